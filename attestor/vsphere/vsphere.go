// Package vsphere is node attestation of a virtual machine on VMware vSphere: the server writes a nonce
// into the machine's guestinfo through vCenter, and the agent, inside, reads it and answers.
//
// This package holds the names, the configuration and the messages.
package vsphere

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "vsphere"

// NonceSize is the size in bytes of either side's nonce.
const NonceSize = 32

// KeyPrefix begins the guestinfo keys that nonces are written to; the rest is the session, in hex.
const KeyPrefix = "guestinfo.assay.nonce."

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// Vmtoolsd is the program of open-vm-tools that reads guestinfo.
	Vmtoolsd string `hcl:"vmtoolsd_path,optional"`
	// DMI is where the kernel shows the machine's own numbers.
	DMI string `hcl:"dmi_path,optional"`
}

// ServerConfig is the server's configuration block.
type ServerConfig struct {
	// URL is vCenter's, as https://vcenter.example.org.
	URL string `hcl:"vcenter_url"`
	// Username is the account that the server logs in with, PasswordFile the file with its password.
	Username     string `hcl:"username"`
	PasswordFile string `hcl:"password_file"`
	// CAPath names a file of the authorities that vCenter's certificate is from: PEM; without it, those
	// of the system.
	CAPath string `hcl:"ca_path,optional"`
	// Folders are the folders, as inventory paths, whose virtual machines are accepted, with those in
	// folders below.
	Folders []string `hcl:"folders"`
	// Clusters, if any are named, are those that a virtual machine must run in.
	Clusters []string `hcl:"clusters,optional"`
	// RequireSecureRPC refuses virtual machines in which any user can read guestinfo.
	RequireSecureRPC bool `hcl:"require_secure_rpc,optional"`
	// Tags asks vCenter for the tags of virtual machines.
	Tags bool `hcl:"tags,optional"`
}

// Evidence is the payload: who the machine says it is.
type Evidence struct {
	BIOSUUID string `json:"bios_uuid"`
	Nonce    []byte `json:"nonce"`
}

// Challenge says where the nonce is to be found.
type Challenge struct {
	Key string `json:"key"`
}

// Response proves that the nonce was read.
type Response struct {
	MAC []byte `json:"mac"`
}

var (
	uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	keyForm  = regexp.MustCompile(`^guestinfo\.assay\.nonce\.[0-9a-f]{32}$`)
)

// IsUUID reports whether a text is a UUID in lower case.
func IsUUID(text string) bool { return uuidForm.MatchString(text) }

// IsKey reports whether a text is a key that a nonce can be at: an agent reads no other.
func IsKey(text string) bool { return keyForm.MatchString(text) }

// Decode reads one JSON message.
func Decode(message []byte, into any) error {
	if json.Unmarshal(message, into) != nil {
		return errors.New("message is not the JSON it should be") // the parser's text would echo it
	}
	return nil
}

// MAC is what an agent answers with: the nonce is the key, and the transcript has all that the two sides
// must agree on, each part with its length, so that nothing can be taken for something else.
func MAC(nonce, agentNonce []byte, key, trustDomain, uuid string) []byte {
	mac := hmac.New(sha256.New, nonce)
	for _, part := range []string{"assay vsphere 1", string(agentNonce), key, trustDomain, uuid} {
		var length [4]byte
		binary.BigEndian.PutUint32(length[:], uint32(len(part))) //nolint:gosec // all of them are short
		mac.Write(length[:])
		mac.Write([]byte(part))
	}
	return mac.Sum(nil)
}

// UUIDOfSerial reads the UUID out of the serial number that VMware gives its machines, as
// "VMware-42 1a 9e 3f 5c 00 11 22-33 44 55 66 77 88 99 aa". It is the better source: the kernel shows the
// UUID itself with its first fields turned around on some hardware versions.
func UUIDOfSerial(serial string) (string, bool) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(serial), "VMware-")
	hex := strings.ToLower(strings.NewReplacer(" ", "", "-", "").Replace(rest))
	if !ok || len(hex) != 32 {
		return "", false
	}
	uuid := strings.Join([]string{hex[:8], hex[8:12], hex[12:16], hex[16:20], hex[20:]}, "-")
	return uuid, IsUUID(uuid)
}
