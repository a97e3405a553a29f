package upstream_test

import (
	"crypto/ecdsa"
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

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
	"github.com/assay-id/assay/workloadapi/identity"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestCheck(t *testing.T) {
	key := newKey(t)
	root, rootKey := upstreamtest.Root(t, "root", 24*time.Hour)
	other, otherKey := upstreamtest.Root(t, "other", 24*time.Hour)
	middleKey := newKey(t)
	middle := upstreamtest.Issue(t, "middle", middleKey.Public(), 12*time.Hour, root, rootKey, nil)
	named := func(c *x509.Certificate) { c.URIs = []*url.URL{upstreamtest.TD.ID().URL()} }
	issue := func(change func(*x509.Certificate)) *x509.Certificate {
		return upstreamtest.Issue(t, "ours", key.Public(), time.Hour, middle, middleKey, func(c *x509.Certificate) {
			named(c)
			if change != nil {
				change(c)
			}
		})
	}
	roots := []*x509.Certificate{root}
	good := issue(nil)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	weakRoot := upstreamtest.Issue(t, "weak", weak.Public(), time.Hour, nil, weak, nil)
	expiredRoot := upstreamtest.Issue(t, "expired", rootKey.Public(), -time.Second, nil, rootKey, nil)
	weakMiddle := upstreamtest.Issue(t, "weak middle", weak.Public(), time.Hour, root, rootKey, nil)
	long := []*x509.Certificate{good}
	for len(long) <= upstream.MaxChain {
		long = append(long, middle)
	}

	t.Run("what is in order is accepted", func(t *testing.T) {
		for name, s := range map[string]*upstream.Signed{
			"below another":                 {Chain: []*x509.Certificate{good, middle}, Roots: roots},
			"with the root at its end":      {Chain: []*x509.Certificate{good, middle, root}, Roots: roots},
			"with roots that are of no use": {Chain: []*x509.Certificate{good, middle}, Roots: []*x509.Certificate{expiredRoot, other, root}},
			"without URI":                   {Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.URIs = nil }), middle}, Roots: roots},
		} {
			c, err := upstream.Check(s, key, upstreamtest.TD, time.Now())
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if len(c.Chain) != 2 || !c.Root.Equal(root) || !c.NotAfter.Equal(c.Chain[0].NotAfter) {
				t.Errorf("%s: %d certificates, root %s, until %s", name, len(c.Chain), c.Root.Subject, c.NotAfter)
			}
		}
	})
	for _, c := range []struct {
		name string
		s    *upstream.Signed
		want string
	}{
		{"nothing", nil, "no certificate"},
		{"no roots", &upstream.Signed{Chain: []*x509.Certificate{good, middle}}, "no root certificate"},
		{"a chain that is too long", &upstream.Signed{Chain: long, Roots: roots}, "its chain has 9 certificates, the limit is 8"},
		{"too many roots", &upstream.Signed{Chain: []*x509.Certificate{good, middle}, Roots: make([]*x509.Certificate, upstream.MaxRoots+1)}, "101 root certificates"},
		{"another key", &upstream.Signed{Chain: []*x509.Certificate{upstreamtest.Issue(t, "x", newKey(t).Public(), time.Hour, middle, middleKey, named), middle}, Roots: roots},
			"signed another key"},
		{"a certificate that is no CA's", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) {
			c.IsCA, c.SubjectKeyId = false, []byte{1}
		}), middle}, Roots: roots}, "is no CA certificate"},
		{"a certificate that must not sign", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), middle}, Roots: roots},
			"must not sign certificates"},
		{"another trust domain", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "evil.org"}} }), middle}, Roots: roots},
			`is of "spiffe://evil.org", and this server is of "spiffe://example.org"`},
		{"an ID with a path", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/spire/server"}}
		}), middle}, Roots: roots}, `is of "spiffe://example.org/spire/server"`},
		{"two IDs", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "evil.org"}) }), middle}, Roots: roots},
			"has 2 URIs"},
		{"a certificate without key identifier", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) {
			// What makes it an authority is put in by hand: else the library would add an identifier.
			c.IsCA, c.BasicConstraintsValid, c.SubjectKeyId = false, false, nil
			c.ExtraExtensions = []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}
		}), middle}, Roots: roots}, "no subject key identifier"},
		{"a weak link of the chain", &upstream.Signed{Chain: []*x509.Certificate{
			upstreamtest.Issue(t, "x", key.Public(), time.Hour, weakMiddle, weak, named), weakMiddle,
		}, Roots: roots}, "RSA with 1024 bits"},
		{"an expired certificate", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), middle}, Roots: roots},
			"has expired"},
		{"a certificate of tomorrow", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
		}), middle}, Roots: roots}, "is not valid before"},
		{"a certificate that ends at once", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(5 * time.Second) }), middle}, Roots: roots},
			"too soon"},
		{"an expired chain", &upstream.Signed{Chain: []*x509.Certificate{good, upstreamtest.Issue(t, "middle", middleKey.Public(), -time.Second, root, rootKey, nil)}, Roots: roots},
			"certificate 2 of its chain"},
		{"a chain with a gap", &upstream.Signed{Chain: []*x509.Certificate{good}, Roots: roots}, "leads to none of its root certificates"},
		{"a chain of others", &upstream.Signed{Chain: []*x509.Certificate{good, upstreamtest.Issue(t, "x", middleKey.Public(), time.Hour, other, otherKey, nil), middle}, Roots: []*x509.Certificate{other}}, "did not sign the one before it"},
		{"the root of others", &upstream.Signed{Chain: []*x509.Certificate{good, middle}, Roots: []*x509.Certificate{other}}, "leads to none of its root certificates"},
		{"a weak root", &upstream.Signed{Chain: []*x509.Certificate{upstreamtest.Issue(t, "x", key.Public(), time.Hour, weakRoot, weak, named)}, Roots: []*x509.Certificate{weakRoot}},
			"none of its root certificates is of use"},
		{"an expired root", &upstream.Signed{Chain: []*x509.Certificate{good, middle}, Roots: []*x509.Certificate{expiredRoot}}, "none of its root certificates is of use"},
		{"a path that must be shorter", &upstream.Signed{Chain: []*x509.Certificate{
			upstreamtest.Issue(t, "x", key.Public(), time.Hour, upstreamtest.Issue(t, "middle", middleKey.Public(), time.Hour, other, otherKey, func(c *x509.Certificate) { c.MaxPathLenZero = true }), middleKey, named),
			upstreamtest.Issue(t, "middle", middleKey.Public(), time.Hour, other, otherKey, func(c *x509.Certificate) { c.MaxPathLenZero = true }),
		}, Roots: []*x509.Certificate{other}}, "nobody would accept what its certificate signs"},
		{"a name constraint", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"evil.org"}, true
		}), middle}, Roots: roots}, "nobody would accept what its certificate signs"},
		{"a purpose that is no SVID's", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), middle}, Roots: roots},
			"nobody would accept what its certificate signs"},
		{"a purpose that is servers' alone", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), middle}, Roots: roots},
			"nobody would accept what its certificate signs"},
		{"a purpose that is clients' alone", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), middle}, Roots: roots},
			"nobody would accept what its certificate signs"},
		{"a critical extension that nobody knows", &upstream.Signed{Chain: []*x509.Certificate{issue(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), middle}, Roots: roots}, "nobody would accept what its certificate signs"},
	} {
		t.Run(c.name+" is refused", func(t *testing.T) {
			_, err := upstream.Check(c.s, key, upstreamtest.TD, time.Now())
			if !errors.Is(err, upstream.ErrRefused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestCheckBundle(t *testing.T) {
	root, rootKey := upstreamtest.Root(t, "root", time.Hour)
	expired := upstreamtest.Issue(t, "expired", rootKey.Public(), -time.Second, nil, rootKey, nil)
	leaf := upstreamtest.Issue(t, "leaf", rootKey.Public(), time.Hour, nil, rootKey, func(c *x509.Certificate) { c.IsCA = false })
	key := identity.JWTAuthority{KeyID: "a", Key: newKey(t).Public(), ExpiresAt: time.Now().Add(time.Hour)}
	old := key
	old.KeyID, old.ExpiresAt = "old", time.Now().Add(-time.Hour)
	b, err := upstream.CheckBundle(upstream.Bundle{
		X509: []identity.X509Authority{{Certificate: expired}, {Certificate: root, Tainted: true}, {Certificate: leaf}},
		JWT:  []identity.JWTAuthority{old, key},
	}, time.Now())
	if err != nil || len(b.X509) != 1 || !b.X509[0].Tainted || len(b.JWT) != 1 || b.JWT[0].KeyID != "a" {
		t.Errorf("%+v, %v", b, err)
	}
	x509s := []identity.X509Authority{{Certificate: root}}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		b    upstream.Bundle
		want string
	}{
		"an empty one":            {upstream.Bundle{}, "no X.509 authority that is of use"},
		"one of expired ones":     {upstream.Bundle{X509: []identity.X509Authority{{Certificate: expired}}}, "has expired"},
		"one without certificate": {upstream.Bundle{X509: []identity.X509Authority{{}}}, "without certificate"},
		"a huge one":              {upstream.Bundle{X509: make([]identity.X509Authority, identity.MaxAuthorities+1)}, "1001 authorities"},
		"one of many keys":        {upstream.Bundle{X509: x509s, JWT: make([]identity.JWTAuthority, identity.MaxAuthorities+1)}, "1001 authorities"},
		"one of many WIT keys":    {upstream.Bundle{X509: x509s, WIT: make([]identity.JWTAuthority, identity.MaxAuthorities+1)}, "1001 authorities"},
		"two WIT keys of one ID":  {upstream.Bundle{X509: x509s, WIT: []identity.JWTAuthority{key, key}}, "two WIT keys of one ID"},
		"a weak WIT key":          {upstream.Bundle{X509: x509s, WIT: []identity.JWTAuthority{{KeyID: "w", Key: weak.Public()}}}, "WIT key that is refused"},
		"two keys of one ID":      {upstream.Bundle{X509: x509s, JWT: []identity.JWTAuthority{key, key}}, "two JWT keys of one ID"},
		"a key without ID":        {upstream.Bundle{X509: x509s, JWT: []identity.JWTAuthority{{Key: key.Key}}}, "or one without"},
		"a weak key":              {upstream.Bundle{X509: x509s, JWT: []identity.JWTAuthority{{KeyID: "w", Key: weak.Public()}}}, "JWT key that is refused"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			if _, err := upstream.CheckBundle(c.b, time.Now()); !errors.Is(err, upstream.ErrRefused) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestParsePEM(t *testing.T) {
	root, _ := upstreamtest.Root(t, "root", time.Hour)
	one := upstreamtest.PEM(root)
	if certs, err := upstream.ParsePEM([]byte(strings.Repeat(one, upstream.MaxRoots))); err != nil || len(certs) != upstream.MaxRoots {
		t.Errorf("as many as there may be: %d certificates, %v", len(certs), err)
	}
	for name, c := range map[string]struct{ text, want string }{
		"nothing":                      {"", "no certificate in PEM"},
		"a certificate and a key":      {one + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", `PEM block of type "PRIVATE KEY"`},
		"a certificate under a key":    {strings.ReplaceAll(one, "CERTIFICATE", "PRIVATE KEY"), `PEM block of type "PRIVATE KEY"`},
		"a certificate and half a one": {one + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate 2"},
		"one certificate too many":     {strings.Repeat(one, upstream.MaxRoots+1), "over 100 certificates"},
		"a certificate and much after": {one + strings.Repeat("\n", upstream.MaxAnswer), "the limit is"},
	} {
		if _, err := upstream.ParsePEM([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

func FuzzParsePEM(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		certs, err := upstream.ParsePEM(text)
		if err == nil && (len(certs) == 0 || len(certs) > upstream.MaxRoots) {
			t.Errorf("%d certificates", len(certs))
		}
	})
}
