package tpmchip

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
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

// eccArea is the public area of a key on P-256 that is otherwise as the template has it.
func eccArea(t *testing.T, template tpm2.TPMTPublic, key *ecdsa.PrivateKey) tpm2.TPMTPublic {
	t.Helper()
	raw, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	half := (len(raw) - 1) / 2
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: raw[1 : 1+half]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[1+half:]},
	})
	return template
}

// signing is the template of an attestation key on a curve.
func signing(curve tpm2.TPMECCCurve) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, Restricted: true, SignEncrypt: true, UserWithAuth: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: curve,
			Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
		}),
	}
}

func TestReadAK(t *testing.T) {
	key := newKey(t, elliptic.P256())
	for name, c := range map[string]struct {
		spoil func(*tpm2.TPMTPublic)
		says  string
	}{
		"one that is good":           {func(*tpm2.TPMTPublic) {}, ""},
		"not fixed in its TPM":       {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false }, "no attestation key"},
		"not fixed below its parent": {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedParent = false }, "no attestation key"},
		"made elsewhere":             {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false }, "no attestation key"},
		"one that signs anything":    {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false }, "no attestation key"},
		"one that does not sign":     {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SignEncrypt = false }, "no attestation key"},
		"one that decrypts":          {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = true }, "no attestation key"},
		"a name made with SHA-1":     {func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA1 }, "not made with SHA-256"},
		"a name made with nothing":   {func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgNull }, "not made with SHA-256"},
		"a point that is not on P-256": {func(p *tpm2.TPMTPublic) {
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: []byte{1}}, Y: tpm2.TPM2BECCParameter{Buffer: []byte{1}}})
		}, "no point on its curve"},
		"another curve":             {func(p *tpm2.TPMTPublic) { *p = eccArea(t, signing(tpm2.TPMECCNistP384), newKey(t, elliptic.P384())) }, "no ECDSA key on P-256"},
		"a curve that is not taken": {func(p *tpm2.TPMTPublic) { *p = eccArea(t, signing(tpm2.TPMECCNistP521), newKey(t, elliptic.P521())) }, "on P-256 or P-384"},
	} {
		public := eccArea(t, signing(tpm2.TPMECCNistP256), key)
		c.spoil(&public)
		_, _, err := ReadAK(tpm2.Marshal(public))
		wants(t, name, err, c.says)
	}
	good := tpm2.Marshal(eccArea(t, signing(tpm2.TPMECCNistP256), key))
	for name, raw := range map[string][]byte{
		"nothing": nil, "half of it": good[:len(good)/2], "a byte after it": append(append([]byte{}, good...), 0), "too much": make([]byte, MaxPublic+1),
	} {
		if _, _, err := ReadAK(raw); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	_, err := ReadPublic(make([]byte, MaxPublic+1))
	wants(t, "too much", err, "1025 bytes")
}

func TestReadEK(t *testing.T) {
	rsaArea := func(bits int, exponent uint32) tpm2.TPMTPublic {
		modulus, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
		if err != nil {
			t.Fatal(err)
		}
		modulus.SetBit(modulus.SetBit(modulus, bits-1, 1), 0, 1)
		public := tpm2.RSAEKTemplate
		parms, err := public.Parameters.RSADetail()
		if err != nil {
			t.Fatal(err)
		}
		own := *parms
		own.KeyBits, own.Exponent = tpm2.TPMKeyBits(bits), exponent
		public.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &own)
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: modulus.Bytes()})
		return public
	}
	good := rsaArea(2048, 0)
	for name, c := range map[string]struct {
		spoil func(*tpm2.TPMTPublic)
		says  string
	}{
		"one that is good":           {func(*tpm2.TPMTPublic) {}, ""},
		"one on P-256":               {func(p *tpm2.TPMTPublic) { *p = eccArea(t, tpm2.ECCEKTemplate, newKey(t, elliptic.P256())) }, ""},
		"not fixed in its TPM":       {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false }, "no endorsement key"},
		"not fixed below its parent": {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedParent = false }, "no endorsement key"},
		"made elsewhere":             {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false }, "no endorsement key"},
		"one that decrypts anything": {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false }, "no endorsement key"},
		"one that does not decrypt":  {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = false }, "no endorsement key"},
		"one that signs":             {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SignEncrypt = true }, "no endorsement key"},
		"RSA of 1024 bits":           {func(p *tpm2.TPMTPublic) { *p = rsaArea(1024, 0) }, "2048 to 4096"},
		"RSA of 6144 bits":           {func(p *tpm2.TPMTPublic) { *p = rsaArea(6144, 0) }, "2048 to 4096"},
		"RSA with exponent 3":        {func(p *tpm2.TPMTPublic) { *p = rsaArea(2048, 3) }, "2048 to 4096"},
	} {
		public := good
		c.spoil(&public)
		_, _, err := ReadEK(tpm2.Marshal(public))
		wants(t, name, err, c.says)
	}
}

