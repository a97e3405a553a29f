// Package x509pop is node attestation by a certificate the machine already has: the agent shows the
// chain and signs a challenge with the leaf's key.
//
// This package holds the names, the configuration and the messages, which are SPIRE's byte for byte,
// so that either side works with SPIRE's other one. Both sides add a nonce and what is signed is the
// SHA-256 of both: neither side can make the other sign or verify something of its choice.
package x509pop

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // an identifier that SPIRE's agents and entries know, not a signature
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "x509pop"

// Limits. They bound what a stranger can make the server compute before anything is proved: parsing
// and verifying happens for whoever connects.
const (
	// NonceSize is the size in bytes of either side's nonce.
	NonceSize = 32
	// MaxIntermediates is how many certificates may follow the leaf.
	MaxIntermediates = 4
	// MaxCertificate is the largest certificate in bytes.
	MaxCertificate = 16 << 10
	// MinRSABits and MaxRSABits bound the RSA keys of leaf and intermediates.
	MinRSABits, MaxRSABits = 2048, 8192
	// MinECDSABits is the smallest curve: P-256.
	MinECDSABits = 256
)

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// PrivateKeyPath names the leaf's private key: PEM, PKCS #8, PKCS #1 or SEC 1, not encrypted.
	PrivateKeyPath string `hcl:"private_key_path"`
	// CertificatePath names the certificate: PEM, the leaf first; intermediates may follow.
	CertificatePath string `hcl:"certificate_path"`
	// IntermediatesPath names further intermediates: PEM. Optional.
	IntermediatesPath string `hcl:"intermediates_path,optional"`
}

// ServerConfig is the server's configuration block. Exactly one of the two is set.
type ServerConfig struct {
	// CABundlePath names a file of root certificates: PEM.
	CABundlePath string `hcl:"ca_bundle_path,optional"`
	// CABundlePaths names several.
	CABundlePaths []string `hcl:"ca_bundle_paths,optional"`
}

// Evidence is the payload: the chain in DER, the leaf first, without the root.
type Evidence struct {
	Certificates [][]byte `json:"certificates"`
}

// Challenge is what the server asks. One of the two is set, as the leaf's key demands.
type Challenge struct {
	RSA   *Nonce `json:"rsa_signature"`
	ECDSA *Nonce `json:"ecdsa_signature"`
}

// Nonce is the server's half of what is to be signed.
type Nonce struct {
	Nonce []byte `json:"nonce"`
}

// Response answers a Challenge of the same kind.
type Response struct {
	RSA   *RSASignature   `json:"rsa_signature"`
	ECDSA *ECDSASignature `json:"ecdsa_signature"`
}

// RSASignature is RSA-PSS with SHA-256 (RFC 8017, section 8.1) over Digest.
type RSASignature struct {
	Nonce     []byte `json:"nonce"`
	Signature []byte `json:"signature"`
}

// ECDSASignature is ECDSA over Digest, with both numbers in big-endian bytes.
type ECDSASignature struct {
	Nonce []byte `json:"nonce"`
	R     []byte `json:"r"`
	S     []byte `json:"s"`
}

// Digest is what gets signed: the SHA-256 of the server's nonce followed by the agent's.
func Digest(server, agent []byte) ([]byte, error) {
	if len(server) != NonceSize || len(agent) != NonceSize {
		return nil, fmt.Errorf("nonces have %d and %d bytes, want %d", len(server), len(agent), NonceSize)
	}
	digest := sha256.New()
	digest.Write(server)
	digest.Write(agent)
	return digest.Sum(nil), nil
}

// Fingerprint is the SHA-1 of a certificate's DER in lower-case hex.
func Fingerprint(cert *x509.Certificate) string {
	sum := sha1.Sum(cert.Raw) //nolint:gosec // see the import
	return hex.EncodeToString(sum[:])
}

// SerialNumber is a serial number in lower-case hex with an even number of digits.
func SerialNumber(serial *big.Int) string { return hex.EncodeToString(serial.Bytes()) }

// CheckKey says why a certificate's key may not take part, or nil.
func CheckKey(cert *x509.Certificate) error {
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < MinRSABits || bits > MaxRSABits {
			return fmt.Errorf("RSA key has %d bits, want %d to %d", bits, MinRSABits, MaxRSABits)
		}
		return nil
	case *ecdsa.PublicKey:
		if bits := key.Curve.Params().BitSize; bits < MinECDSABits {
			return fmt.Errorf("ECDSA key has %d bits, want at least %d", bits, MinECDSABits)
		}
		return nil
	}
	return errors.New("key is neither RSA nor ECDSA")
}

// CheckLeaf says why a certificate cannot prove possession of its key, or nil.
func CheckLeaf(leaf *x509.Certificate) error {
	if err := CheckKey(leaf); err != nil {
		return fmt.Errorf("leaf certificate: %w", err)
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("leaf certificate is not for digital signatures")
	}
	if leaf.IsCA {
		return errors.New("leaf certificate is an authority's")
	}
	return nil
}
