package labhosts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/assay-id/assay/attestor/awsiid"
	"github.com/assay-id/assay/test/fake/aws"
	"github.com/assay-id/assay/test/fake/vcenter"
	"github.com/assay-id/assay/test/lab/machine"
	"github.com/assay-id/assay/test/lab/podman"
	"github.com/assay-id/assay/test/lab/site"
	"github.com/assay-id/assay/test/lab/swtpm"
)

// The parts of the data center that the server must know before it starts.

// newCenter starts a vCenter beside the server.
func (w *world) newCenter() {
	t := w.t
	v, err := vcenter.New(t.Context(), vcenter.Config{Do: w.server.Do, Dial: w.server.Dial})
	must(t, err)
	cleanup(t, v.Close)
	w.center, w.password = v, filepath.Join(w.site.Dir, "vcenter-password")
	must(t, os.WriteFile(w.password, []byte(vcenter.Password), 0o600))
}

// newCloud starts the services of AWS: STS where the server finds it.
func (w *world) newCloud() {
	t := w.t
	const account, instance = "123456789012", "i-0123456789abcdef0"
	c := aws.New()
	t.Cleanup(c.Close)
	text, err := os.ReadFile("../../attestor/awsiid/testdata/real.json")
	must(t, err)
	var e awsiid.Evidence
	must(t, json.Unmarshal(text, &e))
	c.Metadata["dynamic/instance-identity/document"] = e.Document
	c.Metadata["dynamic/instance-identity/signature"] = "AAAA"
	c.Metadata["dynamic/instance-identity/rsa2048"] = e.RSA2048
	c.GiveRole("web", aws.Key{
		ID: "ASIA0123456789ABCDEF", Secret: "secret", Token: "token", Account: account,
		ARN: "arn:aws:sts::" + account + ":assumed-role/web/" + instance,
	})
	// The server's credentials are of another account, so it looks the instance up with a role in the instance's.
	const server = "arn:aws:iam::210987654321:user/assay"
	c.Keys["AKIASERVER"] = aws.Key{ID: "AKIASERVER", Secret: "s3cret", Account: "210987654321", ARN: server}
	c.Roles["arn:aws:iam::"+account+":role/assay-lookup"] = aws.Role{Trust: []string{server}, ExternalID: "of-assay"}
	c.Instances[instance] = aws.Instance{
		ID: instance, Account: account, State: "running", Profile: "arn:aws:iam::" + account + ":instance-profile/web-profile", Role: "web",
		Tags: map[string]string{"tier": "front"},
	}
	w.cloud = c
	must(t, serve(t, w.server, "127.0.0.1:8100", c))
}

// newTPM manufactures the TPM of one host, whose socket it returns.
func (w *world) newTPM() string {
	t := w.t
	m, err := swtpm.New()
	must(t, err)
	cleanup(t, m.Close)
	w.tpms = m
	socket, err := m.Make(t.Context(), "one")
	must(t, err)
	return socket
}

// The nodes. What makes one may run beside what makes another, so it returns errors.

// onMachine is a machine with a real systemd that runs the package. Its certificate is its proof, and its
// workload is a service.
func (w *world) onMachine(ctx context.Context, n *node, deb string) error {
	m, err := machine.Boot(ctx, machine.Config{Netns: n.host.Netns()})
	if err != nil {
		return err
	}
	cleanup(w.t, m.Close)
	const data = "../../attestor/x509pop/testdata/"
	for from, to := range map[string]string{
		deb: "/opt/lab/agent.deb", w.app: "/opt/lab/app", w.bundle: "/etc/assay/bundle.pem",
		data + "real-ecdsa.pem": "/etc/assay/node.pem", data + "real-ecdsa.key": "/etc/assay/node.key", data + "real-intermediate.pem": "/etc/assay/chain.pem",
	} {
		if err := m.Copy(from, to); err != nil {
			return err
		}
	}
	n.selectors = []string{"systemd:id:web.service", "systemd:user:nobody"}
	sh := func(ctx context.Context, script string) error {
		_, err := m.Run(ctx, script)
		if err != nil {
			said, _ := m.Run(context.WithoutCancel(ctx), "journalctl --no-pager -n 40 -o cat -u assay-agent -u web || true")
			err = fmt.Errorf("%w: %s", err, said)
		}
		return err
	}
	n.up = func(ctx context.Context) error {
		if m.Leader() == 0 {
			if err := m.Up(ctx); err != nil {
				return err
			}
		}
		return sh(ctx, "systemctl start assay-agent.socket assay-agent.service") // lab.target wants nothing of multi-user.target
	}
	n.down = func(context.Context) error { return m.Down() }
	n.start = func(ctx context.Context) error {
		return sh(ctx, "systemctl reset-failed web 2>/dev/null || true; systemd-run --quiet --unit=web -p User=nobody "+
			"--setenv=SPIFFE_ENDPOINT_SOCKET=unix:///run/assay/agent/public/api.sock /opt/lab/app -control "+control+" -listen "+mtls)
	}
	return sh(ctx, `cat /etc/assay/chain.pem >> /etc/assay/node.pem; chmod 600 /etc/assay/node.key
dpkg --install /opt/lab/agent.deb
assay-agent setup -nodeAttestor x509pop -trustDomain `+site.TrustDomain+` -serverAddress `+w.site.Address+` -serverPort `+fmt.Sprint(w.site.Port)+`
printf '`+strings.ReplaceAll(telemetry, "\n", `\n`)+`' >> /etc/assay/agent.hcl
systemctl enable assay-agent.service`)
}

