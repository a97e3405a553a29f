// Package httpchallenge is node attestation by a name in DNS: the agent serves a nonce at a well-known path
// over HTTP, and the server fetches it from the host of the name that the agent claims.
//
// This package holds the names, the configuration and the messages, which are SPIRE's byte for byte, so that
// either side works with SPIRE's other one.
package httpchallenge

import (
	"encoding/base64"
	"errors"
	"regexp"
	"strings"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "http_challenge"

const (
	// NonceSize is the size in bytes of the nonce.
	NonceSize = 32
	// Answer is what the agent answers the challenge with once the nonce can be fetched. SPIRE's plugin
	// protocol has no empty answers.
	Answer = "\n"
	// maxName and maxLabel are the longest host name and part of it (RFC 1035, section 2.3.4).
	maxName, maxLabel = 253, 63
)

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// HostName is the name that the server will ask; by default the machine's.
	HostName string `hcl:"hostname,optional"`
	// AgentName tells agents behind one name apart.
	AgentName string `hcl:"agentname,optional"`
	// Port is where the agent listens during attestation; 0 is any.
	Port int `hcl:"port,optional"`
	// AdvertisedPort is the port that the server is told, if another leads to Port.
	AdvertisedPort int `hcl:"advertised_port,optional"`
}

// ServerConfig is the server's configuration block.
type ServerConfig struct {
	// AllowedDNSPatterns are regular expressions, one of which a name must match as a whole.
	AllowedDNSPatterns []string `hcl:"allowed_dns_patterns,optional"`
	// RequiredPort is the only port that is asked.
	RequiredPort *int `hcl:"required_port,optional"`
	// AllowNonRootPorts allows ports that any user may listen on; by default they are allowed.
	AllowNonRootPorts *bool `hcl:"allow_non_root_ports,optional"`
	// TOFU believes a name once; by default it does.
	TOFU *bool `hcl:"tofu,optional"`
	// AllowedNetworks are what a name's address must be in; by default anything but this machine itself,
	// link-local addresses and the like.
	AllowedNetworks []string `hcl:"allowed_networks,optional"`
	// DNSServer is asked in place of the system's resolver, as "10.0.0.53:53".
	DNSServer string `hcl:"dns_server,optional"`
}

// Evidence is the payload: what to fetch where.
type Evidence struct {
	HostName  string `json:"hostname"`
	AgentName string `json:"agentname"`
	Port      int    `json:"port"`
}

// Challenge is what must be there.
type Challenge struct {
	Nonce string `json:"nonce"`
}

// IsNonce reports whether a text is a nonce in its form.
func IsNonce(text string) bool {
	raw, err := base64.URLEncoding.DecodeString(text)
	return err == nil && len(raw) == NonceSize
}

// Path is where an agent's nonce is fetched.
func Path(agentName string) string {
	return "/.well-known/spiffe/nodeattestor/http_challenge/" + agentName + "/challenge"
}

var (
	agentName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9-]{0,31}$`)
	number    = regexp.MustCompile(`^([0-9]+|0x[0-9a-f]*)$`)
	label     = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?$`)
)

// CheckAgentName says what is wrong with an agent's name, or nil.
func CheckAgentName(name string) error {
	if !agentName.MatchString(name) {
		return errors.New("agent name must be a letter, then at most 31 letters, digits and hyphens")
	}
	return nil
}

// HostName reads a host name: in lower case, for names in DNS have no case and an agent's ID has.
func HostName(text string) (string, error) {
	name := strings.ToLower(text)
	if name == "" || len(name) > maxName {
		return "", errors.New("host name is empty or too long")
	}
	for part := range strings.SplitSeq(name, ".") {
		if len(part) > maxLabel || !label.MatchString(part) {
			return "", errors.New("host name is none of DNS")
		}
	}
	// "1.2.3.4" and, with what some resolvers make of them, "127.1" and "0x7f000001" are addresses.
	if number.MatchString(name[strings.LastIndexByte(name, '.')+1:]) {
		return "", errors.New("host name is an address")
	}
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return "", errors.New("host name is this machine's own, whichever it is")
	}
	return name, nil
}
