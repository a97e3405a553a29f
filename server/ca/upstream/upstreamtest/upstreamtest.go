// Package upstreamtest is the suite that every kind of upstream authority passes.
package upstreamtest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/workloadapi/identity"
)

// TD is the trust domain of the suite.
var TD = spiffeid.RequireTrustDomainFromString("example.org")

// Options say what an upstream authority is like.
type Options struct {
	// JWT says that it publishes JWT keys, Bundle that it has a bundle to follow.
	JWT, Bundle bool
	// Published says whether a JWT key is known above. Required with JWT.
	Published func(keyID string) bool
	// Longest is the longest life it gives. 0: an hour at least.
	Longest time.Duration
}

// Run holds an authority to what server/ca expects of one.
func Run(t *testing.T, a upstream.Authority, o Options) {
	t.Run("it signs what it is asked to sign", func(t *testing.T) {
		for name, key := range keys(t) {
			checked := sign(t, a, key)
			if got := checked.Chain[0].URIs; len(got) > 1 {
				t.Errorf("%s: URIs %v", name, got)
			}
			if checked.NotAfter.After(time.Now().Add(time.Hour + time.Minute)) {
				t.Errorf("%s: asked for an hour, it ends at %s", name, checked.NotAfter)
			}
			if o.Longest == 0 && checked.NotAfter.Before(time.Now().Add(50*time.Minute)) {
				t.Errorf("%s: asked for an hour, it ends at %s", name, checked.NotAfter)
			}
		}
	})
	t.Run("no two certificates have one serial number", func(t *testing.T) {
		key := newKey(t)
		first, second := sign(t, a, key), sign(t, a, key)
		if first.Chain[0].SerialNumber.Cmp(second.Chain[0].SerialNumber) == 0 {
			t.Errorf("both have %s", first.Chain[0].SerialNumber)
		}
	})
	t.Run("a request that is none is an error", func(t *testing.T) {
		for name, csr := range map[string][]byte{"nothing": nil, "noise": []byte("noise"), "a bent signature": bent(t)} {
			ctx, cancel := context.WithTimeout(t.Context(), upstream.Patience)
			s, err := a.Sign(ctx, upstream.Request{CSR: csr, TTL: time.Hour, Now: time.Now()})
			cancel()
			if err == nil {
				t.Errorf("%s: signed %v", name, s)
			}
		}
	})
	t.Run("a call ends with its context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = a.Sign(ctx, upstream.Request{CSR: CSR(t, newKey(t)), TTL: time.Hour, Now: time.Now()})
			_ = a.PublishJWT(ctx, identity.JWTAuthority{KeyID: "never", Key: newKey(t).Public()})
			_ = a.Follow(ctx, func(upstream.Bundle) {})
		}()
		select {
		case <-done:
		case <-time.After(2 * upstream.Patience):
			t.Error("it goes on")
		}
	})
	t.Run("JWT keys are published, or it says that they are not", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), upstream.Patience)
		defer cancel()
		key := identity.JWTAuthority{KeyID: "key-of-the-suite", Key: newKey(t).Public(), ExpiresAt: time.Now().Add(time.Hour).Truncate(time.Second)}
		for range 2 { // again, as after a restart
			err := a.PublishJWT(ctx, key)
			switch {
			case o.JWT && err != nil:
				t.Fatal(err)
			case !o.JWT && !errors.Is(err, upstream.ErrNoJWT):
				t.Fatalf("got %v, want ErrNoJWT", err)
			case o.JWT && !o.Published(key.KeyID):
				t.Error("the key is not known above")
			}
		}
	})
	t.Run("keys of WIT-SVIDs are published, or it says that they are not", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), upstream.Patience)
		defer cancel()
		key := identity.JWTAuthority{KeyID: "wit-key-of-the-suite", Key: newKey(t).Public(), ExpiresAt: time.Now().Add(time.Hour).Truncate(time.Second)}
		if err := a.PublishWIT(ctx, key); err != nil && !errors.Is(err, upstream.ErrNoJWT) {
			t.Errorf("got %v, want ErrNoJWT or nothing", err)
		}
	})
	t.Run("its bundle is followed, or it says that there is none", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), upstream.Patience)
		defer cancel()
		checked := sign(t, a, newKey(t))
		heard := make(chan upstream.Bundle, 1)
		err := a.Follow(ctx, func(b upstream.Bundle) {
			select {
			case heard <- b:
			default:
			}
			cancel()
		})
		if !o.Bundle {
			if !errors.Is(err, upstream.ErrNoBundle) {
				t.Errorf("got %v, want ErrNoBundle", err)
			}
			return
		}
		select {
		case b := <-heard:
			if b, err = upstream.CheckBundle(b, time.Now()); err != nil {
				t.Fatal(err)
			}
			found := false
			for _, x := range b.X509 {
				found = found || x.Certificate.Equal(checked.Root)
			}
			if !found {
				t.Error("the root that signs is not in the bundle")
			}
		default:
			t.Errorf("nothing was heard: %v", err)
		}
	})
}

// sign has the key signed for an hour and checks the answer as server/ca does.
func sign(t *testing.T, a upstream.Authority, key crypto.Signer) *upstream.Checked {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), upstream.Patience)
	defer cancel()
	s, err := a.Sign(ctx, upstream.Request{CSR: CSR(t, key), TTL: time.Hour, Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	checked, err := upstream.Check(s, key, TD, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return checked
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keys(t *testing.T) map[string]crypto.Signer {
	t.Helper()
	ec384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]crypto.Signer{"ec-p256": newKey(t), "ec-p384": ec384, "rsa-2048": rsa2048}
}

// CSR is a request for an authority, as server/ca makes one.
func CSR(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}, SerialNumber: rand.Text()},
		URIs:    []*url.URL{TD.ID().URL()},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// bent is a request whose signature is not by its key.
func bent(t *testing.T) []byte {
	t.Helper()
	der := CSR(t, newKey(t))
	der[len(der)-1] ^= 1
	return der
}

// Root is a self-signed authority for tests.
func Root(t *testing.T, name string, life time.Duration) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := newKey(t)
	return Issue(t, name, key.Public(), life, nil, key, nil), key
}

// Issue signs a CA certificate; without parent it is self-signed. change, if not nil, changes the template.
func Issue(t *testing.T, name string, public crypto.PublicKey, life time.Duration, parent *x509.Certificate, by crypto.Signer, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
	if change != nil {
		change(template)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
