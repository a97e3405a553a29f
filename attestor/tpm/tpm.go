// Package tpm is node attestation by a TPM 2.0: the machine shows its endorsement key, proves by credential
// activation that the attestation key it signs with lives in the same TPM, and quotes its PCRs.
//
// This package holds the names, the configuration and the messages. TPM structures travel in the TPM's own
// encoding.
package tpm

import (
	"crypto/sha256"

	"github.com/assay-id/assay/attestor"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "tpm"

const (
	// SecretSize and NonceSize are the sizes in bytes of what the server makes.
	SecretSize, NonceSize = 32, 32
	// DigestSize is the size in bytes of a register of the SHA-256 bank.
	DigestSize = sha256.Size
)

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// Path is the TPM: a device, or the Unix socket of a software TPM.
	Path string `hcl:"tpm_path,optional"`
	// EK says which endorsement key to show, "rsa" or "ecc".
	EK string `hcl:"endorsement_key,optional"`
	// EndorsementPassword is that of the TPM's endorsement hierarchy, if it has one.
	EndorsementPassword string `hcl:"endorsement_hierarchy_password,optional"`
}

// ServerConfig is the server's configuration block. One of the first two must be set.
type ServerConfig struct {
	// EKHashes are the endorsement keys that are accepted, as "assay-agent" says them: the SHA-256 of
	// their public keys (DER) in hex.
	EKHashes []string `hcl:"ek_hashes,optional"`
	// EKCAPath names a file of the authorities whose endorsement key certificates are accepted: PEM.
	EKCAPath string `hcl:"ek_ca_path,optional"`
	// PCRs are the registers that become selectors.
	PCRs []int `hcl:"pcrs,optional"`
}

// Evidence is the payload.
type Evidence struct {
	// EK and AK are public areas (TPMT_PUBLIC).
	EK []byte `json:"ek"`
	AK []byte `json:"ak"`
	// EKCert is the manufacturer's certificate of EK in DER, if the TPM has one.
	EKCert []byte `json:"ek_cert,omitempty"`
}

// Challenge holds a secret that only the TPM of both keys can recover, and asks for a quote.
type Challenge struct {
	Credential []byte `json:"credential"`
	Secret     []byte `json:"secret"`
	Nonce      []byte `json:"nonce"`
	PCRs       []int  `json:"pcrs"`
}

// Response is the recovered secret and the quote (TPMS_ATTEST, TPMT_SIGNATURE) over the registers.
type Response struct {
	Secret    []byte   `json:"secret"`
	Quote     []byte   `json:"quote"`
	Signature []byte   `json:"signature"`
	Values    [][]byte `json:"values"`
}

// QualifyingData is what a quote must hold: the nonce, bound to the trust domain and the agent's own key that
// it is for, so that it is of use to no other request.
func QualifyingData(nonce []byte, trustDomain string, own attestor.KeyHash) []byte {
	digest := sha256.New()
	digest.Write([]byte("assay tpm quote 2\x00" + trustDomain + "\x00"))
	digest.Write(own[:])
	digest.Write(nonce)
	return digest.Sum(nil)
}
