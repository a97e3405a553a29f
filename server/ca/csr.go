package ca

import (
	"crypto"
	"crypto/x509"
	"fmt"

	"github.com/assay-id/assay/workloadapi/identity"
)

// MaxCSR is the largest certificate request in bytes that is looked at. One for RSA-8192 with the
// longest SPIFFE ID is below a tenth of it.
const MaxCSR = 64 << 10

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

// CheckKey says why no certificate is made for a public key, or nil: one that identity.CheckKey
// refuses. The error wraps ErrKey.
func CheckKey(key crypto.PublicKey) error {
	if err := identity.CheckKey(key); err != nil {
		return fmt.Errorf("%w: %w", ErrKey, err)
	}
	return nil
}
