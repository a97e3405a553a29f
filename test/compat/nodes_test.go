package compat

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

// The real spire-agent and ours, by node attestors that both have.

// TestSPIREAgentBySSHPoP has a host certificate made by the real ssh-keygen.
func TestSPIREAgentBySSHPoP(t *testing.T) {
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		lab.Missing(t, "ssh-keygen (Debian package openssh-client)", err)
	}
	for _, kind := range []string{"rsa", "ed25519"} {
		t.Run(kind, func(t *testing.T) {
			var ca, host string
			s := newSite(t, func(s *site.Site) {
				ca, host = filepath.Join(s.Dir, "ca"), filepath.Join(s.Dir, "host")
				keygen(t, "-t", "ed25519", "-f", ca)
				keygen(t, "-t", kind, "-f", host)
				keygen(t, "-s", ca, "-h", "-I", "machine 7", "-n", "web1.example.org", "-V", "+1h", host+".pub")
				s.ServerBlocks = fmt.Sprintf("node_attestor \"sshpop\" {\n  cert_authorities_path = %q\n  canonical_domain = \"example.org\"\n  agent_path_template = \"sshpop/{{ .Hostname }}\"\n}", ca+".pub")
			})
			agent := startSPIREAgent(t, s, fmt.Sprintf(
				`"sshpop" { plugin_data { host_key_path = %q host_cert_path = %q } }`, host, host+"-cert.pub"))
			if got := onlyAgent(t, s); got != "/spire/agent/sshpop/web1" {
				t.Fatalf("the agent is %s", got)
			}
			serveThroughAlias(t, s, agent.socket, &types.Selector{Type: "sshpop", Value: "key-id:machine 7"})
		})
	}
}

// serveThroughAlias has a workload served because of what was proved of its node.
func serveThroughAlias(t *testing.T, s *site.Site, socket string, proved *types.Selector) {
	t.Helper()
	client := entries(t, s)
	alias := newEntry("/spire/server", "/machines")
	alias.Selectors = []*types.Selector{proved}
	createEntry(t, client, alias)
	createEntry(t, client, newEntry("/machines", "/shop"))
	watch(t, socket).until(t, "X509-SVID", hasID("/shop"))
}

func keygen(t *testing.T, args ...string) {
	t.Helper()
	if args[0] == "-t" {
		args = append(args, "-N", "", "-q")
	}
	cmd := exec.CommandContext(t.Context(), "ssh-keygen", args...)
	cmd.Stdin, cmd.Env = strings.NewReader(""), append(os.Environ(), "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
	}
}
