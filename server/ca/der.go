package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/assay-id/assay/server/ca/keys"
)

// This file makes the DER of SVIDs. x509.CreateCertificate would do it too, and does for authorities.
// It encodes a template by reflection and then verifies the signature it was given, which together is
// more than all the rest of a signature: our SVIDs differ in six places, so what surrounds these is
// written down once.
//
// The bytes are the very ones that x509.CreateCertificate makes (a test compares them), and lint.go
// looks at the parsed result as it always did. The signature of a key that is in this process's own
// memory is not verified each time: that key and the authority's certificate were proved to fit when
// the authority was loaded (prove), RSA signatures are checked by crypto/rsa itself, and for ECDSA
// there is nothing left that could go wrong but the processor. Then the SVID is of no use to anybody,
// its nonce being mixed with fresh randomness (crypto/ecdsa) tells nobody anything about the key, and
// the next one is good. Signers that are somewhere else are verified every time.

// The extensions that all SVIDs have in common, as DER.
var (
	// digitalSignature, keyEncipherment, keyAgreement: leafUsage.
	keyUsageDER = []byte{0x30, 0x0e, 0x06, 3, 0x55, 0x1d, 0x0f, 0x01, 1, 0xff, 0x04, 4, 0x03, 2, 3, 0xa8}
	// serverAuth, clientAuth.
	extKeyUsageDER = []byte{
		0x30, 0x1d, 0x06, 3, 0x55, 0x1d, 0x25, 0x04, 0x16, 0x30, 0x14,
		0x06, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1, 0x06, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2,
	}
	// CA:false, which is the default and therefore not there.
	basicConstraintsDER = []byte{0x30, 0x0c, 0x06, 3, 0x55, 0x1d, 0x13, 0x01, 1, 0xff, 0x04, 2, 0x30, 0}
)

// Identifiers of the extensions that differ (RFC 5280 4.2.1).
var (
	subjectKeyIdentifier   = asn1.ObjectIdentifier{2, 5, 29, 14}
	authorityKeyIdentifier = asn1.ObjectIdentifier{2, 5, 29, 35}
)

// Kinds of general names (RFC 5280 4.2.1.6).
const (
	dnsNameTag = 2
	uriTag     = 6
)

// plainSubject is the subject of SVIDs without DNS names, which most are.
var plainSubject = func() []byte {
	der, err := encodeName(svidName)
	if err != nil {
		panic(err) // constant
	}
	return der
}()

var svidName = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}

func encodeName(name pkix.Name) ([]byte, error) { return asn1.Marshal(name.ToRDNSequence()) }

// svidSubject returns the subject of an SVID, as DER: what is asked for, or C=US, O=SPIRE if that is
// nothing, with the first DNS name as common name.
func svidSubject(asked pkix.Name, dnsNames []string) ([]byte, error) {
	if len(asked.ToRDNSequence()) == 0 {
		if len(dnsNames) == 0 {
			return plainSubject, nil
		}
		asked = svidName
	}
	if len(dnsNames) > 0 {
		asked.CommonName = dnsNames[0]
	}
	return encodeName(asked)
}

// issue signs what is wanted, reads it back and checks it.
func (a *authority) issue(w *want) (*x509.Certificate, error) {
	der, err := a.certificate(w)
	if err != nil {
		return nil, fmt.Errorf("create certificate: %w", err)
	}
	cert, err := readBack(der, w)
	if err != nil {
		return nil, err
	}
	if !keys.InProcess(a.signer) {
		if err := a.cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
			return nil, fmt.Errorf("verify what was signed: %w", err)
		}
	}
	return cert, nil
}

// certificate returns the signed DER (RFC 5280 4.1).
func (a *authority) certificate(w *want) ([]byte, error) {
	tbs, err := a.toBeSigned(w)
	if err != nil {
		return nil, err
	}
	digest := a.hash.New()
	digest.Write(tbs)
	signature, err := a.signer.Sign(rand.Reader, digest.Sum(nil), a.hash)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(signature)+32))
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(a.algorithm)
		b.AddASN1BitString(signature)
	})
	return b.Bytes()
}

