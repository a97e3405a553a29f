// Package vsphere is node attestation of a virtual machine on VMware vSphere: the server writes a nonce
// into the machine's guestinfo through vCenter, and the agent, inside, reads it and answers.
//
// This package holds the names, the configuration and the messages.
package vsphere

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strings"

	"github.com/assay-id/assay/attestor"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "vsphere"

// NonceSize is the size in bytes of either side's nonce.
const NonceSize = 32

// KeyPrefix begins the guestinfo keys that nonces are written to, AnswerPrefix those that the guest writes its
// answers to; the rest is the session, in hex, and the same in both.
const KeyPrefix, AnswerPrefix = "guestinfo.assay.nonce.", "guestinfo.assay.answer."

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// Vmtoolsd is the program of open-vm-tools that reads guestinfo.
	Vmtoolsd string `hcl:"vmtoolsd_path,optional"`
	// DMI is where the kernel shows the machine's own numbers.
	DMI string `hcl:"dmi_path,optional"`
	// VCenter is the server's name for the vCenter that the machine is in, where it knows several.
	VCenter string `hcl:"vcenter,optional"`
}

// ServerConfig is the server's configuration block: one vCenter, or blocks of several.
type ServerConfig struct {
	URL              string   `hcl:"vcenter_url,optional"`
	Username         string   `hcl:"username,optional"`
	PasswordFile     string   `hcl:"password_file,optional"`
	CAPath           string   `hcl:"ca_path,optional"`
	Folders          []string `hcl:"folders,optional"`
	Clusters         []string `hcl:"clusters,optional"`
	RequireSecureRPC bool     `hcl:"require_secure_rpc,optional"`
	GuestAnswers     *bool    `hcl:"guest_answers,optional"`
	Tags             bool     `hcl:"tags,optional"`
	TagsInterval     string   `hcl:"tags_interval,optional"`

	VCenters []VCenter `hcl:"vcenter,block"`
}

// VCenter is one vCenter.
type VCenter struct {
	// Name is what agents call it.
	Name string `hcl:"name,label"`
	// URL is its address, as https://vcenter.example.org.
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
	// GuestAnswers has the guest write its answer into guestinfo; by default it must.
	GuestAnswers *bool `hcl:"guest_answers,optional"`
	// Tags asks vCenter for the tags of virtual machines, TagsInterval says how often.
	Tags         bool   `hcl:"tags,optional"`
	TagsInterval string `hcl:"tags_interval,optional"`
}

// All are the vCenters, however they were written.
func (c *ServerConfig) All() ([]VCenter, error) {
	one := VCenter{
		URL: c.URL, Username: c.Username, PasswordFile: c.PasswordFile, CAPath: c.CAPath, Folders: c.Folders, Clusters: c.Clusters,
		RequireSecureRPC: c.RequireSecureRPC, GuestAnswers: c.GuestAnswers, Tags: c.Tags, TagsInterval: c.TagsInterval,
	}
	if len(c.VCenters) == 0 {
		return []VCenter{one}, nil
	}
	if !reflect.DeepEqual(one, VCenter{}) {
		return nil, errors.New("write the keys of a vCenter into its vcenter block, or have no such block")
	}
	seen := map[string]bool{}
	for _, v := range c.VCenters {
		if v.Name == "" || seen[v.Name] {
			return nil, fmt.Errorf("vcenter %q: each needs a name of its own", v.Name)
		}
		seen[v.Name] = true
	}
	return c.VCenters, nil
}

// Evidence is the payload: who the machine says it is.
type Evidence struct {
	BIOSUUID string `json:"bios_uuid"`
	Nonce    []byte `json:"nonce"`
	// VCenter is where to look for it; empty: everywhere.
	VCenter string `json:"vcenter,omitempty"`
}

// Challenge says where the nonce is to be found, and where the guest must write its answer: empty if nowhere.
type Challenge struct {
	Key    string `json:"key"`
	Answer string `json:"answer,omitempty"`
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

// IsAnswer reports whether a text is the key that the answer to a nonce at another key is written to: an agent
// writes no other.
func IsAnswer(answer, key string) bool {
	return IsKey(key) && answer == AnswerPrefix+strings.TrimPrefix(key, KeyPrefix)
}

// MAC is what an agent answers with: the nonce is the key, and the transcript has all that the two sides
// must agree on, each part with its length, so that nothing can be taken for something else. What it is for is
// the agent's own key: an answer is of no use to somebody else's request.
func MAC(nonce, agentNonce []byte, key, trustDomain, uuid string, own attestor.KeyHash) []byte {
	mac := hmac.New(sha256.New, nonce)
	for _, part := range []string{"assay vsphere 2", string(agentNonce), key, trustDomain, uuid, string(own[:])} {
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
