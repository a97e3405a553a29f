package ca

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func TestSignDownstream(t *testing.T) {
	c, store := open(t, Config{})
	key := newKey(t)
	chain, err := c.SignDownstream(t.Context(), key.Public(), 2*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ca := chain[0]
	if !store.held().Nested {
		t.Error("the bundle does not say that there is a server below")
	}
	t.Run("the profile is that of an authority below one other", func(t *testing.T) {
		root := store.held().X509[0].Certificate
		switch {
		case len(chain) != 1:
			t.Errorf("%d certificates", len(chain))
		case len(ca.Subject.OrganizationalUnit) != 1 || ca.Subject.OrganizationalUnit[0] != "DOWNSTREAM-1":
			t.Errorf("subject %s", ca.Subject)
		case ca.Subject.Organization[0] != root.Subject.Organization[0] || ca.Subject.Country[0] != root.Subject.Country[0]:
			t.Errorf("subject %s, the parent's is %s", ca.Subject, root.Subject)
		case len(ca.URIs) != 1 || ca.URIs[0].String() != "spiffe://example.org":
			t.Errorf("URIs %v", ca.URIs)
		case !ca.IsCA || ca.MaxPathLenZero || ca.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(ca.ExtKeyUsage) != 0:
			t.Errorf("%+v", ca)
		case !ca.NotAfter.Equal(epoch.Add(2*time.Hour)) || !ca.NotBefore.Equal(epoch.Add(-10*time.Second)):
			t.Errorf("valid from %s to %s", ca.NotBefore, ca.NotAfter)
		}
	})
	t.Run("what it signs verifies against the root", func(t *testing.T) {
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(1), URIs: []*url.URL{workload.URL()}, NotBefore: epoch, NotAfter: epoch.Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, newKey(t).Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify([]*x509.Certificate{cert, ca}, store.held().X509Bundle(), x509svid.WithTime(epoch)); err != nil {
			t.Error(err)
		}
	})
	t.Run("it lives as long as authorities do, and ends with the one above", func(t *testing.T) {
		for _, ttl := range []time.Duration{0, 48 * time.Hour} {
			chain, err := c.SignDownstream(t.Context(), key.Public(), ttl)
			if err != nil {
				t.Fatal(err)
			}
			if !chain[0].NotAfter.Equal(epoch.Add(24 * time.Hour)) {
				t.Errorf("asked for %s, it ends at %s", ttl, chain[0].NotAfter)
			}
		}
	})
	t.Run("no two have one name", func(t *testing.T) {
		again, err := c.SignDownstream(t.Context(), key.Public(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if string(again[0].RawSubject) == string(ca.RawSubject) {
			t.Errorf("both are %s", ca.Subject)
		}
	})
	t.Run("a weak key and a negative time are refused", func(t *testing.T) {
		weak, err := rsa.GenerateKey(rand.Reader, 1024)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.SignDownstream(t.Context(), weak.Public(), 0); !errors.Is(err, ErrKey) || errors.Is(err, ErrLint) {
			t.Errorf("RSA-1024: %v", err)
		}
		if _, err := c.SignDownstream(t.Context(), key.Public(), -time.Second); !errors.Is(err, ErrTTL) {
			t.Errorf("a negative time: %v", err)
		}
	})
}
