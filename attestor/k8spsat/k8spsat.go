// Package k8spsat is node attestation by a projected service account token: the kubelet puts a token, bound
// to the agent's pod and meant for the server alone, into the pod, and the server has the cluster's own API
// server say whether it is good, and on which node the pod runs.
//
// The message is SPIRE's byte for byte, so that either side works with SPIRE's other one.
package k8spsat

import (
	"encoding/json"
	"errors"

	"github.com/assay-id/assay/attestor"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "k8s_psat"

// DefaultTokenPath is where the token is mounted, as SPIRE has it.
const DefaultTokenPath = "/var/run/secrets/tokens/spire-agent" //nolint:gosec // a path

// DefaultAudience is whom the token must be for.
const DefaultAudience = "spire-server"

// MaxToken is the largest token in bytes. Real ones have some 1,500.
const MaxToken = 16 << 10

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// Cluster is the name under which the server knows the cluster.
	Cluster string `hcl:"cluster"`
	// TokenPath names the projected token; DefaultTokenPath if empty.
	TokenPath string `hcl:"token_path,optional"`
}

// ServerConfig is the server's configuration block.
type ServerConfig struct {
	Clusters []Cluster `hcl:"cluster,block"`
}

// Cluster is one that nodes may come from.
type Cluster struct {
	// Name is what agents call it; it is part of their IDs.
	Name string `hcl:"name,label"`
	// ServiceAccounts are those that agents may run under, as "namespace:name".
	ServiceAccounts []string `hcl:"service_account_allow_list"`
	// Audience is whom tokens must be for, one of these; not set: DefaultAudience; empty: the API server.
	Audience []string `hcl:"audience,optional"`
	// KubeConfig names a kubeconfig file; empty: the cluster that the server itself runs in.
	KubeConfig string `hcl:"kube_config_file,optional"`
	// NodeLabels and PodLabels are the keys of labels that become selectors.
	NodeLabels []string `hcl:"allowed_node_label_keys,optional"`
	PodLabels  []string `hcl:"allowed_pod_label_keys,optional"`
	// UsePodUID makes the agent's ID from its pod's UID, not its node's.
	UsePodUID bool `hcl:"use_pod_uid_for_agent_id,optional"`
}

// Evidence is the payload.
type Evidence struct {
	Cluster string `json:"cluster"`
	Token   string `json:"token"`
}

// Parse reads a payload and refuses what cannot be one.
func Parse(payload []byte) (Evidence, error) {
	if len(payload) > attestor.MaxEvidence {
		return Evidence{}, errors.New("evidence is too large")
	}
	var e Evidence
	switch {
	case json.Unmarshal(payload, &e) != nil: // the parser's text would echo the token
		return Evidence{}, errors.New("message is not the JSON it should be")
	case e.Cluster == "":
		return Evidence{}, errors.New("no cluster is named")
	case e.Token == "":
		return Evidence{}, errors.New("no token")
	case len(e.Token) > MaxToken:
		return Evidence{}, errors.New("token is too large")
	}
	return e, nil
}
