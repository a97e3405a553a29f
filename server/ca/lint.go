package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// want is what a certificate is held against: what was asked for, not what was put in the template.
type want struct {
	profile   string
	issuer    *x509.Certificate // nil: self-signed
	id        spiffeid.ID
	dnsNames  []string
	subject   []byte // DER
	spki      []byte
	keyID     []byte
	notBefore time.Time
	notAfter  time.Time
	now       time.Time
}

// authority says that the certificate is self-signed, ca that it is one of those that sign others.
func (w *want) authority() bool { return w.profile == profileAuthority }
func (w *want) ca() bool        { return w.authority() || w.profile == profileDownstream }

// rule is one thing that holds for every certificate that leaves.
type rule struct {
	name   string
	clause string // where it is written
	check  func(cert *x509.Certificate, w *want) error
}

// rules are the profile in the form it is enforced. Each has a test with a certificate that breaks
// it.
var rules = []rule{
	{"version", "RFC 5280 4.1.2.1", func(cert *x509.Certificate, _ *want) error {
		return unless(cert.Version == 3, "version %d", cert.Version)
	}},
	{"serial", "RFC 5280 4.1.2.2", func(cert *x509.Certificate, _ *want) error {
		n := cert.SerialNumber
		return unless(n.Sign() > 0 && n.Cmp(maxSerial) <= 0, "not between 1 and 2^128−1")
	}},
	{"signature algorithm", "RFC 5280 4.1.2.3", func(cert *x509.Certificate, _ *want) error {
		return unless(slices.Contains(signatureAlgorithms, cert.SignatureAlgorithm), "%s", cert.SignatureAlgorithm)
	}},
	{"issuer", "RFC 5280 4.1.2.4", func(cert *x509.Certificate, w *want) error {
		if w.authority() {
			return unless(bytes.Equal(cert.RawIssuer, cert.RawSubject), "is not the subject of a self-signed certificate")
		}
		return unless(bytes.Equal(cert.RawIssuer, w.issuer.RawSubject), "is not the authority's subject")
	}},
	{"not before", "RFC 5280 4.1.2.5", func(cert *x509.Certificate, w *want) error {
		return unless(cert.NotBefore.Equal(w.notBefore) && !cert.NotBefore.After(w.now), "%s, want %s", cert.NotBefore, w.notBefore)
	}},
	{"not after", "RFC 5280 4.1.2.5", func(cert *x509.Certificate, w *want) error {
		return unless(cert.NotAfter.Equal(w.notAfter) && cert.NotAfter.After(w.now), "%s, want %s", cert.NotAfter, w.notAfter)
	}},
	{"within authority", "RFC 5280 6.1", func(cert *x509.Certificate, w *want) error {
		return unless(w.authority() || !cert.NotAfter.After(w.issuer.NotAfter), "outlives its authority")
	}},
	{"subject", "RFC 5280 4.1.2.6", func(cert *x509.Certificate, w *want) error {
		return unless(bytes.Equal(cert.RawSubject, w.subject), "%s, want the DER %x", cert.Subject, w.subject)
	}},
	{"common name", "SPIRE's profile", func(cert *x509.Certificate, w *want) error {
		return unless(len(w.dnsNames) == 0 || cert.Subject.CommonName == w.dnsNames[0], "is not the first DNS name")
	}},
	{"authority name", "RFC 5280 4.1.2.4", func(cert *x509.Certificate, w *want) error {
		return unless(!w.ca() || cert.Subject.SerialNumber == cert.SerialNumber.String(), "no serialNumber attribute makes it unique")
	}},
	{"public key", "RFC 5280 4.1.2.7", func(cert *x509.Certificate, w *want) error {
		return unless(bytes.Equal(cert.RawSubjectPublicKeyInfo, w.spki), "is not the one that was asked for")
	}},
	{"key strength", "NIST SP 800-57 5.6.1", func(cert *x509.Certificate, _ *want) error {
		return CheckKey(cert.PublicKey)
	}},
	{"SPIFFE ID", "X509-SVID 2", func(cert *x509.Certificate, w *want) error {
		return unless(len(cert.URIs) == 1 && cert.URIs[0].String() == w.id.String(), "URIs %v, want %s", cert.URIs, w.id)
	}},
	{"authority ID", "X509-SVID 4.2", func(_ *x509.Certificate, w *want) error {
		return unless((w.id.Path() == "") == w.ca(), "a path goes with SVIDs only, and with all of them")
	}},
	{"reserved ID", "SPIRE's profile", func(_ *x509.Certificate, w *want) error {
		switch path := w.id.Path(); w.profile {
		case profileServer:
			return unless(path == serverPath, "the server's is %s", serverPath)
		case profileAgent:
			return unless(path != serverPath, "an agent with the server's ID")
		default:
			return unless(!reserved(path), "a workload with a reserved ID")
		}
	}},
	{"DNS names", "RFC 5280 4.2.1.6", func(cert *x509.Certificate, w *want) error {
		if !slices.Equal(cert.DNSNames, w.dnsNames) {
			return fmt.Errorf("%q, want %q", cert.DNSNames, w.dnsNames)
		}
		return checkDNSNames(cert.DNSNames)
	}},
	{"other names", "X509-SVID 2", func(cert *x509.Certificate, _ *want) error {
		// Those that Go does not parse are counted: one general name per URI and DNS name.
		names, err := generalNames(cert)
		if err != nil {
			return err
		}
		return unless(len(cert.EmailAddresses)+len(cert.IPAddresses) == 0 && names == len(cert.URIs)+len(cert.DNSNames),
			"a subject alternative name that is neither URI nor DNS name")
	}},
	{"key usage", "X509-SVID 4.3", func(cert *x509.Certificate, w *want) error {
		usage := leafUsage
		if w.ca() {
			usage = authorityUsage
		}
		return unless(cert.KeyUsage == usage, "%b, want %b", cert.KeyUsage, usage)
	}},
	{"extended key usage", "X509-SVID 4.4", func(cert *x509.Certificate, w *want) error {
		var usage []x509.ExtKeyUsage
		if !w.ca() {
			usage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		}
		return unless(slices.Equal(cert.ExtKeyUsage, usage) && len(cert.UnknownExtKeyUsage) == 0, "%v, want %v", cert.ExtKeyUsage, usage)
	}},
	{"basic constraints", "X509-SVID 4.1", func(cert *x509.Certificate, w *want) error {
		return unless(cert.BasicConstraintsValid && cert.IsCA == w.ca() && cert.MaxPathLen <= 0 && !cert.MaxPathLenZero,
			"CA %t, want %t without a path length", cert.IsCA, w.ca())
	}},
	{"subject key identifier", "RFC 5280 4.2.1.2", func(cert *x509.Certificate, w *want) error {
		return unless(bytes.Equal(cert.SubjectKeyId, w.keyID), "%x, want %x", cert.SubjectKeyId, w.keyID)
	}},
	{"authority key identifier", "RFC 5280 4.2.1.1", func(cert *x509.Certificate, w *want) error {
		var keyID []byte // a self-signed certificate goes without
		if !w.authority() {
			keyID = w.issuer.SubjectKeyId
		}
		return unless(bytes.Equal(cert.AuthorityKeyId, keyID), "%x, want %x", cert.AuthorityKeyId, keyID)
	}},
	{"extensions", "RFC 5280 4.2", checkExtensions},
}

