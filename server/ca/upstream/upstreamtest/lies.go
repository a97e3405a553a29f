package upstreamtest

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/ca/upstream"
)

// Lie is what a hostile authority answers to a request.
type Lie struct {
	// Chain is what it says that it signed, with what is above it, and Roots where that leads.
	Chain, Roots []*x509.Certificate
	// Text, if not empty, takes the place of a certificate.
	Text string
	// Hang says that it answers nothing until the caller leaves.
	Hang bool
}

// PEM is certificates as text.
func PEM(certs ...*x509.Certificate) string {
	var text strings.Builder
	for _, cert := range certs {
		_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}) // a Builder fails nowhere
	}
	return text.String()
}

// Public is the key that a request is for.
func Public(t *testing.T, csr []byte) crypto.PublicKey {
	t.Helper()
	if block, _ := pem.Decode(csr); block != nil {
		csr = block.Bytes
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Errorf("it asks for %.100q: %v", csr, err)
		return nil
	}
	return request.PublicKey
}

// RunLies runs what hostile authorities may answer against one kind of them. open returns an authority whose requests
// are answered with lie. Each must be refused, by it or by the check that the server makes, in words that say why.
func RunLies(t *testing.T, open func(t *testing.T, lie func(public crypto.PublicKey) Lie) upstream.Authority) {
	root, by := Root(t, "root", 24*time.Hour)
	other, _ := Root(t, "other", 24*time.Hour)
	issue := func(public crypto.PublicKey, life time.Duration, change func(*x509.Certificate)) Lie {
		cert := Issue(t, "authority", public, life, root, by, func(c *x509.Certificate) {
			c.URIs = []*url.URL{TD.ID().URL()}
			if change != nil {
				change(c)
			}
		})
		return Lie{Chain: []*x509.Certificate{cert}, Roots: []*x509.Certificate{root}}
	}
	for _, c := range []struct {
		name string
		lie  func(public crypto.PublicKey) Lie
		want string
	}{
		{"signs another key", func(crypto.PublicKey) Lie { return issue(newKey(t).Public(), time.Hour, nil) }, "it signed another key than the one it was asked to sign"},
		{"answers a certificate with CA=false", func(p crypto.PublicKey) Lie {
			return issue(p, time.Hour, func(c *x509.Certificate) { c.IsCA, c.SubjectKeyId = false, []byte("key") })
		}, "is no CA certificate"},
		{"answers a certificate that must not sign", func(p crypto.PublicKey) Lie {
			return issue(p, time.Hour, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
		}, "must not sign certificates"},
		{"puts name constraints on it that leave nothing", func(p crypto.PublicKey) Lie {
			return issue(p, time.Hour, func(c *x509.Certificate) {
				c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"evil.org"}, true
			})
		}, "nobody would accept what its certificate signs"},
		{"answers an expired certificate", func(p crypto.PublicKey) Lie { return issue(p, -time.Second, nil) }, "has expired at"},
		{"answers a chain that does not verify", func(p crypto.PublicKey) Lie {
			l := issue(p, time.Hour, nil)
			l.Roots = []*x509.Certificate{other}
			return l
		}, "leads to none of its root certificates"},
		{"answers an authority of another trust domain", func(p crypto.PublicKey) Lie {
			return issue(p, time.Hour, func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "evil.org"}} })
		}, `its certificate is of "spiffe://evil.org"`},
		{"answers an endless chain", func(p crypto.PublicKey) Lie {
			l := issue(p, time.Hour, nil)
			for range upstream.MaxRoots + 1 {
				l.Chain = append(l.Chain, root)
			}
			return l
		}, "certificates"},
		{"answers garbage", func(crypto.PublicKey) Lie {
			return Lie{Text: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}
		}, "certificate"},
		{"answers nothing", func(crypto.PublicKey) Lie { return Lie{Text: " "} }, "certificate"},
		{"answers more than anybody should read", func(crypto.PublicKey) Lie { return Lie{Text: strings.Repeat("x", 16<<20)} }, ""},
	} {
		t.Run("one that "+c.name+" is refused", func(t *testing.T) {
			a := open(t, c.lie)
			key := newKey(t)
			ctx, cancel := context.WithTimeout(t.Context(), 2*upstream.Patience)
			defer cancel()
			s, err := a.Sign(ctx, upstream.Request{CSR: CSR(t, key), TTL: time.Hour, Now: time.Now()})
			if err == nil {
				_, err = upstream.Check(s, key, TD, time.Now())
			}
			switch {
			case err == nil || !strings.Contains(err.Error(), c.want):
				t.Errorf("got %v, want %q", err, c.want)
			case ctx.Err() != nil:
				t.Errorf("it was waited for: %v", err)
			case len(err.Error()) > 1000:
				t.Errorf("the error is %d bytes long", len(err.Error()))
			}
		})
	}
	t.Run("one that hangs costs the patience of who asks, no more", func(t *testing.T) {
		a := open(t, func(crypto.PublicKey) Lie { return Lie{Hang: true} })
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := a.Sign(ctx, upstream.Request{CSR: CSR(t, newKey(t)), TTL: time.Hour, Now: time.Now()}); err == nil {
			t.Error("there is an answer")
		}
	})
}
