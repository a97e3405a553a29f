package server

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/attestor/tpmdevid"
)

func newKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// wants compares an error with words, of which there are none where there must be no error.
func wants(t *testing.T, name string, err error, says string) {
	t.Helper()
	if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
		t.Errorf("%s: error is %v, want %q", name, err, says)
	}
}

func certify(t *testing.T, key crypto.Signer, change func(*x509.Certificate)) []byte {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestReadChain(t *testing.T) {
	key := newKey(t, elliptic.P256())
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := certify(t, key, nil)
	names := func(n int) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			for i := range n {
				c.DNSNames = append(c.DNSNames, fmt.Sprintf("n%d", i))
			}
		}
	}
	times := func(n int) (list [][]byte) {
		for range n {
			list = append(list, good)
		}
		return list
	}
	for name, c := range map[string]struct {
		ders [][]byte
		says string
	}{
		"a chain that is good":                {times(1), ""},
		"as many as there may be":             {times(1 + tpmdevid.MaxIntermediates), ""},
		"as many names as there may be":       {[][]byte{certify(t, key, names(maxNames))}, ""},
		"nothing":                             {nil, "no certificate"},
		"one too many":                        {times(2 + tpmdevid.MaxIntermediates), "the limit is"},
		"one that is too large":               {[][]byte{append(certify(t, key, nil), make([]byte, tpmdevid.MaxCertificate)...)}, "bytes, the limit is"},
		"half of one":                         {[][]byte{good[:len(good)/2]}, "cannot be read"},
		"one with a name too many":            {[][]byte{certify(t, key, names(maxNames+1))}, "alternative names"},
		"an RSA key of 1024 bits":             {[][]byte{certify(t, weak, nil)}, "RSA key of 1024 bits"},
		"an RSA key of 1024 bits above it":    {[][]byte{good, certify(t, weak, nil)}, "certificate 2: RSA key of 1024 bits"},
		"an ECDSA key on P-224":               {[][]byte{certify(t, newKey(t, elliptic.P224()), nil)}, "ECDSA key is too short"},
		"a key of another kind":               {[][]byte{certify(t, edwards, nil)}, "neither RSA nor ECDSA"},
		"an authority's":                      {[][]byte{certify(t, key, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true })}, "authority's"},
		"one that is not for signatures":      {[][]byte{certify(t, key, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })}, "digital signatures"},
		"one that does not say what it's for": {[][]byte{certify(t, key, func(c *x509.Certificate) { c.KeyUsage = 0 })}, ""},
	} {
		_, _, err := readChain(c.ders)
		wants(t, name, err, c.says)
	}
}

// area is the public area of a DevID's key.
func area(t *testing.T, key *ecdsa.PrivateKey) *tpm2.TPMTPublic {
	t.Helper()
	raw, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return &tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, SignEncrypt: true},
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: raw[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[33:]},
		}),
	}
}

func TestReadDevID(t *testing.T) {
	key := newKey(t, elliptic.P256())
	leaf, err := x509.ParseCertificate(certify(t, key, nil))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		spoil func(*tpm2.TPMTPublic)
		says  string
	}{
		"one that is good":           {func(*tpm2.TPMTPublic) {}, ""},
		"not fixed in its TPM":       {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false }, "fixed there"},
		"not fixed below its parent": {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedParent = false }, "fixed there"},
		"made elsewhere":             {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false }, "made in its TPM"},
		"one that does not sign":     {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SignEncrypt = false }, "sign only"},
		"one that decrypts":          {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = true }, "sign only"},
		"a name made with SHA-1":     {func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA1 }, "not made with SHA-256"},
		"another key":                {func(p *tpm2.TPMTPublic) { *p = *area(t, newKey(t, elliptic.P256())) }, "for another key"},
	} {
		public := area(t, key)
		c.spoil(public)
		_, err := readDevID(tpm2.Marshal(public), leaf)
		wants(t, name, err, c.says)
	}
}

// TestCertification has a key that signs whatever it is given, which no TPM would do, so that each check is alone.
func TestCertification(t *testing.T) {
	ak := newKey(t, elliptic.P256())
	name := []byte{0, 11, 1, 2, 3}
	certifies := func(name []byte) tpm2.TPMUAttest {
		return tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: tpm2.TPM2BName{Buffer: name}})
	}
	for why, c := range map[string]struct {
		says   string // empty: it is believed
		change func(*tpm2.TPMSAttest)
		raw    func([]byte) []byte // a last touch before it is signed
		by     *ecdsa.PrivateKey
	}{
		"it is good":     {},
		"no TPM made it": {says: "certifies no key", raw: func(b []byte) []byte { b[0] ^= 1; return b }},
		"it is a quote": {says: "certifies no key", change: func(a *tpm2.TPMSAttest) {
			a.Type, a.Attested = tpm2.TPMSTAttestQuote, tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{})
		}},
		"it is of another key": {says: "certifies another key", change: func(a *tpm2.TPMSAttest) { a.Attested = certifies([]byte{0, 11, 9, 9, 9}) }},
		"it is of no key":      {says: "certifies another key", change: func(a *tpm2.TPMSAttest) { a.Attested = certifies(nil) }},
		"another key says so":  {says: "signature is wrong", by: newKey(t, elliptic.P256())},
		"it is too large":      {says: "too large", raw: func(b []byte) []byte { return append(b, make([]byte, tpmchip.MaxPublic)...) }},
	} {
		a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCertify, Attested: certifies(name)}
		if c.change != nil {
			c.change(&a)
		}
		e := tpmdevid.Evidence{CertifiedDevID: tpm2.Marshal(a)}
		if c.raw != nil {
			e.CertifiedDevID = c.raw(e.CertifiedDevID)
		}
		by := c.by
		if by == nil {
			by = ak
		}
		digest := sha256.Sum256(e.CertifiedDevID)
		r, s, err := ecdsa.Sign(rand.Reader, by, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		e.CertificationSignature = tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s.Bytes()},
		})})
		wants(t, why, checkCertified(e, ak.Public(), name), c.says)
	}
}
