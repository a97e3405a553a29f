// Package firstboot boots machines with a real systemd as a cloud would, with the samples of deploy as their
// first boot: the real cloud-init runs them, the package is installed, the agent sets itself up, joins and serves.
package firstboot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/object"

	"github.com/assay-id/assay/attestor/awsiid"
	"github.com/assay-id/assay/test/fake/aws"
	"github.com/assay-id/assay/test/fake/vcenter"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/hosts"
	"github.com/assay-id/assay/test/lab/machine"
)

func TestMain(m *testing.M) {
	vcenter.Guest()
	os.Exit(m.Run())
}

const repository = "../../.."

// stages are what cloud-init's units run at a first boot, one after the other, for a machine that its network
// does not come from cloud-init.
const stages = `cloud-init init --local && cloud-init init && cloud-init modules --mode=config && cloud-init modules --mode=final`

// cloudConfig leaves cloud-init what the samples use: what else it would do, this machine has no need for.
const cloudConfig = `datasource_list: [NoCloud]
network: {config: disabled}
disable_root: false
cloud_init_modules: [write-files]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user]
system_info: {distro: debian, paths: {cloud_dir: /var/lib/cloud/, templates_dir: /etc/cloud/templates/}}
`

// instance is a machine that was just made, and its network.
type instance struct {
	*machine.Machine
	host *hosts.Host
	t    *testing.T
}

