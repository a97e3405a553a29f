package compat

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/test/fake/dns"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
	"github.com/assay-id/assay/test/lab/swtpm"
)

// The real spire-agent and ours, by node attestors that both have.

// TestSPIREAgentBySSHPoP has a host certificate made by the real ssh-keygen, for the kind of key that SPIRE looks
// for by default and signs with SHA-1.
func TestSPIREAgentBySSHPoP(t *testing.T) {
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		lab.Missing(t, "ssh-keygen (Debian package openssh-client)", err)
	}
	var ca, host string
	s := newSite(t, func(s *site.Site) {
		ca, host = filepath.Join(s.Dir, "ca"), filepath.Join(s.Dir, "host")
		keygen(t, "-t", "ed25519", "-f", ca)
		keygen(t, "-t", "rsa", "-f", host)
		keygen(t, "-s", ca, "-h", "-I", "machine 7", "-n", "web1.example.org", "-V", "+1h", host+".pub")
		s.ServerBlocks = fmt.Sprintf("node_attestor \"sshpop\" {\n  cert_authorities_path = %q\n  canonical_domain = \"example.org\"\n  agent_path_template = \"sshpop/{{ .Hostname }}\"\n}", ca+".pub")
	})
	agent := startSPIREAgent(t, s, fmt.Sprintf(
		`"sshpop" { plugin_data { host_key_path = %q host_cert_path = %q } }`, host, host+"-cert.pub"))
	if got := onlyAgent(t, s); got != "/spire/agent/sshpop/web1" {
		t.Fatalf("the agent is %s", got)
	}
	serveThroughAlias(t, s, agent.socket, &types.Selector{Type: "sshpop", Value: "key-id:machine 7"})
}

// TestSPIREAgentByHTTPChallenge asks a port that only root can listen on, so that the agent may re-attest.
func TestSPIREAgentByHTTPChallenge(t *testing.T) {
	port := 0
	for p := 1023; p > 600 && port == 0; p-- {
		if l, err := net.Listen("tcp", fmt.Sprintf(":%d", p)); err == nil {
			l.Close()
			port = p
		}
	}
	if port == 0 {
		lab.Missing(t, "a port below 1024", errors.New("none is to be had: run as root"))
	}
	names, err := dns.Start(map[string][]netip.Addr{"web1.example.org": {netip.MustParseAddr("127.0.0.1")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(names.Close)
	s := newSite(t, func(s *site.Site) {
		s.ServerBlocks = fmt.Sprintf("node_attestor \"http_challenge\" {\n  allowed_dns_patterns = [\"web[0-9].example.org\"]\n  allowed_networks = [\"127.0.0.1/32\"]\n  dns_server = %q\n  required_port = %d\n  tofu = false\n}", names.Address(), port)
	})
	block := fmt.Sprintf(`"http_challenge" { plugin_data { hostname = "web1.example.org" port = %d } }`, port)
	agent := startSPIREAgent(t, s, block)
	if got := onlyAgent(t, s); got != "/spire/agent/http_challenge/web1.example.org" {
		t.Fatalf("the agent is %s", got)
	}
	serveThroughAlias(t, s, agent.socket, &types.Selector{Type: "http_challenge", Value: "hostname:web1.example.org"})
	if _, err := s.ServerCLI(t.Context(), "agent", "evict", "-spiffeID", "spiffe://"+site.TrustDomain+onlyAgent(t, s)); err != nil {
		t.Fatal(err)
	}
	err = agent.WaitFor(patiently(t), "it to be back", func() error {
		out, err := s.ServerCLI(t.Context(), "agent", "count")
		if err == nil && !strings.HasPrefix(out, "1 ") {
			err = fmt.Errorf("got %s", out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSPIREAgentByTPMDevID has a software TPM, with a device identity.
func TestSPIREAgentByTPMDevID(t *testing.T) {
	if err := swtpm.Available(); err != nil {
		lab.Missing(t, "a software TPM", err)
	}
	maker, err := swtpm.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { maker.Close() })
	devices, err := swtpm.NewDevIDAuthority(maker.Dir(), "devices")
	if err != nil {
		t.Fatal(err)
	}
	socket, err := maker.Make(t.Context(), "one")
	if err != nil {
		t.Fatal(err)
	}
	roots, err := maker.Roots()
	if err != nil {
		t.Fatal(err)
	}
	d, err := devices.Provision(t.Context(), socket, maker.Dir(), "device-1", tpm2.TPMAlgECC, "secret", nil)
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, func(s *site.Site) {
		s.ServerBlocks = fmt.Sprintf("node_attestor \"tpm_devid\" {\n  devid_ca_path = %q\n  endorsement_ca_path = %q\n}", devices.Path, roots)
	})
	agent := startSPIREAgent(t, s, fmt.Sprintf(
		`"tpm_devid" { plugin_data { devid_cert_path = %q devid_priv_path = %q devid_pub_path = %q tpm_device_path = %q devid_password = "secret" } }`,
		d.Cert, d.Priv, d.Pub, socket))
	if got, want := onlyAgent(t, s), "/spire/agent/tpm_devid/"+tpmchip.Fingerprint(d.Leaf); got != want {
		t.Fatalf("the agent is %s, want %s", got, want)
	}
	serveThroughAlias(t, s, agent.socket, &types.Selector{Type: "tpm_devid", Value: "subject:cn:device-1"})
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