func TestCertified(t *testing.T) {
	now := time.Now()
	maker := newKey(t, elliptic.P256())
	authority := func(by *ecdsa.PrivateKey) *x509.Certificate {
		return issue(t, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, Subject: pkix.Name{CommonName: "maker"}}, nil, by.Public(), by)
	}
	root := authority(maker)
	roots := x509.NewCertPool()
	roots.AddCert(root)
	ek := newKey(t, elliptic.P256())
	hash, err := KeyHash(ek.Public())
	if err != nil {
		t.Fatal(err)
	}
	certificate := func(public crypto.PublicKey, change func(*x509.Certificate)) []byte {
		template := &x509.Certificate{}
		change(template)
		return issue(t, template, root, public, maker).Raw
	}
	same := func(*x509.Certificate) {}
	rival := newKey(t, elliptic.P256())
	edwards, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := certificate(ek.Public(), same)
	for name, c := range map[string]struct {
		der  []byte
		says string
	}{
		"one that is good":                      {good, ""},
		"one with padding after it":             {append(append([]byte{}, good...), 0xff, 0xff), ""},
		"none":                                  {nil, "no certificate"},
		"one that is too large":                 {append(append([]byte{}, good...), make([]byte, MaxCertificate)...), "too large"},
		"half of one":                           {good[:len(good)/2], "cannot be read"},
		"one of another key":                    {certificate(rival.Public(), same), "for another key"},
		"one of another kind of key":            {certificate(edwards, same), "another kind of key"},
		"one that has expired":                  {certificate(ek.Public(), func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }), "not valid now"},
		"one that is not valid yet":             {certificate(ek.Public(), func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }), "not valid now"},
		"one by another maker of the same name": {issue(t, &x509.Certificate{}, authority(rival), ek.Public(), rival).Raw, "accepted authority"},
		"one that it signed itself":             {issue(t, &x509.Certificate{}, nil, ek.Public(), ek).Raw, "accepted authority"},
		"one with a critical extension that nobody knows": {certificate(ek.Public(), func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}), "accepted authority"},
	} {
		_, err := Certified(c.der, hash, roots, now)
		wants(t, name, err, c.says)
	}
}

func issue(t *testing.T, template, parent *x509.Certificate, public crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(1)
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
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

func TestVerify(t *testing.T) {
	signed := []byte("what a TPM says")
	digest := sha256.Sum256(signed)
	key := newKey(t, elliptic.P256())
	ecc := func(by *ecdsa.PrivateKey, hash tpm2.TPMIAlgHash, pad int) []byte {
		r, s, err := ecdsa.Sign(rand.Reader, by, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash: hash, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32+pad))}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s.FillBytes(make([]byte, 32))},
		})})
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ssa := func(digest [32]byte) []byte {
		raw, err := rsa.SignPKCS1v15(rand.Reader, rsaKey, crypto.SHA256, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, &tpm2.TPMSSignatureRSA{
			Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: raw},
		})})
	}
	for name, c := range map[string]struct {
		key  crypto.PublicKey
		raw  []byte
		says string
	}{
		"ECDSA that is good":        {key.Public(), ecc(key, tpm2.TPMAlgSHA256, 0), ""},
		"RSASSA that is good":       {rsaKey.Public(), ssa(digest), ""},
		"another key's":             {key.Public(), ecc(newKey(t, elliptic.P256()), tpm2.TPMAlgSHA256, 0), "signature is wrong"},
		"RSASSA of another text":    {rsaKey.Public(), ssa([32]byte{1}), "signature is wrong"},
		"one that says SHA-384":     {key.Public(), ecc(key, tpm2.TPMAlgSHA384, 0), "not ECDSA with SHA-256"},
		"one with numbers too long": {key.Public(), ecc(key, tpm2.TPMAlgSHA256, 1), "too large"},
		"ECDSA for an RSA key":      {rsaKey.Public(), ecc(key, tpm2.TPMAlgSHA256, 0), "not RSASSA with SHA-256"},
		"RSASSA for an ECDSA key":   {key.Public(), ssa(digest), "not ECDSA with SHA-256"},
		"none":                      {key.Public(), nil, "cannot be read"},
		"one that is too large":     {key.Public(), append(ecc(key, tpm2.TPMAlgSHA256, 0), make([]byte, MaxPublic)...), "signature is too large"},
	} {
		wants(t, name, Verify(c.key, signed, c.raw), c.says)
	}
}

func TestReadRoots(t *testing.T) {
	key := newKey(t, elliptic.P256())
	text := func(ca bool) string {
		cert := issue(t, &x509.Certificate{IsCA: ca, BasicConstraintsValid: true}, nil, key.Public(), key)
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	}
	for name, c := range map[string]struct{ text, says string }{
		"two authorities":                   {text(true) + text(true), ""},
		"nothing":                           {"", "no PEM certificate"},
		"an authority and a leaf":           {text(true) + text(false), "certificate 2"},
		"an authority and what is no other": {text(true) + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate 2"},
	} {
		path := filepath.Join(t.TempDir(), "roots.pem")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := ReadRoots(path)
		wants(t, name, err, c.says)
	}
}