// onTPM is a host with a TPM, whose workload is a container.
func (w *world) onTPM(ctx context.Context, n *node, tpm string) error {
	engine, err := podman.Start(ctx, podman.Config{Netns: n.host.Netns()})
	if err != nil {
		return err
	}
	cleanup(w.t, engine.Close)
	image, err := engine.Build(w.app, "shop")
	if err != nil {
		return err
	}
	n.agent, err = w.site.NewAgent(ctx, n.name, site.AgentOptions{
		Netns: n.host.Netns(), Trust: w.trust(),
		Blocks: fmt.Sprintf("node_attestor \"tpm\" {\n  tpm_path = %q\n}\nworkload_attestor \"docker\" {\n  docker_socket_path = %q\n}\n", tpm, "unix://"+engine.Socket()) +
			// What it keeps over its reboots is sealed to what was booted.
			fmt.Sprintf("key_manager \"tpm\" {\n  tpm_path = %q\n  pcrs = [0, 7]\n}\n", tpm) + telemetry,
	})
	if err != nil {
		return err
	}
	n.selectors = []string{"docker:label:app:shop", "image:id:" + image}
	n.start = func(context.Context) error {
		_, err := engine.Run("--name", "shop", "--network", "host", "--volume", filepath.Dir(n.agent.Socket)+":/agent:ro",
			"--env", "SPIFFE_ENDPOINT_SOCKET=unix:///agent/api.sock", image, "-control", control, "-listen", mtls)
		return err
	}
	n.up = n.agent.Start
	n.down = func(context.Context) error {
		_, err := engine.Do("rm", "--force", "--time", "0", "--all")
		return errors.Join(err, w.killAgent(n))
	}
	return nil
}

// onVSphere is a virtual machine, whose workload is a process.
func (w *world) onVSphere(ctx context.Context, n *node) error {
	vm, err := w.center.VM(ctx, "DC0_C0_RP0_VM0")
	if err != nil {
		return err
	}
	if err := w.center.Secure(ctx, vm); err != nil {
		return err
	}
	is, err := w.center.Read(ctx, vm)
	if err != nil {
		return err
	}
	dmi, vmtoolsd, err := w.center.Inside(vm, is.Config.Uuid)
	if err != nil {
		return err
	}
	return w.plainHost(n, site.AgentOptions{
		Blocks: fmt.Sprintf("node_attestor \"vsphere\" {\n  vmtoolsd_path = %q\n  dmi_path = %q\n}\n", vmtoolsd, dmi) + unixByPath,
	}, 61001)
}

// onEC2 is an instance: its metadata service is where every instance has it.
func (w *world) onEC2(n *node) error {
	if err := n.host.Has("169.254.169.254"); err != nil {
		return err
	}
	if err := serve(w.t, n.host, "169.254.169.254:80", w.cloud); err != nil {
		return err
	}
	return w.plainHost(n, site.AgentOptions{Blocks: "node_attestor \"aws_iid\" {}\n" + unixByPath}, 61002)
}

// onNothing is a host that has nothing to show but a token.
func (w *world) onNothing(ctx context.Context, n *node) error {
	token, err := w.site.Token(ctx)
	if err != nil {
		return err
	}
	return w.plainHost(n, site.AgentOptions{Token: token, Blocks: "node_attestor \"join_token\" {}\n" + unixByPath}, 61003)
}
