package lab_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/test/fake/dns"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
	"github.com/assay-id/assay/test/lab/swtpm"
)

// TestNodesByWhatTheyHave: our own agents prove a host certificate of ssh-keygen, a name in DNS and a device
// identity in a TPM; test/compat has SPIRE's agent do so.
func TestNodesByWhatTheyHave(t *testing.T) {
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		lab.Missing(t, "ssh-keygen (Debian package openssh-client)", err)
	}
	names, err := dns.Start(map[string][]netip.Addr{"web1.example.org": {netip.MustParseAddr("127.0.0.1")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(names.Close)
	files := t.TempDir()
	devices, err := swtpm.NewDevIDAuthority(files, "devices")
	if err != nil {
		t.Fatal(err)
	}
	ca, host := filepath.Join(files, "ca"), filepath.Join(files, "host")
	for _, args := range [][]string{
		{"-q", "-t", "ed25519", "-N", "", "-f", ca}, {"-q", "-t", "rsa", "-N", "", "-f", host},
		{"-q", "-s", ca, "-h", "-I", "machine 7", "-n", "ssh1.example.org", "-V", "+1h", host + ".pub"},
	} {
		if out, err := exec.CommandContext(t.Context(), "ssh-keygen", args...).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
		}
	}
	m, tpms := newMachines(t, fmt.Sprintf(`node_attestor "sshpop" {
  cert_authorities_path = %q
  canonical_domain      = "example.org"
  agent_path_template   = "ssh/{{ .Hostname }}"
}
node_attestor "http_challenge" {
  allowed_dns_patterns = ["web[0-9]\\.example\\.org"]
  allowed_networks     = ["127.0.0.1/32"]
  dns_server           = %q
}
node_attestor "tpm_devid" {
  devid_ca_path       = %q
  endorsement_ca_path = TPMS
}
`, ca+".pub", names.Address(), devices.Path), "one")
	devID, err := devices.Provision(m.ctx, tpms["one"], files, "device-1", tpm2.TPMAlgECC, "secret", nil)
	if err != nil {
		t.Fatal(err)
	}
	agent := func(name, block string) *site.Agent {
		a, err := m.NewAgent(m.ctx, name, site.AgentOptions{Blocks: "node_attestor " + block + "\nworkload_attestor \"unix\" {}\n"})
		if err != nil {
			t.Fatal(err)
		}
		m.watched(a, name)
		return a
	}
	web := `"http_challenge" { hostname = "Web1.example.org" }`
	m.joins(agent("ssh", fmt.Sprintf("\"sshpop\" {\n  host_key_path = %q\n  host_cert_path = %q\n}", host, host+"-cert.pub")))
	m.joins(agent("web", strings.NewReplacer("{ ", "{\n", " }", "\n}").Replace(web)))
	m.joins(agent("devid", fmt.Sprintf("\"tpm_devid\" {\n  devid_cert_path = %q\n  devid_priv_path = %q\n  devid_pub_path = %q\n  tpm_device_path = %q\n  devid_password = \"secret\"\n}", devID.Cert, devID.Priv, devID.Pub, tpms["one"])))
	for path, want := range map[string]struct {
		selector string
		reattest bool
	}{
		"/spire/agent/ssh/ssh1":                                     {"sshpop:key-id:machine 7", true},
		"/spire/agent/http_challenge/web1.example.org":              {"http_challenge:hostname:web1.example.org", false},
		"/spire/agent/tpm_devid/" + tpmchip.Fingerprint(devID.Leaf): {"tpm_devid:subject:cn:device-1", true},
	} {
		a, there := m.agents()[path]
		found := false
		for _, s := range a.Selectors {
			found = found || s.Type+":"+s.Value == want.selector
		}
		if !there || !found || a.Reattest != want.reattest {
			t.Errorf("%s: %+v, want %+v", path, a, want)
		}
	}
	t.Run("a name is believed once", func(t *testing.T) {
		m := m.in(t)
		m.refused(agent("twin", strings.NewReplacer("{ ", "{\n", " }", "\n}").Replace(web)), "attestation data has already been used")
	})
}