// toBeSigned returns the TBSCertificate (RFC 5280 4.1.2) of an SVID.
func (a *authority) toBeSigned(w *want) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, 1024))
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.Tag(0).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // v3
		b.AddASN1BigInt(randomSerial())
		b.AddBytes(a.algorithm)
		b.AddBytes(a.cert.RawSubject)
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			addTime(b, w.notBefore)
			addTime(b, w.notAfter)
		})
		b.AddBytes(w.subject)
		b.AddBytes(w.spki)
		b.AddASN1(casn1.Tag(3).Constructed().ContextSpecific(), func(b *cryptobyte.Builder) {
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { a.addExtensions(b, w) })
		})
	})
	return b.Bytes()
}

func (a *authority) addExtensions(b *cryptobyte.Builder, w *want) {
	b.AddBytes(keyUsageDER)
	b.AddBytes(extKeyUsageDER)
	b.AddBytes(basicConstraintsDER)
	addExtension(b, subjectKeyIdentifier, func(b *cryptobyte.Builder) { b.AddASN1OctetString(w.keyID) })
	addExtension(b, authorityKeyIdentifier, func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(casn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(a.cert.SubjectKeyId) })
		})
	})
	addExtension(b, subjectAltName, func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, name := range w.dnsNames {
				b.AddASN1(casn1.Tag(dnsNameTag).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(name)) })
			}
			b.AddASN1(casn1.Tag(uriTag).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(w.id.String())) })
		})
	})
}

// addExtension adds one that is not critical.
func addExtension(b *cryptobyte.Builder, id asn1.ObjectIdentifier, value cryptobyte.BuilderContinuation) {
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(id)
		b.AddASN1(casn1.OCTET_STRING, value)
	})
}

// addTime adds a time in the form that its year asks for (RFC 5280 4.1.2.5).
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t = t.UTC(); t.Year() < 2050 {
		b.AddASN1UTCTime(t)
	} else {
		b.AddASN1GeneralizedTime(t)
	}
}

// Identifiers of signature algorithms (RFC 4055 5, RFC 5758 3.2).
var (
	sha256WithRSA   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}
	ecdsaWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	ecdsaWithSHA384 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}
)

// prepareX509 fills in what all signatures of the authority have in common.
func (a *authority) prepareX509() error {
	var id asn1.ObjectIdentifier
	switch key := a.public.(type) {
	case *rsa.PublicKey:
		id, a.hash = sha256WithRSA, crypto.SHA256
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			id, a.hash = ecdsaWithSHA256, crypto.SHA256
		case elliptic.P384():
			id, a.hash = ecdsaWithSHA384, crypto.SHA384
		default:
			return fmt.Errorf("no signature algorithm for curve %s", key.Curve.Params().Name)
		}
	}
	var b cryptobyte.Builder
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(id)
		if slices.Equal(id, sha256WithRSA) {
			b.AddASN1NULL() // must be there (RFC 4055 5), and must not for ECDSA (RFC 5758 3.2)
		}
	})
	var err error
	a.algorithm, err = b.Bytes()
	return err
}

// errUnproved says that an authority's private key does not fit its public one.
var errUnproved = errors.New("private key does not make signatures that the public key verifies")

// prove has the private key sign something and verifies that.
func (a *authority) prove() error {
	digest := make([]byte, a.hash.Size())
	_, _ = rand.Read(digest) // never fails
	signature, err := a.signer.Sign(rand.Reader, digest, a.hash)
	if err != nil {
		return fmt.Errorf("try the private key: %w", err)
	}
	good := false
	switch key := a.public.(type) {
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(key, a.hash, digest, signature) == nil
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(key, digest, signature)
	}
	if !good {
		return errUnproved
	}
	return nil
}
