package server

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/x509pop"
)

func TestURIsThatAreSelectors(t *testing.T) {
	j := &judge{trustDomain: spiffeid.RequireTrustDomainFromString("example.org")}
	for text, want := range map[string]string{
		"x509pop://example.org/env/prod":      "san:env:prod",
		"x509pop://example.org/env/prod/eu":   "san:env:prod/eu",
		"x509pop://example.org/env/a:b":       "san:env:a:b",
		"x509pop://example.org/env:a/b":       "", // it would read as env/a:b does
		"x509pop://example.org/env":           "",
		"x509pop://example.org/":              "",
		"x509pop://other.test/env/prod":       "",
		"x509pop://example.org.test/env/prod": "",
		"https://example.org/env/prod":        "",
		"spiffe://example.org/env/prod":       "",
		"x509pop:env/prod":                    "",
	} {
		uri, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		got := attestor.NewSet(j.selectors(&x509.Certificate{SerialNumber: big.NewInt(1), URIs: []*url.URL{uri}}, nil)...).Strings()
		wants := []string{"x509pop:serialnumber:01"}
		if want != "" {
			wants = []string{"x509pop:" + want, "x509pop:serialnumber:01"}
		}
		if !slices.Equal(got, wants) {
			t.Errorf("%s: selectors are %q, want %q", text, got, wants)
		}
	}
}

func TestSignatureOfAnAnswer(t *testing.T) {
	server, agent := make([]byte, x509pop.NonceSize), make([]byte, x509pop.NonceSize)
	digest, err := x509pop.Digest(server, agent)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	r, s, err := ecdsa.Sign(rand.Reader, key, digest)
	if err != nil {
		t.Fatal(err)
	}
	pss, err := rsa.SignPSS(rand.Reader, large, crypto.SHA256, digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	ec := func(size int) *x509pop.ECDSASignature {
		return &x509pop.ECDSASignature{Nonce: agent, R: r.FillBytes(make([]byte, size)), S: s.FillBytes(make([]byte, size))}
	}
	ss := &x509pop.RSASignature{Nonce: agent, Signature: pss}
	for name, c := range map[string]struct {
		key    crypto.PublicKey
		answer x509pop.Response
		says   string // empty: it is good
	}{
		"ECDSA that is good":           {key.Public(), x509pop.Response{ECDSA: ec(32)}, ""},
		"RSA that is good":             {large.Public(), x509pop.Response{RSA: ss}, ""},
		"ECDSA with zeros in front":    {key.Public(), x509pop.Response{ECDSA: ec(33)}, "too large"},
		"ECDSA with RSA beside it":     {key.Public(), x509pop.Response{ECDSA: ec(32), RSA: ss}, "not for an ECDSA key"},
		"RSA with ECDSA beside it":     {large.Public(), x509pop.Response{ECDSA: ec(32), RSA: ss}, "not for an RSA key"},
		"ECDSA for an RSA key":         {large.Public(), x509pop.Response{ECDSA: ec(32)}, "not for an RSA key"},
		"RSA for an ECDSA key":         {key.Public(), x509pop.Response{RSA: ss}, "not for an ECDSA key"},
		"RSA as PKCS #1 v1.5 signs it": {large.Public(), x509pop.Response{RSA: &x509pop.RSASignature{Nonce: agent, Signature: pkcs1(t, large, digest)}}, "signature is wrong"},
	} {
		err := checkSignature(&x509.Certificate{PublicKey: c.key}, server, c.answer)
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error is %v, want %q", name, err, c.says)
		}
	}
}

func pkcs1(t *testing.T, key *rsa.PrivateKey, digest []byte) []byte {
	t.Helper()
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest)
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

func TestIntermediateWithAWeakKeyIsRefused(t *testing.T) {
	certificate := func(key crypto.Signer, ca bool) []byte {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: ca, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for bits, says := range map[int]string{2048: "", 1024: "intermediate certificate 1"} {
		above, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		payload, err := json.Marshal(x509pop.Evidence{Certificates: [][]byte{certificate(key, false), certificate(above, true)}})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := parse(payload); (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("RSA of %d bits: error is %v, want %q", bits, err, says)
		}
	}
}
