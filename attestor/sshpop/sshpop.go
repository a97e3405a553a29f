// Package sshpop is node attestation by the SSH host certificate that the machine already has: the agent
// shows the certificate and signs a challenge with the host key.
//
// This package holds the names, the configuration and the messages, which are SPIRE's byte for byte, so that
// either side works with SPIRE's other one. Both sides add a nonce and what is signed is the SHA-256 of both,
// so neither can have the other sign or verify something of its choice; in particular nothing that an SSH
// client would take for a host key's signature.
package sshpop

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/ssh"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "sshpop"

const (
	// NonceSize is the size in bytes of either side's nonce.
	NonceSize = 32
	// MaxCertificate is the largest certificate in bytes.
	MaxCertificate = 32 << 10
	// MaxSignature is the largest signature in bytes: RSA of the largest key.
	MaxSignature = MaxRSABits / 8
	// MinRSABits and MaxRSABits bound RSA keys.
	MinRSABits, MaxRSABits = 2048, 8192
)

// AgentConfig is the agent's configuration block. The defaults are sshd's.
type AgentConfig struct {
	// HostKeyPath names the private key in OpenSSH's or PEM form, not encrypted.
	HostKeyPath string `hcl:"host_key_path,optional"`
	// HostCertPath names its certificate, as ssh-keygen -s -h writes it.
	HostCertPath string `hcl:"host_cert_path,optional"`
}

// ServerConfig is the server's configuration block. One of the first two must be set; both count.
type ServerConfig struct {
	// CertAuthorities are the keys whose host certificates are accepted, each a line as in authorized_keys.
	CertAuthorities []string `hcl:"cert_authorities,optional"`
	// CertAuthoritiesPath names a file of such lines.
	CertAuthoritiesPath string `hcl:"cert_authorities_path,optional"`
	// CanonicalDomain is the domain that the host's name must be in; it is cut from the name.
	CanonicalDomain string `hcl:"canonical_domain,optional"`
	// AgentPathTemplate makes the agent's path.
	AgentPathTemplate string `hcl:"agent_path_template,optional"`
}

// Evidence is the payload: the certificate in SSH's wire form.
type Evidence struct {
	Certificate []byte
}

// Challenge is what the server asks.
type Challenge struct {
	Nonce []byte
}

// Response answers it: Signature is over Digest.
type Response struct {
	Nonce     []byte
	Signature *ssh.Signature
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

// Fingerprint names a certificate: the SHA-256 of its wire form in base64 for URLs, without padding.
func Fingerprint(cert *ssh.Certificate) string {
	sum := sha256.Sum256(cert.Marshal())
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// keyTypes are the kinds of keys that take part: no DSA, no security keys, which machines do not have, and no
// certificates in a key's place.
var keyTypes = []string{ssh.KeyAlgoRSA, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoED25519}

// CheckKey says why a key may not take part, or nil.
func CheckKey(key ssh.PublicKey) error {
	if key == nil || !slices.Contains(keyTypes, key.Type()) {
		return errors.New("key is neither RSA nor ECDSA nor Ed25519")
	}
	inner, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return errors.New("key is neither RSA nor ECDSA nor Ed25519")
	}
	switch key := inner.CryptoPublicKey().(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < MinRSABits || bits > MaxRSABits {
			return fmt.Errorf("RSA key has %d bits, want %d to %d", bits, MinRSABits, MaxRSABits)
		}
	case *ecdsa.PublicKey:
		if _, err := key.ECDH(); err != nil {
			return errors.New("ECDSA key is no point on its curve")
		}
	}
	return nil
}

// ParseCertificate reads a certificate in wire form and checks what it must be whoever signed it.
func ParseCertificate(wire []byte) (*ssh.Certificate, error) {
	if len(wire) == 0 {
		return nil, errors.New("no certificate")
	}
	if len(wire) > MaxCertificate {
		return nil, fmt.Errorf("certificate has %d bytes, the limit is %d", len(wire), MaxCertificate)
	}
	key, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return nil, errors.New("certificate cannot be read")
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("it is a key without a certificate")
	}
	return cert, Check(cert)
}

// Check says why a certificate is none of a host, or nil. Who signed it is not looked at.
func Check(cert *ssh.Certificate) error {
	switch {
	case cert.CertType != ssh.HostCert:
		return errors.New("certificate is not a host's")
	case len(cert.ValidPrincipals) == 0:
		return errors.New("certificate names no host")
	case len(cert.CriticalOptions) > 0:
		return errors.New("certificate has critical options, and hosts have none that are known")
	}
	if err := CheckKey(cert.Key); err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	return nil
}
