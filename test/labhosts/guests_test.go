package labhosts

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/ssh"

	"github.com/assay-id/assay/test/fake/aws"
	"github.com/assay-id/assay/test/fake/dns"
	"github.com/assay-id/assay/test/lab/hosts"
	"github.com/assay-id/assay/test/lab/site"
	"github.com/assay-id/assay/test/lab/swtpm"
)

// guest is one more agent, on a host that has one already: it joins in another way, and serves a process.
type guest struct {
	node
	on    string // the name of the host
	judge string // the server's block
	shows string // the agent's block
	env   []string
	// proves is the beginning of a selector that it must have.
	proves string
}

// newGuests prepares what they show, and what the server must know of it.
func (w *world) newGuests() []*guest {
	w.t.Helper()
	roots, err := w.tpms.Roots()
	must(w.t, err)
	return []*guest{w.bySSH(), w.byName(), w.byDevID(roots), w.byTask(), w.byTwoWays(roots)}
}

// bySSH shows a host certificate, as ssh-keygen would make it.
func (w *world) bySSH() *guest {
	t, dir := w.t, w.site.Dir
	_, caKey, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	ca, err := ssh.NewSignerFromSigner(caKey)
	must(t, err)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	host, err := ssh.NewSignerFromSigner(key)
	must(t, err)
	cert := &ssh.Certificate{
		Key: host.PublicKey(), CertType: ssh.HostCert, KeyId: "web1", ValidPrincipals: []string{"web1.example.org"},
		ValidAfter: uint64(time.Now().Add(-time.Hour).Unix()), ValidBefore: uint64(time.Now().Add(24 * time.Hour).Unix()),
	}
	must(t, cert.SignCert(rand.Reader, ca))
	block, err := ssh.MarshalPrivateKey(key, "")
	must(t, err)
	keyPath, certPath := filepath.Join(dir, "ssh_host_key"), filepath.Join(dir, "ssh_host_key-cert.pub")
	must(t, os.WriteFile(keyPath, pem.EncodeToMemory(block), 0o600))
	must(t, os.WriteFile(certPath, ssh.MarshalAuthorizedKey(cert), 0o600))
	return &guest{
		node: node{kind: "sshpop"}, on: "plain", proves: "sshpop:hostname:web1",
		judge: fmt.Sprintf("node_attestor \"sshpop\" {\n  cert_authorities = [%q]\n  canonical_domain = \"example.org\"\n}\n", strings.TrimSpace(string(ssh.MarshalAuthorizedKey(ca.PublicKey())))),
		shows: fmt.Sprintf("node_attestor \"sshpop\" {\n  host_key_path = %q\n  host_cert_path = %q\n}\n", keyPath, certPath),
	}
}

// byName is asked back at the address that its name has, at a port that only root can listen on.
func (w *world) byName() *guest {
	t := w.t
	address, err := netip.ParseAddr(w.named("plain").Addr)
	must(t, err)
	var names *dns.Server
	must(t, w.server.Do(func() error {
		names, err = dns.Start(map[string][]netip.Addr{"batch.example.org": {address}})
		return err
	}))
	t.Cleanup(names.Close)
	return &guest{
		node: node{kind: "http_challenge"}, on: "plain", proves: "http_challenge:hostname:batch.example.org",
		judge: fmt.Sprintf("node_attestor \"http_challenge\" {\n  allowed_dns_patterns = [\"[a-z]+\\\\.example\\\\.org\"]\n  required_port = 80\n  tofu = false\n  dns_server = %q\n}\n", names.Address()),
		shows: "node_attestor \"http_challenge\" {\n  hostname = \"batch.example.org\"\n  port = 80\n}\n",
	}
}

// byDevID shows a device identity that lives in a TPM of its own.
func (w *world) byDevID(roots string) *guest {
	t := w.t
	socket, err := w.tpms.Make(t.Context(), "two")
	must(t, err)
	devices, err := swtpm.NewDevIDAuthority(w.site.Dir, "devices")
	must(t, err)
	d, err := devices.Provision(t.Context(), socket, w.site.Dir, "device", tpm2.TPMAlgECC, "", nil)
	must(t, err)
	return &guest{
		node: node{kind: "tpm_devid"}, on: "tpm", proves: "tpm_devid:issuer:cn:",
		judge: fmt.Sprintf("node_attestor \"tpm_devid\" {\n  devid_ca_path = %q\n  endorsement_ca_path = %q\n}\n", devices.Path, roots),
		shows: fmt.Sprintf("node_attestor \"tpm_devid\" {\n  devid_cert_path = %q\n  devid_priv_path = %q\n  devid_pub_path = %q\n  tpm_device_path = %q\n}\n", d.Cert, d.Priv, d.Pub, socket),
	}
}

