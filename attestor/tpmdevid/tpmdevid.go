// Package tpmdevid is node attestation by a device identity (DevID, IEEE 802.1AR) whose key lives in a TPM 2.0:
// the agent shows the DevID's certificate, has the TPM certify that the key is in it, and proves by credential
// activation which TPM that is.
//
// This package holds the names, the configuration and the messages, which are SPIRE's byte for byte, so that
// either side works with SPIRE's other one. TPM structures travel in the TPM's own encoding.
package tpmdevid

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "tpm_devid"

const (
	// NonceSize is the size in bytes of what the DevID signs, SecretSize that of what is encrypted to the
	// endorsement key.
	NonceSize, SecretSize = 32, 32
	// MaxIntermediates is how many certificates may follow the DevID's, MaxCertificate the largest in bytes.
	MaxIntermediates, MaxCertificate = 4, 8 << 10
)

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// CertPath names the DevID's certificate, intermediates after it: PEM.
	CertPath string `hcl:"devid_cert_path"`
	// PrivPath and PubPath name the key as the TPM gave it out when it was made (TPM2B_PRIVATE and TPMT_PUBLIC;
	// tpm2_create's files will do).
	PrivPath string `hcl:"devid_priv_path"`
	PubPath  string `hcl:"devid_pub_path"`
	// DevicePath is the TPM: a device, or the Unix socket of a software TPM; without it the one in /dev.
	DevicePath string `hcl:"tpm_device_path,optional"`
	// The passwords of the key, and of the TPM's hierarchies, where they have one.
	Password            string `hcl:"devid_password,optional"`
	OwnerPassword       string `hcl:"owner_hierarchy_password,optional"`
	EndorsementPassword string `hcl:"endorsement_hierarchy_password,optional"`
}

// ServerConfig is the server's configuration block.
type ServerConfig struct {
	// DevIDCAPath names a file of the authorities whose DevIDs are accepted: PEM.
	DevIDCAPath string `hcl:"devid_ca_path"`
	// EndorsementCAPath names a file of the authorities whose TPMs are accepted: PEM.
	EndorsementCAPath string `hcl:"endorsement_ca_path"`
}

// Evidence is the payload.
type Evidence struct {
	// DevIDCert is the chain in DER, the DevID's first.
	DevIDCert [][]byte
	// DevIDPub is its key's public area (TPMT_PUBLIC).
	DevIDPub []byte

	// EKCert is the manufacturer's certificate of the endorsement key, EKPub the key.
	EKCert []byte
	EKPub  []byte

	AKPub []byte

	// CertifiedDevID is what the attestation key says of the DevID (TPMS_ATTEST), with its signature
	// (TPMT_SIGNATURE).
	CertifiedDevID         []byte
	CertificationSignature []byte
}

// Challenge is what the server asks.
type Challenge struct {
	// DevID is a nonce for the DevID to sign.
	DevID          []byte
	CredActivation *Credential
}

// Credential holds a secret that only the TPM of both keys can recover.
type Credential struct {
	Credential []byte
	Secret     []byte
}

// Response is the signature by the DevID and the recovered secret.
type Response struct {
	DevID          []byte
	CredActivation []byte
}
