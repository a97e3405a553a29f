package upstream

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// ParsePEM returns the certificates of a PEM text, of which there must be one at least. Blocks of other types
// are an error: a private key in a bundle is a mistake that somebody wants to know of.
func ParsePEM(text []byte) ([]*x509.Certificate, error) {
	if len(text) > MaxAnswer {
		return nil, fmt.Errorf("PEM of %d bytes, the limit is %d", len(text), MaxAnswer)
	}
	var certs []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block of type %q where certificates are expected", clip(block.Type))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		if certs = append(certs, cert); len(certs) > MaxRoots {
			return nil, fmt.Errorf("over %d certificates", MaxRoots)
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in PEM")
	}
	return certs, nil
}
