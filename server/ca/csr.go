package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
)

// MaxCSR is the largest certificate request in bytes that is looked at. One for RSA-8192 with the
// longest SPIFFE ID is below a tenth of it.
const MaxCSR = 64 << 10

// Sizes of RSA keys that certificates are made for. The upper one bounds what checking a signature
// can cost.
const (
	minRSA      = 2048
	maxRSA      = 8192
	minExponent = 65537 // NIST SP 800-56B 6.2, and what every library makes
)

// ParseCSR parses a PKCS #10 certificate request (RFC 2986) and verifies its signature, which
// proves that whoever asks holds the private key. Nothing that is in a request is a right: callers
// take the public key, and decide the rest. The key must be one that CheckKey accepts, and the
// signature must not be made with MD5 or SHA-1. The error wraps ErrCSR or ErrKey.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	if len(der) == 0 {
		return nil, fmt.Errorf("%w: empty", ErrCSR)
	}
	if len(der) > MaxCSR {
		return nil, fmt.Errorf("%w: %d bytes long, the limit is %d", ErrCSR, len(der), MaxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	// Before the signature: an RSA key of 60,000 bits would be paid for by us.
	if err := CheckKey(csr.PublicKey); err != nil {
		return nil, err
	}
	switch csr.SignatureAlgorithm {
	case x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
		x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512:
	default:
		return nil, fmt.Errorf("%w: signature algorithm %s is not accepted", ErrCSR, csr.SignatureAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: signature does not fit the key", ErrCSR)
	}
	return csr, nil
}

// CheckKey says why no certificate is made for a public key, or nil. Accepted are RSA with 2048 to
// 8192 bits and an odd public exponent of at least 65537, and ECDSA on P-256, P-384 and P-521.
// Ed25519 is refused: SPIRE does, and too few TLS stacks of workloads verify it. The error wraps
// ErrKey.
func CheckKey(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if key == nil || key.N == nil {
			return fmt.Errorf("%w: missing", ErrKey)
		}
		if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("%w: RSA with %d bits, want %d to %d", ErrKey, bits, minRSA, maxRSA)
		}
		if key.N.Bit(0) == 0 {
			return fmt.Errorf("%w: RSA with an even modulus", ErrKey)
		}
		if key.E < minExponent || key.E&1 == 0 {
			return fmt.Errorf("%w: RSA with public exponent %d", ErrKey, key.E)
		}
		return nil
	case *ecdsa.PublicKey:
		if key == nil || key.Curve == nil {
			return fmt.Errorf("%w: missing", ErrKey)
		}
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
		default:
			return fmt.Errorf("%w: ECDSA on curve %s, want P-256, P-384 or P-521", ErrKey, key.Curve.Params().Name)
		}
		// Keys that were parsed are on their curve; those that were not are found out here.
		if _, err := key.Bytes(); err != nil {
			return fmt.Errorf("%w: point is not on the curve", ErrKey)
		}
		return nil
	case nil:
		return fmt.Errorf("%w: missing", ErrKey)
	}
	return fmt.Errorf("%w: %T, want RSA or ECDSA", ErrKey, key)
}
