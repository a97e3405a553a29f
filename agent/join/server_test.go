package join

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// issuer signs certificates of a trust domain.
type issuer struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{t: t, key: key}
	i.cert = i.sign(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, "spiffe://example.org", time.Hour)
	return i
}

func (i *issuer) sign(template *x509.Certificate, id string, life time.Duration) *x509.Certificate {
	i.t.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		i.t.Fatal(err)
	}
	template.SerialNumber, template.URIs = big.NewInt(1), []*url.URL{uri}
	template.NotBefore, template.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(life)
	parent := i.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, i.key.Public(), i.key)
	if err != nil {
		i.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		i.t.Fatal(err)
	}
	return cert
}

func (i *issuer) svid(id string, life time.Duration) *x509.Certificate {
	return i.sign(&x509.Certificate{BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature}, id, life)
}

// TestWhoIsTheServer is about certificates that are good in all but one thing.
func TestWhoIsTheServer(t *testing.T) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	own, rival := newIssuer(t), newIssuer(t)
	bundle := func(i *issuer) *identity.Bundle {
		return &identity.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), X509: []identity.X509Authority{{Certificate: i.cert}}}
	}
	const server = "spiffe://example.org/spire/server"
	held := func(w *trust) { w.set(bundle(own)) }
	boot := func(w *trust) { w.believe([]*x509.Certificate{own.cert}, false) }
	for name, c := range map[string]struct {
		knows func(*trust)
		shows []*x509.Certificate
		says  string // empty: it is the server
	}{
		"the server":                         {held, []*x509.Certificate{own.svid(server, time.Hour)}, ""},
		"the server, by the bootstrap":       {boot, []*x509.Certificate{own.svid(server, time.Hour)}, ""},
		"a workload":                         {held, []*x509.Certificate{own.svid("spiffe://example.org/shop", time.Hour)}, `it is "spiffe://example.org/shop"`},
		"a workload, by the bootstrap":       {boot, []*x509.Certificate{own.svid("spiffe://example.org/shop", time.Hour)}, `it is "spiffe://example.org/shop"`},
		"another agent":                      {held, []*x509.Certificate{own.svid("spiffe://example.org/spire/agent/a", time.Hour)}, `it is "spiffe://example.org/spire/agent/a"`},
		"another trust domain's server":      {held, []*x509.Certificate{own.svid("spiffe://other.test/spire/server", time.Hour)}, "verify server"},
		"one that has expired":               {held, []*x509.Certificate{own.svid(server, -time.Minute)}, "verify server"},
		"one of another authority":           {held, []*x509.Certificate{rival.svid(server, time.Hour)}, "verify server"},
		"nobody":                             {held, nil, "no certificate"},
		"the server, while nothing is known": {func(*trust) {}, []*x509.Certificate{own.svid(server, time.Hour)}, "no bundle"},
		"who only the bootstrap knew, once there is a bundle": {
			func(w *trust) { w.believe([]*x509.Certificate{rival.cert}, false); held(w) }, []*x509.Certificate{rival.svid(server, time.Hour)}, "verify server",
		},
		"whom nobody knows, once there is a bundle": {
			func(w *trust) { w.believe(nil, true); held(w) }, []*x509.Certificate{rival.svid(server, time.Hour)}, "verify server",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, err := newTrust(spiffeid.RequireTrustDomainFromString("example.org"), 0, time.Now, log)
			if err != nil {
				t.Fatal(err)
			}
			c.knows(w)
			err = w.verify(tls.ConnectionState{PeerCertificates: c.shows})
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("error is %v, want %q", err, c.says)
			}
		})
	}
}
