package kube

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// StartNode adds controllers, a scheduler and the node, and waits until it is ready. pause is a static program
// that waits for its end, which every pod's sandbox runs.
func (c *Cluster) StartNode(ctx context.Context, pause string) error {
	if err := Available(c.bin, true); err != nil {
		return err
	}
	c.node = true
	for name, args := range map[string][]string{
		"kube-controller-manager": {
			"--kubeconfig=" + c.Kubeconfig("kcm"), "--authentication-kubeconfig=" + c.Kubeconfig("kcm"), "--authorization-kubeconfig=" + c.Kubeconfig("kcm"),
			"--bind-address=127.0.0.1", "--service-account-private-key-file=" + c.path("pki", "sa.key"), "--root-ca-file=" + c.CA(),
			"--use-service-account-credentials=true", "--leader-elect=false",
		},
		"kube-scheduler": {
			"--kubeconfig=" + c.Kubeconfig("sched"), "--authentication-kubeconfig=" + c.Kubeconfig("sched"), "--authorization-kubeconfig=" + c.Kubeconfig("sched"),
			"--bind-address=127.0.0.1", "--leader-elect=false",
		},
	} {
		if err := c.start(name, filepath.Join(c.bin, name), args...); err != nil {
			return err
		}
	}
	if err := c.startContainerd(ctx); err != nil {
		return err
	}
	if _, err := c.Import(ctx, "lab.local/pause:1", map[string]string{"/pause": pause}, "/pause"); err != nil {
		return err
	}
	if err := c.startProxy(); err != nil {
		return err
	}
	if err := c.StartKubelet(ctx); err != nil {
		return err
	}
	if err := c.preparePolicies(ctx); err != nil {
		return err
	}
	return c.startNames(ctx)
}

// nodeFolders are where a node has things, and where in the cluster's own folder they are here. The parts of
// the node, and with them its pods, see them in a mount namespace of their own: manifests are applied as they
// are, beside whatever the machine runs itself.
var nodeFolders = [][2]string{
	{"/var/lib/kubelet", "kubelet"}, {"/run/containerd", "cd"}, {"/run/assay", "run"}, {"/var/lib/assay", "state"},
}

// startNamespace starts the process that holds the node's mount namespace.
func (c *Cluster) startNamespace(ctx context.Context) error {
	var script strings.Builder
	script.WriteString("set -e\n")
	for _, f := range nodeFolders {
		for _, dir := range []string{f[0], c.path(f[1])} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		fmt.Fprintf(&script, "mount --bind %s %s\nmount --make-shared %[2]s\n", c.path(f[1]), f[0])
	}
	ready := c.path("namespace.ready")
	fmt.Fprintf(&script, "touch %s\nexec sleep infinity\n", ready)
	if err := c.start("namespace", "unshare", "--mount", "--propagation", "private", "sh", "-c", script.String()); err != nil {
		return err
	}
	return c.wait(ctx, "namespace", func(context.Context) error {
		_, err := os.Stat(ready)
		return err
	})
}

// startInside starts a part in the node's mount namespace.
func (c *Cluster) startInside(name, program string, args ...string) error {
	program, err := find(program)
	if err != nil {
		return err
	}
	return c.start(name, "nsenter", append([]string{c.namespace(), "--", program}, args...)...)
}

// namespace is the node's mount namespace, for nsenter.
func (c *Cluster) namespace() string {
	return "--mount=/proc/" + strconv.Itoa(c.parts["namespace"].cmd.Process.Pid) + "/ns/mnt"
}

// OnNode is where a path of the node's is found from outside of its mount namespace.
func (c *Cluster) OnNode(path string) string {
	return filepath.Join("/proc", strconv.Itoa(c.parts["namespace"].cmd.Process.Pid), "root", path)
}

// startProxy starts kube-proxy. Who asks a service is seen by who answers: NetworkPolicies are about that.
func (c *Cluster) startProxy() error {
	config := fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {kubeconfig: %s}
hostnameOverride: %s
clusterCIDR: %s.0/24
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
iptables: {masqueradeAll: false, syncPeriod: 30s, minSyncPeriod: 100ms}
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, c.Kubeconfig("proxy"), NodeName, podNet)
	if err := os.WriteFile(c.path("proxy.yaml"), []byte(config), 0o600); err != nil {
		return err
	}
	return c.start("kube-proxy", filepath.Join(c.bin, "kube-proxy"), "--config="+c.path("proxy.yaml"))
}

