package conf

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const pidReference = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"

// brokerFile is an agent's file with a broker block.
func brokerFile(inner string) string {
	return `agent {
  trust_domain = "example.org"
  server_address = "localhost"
  data_dir = "/tmp/x"
  insecure_bootstrap = true
  broker {
` + inner + `
  }
}
node_attestor "join_token" {}
workload_attestor "unix" {}
`
}

func TestBroker(t *testing.T) {
	load := func(inner string) (*Agent, error) {
		return LoadAgent(write(t, "agent.hcl", brokerFile(inner)), nodes, workloads, Options{})
	}
	a, err := load(`socket_path = "/run/assay/agent/broker/broker.sock"
bind_address = "127.0.0.1:8443"
allow "spiffe://example.org/mesh" {
  reference_types = ["` + pidReference + `"]
}
allow "spiffe://other.test/mesh" {
  reference_types_over_tcp = ["*"]
}`)
	if err != nil {
		t.Fatal(err)
	}
	want := Broker{SocketPath: "/run/assay/agent/broker/broker.sock", Address: "127.0.0.1:8443", Allow: []BrokerGrant{
		{ID: spiffeid.RequireFromString("spiffe://example.org/mesh"), Types: map[string]bool{pidReference: false}},
		{ID: spiffeid.RequireFromString("spiffe://other.test/mesh"), Types: map[string]bool{"*": true}},
	}}
	if diff := cmp.Diff(want, a.Broker, cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	const allow = "\nallow \"spiffe://example.org/mesh\" { reference_types = [\"*\"] }"
	for name, c := range map[string]struct{ inner, want string }{
		"no address":               {allow, "6,3-9: Missing address; Brokers need somewhere to call"},
		"nobody":                   {`bind_address = "127.0.0.1:1"`, "6,3-9: Missing broker; Nobody may call yet"},
		"beside the Workload API":  {`socket_path = "/run/assay/agent/public/b.sock"` + allow, "7,15-47: Invalid socket path; "},
		"no port":                  {`bind_address = "127.0.0.1"` + allow, "7,16-27: Invalid address; "},
		"a name":                   {`bind_address = "example.org:1"` + allow, "7,16-31: Invalid address; "},
		"no SPIFFE ID":             {"bind_address = \"127.0.0.1:1\"\nallow \"mesh\" { reference_types = [\"*\"] }", `8,1-13: Invalid SPIFFE ID; "mesh" is no SPIFFE ID`},
		"a whole trust domain":     {"bind_address = \"127.0.0.1:1\"\nallow \"spiffe://example.org\" { reference_types = [\"*\"] }", "8,1-29: Invalid SPIFFE ID; "},
		"the same twice":           {`bind_address = "127.0.0.1:1"` + allow + allow, "9,1-34: Duplicate broker; "},
		"nothing to refer to":      {"bind_address = \"127.0.0.1:1\"\nallow \"spiffe://example.org/mesh\" {}", "8,1-34: Missing reference types; "},
		"a type that there is not": {"bind_address = \"127.0.0.1:1\"\nallow \"spiffe://example.org/mesh\" { reference_types = [\"type.googleapis.com/spiffe.broker.Nope\"] }", `8,1-34: Unknown reference type; "spiffe.broker.Nope" is nothing that this agent can look up; there are "spiffe.broker.WorkloadPIDReference" and "spiffe.broker.KubernetesObjectReference".`},
		"what is no type":          {"bind_address = \"127.0.0.1:1\"\nallow \"spiffe://example.org/mesh\" { reference_types = [\"pid\"] }", `8,1-34: Invalid reference type; "pid" is no type URL`},
		"a key that is not needed": {`bind_address = "127.0.0.1:1"` + allow + "\nbrokers = []", "9,1-8: Unsupported argument; "},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := load(c.inner); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
