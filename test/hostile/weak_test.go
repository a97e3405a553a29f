package hostile

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"sync"
	"time"
)

// badDER are values for fields by their name, in whatever message: what has such a field gets all of
// them, and must refuse each.
var badDER = map[string]map[string][]byte{
	"csr": {
		"a request that its key did not sign":                  brokenCSR(),
		"a request for RSA with 1024 bits":                     newCSR(weakRSA(), "spiffe://example.org/minted"),
		"a request for P-224":                                  newCSR(p224(), "spiffe://example.org/minted"),
		"a request for Ed25519":                                newCSR(ed(), "spiffe://example.org/minted"),
		"a request signed with SHA-1":                          sha1CSR(),
		"a request with something after it":                    append(newCSR(aKey, "spiffe://example.org/minted"), 0),
		"a certificate":                                        newAuthority(),
		"a request for another's key, with an empty signature": unsignedCSR(),
	},
	"asn1": {
		"a certificate that is no CA's":            certificate(aKey, func(c *x509.Certificate) { c.IsCA = false }),
		"a certificate that says nothing of CAs":   certificate(aKey, func(c *x509.Certificate) { c.BasicConstraintsValid, c.IsCA = false, false }),
		"a CA certificate that must not sign":      certificate(aKey, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }),
		"a CA certificate with RSA of 1024 bits":   certificate(weakRSA(), nil),
		"a CA certificate with P-224":              certificate(p224(), nil),
		"a CA certificate with something after it": append(newAuthority(), 0),
		"two CA certificates":                      append(newAuthority(), newAuthority()...),
		"a request":                                newCSR(aKey),
	},
	"public_key": {
		"RSA with 1024 bits": public(weakRSA()),
		"P-224":              public(p224()),
		"Ed25519":            public(ed()),
		"something after it": append(public(aKey), 0),
		"a private key":      private(aKey),
	},
}

// weakRSA is made once: to make one takes a while.
var weakRSA = sync.OnceValue(func() crypto.Signer {
	// The library makes none so small any more unless told to.
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		panic(err)
	}
	return key
})

func p224() crypto.Signer {
	key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func ed() crypto.Signer {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func public(key crypto.Signer) []byte {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err)
	}
	return der
}

func private(key crypto.Signer) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic(err)
	}
	return der
}

// brokenCSR is one whose signature is another request's.
func brokenCSR() []byte {
	der := bytes.Clone(newCSR(aKey, "spiffe://example.org/minted"))
	other := newCSR(newKey(), "spiffe://example.org/minted")
	var a, b csrParts
	if _, err := asn1.Unmarshal(der, &a); err != nil {
		panic(err)
	}
	if _, err := asn1.Unmarshal(other, &b); err != nil {
		panic(err)
	}
	a.Signature = b.Signature
	return a.marshal()
}

// unsignedCSR is one with a signature of no bits.
func unsignedCSR() []byte {
	var a csrParts
	if _, err := asn1.Unmarshal(newCSR(aKey, "spiffe://example.org/minted"), &a); err != nil {
		panic(err)
	}
	a.Signature = asn1.BitString{}
	return a.marshal()
}

// sha1CSR says that it was signed with SHA-1.
func sha1CSR() []byte {
	var a csrParts
	if _, err := asn1.Unmarshal(newCSR(aKey, "spiffe://example.org/minted"), &a); err != nil {
		panic(err)
	}
	a.Algorithm = pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}}
	return a.marshal()
}

// csrParts are those of a certificate request (RFC 2986 section 4.2).
type csrParts struct {
	Info      asn1.RawValue
	Algorithm pkix.AlgorithmIdentifier
	Signature asn1.BitString
}

func (p csrParts) marshal() []byte {
	der, err := asn1.Marshal(p)
	if err != nil {
		panic(err)
	}
	return der
}

// certificate is a self-signed CA's, changed.
func certificate(key crypto.Signer, change func(*x509.Certificate)) []byte {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(8), Subject: pkix.Name{CommonName: "authority"}, URIs: []*url.URL{{Scheme: "spiffe", Host: "other.test"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return der
}
