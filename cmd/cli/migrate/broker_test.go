package migrate

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor/k8s"
	"github.com/assay-id/assay/conf"
)

func TestBroker(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.conf")
	text := `agent {
  trust_domain = "example.org"
  experimental { broker {
    socket_path = "/run/spire/broker/broker.sock"
    bind_address = "0.0.0.0:8443"
    brokers = [
      { id = "spiffe://example.org/mesh" allowed_reference_types = [
          { type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" },
          { type_url = "type.googleapis.com/spiffe.broker.KubernetesObjectReference" allow_over_tcp = true } ] },
      { id = "spiffe://example.org/any" allowed_reference_types = [ { type_url = "*" } ] },
    ]
    colour = "blue"
  } }
}
plugins {
  WorkloadAttestor "k8s" { plugin_data {
    experimental { broker { access_policy = "enforced" brokers = [ { id = "spiffe://example.org/mesh" pod_reference_scope = "cluster" } ] } }
  } }
}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	result, err := Agent(path, Shape{File: conf.AgentShape(), Plugins: map[string]map[string]func() any{
		"workload_attestor": {k8s.Type: func() any { return new(k8s.Config) }},
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := `  broker {
    socket_path  = "/run/spire/broker/broker.sock"
    bind_address = "0.0.0.0:8443"
    allow "spiffe://example.org/mesh" {
      reference_types          = ["type.googleapis.com/spiffe.broker.WorkloadPIDReference"]
      reference_types_over_tcp = ["type.googleapis.com/spiffe.broker.KubernetesObjectReference"]
    }
    allow "spiffe://example.org/any" {
      reference_types = ["*"]
    }
  }
`
	if !strings.Contains(string(result.Config), want) {
		t.Errorf("got\n%s", result.Config)
	}
	told := ""
	for _, r := range result.Remarks {
		told += r.line(path) + "\n"
	}
	for _, want := range []string{"left out agent.experimental.broker.colour", "left out plugins.WorkloadAttestor.k8s.experimental; Brokers may refer to pods of this node without it"} {
		if !strings.Contains(told, want) {
			t.Errorf("told\n%s", told)
		}
	}
}
