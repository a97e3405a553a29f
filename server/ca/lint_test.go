package ca

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// forgery is a certificate in the making, with what it is held against.
type forgery struct {
	template *x509.Certificate
	parent   *x509.Certificate
	key      crypto.PublicKey
	signer   crypto.Signer
	want     *want
	der      func([]byte) []byte // a last touch, which no signature survives
}

// forge makes the certificate that the CA would make, but for what change does to it.
func forge(t *testing.T, c *CA, profile string, change func(f *forgery)) (*x509.Certificate, *want) {
	t.Helper()
	key := newKey(t)
	path := ""
	switch profile {
	case profileServer:
		path = serverPath
	case profileAgent:
		path = "/spire/agent/x509pop/a"
	case profileWorkload, profileMint:
		path = workload.Path()
	}
	id, err := spiffeid.FromPath(testTD, path)
	if err != nil {
		t.Fatal(err)
	}
	spki, keyID, err := keyIdentifier(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	a := c.x509.Load()
	f := &forgery{
		parent: a.cert, key: key.Public(), signer: a.signer,
		template: &x509.Certificate{
			SerialNumber: randomSerial(), Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
			NotBefore: epoch.Add(-10 * time.Second), NotAfter: epoch.Add(time.Hour),
			URIs: []*url.URL{id.URL()}, KeyUsage: leafUsage,
			ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true, SubjectKeyId: keyID,
		},
	}
	if profile == profileWorkload || profile == profileMint {
		f.template.DNSNames = []string{"shop.example.org", "*.shop.example.org"}
		f.template.Subject.CommonName = "shop.example.org"
	}
	if profile == profileAuthority {
		f.parent, f.signer = f.template, key
		f.template.IsCA, f.template.KeyUsage, f.template.ExtKeyUsage = true, authorityUsage, nil
		f.template.Subject = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}, SerialNumber: f.template.SerialNumber.String()}
	}
	if profile == profileDownstream {
		f.template.IsCA, f.template.KeyUsage, f.template.ExtKeyUsage = true, authorityUsage, nil
		f.template.Subject = pkix.Name{
			Country: []string{"US"}, Organization: []string{"SPIFFE"}, OrganizationalUnit: []string{"DOWNSTREAM-1"},
			SerialNumber: f.template.SerialNumber.String(),
		}
	}
	f.want = &want{
		profile: profile, issuer: a.cert, id: id, dnsNames: slices.Clone(f.template.DNSNames), subject: nameDER(t, f.template.Subject),
		spki: spki, keyID: keyID, notBefore: f.template.NotBefore, notAfter: f.template.NotAfter, now: epoch,
	}
	if change != nil {
		change(f)
	}
	der, err := x509.CreateCertificate(rand.Reader, f.template, f.parent, f.key, f.signer)
	if err != nil {
		t.Fatal(err)
	}
	if f.der != nil {
		der = f.der(der)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, f.want
}

