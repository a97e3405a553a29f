package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/assay-id/assay/conf"
)

// command is one with the test's context.
func command(t *testing.T) *cobra.Command {
	t.Helper()
	c := &cobra.Command{}
	c.SetContext(t.Context())
	return c
}

// furnish makes a machine out of files.
func furnish(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestSetup(t *testing.T) {
	for _, c := range []struct {
		why       string
		files     map[string]string
		env       map[string]string
		token     bool
		node      string
		workloads string
	}{
		{"an EC2 instance", map[string]string{vendor: "Amazon EC2\n", "run/systemd/system/x": ""}, nil, false, "aws_iid", "unix systemd"},
		{"an EC2 instance on Xen", map[string]string{vendor: "Xen\n", "sys/hypervisor/uuid": "ec2e1916-9099-7caf-fd21-012345abcdef\n"}, nil, false, "aws_iid", "unix"},
		{"another machine on Xen", map[string]string{vendor: "Xen\n", "sys/hypervisor/uuid": "01234567-9099-7caf-fd21-012345abcdef\n", "dev/tpmrm0": ""}, nil, false, "tpm", "unix"},
		{"a virtual machine on vSphere", map[string]string{vendor: "VMware, Inc.\n", "usr/bin/vmtoolsd": "", "dev/tpmrm0": ""}, nil, false, "vsphere", "unix"},
		{"one without open-vm-tools, but with a TPM", map[string]string{vendor: "VMware, Inc.\n", "dev/tpmrm0": ""}, nil, false, "tpm", "unix"},
		{"a machine with a certificate", map[string]string{"etc/assay/node.pem": "", "etc/assay/node.key": "", "dev/tpmrm0": ""}, nil, false, "x509pop", "unix"},
		{"a machine with a token", map[string]string{vendor: "Amazon EC2\n", "var/run/docker.sock": ""}, nil, true, "join_token", "unix docker"},
		{"one with an SSH host certificate", map[string]string{"etc/ssh/ssh_host_rsa_key-cert.pub": ""}, nil, false, "sshpop", "unix"},
		{"one with an SSH host certificate of another kind", map[string]string{"etc/ssh/ssh_host_ed25519_key-cert.pub": ""}, nil, false, "sshpop", "unix"},
		{"one with a device identity", map[string]string{"dev/tpmrm0": "", "etc/assay/devid.pem": "", "etc/assay/devid.priv": "", "etc/assay/devid.pub": ""}, nil, false, "tpm_devid", "unix"},
		{"a task in Fargate", map[string]string{vendor: "Amazon EC2\n"}, map[string]string{"ECS_CONTAINER_METADATA_URI_V4": "http://169.254.170.2/v4/x", "AWS_EXECUTION_ENV": "AWS_ECS_FARGATE"}, false, "ecs", "unix ecs"},
		{"a container instance of ECS", map[string]string{vendor: "Amazon EC2\n", "etc/ecs/ecs.config": "", "var/run/docker.sock": ""}, nil, false, "aws_iid", "unix docker ecs"},
		{"a pod", map[string]string{podToken: "x", vendor: "Amazon EC2\n"}, map[string]string{"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, false, "k8s_psat", "unix k8s"},
		{"a machine with Podman", map[string]string{"dev/tpmrm0": "", "run/podman/podman.sock": ""}, nil, false, "tpm", "unix docker"},
		{"a machine with nothing", nil, nil, false, "", ""},
	} {
		t.Run(c.why, func(t *testing.T) {
			for _, name := range []string{"ECS_CONTAINER_METADATA_URI_V4", "AWS_EXECUTION_ENV", "KUBERNETES_SERVICE_HOST", "MY_NODE_NAME"} {
				t.Setenv(name, c.env[name])
			}
			dir := t.TempDir()
			for name, text := range map[string]string{"token": "0f7ba2b4\n", "bundle.pem": ""} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			f := &setupFlags{
				config: filepath.Join(dir, "etc", "agent.hcl"), root: furnish(t, c.files), trustDomain: "example.org", address: "assay.example.org",
				port: 8081, cluster: "production", bundle: filepath.Join(dir, "bundle.pem"), dataDir: filepath.Join(dir, "data"), offline: true,
			}
			if c.token {
				f.token = filepath.Join(dir, "token")
			}
			result, err := f.run(command(t), nil)
			if c.node == "" {
				if err == nil || !strings.Contains(err.Error(), "join token") {
					t.Errorf("error is %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var ways []string
			for _, w := range result.Workloads {
				ways = append(ways, w.Type)
			}
			if result.Node.Type != c.node || strings.Join(ways, " ") != c.workloads {
				t.Errorf("node by %s, workloads by %q", result.Node.Type, ways)
			}
			read, err := conf.LoadAgent(f.config, nodes(), workloads(), conf.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if result.Node.Proves == "" {
				t.Error("it does not say what that proves")
			}
			if read.ServerAddress != "assay.example.org" || read.TrustDomain.Name() != "example.org" || len(read.Workloads) != len(ways) {
				t.Errorf("the file says %+v", read)
			}
			if _, err := f.run(command(t), nil); err == nil || !strings.Contains(err.Error(), "-force") {
				t.Errorf("it was overwritten: %v", err)
			}
			f.force = true
			if _, err := f.run(command(t), nil); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(f.config + ".old"); err != nil {
				t.Errorf("the old file is not kept: %v", err)
			}
		})
	}
	t.Run("what was replaced before stays, and nothing is kept twice", func(t *testing.T) {
		dir := t.TempDir()
		f := &setupFlags{config: filepath.Join(dir, "agent.hcl"), root: furnish(t, map[string]string{"dev/tpmrm0": ""}), trustDomain: "example.org", address: "localhost", port: 8081, bundle: filepath.Join(dir, "bundle.pem"), dataDir: dir, offline: true, force: true}
		for name, text := range map[string]string{f.bundle: "", f.config: "mine"} {
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for range 4 {
			if _, err := f.run(command(t), nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(f.config, []byte("mine too"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.run(command(t), nil); err != nil {
			t.Fatal(err)
		}
		written, err := os.ReadFile(f.config)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{".old": "mine", ".old.2": string(written), ".old.3": "mine too"} {
			if text, err := os.ReadFile(f.config + name); err != nil || string(text) != want {
				t.Errorf("%s: %s, %v", name, text, err)
			}
		}
		if kept, err := filepath.Glob(f.config + ".*"); err != nil || len(kept) != 3 {
			t.Errorf("there are %q, %v", kept, err)
		}
	})
	t.Run("a server that is away is said, and the file is written", func(t *testing.T) {
		dir := t.TempDir()
		f := &setupFlags{config: filepath.Join(dir, "agent.hcl"), root: furnish(t, map[string]string{"dev/tpmrm0": ""}), trustDomain: "example.org", address: "127.0.0.1", port: 1, bundle: filepath.Join(dir, "bundle.pem"), dataDir: dir}
		if err := os.WriteFile(f.bundle, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		result, err := f.run(command(t), nil)
		if err != nil || result.Reached || result.Problem == "" {
			t.Errorf("%+v, %v", result, err)
		}
	})
	t.Run("paths that are relative to here mean the same to the agent", func(t *testing.T) {
		dir := t.TempDir()
		t.Chdir(dir)
		for name, text := range map[string]string{"token": "0f7ba2b4\n", "bundle.pem": ""} {
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		f := &setupFlags{config: "agent.hcl", root: dir, trustDomain: "example.org", address: "localhost", port: 8081, bundle: "bundle.pem", token: "./token", dataDir: "data", offline: true}
		if _, err := f.run(command(t), nil); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile("agent.hcl")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"/bundle.pem", "/token", "/data"} {
			if !strings.Contains(string(text), quote(dir+want)) {
				t.Errorf("no %s in\n%s", dir+want, text)
			}
		}
	})
	t.Run("what the package's unit hides from the agent is said", func(t *testing.T) {
		booted := host{furnish(t, map[string]string{"run/systemd/system/x": ""}), os.Getenv}
		for _, c := range []struct {
			bundle, token, data string
			want                []string
		}{
			{"/etc/assay/bundle.pem", "/root/token", "/var/lib/assay/agent", nil},
			{"/etc/assay/bundle.pem", "", "/var/lib/assay/agent/one", nil},
			{"/tmp/bundle.pem", "/var/tmp/token", "/var/lib/assay/agent", []string{"-trustBundle /tmp/bundle.pem: ", "-joinTokenFile /var/tmp/token: "}},
			{"/tmpfs/bundle.pem", "", "/var/lib/assay/agent2", []string{"-dataDir /var/lib/assay/agent2: "}},
		} {
			f := &setupFlags{config: defaultConfig, bundle: c.bundle, token: c.token, dataDir: c.data}
			got := f.unit(booted)
			if len(got) != len(c.want) {
				t.Fatalf("%+v: %q", c, got)
			}
			for i, want := range c.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("%q, not %q", got[i], want)
				}
			}
			elsewhere := *f
			elsewhere.config = "/srv/agent.hcl"
			if got := append(elsewhere.unit(booted), f.unit(host{t.TempDir(), os.Getenv})...); got != nil {
				t.Errorf("a file that the unit does not read, and a machine without systemd: %q", got)
			}
		}
	})
	t.Run("what is missing for a better proof is said", func(t *testing.T) {
		for why, files := range map[string]map[string]string{
			"nothing else is here": {vendor: "VMware, Inc.\n"},
			"a TPM is here":        {vendor: "VMware, Inc.\n", "dev/tpmrm0": ""},
		} {
			dir := t.TempDir()
			f := &setupFlags{config: filepath.Join(dir, "agent.hcl"), root: furnish(t, files), trustDomain: "example.org", address: "localhost", port: 8081, bundle: filepath.Join(dir, "bundle.pem"), dataDir: dir, offline: true}
			if err := os.WriteFile(f.bundle, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			result, err := f.run(command(t), nil)
			said := fmt.Sprint(err)
			if err == nil {
				said = result.Missed
			}
			if !strings.Contains(said, "open-vm-tools is not installed") {
				t.Errorf("%s: %s", why, said)
			}
		}
	})
	t.Run("a quote is data", func(t *testing.T) {
		if got := quote("a\"\n}${x}%{if}"); got != `"a\"\n}$${x}%%{if}"` {
			t.Errorf("quoted is %s", got)
		}
	})
}
