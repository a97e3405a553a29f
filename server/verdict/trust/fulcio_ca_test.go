package trust_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	securesystems "github.com/secure-systems-lab/go-securesystemslib/dsse"
	rekor "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/assay-id/assay/server/verdict/trust"
)

// sigstore is a whole Sigstore in memory: a certificate authority of our own, which writes the extensions
// that a test wants, and the library's test log and timestamp authority.
type sigstore struct {
	services *ca.VirtualSigstore
	caKey    *ecdsa.PrivateKey
	caCert   *x509.Certificate
	rootFile string // with the log and the timestamp authority
	noLog    string // with the timestamp authority alone
}

func newSigstore(t testing.TB) *sigstore {
	t.Helper()
	services, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	s := &sigstore{services: services}
	if s.caKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fulcio of this test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, s.caKey.Public(), s.caKey)
	if err != nil {
		t.Fatal(err)
	}
	if s.caCert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	logs := services.RekorLogs()
	for id, log := range logs {
		if log.ID, err = hex.DecodeString(id); err != nil {
			t.Fatal(err)
		}
	}
	s.rootFile = s.writeRoot(t, logs)
	s.noLog = s.writeRoot(t, nil)
	return s
}

func (s *sigstore) writeRoot(t testing.TB, logs map[string]*root.TransparencyLog) string {
	t.Helper()
	authority := &root.FulcioCertificateAuthority{
		Root: s.caCert, URI: "https://fulcio.example", ValidityPeriodStart: s.caCert.NotBefore, ValidityPeriodEnd: s.caCert.NotAfter,
	}
	material, err := root.NewTrustedRoot(root.TrustedRootMediaType01, []root.CertificateAuthority{authority}, nil, s.services.TimestampingAuthorities(), logs)
	if err != nil {
		t.Fatal(err)
	}
	text, err := material.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "trusted_root.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// signer is whom the authority certifies.
type signer struct {
	uri       string            // subject alternative name; several by spaces
	email     string            // another one
	user      string            // another one, as otherName
	fields    map[int]string    // extensions by the last number of their OID
	raw       map[int][]byte    // the same, not encoded
	notBefore time.Time         // zero: now
	pub       *ecdsa.PrivateKey // nil: a new one
}

var arc = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1}

// certify makes the signer's certificate.
func (s *sigstore) certify(t testing.TB, who signer) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	leafKey := who.pub
	if leafKey == nil {
		var err error
		if leafKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	if who.notBefore.IsZero() {
		who.notBefore = time.Now().Add(-time.Minute)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: who.notBefore, NotAfter: who.notBefore.Add(10 * time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	for uri := range strings.FieldsSeq(who.uri) {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	if who.email != "" {
		template.EmailAddresses = []string{who.email}
	}
	if who.user != "" {
		template.ExtraExtensions = append(template.ExtraExtensions, otherName(t, who.user))
	}
	for n, value := range who.fields {
		der, err := asn1.MarshalWithParams(value, "utf8")
		if err != nil {
			t.Fatal(err)
		}
		template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: append(slices.Clip(arc), n), Value: der})
	}
	for n, value := range who.raw {
		template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: append(slices.Clip(arc), n), Value: value})
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.caCert, leafKey.Public(), s.caKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, leafKey
}

// otherName is the SAN that Fulcio makes for user names.
func otherName(t testing.TB, user string) pkix.Extension {
	t.Helper()
	name, err := asn1.MarshalWithParams(user, "utf8")
	if err != nil {
		t.Fatal(err)
	}
	oid, err := asn1.Marshal(append(slices.Clip(arc), 7))
	if err != nil {
		t.Fatal(err)
	}
	wrap := func(tag int, content []byte) []byte {
		der, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: content})
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	der, err := asn1.Marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: wrap(0, append(oid, wrap(0, name)...))})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}
}

// bundle signs a statement and has it logged and timestamped. Without log there is the timestamp alone.
func (s *sigstore) bundle(t testing.TB, who signer, payload []byte, log bool) map[string]any {
	t.Helper()
	cert, leafKey := s.certify(t, who)
	sum := sha256.Sum256(pae(statement, payload))
	sig, err := leafKey.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	encoded := base64.StdEncoding.EncodeToString
	material := map[string]any{"certificate": map[string]string{"rawBytes": encoded(cert.Raw)}}
	s.vouch(t, material, sig)
	if log {
		e := &securesystems.Envelope{PayloadType: statement, Payload: encoded(payload), Signatures: []securesystems.Signature{{Sig: encoded(sig)}}}
		entry, err := s.services.GenerateTlogEntry(cert, e, sig, time.Now().Unix(), true)
		if err != nil {
			t.Fatal(err)
		}
		logged := entry.TransparencyLogEntry()
		logged.KindVersion = &rekor.KindVersion{Kind: "dsse", Version: "0.0.1"}
		promise, err := s.services.RekorSignPayload(tlog.RekorPayload{
			Body: entry.Body(), IntegratedTime: logged.GetIntegratedTime(), LogIndex: logged.GetLogIndex(), LogID: hex.EncodeToString(logged.GetLogId().GetKeyId()),
		})
		if err != nil {
			t.Fatal(err)
		}
		logged.InclusionPromise = &rekor.InclusionPromise{SignedEntryTimestamp: promise}
		text, err := protojson.Marshal(logged)
		if err != nil {
			t.Fatal(err)
		}
		material["tlogEntries"] = []any{rawJSON(text)}
	}
	return map[string]any{
		"mediaType":            "application/vnd.dev.sigstore.bundle.v0.3+json",
		"verificationMaterial": material,
		"dsseEnvelope": map[string]any{
			"payloadType": statement, "payload": encoded(payload), "signatures": []any{map[string]string{"sig": encoded(sig)}},
		},
	}
}

// vouch adds a timestamp over the signature.
func (s *sigstore) vouch(t testing.TB, material map[string]any, sig []byte) {
	t.Helper()
	stamp, err := s.services.TimestampResponse(sig)
	if err != nil {
		t.Fatal(err)
	}
	material["timestampVerificationData"] = map[string]any{
		"rfc3161Timestamps": []any{map[string]string{"signedTimestamp": base64.StdEncoding.EncodeToString(stamp)}},
	}
}

// digestBundle signs a bare digest.
func (s *sigstore) digestBundle(t testing.TB, who signer, digest string) map[string]any {
	t.Helper()
	cert, leafKey := s.certify(t, who)
	sum, err := hex.DecodeString(strings.TrimPrefix(digest, "sha256:"))
	if err != nil {
		t.Fatal(err)
	}
	sig, err := leafKey.Sign(rand.Reader, sum, crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	encoded := base64.StdEncoding.EncodeToString
	material := map[string]any{"certificate": map[string]string{"rawBytes": encoded(cert.Raw)}}
	s.vouch(t, material, sig)
	return map[string]any{
		"mediaType":            "application/vnd.dev.sigstore.bundle.v0.3+json",
		"verificationMaterial": material,
		"messageSignature": map[string]any{
			"messageDigest": map[string]string{"algorithm": "SHA2_256", "digest": encoded(sum)}, "signature": encoded(sig),
		},
	}
}

type rawJSON []byte

func (r rawJSON) MarshalJSON() ([]byte, error) { return r, nil }

// now is a verifier whose clock is the real one, which the test timestamp authority also reads.
func now(t testing.TB, policies ...*trust.Policy) *trust.Verifier {
	t.Helper()
	v, err := trust.New(policies, trust.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}