func nameDER(t testing.TB, name pkix.Name) []byte {
	t.Helper()
	der, err := encodeName(name)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestLint(t *testing.T) {
	c, _ := open(t, Config{})

	for _, profile := range []string{profileWorkload, profileAgent, profileServer, profileMint, profileAuthority, profileDownstream} {
		t.Run("a certificate of the profile "+profile+" passes", func(t *testing.T) {
			cert, w := forge(t, c, profile, nil)
			if err := lint(cert, w); err != nil {
				t.Error(err)
			}
		})
	}

	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, _ := open(t, Config{})
	crl := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 31}, Value: []byte{0x30, 0}}

	// usingKey has the certificate carry, and the asker want, the key.
	usingKey := func(key crypto.PublicKey) func(*forgery) {
		return func(f *forgery) {
			f.key = key
			f.want.spki, f.want.keyID, _ = keyIdentifier(key)
			f.template.SubjectKeyId = f.want.keyID
		}
	}
	withID := func(id string) func(*forgery) {
		return func(f *forgery) {
			f.want.id = spiffeid.RequireFromString(id)
			f.template.URIs = []*url.URL{f.want.id.URL()}
		}
	}
	covered := map[string]bool{}
	for _, forged := range []struct {
		flaw    string
		profile string
		breaks  string // rules, comma-separated
		change  func(*forgery)
	}{
		{"serial number 0", profileWorkload, "serial", func(f *forgery) {
			f.der = func(der []byte) []byte {
				serial, _ := asn1.Marshal(f.template.SerialNumber)
				return bytes.Replace(der, serial, append([]byte{2, byte(len(serial) - 2)}, make([]byte, len(serial)-2)...), 1)
			}
			f.template.SerialNumber = big.NewInt(127) // one byte, for which 0 is as short as it gets
		}},
		{"a serial number of 129 bits", profileWorkload, "serial", func(f *forgery) {
			f.template.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 128)
		}},
		{"a SHA-1 signature", profileWorkload, "signature algorithm", func(f *forgery) { f.template.SignatureAlgorithm = x509.ECDSAWithSHA1 }},
		{"an unusual signature", profileWorkload, "signature algorithm", func(f *forgery) { f.template.SignatureAlgorithm = x509.ECDSAWithSHA512 }},
		{"another issuer", profileWorkload, "issuer,authority key identifier", func(f *forgery) {
			f.parent, f.signer = other.x509.Load().cert, other.x509.Load().signer
		}},
		{"a subject that did not issue it", profileAuthority, "issuer,authority key identifier,extensions", func(f *forgery) {
			f.parent, f.signer = other.x509.Load().cert, other.x509.Load().signer
		}},
		{"a later start", profileWorkload, "not before", func(f *forgery) { f.template.NotBefore = epoch }},
		{"a start in the future", profileWorkload, "not before", func(f *forgery) {
			f.template.NotBefore = epoch.Add(time.Minute)
			f.want.notBefore = f.template.NotBefore
		}},
		{"a longer life", profileWorkload, "not after", func(f *forgery) { f.template.NotAfter = epoch.Add(2 * time.Hour) }},
		{"no life", profileWorkload, "not after", func(f *forgery) {
			f.template.NotAfter = epoch
			f.want.notAfter = epoch
		}},
		{"a life beyond its authority's", profileWorkload, "within authority", func(f *forgery) {
			f.template.NotAfter = epoch.Add(48 * time.Hour)
			f.want.notAfter = f.template.NotAfter
		}},
		{"a life beyond that of the authority above", profileDownstream, "within authority", func(f *forgery) {
			f.template.NotAfter = epoch.Add(48 * time.Hour)
			f.want.notAfter = f.template.NotAfter
		}},
		{"another subject", profileWorkload, "subject", func(f *forgery) { f.template.Subject.Organization = []string{"Evil"} }},
		{"no common name", profileWorkload, "common name", func(f *forgery) {
			f.template.Subject.CommonName = ""
			f.want.subject = nameDER(t, f.template.Subject)
		}},
		{"a common name that is another DNS name", profileMint, "common name", func(f *forgery) {
			f.template.Subject.CommonName = "*.shop.example.org"
			f.want.subject = nameDER(t, f.template.Subject)
		}},
		{"a name that other authorities have", profileAuthority, "authority name", func(f *forgery) {
			f.template.Subject.SerialNumber = ""
			f.want.subject = nameDER(t, f.template.Subject)
		}},
		{"a name that other authorities have", profileDownstream, "authority name", func(f *forgery) {
			f.template.Subject.SerialNumber = ""
			f.want.subject = nameDER(t, f.template.Subject)
		}},
		{"another's key", profileWorkload, "public key", func(f *forgery) { f.key = newKey(t).Public() }},
		{"RSA-1024", profileWorkload, "key strength", usingKey(weak.Public())},
		{"Ed25519", profileWorkload, "key strength", usingKey(edwards)},
		{"another ID", profileWorkload, "SPIFFE ID", func(f *forgery) {
			f.template.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/other"}}
		}},
		{"two IDs", profileWorkload, "SPIFFE ID", func(f *forgery) {
			f.template.URIs = append(f.template.URIs, &url.URL{Scheme: "https", Host: "example.org"})
		}},
		{"no ID", profileWorkload, "SPIFFE ID", func(f *forgery) { f.template.URIs = nil }},
		{"the trust domain's ID", profileWorkload, "authority ID", withID("spiffe://example.org")},
		{"a path in its ID", profileDownstream, "authority ID", withID("spiffe://example.org/ca")},
		{"a path in an authority's ID", profileAuthority, "authority ID", withID("spiffe://example.org/ca")},
		{"the server's ID for a workload", profileWorkload, "reserved ID", withID("spiffe://example.org/spire/server")},
		{"an agent's ID by mint", profileMint, "reserved ID", withID("spiffe://example.org/spire/agent/a")},
		{"the server's ID for an agent", profileAgent, "reserved ID", withID("spiffe://example.org/spire/server")},
		{"another ID for the server", profileServer, "reserved ID", withID("spiffe://example.org/shop")},
		{"a DNS name more", profileWorkload, "DNS names", func(f *forgery) { f.template.DNSNames = append(f.template.DNSNames, "bank.example.org") }},
		{"DNS names in another order", profileWorkload, "DNS names", func(f *forgery) { slices.Reverse(f.template.DNSNames) }},
		{"a DNS name that is none", profileWorkload, "DNS names", func(f *forgery) {
			f.template.DNSNames[1] = "*.*.org"
			f.want.dnsNames = f.template.DNSNames
		}},
		{"an email address", profileWorkload, "other names", func(f *forgery) { f.template.EmailAddresses = []string{"a@example.org"} }},
		{"an IP address", profileWorkload, "other names", func(f *forgery) { f.template.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1).To4()} }},
		{"a name of a kind Go does not read", profileAgent, "other names", func(f *forgery) {
			value, _ := asn1.Marshal([]asn1.RawValue{
				{Class: 2, Tag: 6, Bytes: []byte(f.want.id.String())},
				{Class: 2, Tag: 8, Bytes: []byte{42, 3, 4}}, // registeredID
			})
			f.template.ExtraExtensions = []pkix.Extension{{Id: subjectAltName, Value: value}}
		}},
		{"a certificate's signature", profileWorkload, "key usage", func(f *forgery) { f.template.KeyUsage |= x509.KeyUsageCertSign }},
		{"too few usages", profileWorkload, "key usage", func(f *forgery) { f.template.KeyUsage = x509.KeyUsageDigitalSignature }},
		{"a leaf's usages", profileAuthority, "key usage", func(f *forgery) { f.template.KeyUsage |= x509.KeyUsageDigitalSignature }},
		{"one extended usage", profileWorkload, "extended key usage", func(f *forgery) { f.template.ExtKeyUsage = f.template.ExtKeyUsage[:1] }},
		{"any extended usage", profileWorkload, "extended key usage", func(f *forgery) {
			f.template.ExtKeyUsage = append(f.template.ExtKeyUsage, x509.ExtKeyUsageAny)
		}},
		{"an unknown extended usage", profileWorkload, "extended key usage", func(f *forgery) {
			f.template.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3, 4}}
		}},
		{"a leaf's usages", profileDownstream, "key usage", func(f *forgery) { f.template.KeyUsage |= x509.KeyUsageDigitalSignature }},
		{"an extended usage", profileDownstream, "extended key usage,extensions", func(f *forgery) {
			f.template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}},
		{"an extended usage", profileAuthority, "extended key usage,extensions", func(f *forgery) {
			f.template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}},
		{"CA:true", profileWorkload, "basic constraints", func(f *forgery) { f.template.IsCA = true }},
		{"CA:false", profileDownstream, "basic constraints", func(f *forgery) { f.template.IsCA = false }},
		{"CA:false", profileAuthority, "basic constraints", func(f *forgery) { f.template.IsCA = false }},
		{"a path length", profileAuthority, "basic constraints", func(f *forgery) { f.template.MaxPathLen = 1 }},
		{"a path length of zero", profileAuthority, "basic constraints", func(f *forgery) { f.template.MaxPathLenZero = true }},
		{"no basic constraints", profileWorkload, "basic constraints,extensions", func(f *forgery) { f.template.BasicConstraintsValid = false }},
		{"another key identifier", profileWorkload, "subject key identifier", func(f *forgery) { f.template.SubjectKeyId = []byte{1, 2, 3} }},
		{"no key identifier", profileWorkload, "subject key identifier,extensions", func(f *forgery) { f.template.SubjectKeyId = nil }},
		{"another authority key identifier", profileWorkload, "authority key identifier", func(f *forgery) {
			parent := *f.parent
			parent.SubjectKeyId = []byte{1, 2, 3}
			f.parent = &parent
		}},
		{"an authority key identifier", profileAuthority, "authority key identifier,extensions", func(f *forgery) {
			f.template.AuthorityKeyId = []byte{1, 2, 3}
		}},
		{"a CRL address", profileWorkload, "extensions", func(f *forgery) { f.template.ExtraExtensions = []pkix.Extension{crl} }},
		{"a policy", profileWorkload, "extensions", func(f *forgery) {
			policy, _ := x509.OIDFromInts([]uint64{1, 2, 3})
			f.template.Policies = []x509.OID{policy}
		}},
		{"an uncritical key usage", profileWorkload, "extensions", func(f *forgery) {
			f.template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 3, 0xa8}}}
		}},
	} {
		t.Run("a certificate of the profile "+forged.profile+" with "+forged.flaw+" does not", func(t *testing.T) {
			cert, w := forge(t, c, forged.profile, forged.change)
			var broken []string
			for _, r := range rules {
				if r.check(cert, w) != nil {
					broken = append(broken, r.name)
				}
			}
			slices.Sort(broken)
			want := strings.Split(forged.breaks, ",")
			slices.Sort(want)
			if diff := cmp.Diff(want, broken); diff != "" {
				t.Error(diff)
			}
			if err := lint(cert, w); !errors.Is(err, ErrLint) || !strings.Contains(err.Error(), want[0]) {
				t.Errorf("got %v", err)
			}
		})
		for name := range strings.SplitSeq(forged.breaks, ",") {
			covered[name] = true
		}
	}

	t.Run("a certificate of version 1 does not", func(t *testing.T) {
		cert, w := forge(t, c, profileWorkload, func(f *forgery) { f.der = versionOne })
		if cert.Version != 1 {
			t.Fatalf("forged version %d", cert.Version)
		}
		if err := lint(cert, w); !errors.Is(err, ErrLint) || !strings.Contains(err.Error(), "version 1") {
			t.Errorf("got %v", err)
		}
		covered["version"] = true
	})

	// The library parses neither; the rules do not lean on that.
	for flaw, change := range map[string]func(*x509.Certificate){
		"keyUsage is there 2 times": func(cert *x509.Certificate) {
			cert.Extensions = append(cert.Extensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true})
		},
		"subjectAltName cannot be parsed": func(cert *x509.Certificate) {
			n := slices.IndexFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(subjectAltName) })
			cert.Extensions[n].Value = append(slices.Clone(cert.Extensions[n].Value), 0)
		},
	} {
		t.Run("a certificate of which "+flaw+" does not", func(t *testing.T) {
			cert, w := forge(t, c, profileWorkload, nil)
			change(cert)
			if err := lint(cert, w); !errors.Is(err, ErrLint) || !strings.Contains(err.Error(), flaw) {
				t.Errorf("got %v", err)
			}
		})
	}

	t.Run("every rule has a certificate that breaks it", func(t *testing.T) {
		for _, r := range rules {
			if !covered[r.name] {
				t.Errorf("%s has none", r.name)
			}
			if r.clause == "" {
				t.Errorf("%s is written nowhere", r.name)
			}
		}
	})
}