func boot(t *testing.T) instance {
	t.Helper()
	for why, err := range map[string]error{"a real systemd": machine.Available(), "a network": hosts.Available()} {
		if err != nil {
			lab.Missing(t, why, err)
		}
	}
	for _, program := range []string{"cloud-init", "curl", "python3"} {
		if _, err := exec.LookPath(program); err != nil {
			lab.Missing(t, program, err)
		}
	}
	network, err := hosts.New()
	if err != nil {
		lab.Missing(t, "a network", err)
	}
	t.Cleanup(func() {
		if err := network.Close(); err != nil {
			t.Error(err)
		}
	})
	host, err := network.Host("one")
	if err != nil {
		t.Fatal(err)
	}
	m, err := machine.Boot(t.Context(), machine.Config{Netns: host.Netns()})
	if err != nil {
		lab.Missing(t, "a real systemd", err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return instance{m, host, t}
}

func (i instance) must(err error) {
	i.t.Helper()
	if err != nil {
		i.t.Fatal(err)
	}
}

func (i instance) sh(script string) string {
	i.t.Helper()
	out, err := i.Run(i.t.Context(), script)
	if err != nil {
		i.t.Fatalf("%v\n%s", err, i.journal())
	}
	return strings.TrimSpace(out)
}

func (i instance) journal() string {
	out, _ := i.Run(context.WithoutCancel(i.t.Context()), "tail -n 40 /var/log/cloud-init-output.log 2>/dev/null; journalctl --merge --no-pager -n 40 -o cat -u 'assay-*' || true")
	return out
}

// until runs a script again and again until it succeeds.
func (i instance) until(script string) {
	i.t.Helper()
	var err error
	for range 60 {
		if _, err = i.Run(i.t.Context(), script); err == nil {
			return
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-i.t.Context().Done():
		}
	}
	i.t.Fatalf("%v\n%s", err, i.journal())
}

// server installs and starts a server that believes what a block says, and the shop that packages come from.
func (i instance) server(nodeAttestor string) {
	i.t.Helper()
	for name, pattern := range map[string]string{"server.deb": "assay-server_*.deb", "www/assay-agent_amd64.deb": "assay-agent_*.deb"} {
		found, err := filepath.Glob(filepath.Join(repository, "bin", "packages", pattern))
		if err == nil && len(found) != 1 {
			err = fmt.Errorf("%d files fit %s; run make packages", len(found), pattern)
		}
		if err != nil {
			lab.Missing(i.t, "the package "+pattern, err)
		}
		i.must(i.Copy(found[0], "/opt/lab/"+name))
	}
	i.sh("dpkg --install /opt/lab/server.deb")
	i.must(i.Write("/opt/lab/block.hcl", nodeAttestor))
	i.sh("cat /opt/lab/block.hcl >> /etc/assay/server.hcl && systemctl start assay-server.service")
	i.sh("echo 127.0.0.1 packages.example.org assay.example.org >> /etc/hosts; systemd-run --quiet --unit=packages python3 -m http.server --bind 127.0.0.1 --directory /opt/lab/www 80")
	i.until("curl -fsS -o /dev/null http://packages.example.org/")
}

// first has cloud-init run a sample, with what is an operator's to fill in filled in, and nothing else changed.
func (i instance) first(sample string) {
	i.t.Helper()
	text, err := os.ReadFile(filepath.Join(repository, "deploy", sample))
	i.must(err)
	deb, err := os.ReadFile(filepath.Join(i.Root(), "opt/lab/www/assay-agent_amd64.deb"))
	i.must(err)
	sum := sha256.Sum256(deb)
	bundle := strings.TrimSpace(i.sh("assay-server bundle show"))
	for _, fill := range [][2]string{
		{"https://packages", "http://packages"},
		{strings.Repeat("0", 64), hex.EncodeToString(sum[:])},
		{"      -----BEGIN CERTIFICATE-----\n      what \"assay-server bundle show\" prints\n      -----END CERTIFICATE-----", "      " + strings.ReplaceAll(bundle, "\n", "\n      ")},
	} {
		if bytes.Count(text, []byte(fill[0])) != 1 {
			i.t.Fatalf("%s has not one %q", sample, fill[0])
		}
		text = bytes.Replace(text, []byte(fill[0]), []byte(fill[1]), 1)
	}
	i.must(i.Write("/var/lib/cloud/seed/nocloud/user-data", string(text)))
	i.must(i.Write("/var/lib/cloud/seed/nocloud/meta-data", "instance-id: one\n"))
	i.must(i.Write("/etc/cloud/cloud.cfg", cloudConfig))
	i.sh("rm -rf /etc/cloud/cloud.cfg.d /etc/assay/agent.hcl; " + stages + ` && grep -q '"errors": \[\]' /run/cloud-init/result.json`)
	i.sh("assay-agent healthcheck && systemctl is-enabled assay-agent.service && assay-agent validate")
}

// firmware makes the kernel say whose machine this is, and its number.
func (i instance) firmware(vendor, uuid string) {
	i.t.Helper()
	i.sh("mount -t tmpfs firmware /sys/class && mkdir -p /sys/class/dmi/id && echo '" + vendor + "' > /sys/class/dmi/id/sys_vendor && echo '" + uuid + "' > /sys/class/dmi/id/product_uuid")
}

// fetch waits until root gets an identity.
func (i instance) fetch(want string) {
	i.t.Helper()
	i.until("assay-agent api fetch x509 -timeout 10s -output json | grep -F '" + want + "'")
}

// agent is the one that the server knows.
func (i instance) agent() (path, selectors string) {
	i.t.Helper()
	var said struct {
		Agents []struct {
			ID        struct{ Path string }
			Selectors []struct{ Value string }
		}
	}
	out := i.sh("assay-server agent list -output json")
	if err := json.Unmarshal([]byte(out), &said); err != nil || len(said.Agents) != 1 {
		i.t.Fatalf("agents are %s, %v", out, err)
	}
	for _, s := range said.Agents[0].Selectors {
		selectors += s.Value + " "
	}
	return said.Agents[0].ID.Path, selectors
}

// copied makes the machine a copy of itself: its agent must begin anew.
func (i instance) copied(want string) {
	i.t.Helper()
	before := i.sh("cat /var/lib/assay/agent/machine-id; find /var/lib/assay/agent -type f | sort | xargs sha256sum")
	i.sh("systemctl stop assay-agent.service assay-agent.socket; systemd-id128 new > /etc/machine-id; systemctl start assay-agent.service")
	i.fetch(want)
	if after := i.sh("cat /var/lib/assay/agent/machine-id; find /var/lib/assay/agent -type f | sort | xargs sha256sum"); after == before {
		i.t.Error("the copy has the state of what it was copied from")
	}
	i.until("journalctl --merge -o cat -u assay-agent.service | grep 'this machine is a copy of another'")
	// And once only: after that it is a machine like any other.
	i.sh("systemctl restart assay-agent.service")
	i.fetch(want)
	if n := i.sh("journalctl --merge -o cat -u assay-agent.service | grep -c 'this machine is a copy of another'"); n != "1" {
		i.t.Errorf("it was found to be a copy %s times", n)
	}
}

// prepared makes an image of the machine, and demands that nothing of it is left.
func (i instance) prepared() {
	i.t.Helper()
	script, err := os.ReadFile(filepath.Join(repository, "deploy/hosts/prepare-image.sh"))
	i.must(err)
	i.must(i.Write("/opt/lab/prepare-image.sh", string(script)))
	i.sh("touch /etc/assay/node.key /etc/assay/node.pem /etc/assay/devid.pem /etc/assay/devid.priv /etc/assay/devid.pub; sh /opt/lab/prepare-image.sh")
	i.sh("test -z \"$(ls /etc/assay/node.* /etc/assay/devid.* 2>/dev/null)\" && ! test -e /var/lib/assay/agent && ! test -e /etc/assay/agent.hcl && ! test -s /etc/machine-id && test -z \"$(ls /etc/ssh/ssh_host_* 2>/dev/null)\" && ! systemctl is-enabled assay-agent.service && ! systemctl is-active assay-agent.service")
}

func TestEC2(t *testing.T) {
	const account, id = "123456789012", "i-0123456789abcdef0"
	i := boot(t)
	i.must(i.host.Has("169.254.169.254"))
	cloud := aws.New()
	t.Cleanup(cloud.Close)
	listen := func(address string) string {
		l, err := i.host.Listen("tcp", address)
		i.must(err)
		return cloud.Also(l)
	}
	listen("169.254.169.254:80")
	api := listen("127.0.0.1:0")
	text, err := os.ReadFile(filepath.Join(repository, "attestor/awsiid/testdata/real.json"))
	i.must(err)
	var document awsiid.Evidence
	i.must(json.Unmarshal(text, &document))
	for name, text := range map[string]string{"document": document.Document, "signature": "AAAA", "rsa2048": document.RSA2048} {
		cloud.Metadata["dynamic/instance-identity/"+name] = text
	}
	is := aws.Instance{
		ID: id, Account: account, State: "running", Profile: "arn:aws:iam::" + account + ":instance-profile/web", Role: "web", Tags: map[string]string{"tier": "front"},
	}
	cloud.Instances[id] = is
	cloud.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: account}
	cloud.GiveRole("web", aws.Key{ID: "ASIAWEB", Secret: "x", Token: "y", Account: account, ARN: "arn:aws:sts::" + account + ":assumed-role/web/" + id})
	change := func(how func(*aws.Instance)) {
		cloud.Lock()
		defer cloud.Unlock()
		how(&is)
		cloud.Instances[id] = is
	}
	i.must(i.Copy(filepath.Join(repository, "attestor/awsiid/testdata/us-east-1.pem"), "/etc/assay/us-east-1.pem"))
	i.firmware("Amazon EC2", "")
	i.server(fmt.Sprintf(`
node_attestor "aws_iid" {
  account_ids         = [%q]
  region_certificates = { "us-east-1" = "/etc/assay/us-east-1.pem" }
  instance_roles      = ["web"]
  require_proof       = true
  lookup_instance     = true
  refresh_interval    = "5s"
  access_key_id       = "AKIASERVER"
  secret_access_key   = "s3cret"
  sts_endpoint        = %[2]q
  ec2_endpoint        = %[2]q
  iam_endpoint        = %[2]q
}
`, account, api))
	const parent = "spiffe://example.org/spire/agent/aws_iid/" + account + "/us-east-1/" + id
	i.sh("assay-server entry create -parentID " + parent + " -spiffeID spiffe://example.org/root -selector unix:uid:0")
	i.first("ec2/user-data.yaml")
	i.fetch("spiffe://example.org/root")
	if path, selectors := i.agent(); !strings.HasSuffix(parent, path) || !strings.Contains(selectors, "tag:tier:front") {
		t.Errorf("the agent is %s with %s", path, selectors)
	}
	t.Run("a copy of the machine's disk is not the machine, and proves itself anew", func(t *testing.T) {
		instance{i.Machine, i.host, t}.copied("spiffe://example.org/root")
	})
	t.Run("a changed tag is the agent's", func(t *testing.T) {
		i := instance{i.Machine, i.host, t}
		change(func(is *aws.Instance) { is.Tags = map[string]string{"tier": "back"} })
		i.until("assay-server agent list -output json | grep -F 'tag:tier:back'")
	})
	t.Run("the agent of a terminated instance is evicted, and stays away", func(t *testing.T) {
		i := instance{i.Machine, i.host, t}
		change(func(is *aws.Instance) { is.State = "terminated" })
		i.until("assay-server agent list -output json | grep -F '\"agents\":[]'")
		i.until(`grep '"event":"agent.evict"' /var/lib/assay/server/audit.log | grep -F attestor/aws_iid`)
		i.until(`grep '"event":"agent.attest"' /var/lib/assay/server/audit.log | grep -F 'instance does not run'`)
	})
	t.Run("an image of it has nothing of it", func(t *testing.T) {
		instance{i.Machine, i.host, t}.prepared()
	})
}

func TestVSphere(t *testing.T) {
	i := boot(t)
	center, err := vcenter.New(t.Context(), vcenter.Config{
		Do: i.host.Do, Dial: i.host.Dial,
	})
	i.must(err)
	t.Cleanup(func() {
		// It waits for the vCenter's word, and the vCenter for its callers.
		if _, err := i.Run(context.WithoutCancel(t.Context()), "systemctl stop assay-server.service"); err != nil {
			t.Error(err)
		}
		if err := center.Close(); err != nil {
			t.Error(err)
		}
	})
	vm, err := center.VM(t.Context(), "DC0_C0_RP0_VM0")
	i.must(err)
	i.must(center.Secure(t.Context(), vm))
	is, err := center.Read(t.Context(), vm)
	i.must(err)
	i.inside(center, vm, is.Config.Uuid)
	i.firmware("VMware, Inc.", strings.ToUpper(is.Config.Uuid))
	i.must(i.Copy(center.CA, "/etc/assay/vcenter-ca.pem"))
	i.must(i.Write("/etc/assay/vcenter-password", vcenter.Password))
	i.sh("chmod 0644 /etc/assay/vcenter-ca.pem") // the server is a user of its own
	i.server(fmt.Sprintf(`
node_attestor "vsphere" {
  vcenter_url        = "https://%s"
  username           = %q
  password_file      = "/etc/assay/vcenter-password"
  ca_path            = "/etc/assay/vcenter-ca.pem"
  folders            = ["/"]
  require_secure_rpc = true
}
`, center.URL.Host, vcenter.Username))
	parent := "spiffe://example.org/spire/agent/vsphere/" + center.Admin.ServiceContent.About.InstanceUuid + "/" + is.Config.InstanceUuid
	i.sh("assay-server entry create -parentID " + parent + " -spiffeID spiffe://example.org/root -selector unix:uid:0")
	i.first("vmware/user-data.yaml")
	i.fetch("spiffe://example.org/root")
	if path, selectors := i.agent(); !strings.HasSuffix(parent, path) || !strings.Contains(selectors, "vm-name:DC0_C0_RP0_VM0") {
		t.Errorf("the agent is %s with %s", path, selectors)
	}
	t.Run("a copy of the machine's disk is not the machine, and proves itself anew", func(t *testing.T) {
		instance{i.Machine, i.host, t}.copied("spiffe://example.org/root")
	})
}

// inside gives the machine the vmtoolsd that reads the guestinfo of a virtual machine.
func (i instance) inside(center *vcenter.Center, vm *object.VirtualMachine, uuid string) {
	i.t.Helper()
	self, err := os.Executable()
	i.must(err)
	i.must(i.Copy(self, "/opt/vm/guest"))
	_, vmtoolsd, err := center.InsideAt(vm, uuid, i.Root(), "/opt/vm", "/opt/vm/guest")
	i.must(err)
	i.sh("ln -sf " + vmtoolsd + " /usr/bin/vmtoolsd")
}

func TestByHand(t *testing.T) {
	i := boot(t)
	i.server("")
	token := strings.TrimPrefix(i.sh("assay-server token generate -spiffeID spiffe://example.org/node/one"), "Token: ")
	i.sh("assay-server bundle show > /etc/assay/bundle.pem; umask 077; echo " + token + " > /etc/assay/join-token")
	i.sh("assay-server entry create -parentID spiffe://example.org/node/one -spiffeID spiffe://example.org/root -selector unix:uid:0")
	i.must(i.Copy(filepath.Join(repository, "deploy/hosts/join.sh"), "/opt/lab/join.sh"))
	for range 2 { // the second time changes nothing
		i.sh("rm -f /etc/assay/agent.hcl.old; /opt/lab/join.sh /opt/lab/www/assay-agent_amd64.deb example.org localhost -joinTokenFile /etc/assay/join-token")
		i.fetch("spiffe://example.org/root")
	}
	i.sh("! test -e /etc/assay/agent.hcl.old")
	if out, err := i.Run(t.Context(), "rm /etc/assay/bundle.pem; /opt/lab/join.sh x.deb example.org localhost"); err == nil || !strings.Contains(out, "bundle show") {
		t.Errorf("without a bundle: %s, %v", out, err)
	}
}
