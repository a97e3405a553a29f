package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
)

// Sizes of RSA keys that are accepted. The upper one bounds what checking a signature can cost.
const (
	minRSA      = 2048
	maxRSA      = 8192
	minExponent = 65537 // NIST SP 800-56B 6.2, and what every library makes
)

// CheckKey says why a public key is not accepted, or nil. Accepted are RSA with 2048 to 8192 bits and
// an odd public exponent of at least 65537, and ECDSA on P-256, P-384 and P-521. Ed25519 is refused:
// JWT-SVID section 2.1 has no algorithm for it, SPIRE refuses it, and too few TLS stacks of workloads
// verify it.
func CheckKey(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if key == nil || key.N == nil {
			return errors.New("missing")
		}
		if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("RSA with %d bits, want %d to %d", bits, minRSA, maxRSA)
		}
		if key.N.Bit(0) == 0 {
			return errors.New("RSA with an even modulus")
		}
		if key.E < minExponent || key.E&1 == 0 {
			return fmt.Errorf("RSA with public exponent %d", key.E)
		}
		return nil
	case *ecdsa.PublicKey:
		if key == nil || key.Curve == nil {
			return errors.New("missing")
		}
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
		default:
			return fmt.Errorf("ECDSA on curve %s, want P-256, P-384 or P-521", key.Curve.Params().Name)
		}
		// Keys that were parsed are on their curve; those that were not are found out here.
		if _, err := key.Bytes(); err != nil {
			return errors.New("point is not on the curve")
		}
		return nil
	case nil:
		return errors.New("missing")
	}
	return fmt.Errorf("%T, want RSA or ECDSA", key)
}

// CheckAuthority says why a certificate cannot be an X.509 authority, or nil. It must be a CA
// certificate by its basic constraints (X509-SVID section 4.1), and its key must be strong. A key
// usage must allow signing certificates (section 4.3) if there is one: authorities of old that have
// none still verify what they signed, for the standard library as for others (RFC 5280 4.2.1.3 binds
// only conforming CAs).
func CheckAuthority(cert *x509.Certificate) error {
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return fmt.Errorf("certificate %q is no CA certificate", clip(cert.Subject.String()))
	case cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("certificate %q must not sign certificates, by its key usage", clip(cert.Subject.String()))
	}
	return CheckCertificateKey(cert)
}

// CheckCertificateKey says why a certificate's key is not accepted in a chain that somebody else made,
// or nil. Beside those that CheckKey accepts, that is Ed25519: which algorithms its workloads can
// verify is for the other trust domain to know.
func CheckCertificateKey(cert *x509.Certificate) error {
	if _, ok := cert.PublicKey.(ed25519.PublicKey); ok {
		return nil
	}
	if err := CheckKey(cert.PublicKey); err != nil {
		return fmt.Errorf("certificate %q: key is refused: %w", clip(cert.Subject.String()), err)
	}
	return nil
}

// clip keeps a stranger's text from filling a message.
func clip(s string) string {
	if len(s) > 120 {
		return s[:120] + "…"
	}
	return s
}

// TokenAlgorithm is what a key signs tokens with if nobody asks for another (RFC 7518 section 3.1), empty
// for a key of a kind that is not accepted.
func TokenAlgorithm(key crypto.PublicKey) string {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return "RS256"
	case *ecdsa.PublicKey:
		return map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[key.Curve.Params().BitSize]
	}
	return ""
}
