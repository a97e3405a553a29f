package ca

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca/keys"
)

// TestDER holds our own encoder against that of crypto/x509.
func TestDER(t *testing.T) {
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public := map[string]crypto.PublicKey{
		"P-256": newKey(t).Public(), "P-384": onCurve(t, elliptic.P384()).Public(), "P-521": onCurve(t, elliptic.P521()).Public(),
		"RSA": large.Public(),
	}
	long, err := spiffeid.FromPath(testTD, "/"+strings.Repeat("a/", 900)+"z")
	if err != nil {
		t.Fatal(err)
	}
	many := make([]string, 40)
	for i := range many {
		many[i] = strings.Repeat("x", i+1) + ".example.org"
	}
	mints := map[string]MintParams{
		"a plain one":               {ID: workload},
		"DNS names":                 {ID: workload, DNSNames: []string{"shop.example.org", "*.shop", "a"}},
		"many DNS names":            {ID: workload, DNSNames: many},
		"a long ID":                 {ID: long},
		"a life beyond 2049":        {ID: workload, TTL: 30 * 365 * 24 * time.Hour},
		"a subject":                 {ID: workload, Subject: pkix.Name{Organization: []string{"Bäckerei", "b"}, CommonName: "*"}},
		"a subject and a DNS name":  {ID: workload, Subject: pkix.Name{Organization: []string{"Shop"}, CommonName: "given way"}, DNSNames: []string{"shop"}},
		"a subject with rare parts": {ID: workload, Subject: pkix.Name{SerialNumber: "1", ExtraNames: []pkix.AttributeTypeAndValue{{Type: []int{2, 5, 4, 12}, Value: "title"}}}},
	}
	for _, kind := range []keys.Kind{keys.EC256, keys.EC384, keys.RSA2048} {
		c, _ := open(t, Config{KeyType: kind, CATTL: 40 * 365 * 24 * time.Hour})
		a := c.x509.Load()
		for what, p := range mints {
			for name, key := range public {
				t.Run("an SVID with "+what+" for a key on "+name+" by "+string(kind)+" is what crypto/x509 would make", func(t *testing.T) {
					p.PublicKey = key
					chain, err := c.SignMint(t.Context(), p)
					if err != nil {
						t.Fatal(err)
					}
					got := chain[0]
					subject := p.Subject
					if len(subject.ToRDNSequence()) == 0 {
						subject = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}
					}
					if len(p.DNSNames) > 0 {
						subject.CommonName = p.DNSNames[0]
					}
					der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
						SerialNumber: got.SerialNumber, Subject: subject, NotBefore: got.NotBefore, NotAfter: got.NotAfter,
						URIs: []*url.URL{p.ID.URL()}, DNSNames: p.DNSNames, KeyUsage: leafUsage,
						ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
						BasicConstraintsValid: true, SubjectKeyId: got.SubjectKeyId,
					}, a.cert, key, a.signer)
					if err != nil {
						t.Fatal(err)
					}
					want, err := x509.ParseCertificate(der)
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got.RawTBSCertificate, want.RawTBSCertificate) {
						t.Errorf("got  %x\nwant %x", got.RawTBSCertificate, want.RawTBSCertificate)
					}
					if got.SignatureAlgorithm != want.SignatureAlgorithm {
						t.Errorf("signed with %s, want %s", got.SignatureAlgorithm, want.SignatureAlgorithm)
					}
					if err := got.CheckSignatureFrom(a.cert); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

func TestProve(t *testing.T) {
	t.Run("an authority whose key signs something else is not loaded", func(t *testing.T) {
		for _, kind := range []keys.Kind{keys.EC256, keys.EC384, keys.RSA2048} {
			c, _ := open(t, Config{KeyType: kind})
			for _, a := range []*authority{c.x509.Load(), c.jwt.Load()} {
				if _, err := decode(a.line, a.signer, testTD); err != nil {
					t.Fatal(err)
				}
				if _, err := decode(a.line, liar{a.signer}, testTD); !errors.Is(err, ErrJournal) || !errors.Is(err, errUnproved) {
					t.Errorf("%s %s: got %v", a.line.Kind, kind, err)
				}
			}
		}
	})
}