func TestWhatBreaksARuleDoesNotLeave(t *testing.T) {
	c, _ := open(t, Config{})
	a := c.x509.Load()
	key := newKey(t)
	spki, keyID, err := keyIdentifier(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	asked := func(path string) *want {
		id, err := spiffeid.FromPath(testTD, path)
		if err != nil {
			t.Fatal(err)
		}
		return &want{
			profile: profileWorkload, issuer: a.cert, id: id, subject: plainSubject, spki: spki, keyID: keyID,
			notBefore: epoch, notAfter: epoch.Add(time.Hour), now: epoch,
		}
	}
	if _, err := a.issue(asked("/shop")); err != nil {
		t.Fatal(err)
	}
	// What is asked for is looked at long before: here it is only the certificate that is wrong.
	if _, err := a.issue(asked(serverPath)); !errors.Is(err, ErrLint) || !strings.Contains(err.Error(), "reserved ID") {
		t.Errorf("got %v", err)
	}
}

// versionOne takes version and extensions out of a certificate.
func versionOne(der []byte) []byte {
	var cert, tbs struct{ Fields []asn1.RawValue }
	if _, err := asn1.Unmarshal(der, &cert.Fields); err != nil {
		return der
	}
	if _, err := asn1.Unmarshal(cert.Fields[0].FullBytes, &tbs.Fields); err != nil {
		return der
	}
	kept := tbs.Fields[1 : len(tbs.Fields)-1]
	body, err := asn1.Marshal(kept)
	if err != nil {
		return der
	}
	cert.Fields[0] = asn1.RawValue{FullBytes: body}
	out, err := asn1.Marshal(cert.Fields)
	if err != nil {
		return der
	}
	return out
}