// byTask is a task of ECS with its own metadata service, which the environment leads to as ECS's does.
func (w *world) byTask() *guest {
	const account, id = "123456789012", "158d1c8083dd49d6b527399fd6414f5c"
	arn := "arn:aws:ecs:us-east-1:" + account + ":task/prod/" + id
	w.cloud.AddTask(aws.Task{
		ARN: arn, Account: account, Cluster: "prod", Family: "shop", Revision: "26", LaunchType: "FARGATE", Status: "RUNNING",
	}, aws.Key{ID: "ASIATASK", Secret: "of the task", Token: "of the task, too", Account: account, ARN: "arn:aws:sts::" + account + ":assumed-role/shop-task/" + id})
	cloud := w.named("cloud")
	must(w.t, cloud.Has("169.254.170.2"))
	must(w.t, serve(w.t, cloud, "169.254.170.2:80", w.cloud))
	path := func(url string) string { return strings.TrimPrefix(url, w.cloud.URL()) }
	return &guest{
		node: node{kind: "ecs"}, on: "cloud", proves: "ecs:task-id:" + id,
		judge: fmt.Sprintf("node_attestor \"ecs\" {\n  account_ids = [%q]\n  regions = [\"us-east-1\"]\n  task_roles = [\"shop-task\"]\n  sts_endpoint = \"http://127.0.0.1:8100\"\n}\n", account),
		shows: "node_attestor \"ecs\" {}\n",
		env: []string{
			"ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2" + path(w.cloud.MetadataURI(arn)),
			"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=" + path(w.cloud.CredentialsURI()),
		},
	}
}

// byTwoWays is a virtual machine with a TPM, which must show both.
func (w *world) byTwoWays(roots string) *guest {
	t := w.t
	vm, err := w.center.VM(t.Context(), "DC0_C0_RP0_VM1")
	must(t, err)
	must(t, w.center.Secure(t.Context(), vm))
	is, err := w.center.Read(t.Context(), vm)
	must(t, err)
	dmi, vmtoolsd, err := w.center.Inside(vm, is.Config.Uuid)
	must(t, err)
	socket, err := w.tpms.Make(t.Context(), "three")
	must(t, err)
	return &guest{
		node: node{kind: "all"}, on: "vm", proves: "all:part:tpm/",
		judge: fmt.Sprintf("node_attestor \"all\" {\n  combination \"vm\" {\n    part \"vsphere\" {\n%s    }\n    part \"tpm\" {\n      ek_ca_path = %q\n    }\n  }\n}\n", w.vCenterBlock(), roots),
		shows: fmt.Sprintf("node_attestor \"all\" {\n  combination = \"vm\"\n  part \"vsphere\" {\n    vmtoolsd_path = %q\n    dmi_path = %q\n  }\n  part \"tpm\" {\n    tpm_path = %q\n  }\n}\n", vmtoolsd, dmi, socket),
	}
}

func (w *world) named(name string) *hosts.Host {
	w.t.Helper()
	for _, n := range w.nodes {
		if n.name == name {
			return n.host
		}
	}
	w.t.Fatalf("no host %s", name)
	return nil
}

// visit lets each join, and asks it for the identity of a process.
func (w *world) visit(t *testing.T, r *report, all []*guest) {
	for _, g := range all {
		t.Run("by "+g.kind, func(t *testing.T) {
			began := time.Now()
			a, err := w.site.NewAgent(t.Context(), g.kind, site.AgentOptions{
				Netns: w.named(g.on).Netns(), Trust: w.trust(), Blocks: g.shows + unixByPath, Env: g.env,
			})
			must(t, err)
			if err := a.Start(t.Context()); err != nil {
				t.Fatalf("%v\n%s", err, site.Tail(w.site.ServerLog(), 10))
			}
			defer a.Kill()
			must(t, w.joined(t.Context(), &g.node))
			r.add("agent started -> admitted by "+g.kind, time.Since(began))
			g.demands(t, g.proves)
			g.selectors = []string{"unix:uid:0"}
			id := domain + "/guest/" + g.kind
			w.entry(t, &g.node, id)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			out, err := a.CLI(ctx, "api", "fetch", "x509", "-socketPath", a.Socket, "-timeout", "30s")
			if err != nil || !strings.Contains(out, id) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