// lint returns an error wrapping ErrLint that names every rule the certificate breaks.
func lint(cert *x509.Certificate, w *want) error {
	var broken []error
	for i := range rules {
		if err := rules[i].check(cert, w); err != nil {
			broken = append(broken, fmt.Errorf("%s (%s): %w", rules[i].name, rules[i].clause, err))
		}
	}
	if broken == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrLint, errors.Join(broken...))
}

func unless(holds bool, format string, args ...any) error {
	if holds {
		return nil
	}
	return fmt.Errorf(format, args...)
}

var (
	maxSerial = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 128), big.NewInt(1))

	signatureAlgorithms = []x509.SignatureAlgorithm{x509.SHA256WithRSA, x509.ECDSAWithSHA256, x509.ECDSAWithSHA384}
)

// extension is one of those that a certificate may, and in the case of most must, have.
type extension struct {
	name       string
	id         asn1.ObjectIdentifier
	critical   bool
	authority  bool // authorities have it
	downstream bool // authorities of downstream servers have it
	leaf       bool // SVIDs have it
}

var subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

var extensions = []extension{
	{"subjectKeyIdentifier", asn1.ObjectIdentifier{2, 5, 29, 14}, false, true, true, true},
	{"keyUsage", asn1.ObjectIdentifier{2, 5, 29, 15}, true, true, true, true},
	{"subjectAltName", subjectAltName, false, true, true, true}, // not critical: the subject is never empty
	{"basicConstraints", asn1.ObjectIdentifier{2, 5, 29, 19}, true, true, true, true},
	{"authorityKeyIdentifier", asn1.ObjectIdentifier{2, 5, 29, 35}, false, false, true, true},
	{"extKeyUsage", asn1.ObjectIdentifier{2, 5, 29, 37}, false, false, false, true},
}

// checkExtensions wants exactly the extensions of the table, so that neither a CRL address nor a
// policy nor anything from a request gets in.
func checkExtensions(cert *x509.Certificate, w *want) error {
	for _, e := range extensions {
		wanted, found := e.leaf, 0
		switch w.profile {
		case profileAuthority:
			wanted = e.authority
		case profileDownstream:
			wanted = e.downstream
		}
		for _, has := range cert.Extensions {
			if !has.Id.Equal(e.id) {
				continue
			}
			found++
			if has.Critical != e.critical {
				return fmt.Errorf("%s: critical %t, want %t", e.name, has.Critical, e.critical)
			}
		}
		if wanted && found != 1 || !wanted && found != 0 {
			return fmt.Errorf("%s is there %d times", e.name, found)
		}
	}
	for _, has := range cert.Extensions {
		if !slices.ContainsFunc(extensions, func(e extension) bool { return e.id.Equal(has.Id) }) {
			return fmt.Errorf("%s has no place in this profile", has.Id)
		}
	}
	return nil
}

// generalNames counts the names in the subjectAltName extension.
func generalNames(cert *x509.Certificate) (int, error) {
	for _, e := range cert.Extensions {
		if !e.Id.Equal(subjectAltName) {
			continue
		}
		in := cryptobyte.String(e.Value)
		var names cryptobyte.String
		good := in.ReadASN1(&names, casn1.SEQUENCE) && in.Empty()
		n := 0
		for ; good && !names.Empty(); n++ {
			var name cryptobyte.String
			var tag casn1.Tag
			good = names.ReadAnyASN1(&name, &tag)
		}
		if !good {
			return 0, errors.New("subjectAltName cannot be parsed")
		}
		return n, nil
	}
	return 0, nil
}
