package lab_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/object"

	"github.com/assay-id/assay/test/fake/vcenter"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
	"github.com/assay-id/assay/test/lab/swtpm"
)

// machines makes machines of the test's own: a software TPM each, and certificates.
type machines struct {
	*site.Site
	t     *testing.T
	ctx   context.Context
	tpms  *swtpm.Maker
	roots string
	ca    *x509.Certificate
	caKey *ecdsa.PrivateKey
}

// in are the machines of a part of a test.
func (m *machines) in(t *testing.T) *machines {
	c := *m
	c.t = t
	return &c
}

// newMachines starts a server that accepts what blocks say, in which CA and TPMS stand for the files with the
// authorities.
func newMachines(t *testing.T, blocks string, tpms ...string) (*machines, map[string]string) {
	t.Helper()
	if err := swtpm.Available(); err != nil {
		lab.Missing(t, "a software TPM", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	m := &machines{t: t, ctx: ctx}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	m.tpms, err = swtpm.New()
	must(err)
	t.Cleanup(func() { _ = m.tpms.Close() })
	sockets := map[string]string{}
	for _, name := range tpms {
		sockets[name], err = m.tpms.Make(ctx, name)
		must(err)
	}
	m.roots, err = m.tpms.Roots()
	must(err)
	m.Site, err = site.New(m.tpms.Dir(), "../../bin")
	must(err)
	m.caKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, Subject: pkix.Name{CommonName: "machines"}}
	m.ca = m.sign(template, template, &m.caKey.PublicKey)
	m.ServerBlocks = strings.NewReplacer("CA", fmt.Sprintf("%q", m.write("ca.pem", "CERTIFICATE", m.ca.Raw)), "TPMS", fmt.Sprintf("%q", m.roots)).Replace(blocks)
	must(m.StartServer(ctx))
	t.Cleanup(func() {
		if err := m.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("end of the server's log:\n%s", site.Tail(m.ServerLog(), 40))
		}
	})
	return m, sockets
}

func (m *machines) sign(template, parent *x509.Certificate, key any) *x509.Certificate {
	m.t.Helper()
	template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, m.caKey)
	if err != nil {
		m.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		m.t.Fatal(err)
	}
	return cert
}

func (m *machines) write(name, kind string, der []byte) string {
	m.t.Helper()
	path := filepath.Join(m.Dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return path
}

// certificate makes a machine's certificate, for the TPM of a hash if there is one, and returns the part's block.
func (m *machines) certificate(name, ek string) string {
	m.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		m.t.Fatal(err)
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature}
	if ek != "" {
		template.URIs = []*url.URL{{Scheme: "x509pop", Host: site.TrustDomain, Path: "/ek/" + ek}}
	}
	leaf := m.sign(template, m.ca, &key.PublicKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		m.t.Fatal(err)
	}
	return fmt.Sprintf("part \"x509pop\" {\n    private_key_path = %q\n    certificate_path = %q\n  }\n",
		m.write(name+".key", "PRIVATE KEY", der), m.write(name+".pem", "CERTIFICATE", leaf.Raw))
}

func tpmPart(socket string) string {
	return fmt.Sprintf("part \"tpm\" {\n    tpm_path = %q\n  }\n", socket)
}

// agent writes an agent that attests by a combination of parts.
func (m *machines) agent(name, combination string, o site.AgentOptions, parts ...string) *site.Agent {
	m.t.Helper()
	o.Blocks = fmt.Sprintf("node_attestor \"all\" {\n  combination = %q\n  %s}\nworkload_attestor \"unix\" {}\n%s", combination, strings.Join(parts, "  "), o.Blocks)
	a, err := m.NewAgent(m.ctx, name, o)
	if err != nil {
		m.t.Fatal(err)
	}
	m.watched(a, name)
	return a
}

// watched ends an agent with the test, and shows its log if that failed.
func (m *machines) watched(a *site.Agent, name string) {
	m.t.Cleanup(func() {
		if a.Process != nil {
			a.Kill()
		}
		if m.t.Failed() {
			m.t.Logf("end of the log of agent %s:\n%s", name, site.Tail(a.Log, 30))
		}
	})
}

// joins starts an agent and waits until it is attested.
func (m *machines) joins(a *site.Agent) {
	m.t.Helper()
	m.says(a, "agent attested")
}

// says starts an agent and waits until its log has a text.
func (m *machines) says(a *site.Agent, want string) {
	m.t.Helper()
	if err := a.Launch(); err != nil {
		m.t.Fatal(err)
	}
	m.until(a, want)
}