// RuntimeSocket is containerd's.
func (c *Cluster) RuntimeSocket() string { return c.path("cd", "containerd.sock") }

func (c *Cluster) startContainerd(ctx context.Context) error {
	for _, dir := range []string{"cni", "podlogs"} {
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := c.startNamespace(ctx); err != nil {
		return err
	}
	files := map[string]string{
		// ptp: all that pods say to each other is routed, and so NetworkPolicies are about it.
		c.path("cni", "10-lab.conflist"): fmt.Sprintf(`{"cniVersion":"0.4.0","name":"lab","plugins":[{"type":"ptp","ipMasq":false,
"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"%s.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`, c.path("ipam"), podNet),
		// restrict_oom_score_adj: a machine may lack CAP_SYS_RESOURCE, without which runc cannot lower it.
		c.path("cd", "config.toml"): fmt.Sprintf(`version = 2
root = %q
state = %q
[grpc]
  address = %q
[ttrpc]
  address = %[3]q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "lab.local/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = %[4]q
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
`, c.path("cd", "root"), c.path("cd", "state"), c.RuntimeSocket(), c.path("cni")),
	}
	for path, text := range files {
		text = strings.Replace(text, "[ttrpc]\n  address = "+fmt.Sprintf("%q", c.RuntimeSocket()), "[ttrpc]\n  address = "+fmt.Sprintf("%q", c.RuntimeSocket()+".ttrpc"), 1)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	return c.StartContainerd(ctx)
}

// StartContainerd starts the container runtime, again after Stop("containerd").
func (c *Cluster) StartContainerd(ctx context.Context) error {
	if err := c.startInside("containerd", "containerd", "-c", c.path("cd", "config.toml")); err != nil {
		return err
	}
	return c.wait(ctx, "containerd", func(ctx context.Context) error { return c.ctr(ctx, "version") })
}

// StartKubelet starts the kubelet, again after Stop("kubelet"), and waits until the node is ready.
func (c *Cluster) StartKubelet(ctx context.Context) error {
	config := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
imagePullCredentialsVerificationPolicy: NeverVerify
cgroupDriver: cgroupfs
failSwapOn: false
containerRuntimeEndpoint: unix://%s
address: %s
port: 10250
tlsCertFile: %s
tlsPrivateKeyFile: %s
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %s}}
authorization: {mode: Webhook}
healthzBindAddress: 127.0.0.1
makeIPTablesUtilChains: false
resolvConf: ""
clusterDNS: [%s]
clusterDomain: cluster.local
podLogsDir: %s
volumePluginDir: %s
maxPods: 250
registryPullQPS: 0
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "50Mi"}
`, c.RuntimeSocket(), NodeIP, c.path("pki", "kubelet-server.crt"), c.path("pki", "kubelet-server.key"), c.CA(), namesIP, c.path("podlogs"), c.path("plugins"))
	if err := os.WriteFile(c.path("kubelet.yaml"), []byte(config), 0o600); err != nil {
		return err
	}
	if err := c.startInside("kubelet", filepath.Join(c.bin, "kubelet"), "--config="+c.path("kubelet.yaml"), "--kubeconfig="+c.Kubeconfig("kubelet"),
		"--root-dir=/var/lib/kubelet", "--hostname-override="+NodeName, "--node-ip="+NodeIP, "--v=2"); err != nil {
		return err
	}
	began := time.Now()
	return c.wait(ctx, "kubelet", func(ctx context.Context) error {
		node, err := c.Client.CoreV1().Nodes().Get(ctx, NodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		i := slices.IndexFunc(node.Status.Conditions, func(one corev1.NodeCondition) bool { return one.Type == corev1.NodeReady })
		// The condition of before a restart is not this kubelet's word.
		if i < 0 || node.Status.Conditions[i].Status != corev1.ConditionTrue || node.Status.Conditions[i].LastHeartbeatTime.Time.Before(began.Truncate(time.Second)) {
			return errors.New("node is not ready")
		}
		return nil
	})
}

// KubeletDir is the kubelet's root folder, with what is mounted there.
func (c *Cluster) KubeletDir() string { return c.OnNode("/var/lib/kubelet") }

// PodLogs is the folder of the pods' logs.
func (c *Cluster) PodLogs() string { return c.path("podlogs") }

func (c *Cluster) ctr(ctx context.Context, args ...string) error {
	return run(ctx, "ctr", append([]string{"-a", c.RuntimeSocket(), "-n", "k8s.io"}, args...)...)
}

// Exec runs a program in a container and returns what it printed; no part but the runtime is asked.
func (c *Cluster) Exec(ctx context.Context, container string, args ...string) (string, error) {
	program, err := find("ctr")
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, "nsenter", append([]string{c.namespace(), "--", program, "-a", c.RuntimeSocket(), "-n", "k8s.io", "tasks", "exec",
		"--exec-id", "lab-" + strconv.FormatInt(time.Now().UnixNano(), 36), container}, args...)...).CombinedOutput()
	return string(out), err
}

// Load gives the node an image from a file, as `docker save` and `make images` write them.
func (c *Cluster) Load(ctx context.Context, path string) error {
	return c.ctr(ctx, "images", "import", path)
}

// Import makes an image FROM scratch of files (the path in it, and what to put there), and gives it to the
// node. It returns the digest of its configuration.
func (c *Cluster) Import(ctx context.Context, reference string, files map[string]string, entrypoint ...string) (string, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	paths := []string{}
	for path := range files {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		text, err := os.ReadFile(files[path])
		if err != nil {
			return "", err
		}
		if err := w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(path, "/"), Mode: 0o755, Size: int64(len(text))}); err != nil {
			return "", err
		}
		if _, err := w.Write(text); err != nil {
			return "", err
		}
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	path := c.path("layer.tar")
	defer os.Remove(path)
	if err := os.WriteFile(path, layer.Bytes(), 0o600); err != nil {
		return "", err
	}
	made, err := tarball.LayerFromFile(path, tarball.WithMediaType(types.DockerLayer))
	if err != nil {
		return "", err
	}
	img, err := mutate.AppendLayers(empty.Image, made)
	if err != nil {
		return "", err
	}
	if img, err = mutate.ConfigFile(img, with(img, entrypoint)); err != nil {
		return "", err
	}
	tag, err := name.NewTag(reference)
	if err != nil {
		return "", err
	}
	archive := c.path("image.tar")
	defer os.Remove(archive)
	if err := tarball.WriteToFile(archive, tag, img); err != nil {
		return "", err
	}
	if err := c.ctr(ctx, "images", "import", archive); err != nil {
		return "", err
	}
	digest, err := img.ConfigName()
	return digest.String(), err
}

func with(img v1.Image, entrypoint []string) *v1.ConfigFile {
	config, err := img.ConfigFile()
	if err != nil {
		config = &v1.ConfigFile{}
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Config.Entrypoint = "linux", "amd64", entrypoint
	return config
}

// closeNode ends the node, its containers and what it mounted.
func (c *Cluster) closeNode() {
	if !c.node {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c.Stop("kubelet")
	list := func(args ...string) []string {
		program, err := find("ctr")
		if err != nil {
			return nil
		}
		out, err := exec.CommandContext(ctx, program, append([]string{"-a", c.RuntimeSocket(), "-n", "k8s.io"}, args...)...).Output()
		if err != nil {
			return nil
		}
		return strings.Fields(string(out))
	}
	for _, id := range list("tasks", "ls", "-q") {
		_ = c.ctr(ctx, "tasks", "kill", "-s", "KILL", "-a", id)
	}
	for _, id := range list("tasks", "ls", "-q") {
		_ = c.ctr(ctx, "tasks", "rm", "-f", id)
	}
	for _, id := range list("containers", "ls", "-q") {
		_ = c.ctr(ctx, "containers", "rm", id)
	}
	c.Stop("containerd")
	c.Stop("kube-proxy")
	_ = run(ctx, filepath.Join(c.bin, "kube-proxy"), "--cleanup")
	c.Stop("namespace") // and with it everything that was mounted in it
	c.Stop("netpol")
	_ = cleanPolicies(ctx) // there may be none
	for _, root := range []string{"/sys/fs/cgroup/*/kubepods", "/sys/fs/cgroup/*/k8s.io", "/sys/fs/cgroup/kubepods"} {
		found, _ := filepath.Glob(root)
		for _, dir := range found {
			removeCgroups(dir)
		}
	}
}

// removeCgroups removes empty cgroups, the innermost first.
func removeCgroups(root string) {
	var dirs []string
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, dir := range dirs {
		_ = os.Remove(dir)
	}
}
