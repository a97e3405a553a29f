package main

import (
	"os"
	"path/filepath"
	"strings"
)

// host is what setup looks at: paths below a root, which tests put elsewhere, and the environment.
type host struct {
	root string
	env  func(string) string
}

func (h host) exists(path string) bool {
	_, err := os.Stat(filepath.Join(h.root, path))
	return err == nil
}

// read returns what is in a small file, and nothing if it cannot be read.
func (h host) read(path string) string {
	text, err := os.ReadFile(filepath.Join(h.root, path))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// vendor is where the firmware says who made the machine.
const vendor = "sys/class/dmi/id/sys_vendor"

// ec2 reports whether this is an instance. Those on Xen, of before Nitro, say so by their UUID.
func (h host) ec2() bool {
	made := h.read(vendor)
	return made == "Amazon EC2" || made == "Xen" && strings.HasPrefix(h.read("sys/hypervisor/uuid"), "ec2")
}

func (h host) vmware() bool { return strings.HasPrefix(h.read(vendor), "VMware") }

// missed says what would prove this machine but for something that is missing.
func (h host) missed() string {
	if h.vmware() && !h.exists("usr/bin/vmtoolsd") {
		return "vsphere: the firmware says VMware, but /usr/bin/vmtoolsd of open-vm-tools is not installed"
	}
	return ""
}

// way is a way to prove something, why it was chosen, and what it would prove.
type way struct {
	Type   string `json:"type"`
	Why    string `json:"why"`
	Proves string `json:"proves,omitempty"`
	// Body is what the block has in it, line by line.
	Body []string `json:"-"`
}

// proofs say what each node attestor proves, to whom an operator's README says the rest.
var proofs = map[string]string{
	"join_token":     "that somebody was given the token, once",
	"aws_iid":        "the instance's account, region and ID, once; with an IAM role that is one of the server's instance_roles, again at any time",
	"ecs":            "the task, by its IAM role, which must be one of the server's task_roles; again at any time",
	"k8s_psat":       "the node, the namespace and the service account of the agent's pod",
	"vsphere":        "the virtual machine, as vCenter knows it",
	"x509pop":        "the possession of the machine certificate's key",
	"sshpop":         "the possession of the SSH host certificate's key",
	"tpm_devid":      "the device identity that the machine was given, whose key is in its TPM",
	"tpm":            "the TPM by its endorsement key, and what was booted, where the server wants that",
	"http_challenge": "that the machine answers at its name in DNS",
}

func nodeWay(kind, why string, body ...string) way { return way{kind, why, proofs[kind], body} }

// nodeWays are how this machine can prove what it is, the best first.
func (h host) nodeWays(cluster string) []way {
	var ways []way
	add := func(w way) { ways = append(ways, w) }
	if h.env("ECS_CONTAINER_METADATA_URI_V4") != "" {
		add(nodeWay("ecs", "this is a container of an ECS task (ECS_CONTAINER_METADATA_URI_V4 is set): the task's role"))
	}
	if h.inCluster() {
		// Which name the server has for the cluster cannot be seen from within.
		add(nodeWay("k8s_psat", "this is a pod, with a token projected for the server", "cluster    = "+quote(cluster), `token_path = "/`+podToken+`"`))
	}
	switch {
	case h.ec2():
		add(nodeWay("aws_iid", "the firmware says Amazon EC2: its identity document and its role"))
	case h.vmware() && h.exists("usr/bin/vmtoolsd"):
		add(nodeWay("vsphere", "the firmware says VMware and open-vm-tools are installed: a nonce through guestinfo"))
	}
	if h.exists("etc/assay/node.pem") && h.exists("etc/assay/node.key") {
		add(nodeWay("x509pop", "/etc/assay/node.pem and node.key are there: the machine's own certificate",
			`private_key_path = "/etc/assay/node.key"`, `certificate_path = "/etc/assay/node.pem"`))
	}
	for _, kind := range []string{"rsa", "ed25519", "ecdsa"} {
		key := "/etc/ssh/ssh_host_" + kind + "_key"
		if !h.exists(key + "-cert.pub") {
			continue
		}
		var body []string
		if kind != "rsa" { // which is the default
			body = []string{"host_key_path  = " + quote(key), "host_cert_path = " + quote(key+"-cert.pub")}
		}
		add(nodeWay("sshpop", key+"-cert.pub is there: the SSH host certificate", body...))
		break
	}
	if h.exists("dev/tpmrm0") && h.exists("etc/assay/devid.pem") && h.exists("etc/assay/devid.priv") && h.exists("etc/assay/devid.pub") {
		add(nodeWay("tpm_devid", "/etc/assay/devid.pem, .priv and .pub are there: a device identity of the TPM",
			`devid_cert_path = "/etc/assay/devid.pem"`, `devid_priv_path = "/etc/assay/devid.priv"`, `devid_pub_path  = "/etc/assay/devid.pub"`))
	}
	if h.exists("dev/tpmrm0") {
		add(nodeWay("tpm", "/dev/tpmrm0 is there: the TPM's endorsement key, and what was booted"))
	}
	return ways
}

// podToken is where manifests mount the token that is projected for the server.
const podToken = "var/run/secrets/tokens/spire-agent" //nolint:gosec // a path, no credential

func (h host) inCluster() bool { return h.env("KUBERNETES_SERVICE_HOST") != "" && h.exists(podToken) }

// nothingSeen is what a machine with none of them is.
const nothingSeen = "nothing here proves what this machine is: no EC2, no ECS, no vSphere, no certificate, no TPM"

// workloadWays find what can be proved about processes here.
func (h host) workloadWays() []way {
	ways := []way{{Type: "unix", Why: "user, group and program of a process"}}
	if h.exists("run/systemd/system") {
		ways = append(ways, way{Type: "systemd", Why: "systemd runs here: the unit of a process"})
	}
	switch {
	case h.exists("var/run/docker.sock"):
		ways = append(ways, way{Type: "docker", Why: "a Docker Engine listens at /var/run/docker.sock: image, labels and environment"})
	case h.exists("run/podman/podman.sock"):
		ways = append(ways, way{
			Type: "docker", Why: "Podman listens at /run/podman/podman.sock: image, labels and environment",
			Body: []string{`docker_socket_path = "unix:///run/podman/podman.sock"`},
		})
	}
	if h.inCluster() {
		ways = append(ways, way{Type: "k8s", Why: "this is a pod: namespace, service account, labels and image of pods"})
	}
	switch {
	case h.env("AWS_EXECUTION_ENV") == "AWS_ECS_FARGATE":
		ways = append(ways, way{Type: "ecs", Why: "this is a task in Fargate: the containers beside this one", Body: []string{"sidecar = true"}})
	case h.exists("etc/ecs/ecs.config") || h.exists("var/lib/ecs"):
		ways = append(ways, way{Type: "ecs", Why: "this is a container instance of ECS: task, family and container of a process"})
	}
	return ways
}