// until waits until an agent's log has a text.
func (m *machines) until(a *site.Agent, want string) {
	m.t.Helper()
	err := a.WaitFor(m.ctx, "the agent's log", func() error {
		text, err := os.ReadFile(a.Log)
		if err == nil && !strings.Contains(string(text), want) {
			err = fmt.Errorf("it does not say %q", want)
		}
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// refused starts an agent and waits until its log says why the server does not want it.
func (m *machines) refused(a *site.Agent, why string) {
	m.t.Helper()
	before := len(m.agents())
	m.says(a, why)
	a.Kill()
	if after := len(m.agents()); after != before {
		m.t.Errorf("there are %d agents, and were %d", after, before)
	}
}

type listed struct {
	ID        struct{ Path string } `json:"id"`
	Selectors []struct{ Type, Value string }
	Reattest  bool `json:"can_reattest"`
}

func (m *machines) agents() map[string]listed {
	m.t.Helper()
	out, err := m.ServerCLI(m.ctx, "agent", "list", "-output", "json")
	if err != nil {
		m.t.Fatal(err)
	}
	var list struct{ Agents []listed }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		m.t.Fatal(err)
	}
	found := map[string]listed{}
	for _, a := range list.Agents {
		found[a.ID.Path] = a
	}
	return found
}

// ek asks the agent's program for the hash of a TPM.
func (m *machines) ek(socket string) string {
	m.t.Helper()
	out, err := site.Run(m.ctx, nil, filepath.Join(m.Bin, "assay-agent"), "tpm", "ek", "-tpmPath", socket, "-output", "json")
	if err != nil {
		m.t.Fatal(err)
	}
	var said struct {
		Hash, Kind  string
		Certificate struct{ Issuer string }
	}
	if err := json.Unmarshal([]byte(out), &said); err != nil || len(said.Hash) != 64 || said.Kind != "RSA 2048" || said.Certificate.Issuer == "" {
		m.t.Fatalf("%s, %v", out, err)
	}
	return said.Hash
}

// TestPartsOfTwoMachinesDoNotMix has two machines, each with a certificate and a TPM, and an attacker who
// holds the certificate's key of the one and uses the TPM of the other.
func TestPartsOfTwoMachinesDoNotMix(t *testing.T) {
	m, tpms := newMachines(t, `node_attestor "all" {
  combination "metal" {
    part "x509pop" { ca_bundle_path = CA }
    part "tpm" { ek_ca_path = TPMS }
  }
  combination "linked" {
    id_from = "tpm"
    same    = [["tpm:ek", "x509pop:san:ek"]]
    part "x509pop" { ca_bundle_path = CA }
    part "tpm" { ek_ca_path = TPMS }
  }
}
`, "one", "two", "three")
	one, two := m.certificate("cert-one", ""), m.certificate("cert-two", "")
	first := m.agent("first", "metal", site.AgentOptions{}, one, tpmPart(tpms["one"]))
	m.joins(first)
	hash := m.ek(tpms["one"])
	var path string
	for p, a := range m.agents() {
		path = p
		var all []string
		for _, s := range a.Selectors {
			all = append(all, s.Type+":"+s.Value)
		}
		text := strings.Join(all, "\n")
		for _, want := range []string{"all:combination:metal", "all:part:tpm/" + hash, "tpm:ek:" + hash, "x509pop:subject:cn:cert-one"} {
			if !strings.Contains(text, want) {
				t.Errorf("no %s in\n%s", want, text)
			}
		}
	}
	if !strings.HasPrefix(path, "/spire/agent/all/metal/x509pop/") {
		t.Fatalf("the agent is %s", path)
	}
	const used = "attestation data has already been used"
	t.Run("the certificate of a machine that is known, with the TPM of another", func(t *testing.T) {
		m := m.in(t)
		m.refused(m.agent("mixed", "metal", site.AgentOptions{}, one, tpmPart(tpms["two"])), used)
	})
	t.Run("the TPM of a machine that is known, with another certificate", func(t *testing.T) {
		m := m.in(t)
		m.refused(m.agent("turned", "metal", site.AgentOptions{}, two, tpmPart(tpms["one"])), used)
	})
	t.Run("a certificate without its TPM", func(t *testing.T) {
		m := m.in(t)
		a, err := m.NewAgent(m.ctx, "alone", site.AgentOptions{Blocks: "node_attestor" + strings.TrimPrefix(one, "part") + "workload_attestor \"unix\" {}\n"})
		if err != nil {
			t.Fatal(err)
		}
		m.refused(a, `could not find node attestor type \"x509pop\"`)
	})
	t.Run("two machines, each with its own", func(t *testing.T) {
		m := m.in(t)
		m.joins(m.agent("second", "metal", site.AgentOptions{}, two, tpmPart(tpms["two"])))
		if n := len(m.agents()); n != 2 {
			t.Errorf("%d agents", n)
		}
	})
	t.Run("a certificate that names another TPM, before either was ever seen", func(t *testing.T) {
		m := m.in(t)
		m.refused(m.agent("forged", "linked", site.AgentOptions{}, m.certificate("stolen", m.ek(tpms["two"])), tpmPart(tpms["three"])), "no value in common")
		m.joins(m.agent("third", "linked", site.AgentOptions{}, m.certificate("cert-three", m.ek(tpms["three"])), tpmPart(tpms["three"])))
		if _, there := m.agents()["/spire/agent/all/linked/tpm/"+m.ek(tpms["three"])]; !there {
			t.Errorf("agents are %v", m.agents())
		}
	})
	t.Run("a certificate that names its TPM is renewed", func(t *testing.T) {
		m := m.in(t)
		before := len(m.agents())
		m.joins(m.agent("renewed", "linked", site.AgentOptions{}, m.certificate("cert-renewed", m.ek(tpms["three"])), tpmPart(tpms["three"])))
		if after := len(m.agents()); after != before {
			t.Errorf("there are %d agents, and were %d", after, before)
		}
	})
	t.Run("a banned machine's parts do not come back beside others", func(t *testing.T) {
		m := m.in(t)
		if _, err := m.ServerCLI(m.ctx, "agent", "ban", "-spiffeID", "spiffe://"+site.TrustDomain+path); err != nil {
			t.Fatal(err)
		}
		m.refused(m.agent("returned", "metal", site.AgentOptions{}, m.certificate("fresh", ""), tpmPart(tpms["one"])), used)
		m.refused(m.agent("again", "metal", site.AgentOptions{}, one, tpmPart(tpms["one"])), "banned")
	})
	t.Run("evicted, a machine comes back by itself", func(t *testing.T) {
		m := m.in(t)
		if _, err := m.ServerCLI(m.ctx, "agent", "evict", "-spiffeID", "spiffe://"+site.TrustDomain+path); err != nil {
			t.Fatal(err)
		}
		m.joins(m.agent("anew", "metal", site.AgentOptions{}, m.certificate("new-cert", ""), tpmPart(tpms["one"])))
	})
}

// TestJoinTokenBesideACertificate: an operator hands out a token for a machine with a certificate; the token is
// spent only when the certificate was proved, and the agent then renews.
func TestJoinTokenBesideACertificate(t *testing.T) {
	m, _ := newMachines(t, `node_attestor "all" {
  combination "handed-out" {
    id_from = "x509pop"
    part "join_token" {}
    part "x509pop" { ca_bundle_path = CA }
  }
}
`)
	token, err := m.Token(m.ctx)
	if err != nil {
		t.Fatal(err)
	}
	const tokenPart = "part \"join_token\" {}\n"
	good := m.certificate("node", "")
	rival := m.in(t)
	if rival.caKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, Subject: m.ca.Subject}
	rival.ca = rival.sign(template, template, &rival.caKey.PublicKey)
	bad := rival.certificate("forged", "")
	m.refused(m.agent("forger", "handed-out", site.AgentOptions{Token: token}, tokenPart, bad), "part x509pop: verify certificate")
	m.joins(m.agent("node", "handed-out", site.AgentOptions{Token: token}, tokenPart, good))
	for path, a := range m.agents() {
		if !strings.HasPrefix(path, "/spire/agent/all/handed-out/x509pop/") || a.Reattest {
			t.Errorf("agent %s: %+v", path, a)
		}
	}
	m.refused(m.agent("thief", "handed-out", site.AgentOptions{Token: token}, tokenPart, good), "join token does not exist or has already been used")
}

// TestAgentWithItsKeysInTheTPM joins with a token, which works once: after a restart it is known by the key that
// its TPM has, without the server's help, and a copy of its disk is of no use on another machine.
func TestAgentWithItsKeysInTheTPM(t *testing.T) {
	m, tpms := newMachines(t, "node_attestor \"join_token\" {}\n", "one", "two")
	token, err := m.Token(m.ctx)
	if err != nil {
		t.Fatal(err)
	}
	blocks := func(tpm string) string {
		return fmt.Sprintf("node_attestor \"join_token\" {}\nworkload_attestor \"unix\" {}\nkey_manager \"tpm\" {\n  tpm_path = %q\n}\n", tpms[tpm])
	}
	a, err := m.NewAgent(m.ctx, "sealed", site.AgentOptions{Token: token, Blocks: blocks("one")})
	if err != nil {
		t.Fatal(err)
	}
	m.watched(a, "sealed")
	m.joins(a)
	m.until(a, "following the feed")
	a.Kill()
	stolen, err := m.NewAgent(m.ctx, "stolen", site.AgentOptions{Token: token, Blocks: blocks("two")})
	if err != nil {
		t.Fatal(err)
	}
	m.watched(stolen, "stolen")
	if err := os.CopyFS(stolen.Data(), os.DirFS(a.Data())); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(a.Log); err != nil {
		t.Fatal(err)
	}
	t.Run("after a restart it is known without a new token", func(t *testing.T) {
		m := m.in(t)
		m.says(a, "following the feed")
		text, err := os.ReadFile(a.Log)
		if err != nil || strings.Contains(string(text), "agent attested") {
			t.Errorf("it attested again: %v", err)
		}
	})
	t.Run("a copy of its disk is of no use to another machine", func(t *testing.T) {
		m := m.in(t)
		m.refused(stolen, "not of this TPM")
		text, err := os.ReadFile(stolen.Log)
		if err != nil || strings.Contains(string(text), "following the feed") {
			t.Errorf("the copy is followed: %v", err)
		}
	})
}

// TestVirtualMachineAndItsTPM: a virtual machine on vSphere that must show a TPM as well. What vCenter tells of
// the machine changes the node's selectors and not its TPM's, and when the machine is removed its agent is gone.
func TestVirtualMachineAndItsTPM(t *testing.T) {
	v, err := vcenter.New(t.Context(), vcenter.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.Close() })
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte(vcenter.Password), 0o600); err != nil {
		t.Fatal(err)
	}
	m, tpms := newMachines(t, fmt.Sprintf(`node_attestor "all" {
  combination "vm" {
    part "vsphere" {
      vcenter_url   = "https://%s"
      username      = %q
      password_file = %q
      ca_path       = %q
      folders       = ["/DC0/vm"]
    }
    part "tpm" { ek_ca_path = TPMS }
  }
}
`, v.URL.Host, vcenter.Username, secret, v.CA), "one")
	vm, err := v.VM(m.ctx, "DC0_C0_RP0_VM0")
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Secure(m.ctx, vm); err != nil {
		t.Fatal(err)
	}
	is, err := v.Read(m.ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	dmi, vmtoolsd, err := v.Inside(vm, is.Config.Uuid)
	if err != nil {
		t.Fatal(err)
	}
	m.joins(m.agent("vm", "vm", site.AgentOptions{}, fmt.Sprintf("part \"vsphere\" {\n    vmtoolsd_path = %q\n    dmi_path = %q\n  }\n", vmtoolsd, dmi), tpmPart(tpms["one"])))
	path := "/spire/agent/all/vm/vsphere/" + v.Admin.ServiceContent.About.InstanceUuid + "/" + is.Config.InstanceUuid
	tpm := "tpm:ek:" + m.ek(tpms["one"])
	becomes := func(what string, is func(selectors []string, there bool) bool) {
		t.Helper()
		for m.ctx.Err() == nil {
			a, there := m.agents()[path]
			var selectors []string
			for _, s := range a.Selectors {
				selectors = append(selectors, s.Type+":"+s.Value)
			}
			if is(selectors, there) {
				return
			}
		}
		t.Fatalf("never %s: %v", what, m.agents())
	}
	becomes("admitted", func(s []string, there bool) bool {
		return there && slices.Contains(s, tpm) && slices.Contains(s, "vsphere:vm-name:DC0_C0_RP0_VM0") && slices.Contains(s, "vsphere:secure-rpc:true")
	})
	done := func(task *object.Task, err error) {
		t.Helper()
		if err == nil {
			err = task.Wait(m.ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	done(vm.Rename(m.ctx, "shop-1"))
	becomes("renamed", func(s []string, there bool) bool {
		return there && slices.Contains(s, tpm) && slices.Contains(s, "vsphere:vm-name:shop-1") && slices.Contains(s, "all:combination:vm")
	})
	done(vm.PowerOff(m.ctx))
	done(vm.Destroy(m.ctx))
	becomes("evicted", func(_ []string, there bool) bool { return !there })
}
