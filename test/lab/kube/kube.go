// Package kube runs a private Kubernetes: etcd and the real API server, and where asked for controllers, a
// scheduler and one node of containerd and kubelet, all beside whatever the machine already has. Its binaries
// are built from source in a module of their own (test/lab/k8s, `make k8s`), its images are made here, and
// nothing is pulled.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Addresses of the cluster: the node's own, that of the API server's service, and the network of pods.
const (
	NodeName  = "lab-node"
	NodeIP    = "10.97.0.1"
	serviceIP = "10.96.0.1"
	// serviceNet is where services have their addresses.
	serviceNet = "10.96.0.0/16"
	podNet     = "10.98.0"
	link       = "assay-k8s0"
	etcdURL    = "http://127.0.0.1:23790"
)

// startTime is how long a part may take to start; on a busy small machine they are slow.
const startTime = 4 * time.Minute

// turn is locked by the one cluster that runs on a machine at a time.
var turn = filepath.Join(os.TempDir(), "assay-k8s.lock")

// Cluster is a private Kubernetes. Only one can run on a machine: Start waits for its turn. Only one goroutine
// may start and stop its parts.
type Cluster struct {
	// Dir holds everything that the cluster writes.
	Dir string
	// Client speaks with the API server as its administrator.
	Client *kubernetes.Clientset
	// Config is how Client does.
	Config *rest.Config

	bin   string
	parts map[string]*part
	node  bool
	mine  *os.File // the lock of turn
}

type part struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// Binaries are what a cluster needs from `make k8s`: the first is enough for Start, StartNode needs all.
var Binaries = []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl", "coredns", "netpol"}

// Available says why there can be no private cluster here, or nil; bin is where the binaries are.
func Available(bin string, node bool) error {
	if os.Geteuid() != 0 {
		return errors.New("a private cluster needs root")
	}
	tools := []string{"etcd", "ip"}
	need := Binaries[:1]
	if node {
		tools, need = append(tools, "containerd", "runc", "iptables", "ipset", "ctr", "unshare", "nsenter"), Binaries
	}
	for _, tool := range tools {
		if _, err := find(tool); err != nil {
			return err
		}
	}
	for _, name := range need {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return fmt.Errorf("%w (make k8s builds it)", err)
		}
	}
	if node {
		if _, err := os.Stat("/usr/lib/cni/ptp"); err != nil {
			return fmt.Errorf("%w (Debian: apt-get install containernetworking-plugins)", err)
		}
	}
	return nil
}

// find looks for a program where Debian has it, which is not on every path.
func find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return filepath.Join(dir, name), nil
		}
	}
	return "", fmt.Errorf("%s is not installed (make setup installs it on Debian)", name)
}

// Start brings up etcd and the API server with everything they write below a new folder.
func Start(ctx context.Context, bin string) (*Cluster, error) {
	if err := Available(bin, false); err != nil {
		return nil, err
	}
	mine, err := takeTurn(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "assay-k8s-")
	if err != nil {
		return nil, errors.Join(err, mine.Close())
	}
	c := &Cluster{Dir: dir, bin: bin, parts: map[string]*part{}, mine: mine}
	if err := c.up(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// takeTurn waits until no other cluster runs on the machine.
func takeTurn(ctx context.Context) (*os.File, error) {
	file, err := os.OpenFile(turn, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
			return file, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("another private cluster runs (%s): %w", turn, err), file.Close())
		case <-time.After(time.Second):
		}
	}
}

func (c *Cluster) up(ctx context.Context) error {
	if err := os.Chmod(c.Dir, 0o755); err != nil { // pods mount folders in it
		return err
	}
	if err := c.makeKeys(); err != nil {
		return err
	}
	_ = run(ctx, "ip", "link", "del", link) // of a run that was killed
	for _, args := range [][]string{
		{"link", "add", link, "type", "bridge"}, {"addr", "add", NodeIP + "/32", "dev", link}, {"link", "set", link, "up"},
	} {
		if err := run(ctx, "ip", args...); err != nil {
			return err
		}
	}
	if err := c.start("etcd", "etcd", "--data-dir", c.path("etcd"), "--listen-client-urls", etcdURL, "--advertise-client-urls", etcdURL,
		"--listen-peer-urls", "http://127.0.0.1:23800", "--initial-advertise-peer-urls", "http://127.0.0.1:23800",
		"--initial-cluster", "default=http://127.0.0.1:23800"); err != nil {
		return err
	}
	if err := c.wait(ctx, "etcd", func(ctx context.Context) error { return get(ctx, etcdURL+"/health") }); err != nil {
		return err
	}
	var err error
	if c.Config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig("admin")); err != nil {
		return err
	}
	c.Config.QPS, c.Config.Burst = 200, 400
	if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
		return err
	}
	return c.StartAPIServer(ctx)
}

// StartAPIServer starts the API server, again after Stop("kube-apiserver"), and waits until it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	pki := func(name string) string { return c.path("pki", name) }
	if err := c.start("kube-apiserver", filepath.Join(c.bin, "kube-apiserver"),
		"--etcd-servers="+etcdURL, "--service-cluster-ip-range="+serviceNet,
		"--bind-address="+NodeIP, "--advertise-address="+NodeIP, "--secure-port=6443",
		"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"), "--client-ca-file="+pki("ca.crt"),
		"--kubelet-client-certificate="+pki("admin.crt"), "--kubelet-client-key="+pki("admin.key"), "--kubelet-certificate-authority="+pki("ca.crt"),
		"--service-account-key-file="+pki("sa.key"), "--service-account-signing-key-file="+pki("sa.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--kubelet-preferred-address-types=InternalIP",
		"--feature-gates=ClusterTrustBundle=true", "--runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles=true"); err != nil {
		return err
	}
	return c.wait(ctx, "kube-apiserver", func(ctx context.Context) error {
		return c.Client.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

// Kubeconfig is the path of a user's kubeconfig: admin, kubelet, kcm or sched.
func (c *Cluster) Kubeconfig(user string) string { return c.path(user + ".conf") }

// CA is the path of the cluster's CA certificate.
func (c *Cluster) CA() string { return c.path("pki", "ca.crt") }

// Kubectl runs the real kubectl as the administrator.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "kubectl"), append([]string{"--kubeconfig", c.Kubeconfig("admin")}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said // warnings too
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s%s", strings.Join(args, " "), err, out, said.String())
	}
	return string(out), nil
}

// Log is the path of a part's log.
func (c *Cluster) Log(name string) string { return c.path(name + ".log") }

func (c *Cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.Dir}, parts...)...)
}

// start starts a part; its output goes to its log.
func (c *Cluster) start(name, program string, args ...string) error {
	program, err := find(program)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(c.Log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(context.Background(), program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is ours to pass on
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	p := &part{cmd, make(chan struct{})}
	c.parts[name] = p
	go func() {
		_ = cmd.Wait()
		close(p.exited)
	}()
	return nil
}

// wait waits until a part answers.
func (c *Cluster) wait(ctx context.Context, name string, answers func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		err := answers(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-c.parts[name].exited:
			return fmt.Errorf("%s ended while starting: %s", name, c.lastWords(name))
		case <-ctx.Done():
			return fmt.Errorf("%s does not answer: %w: %s", name, err, c.lastWords(name))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (c *Cluster) lastWords(name string) string {
	text, err := os.ReadFile(c.Log(name))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// Stop ends a part.
func (c *Cluster) Stop(name string) {
	p := c.parts[name]
	if p == nil {
		return
	}
	delete(c.parts, name)
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.exited:
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
}

// Kill ends a part at once, as a crash would.
func (c *Cluster) Kill(name string) {
	p := c.parts[name]
	if p == nil {
		return
	}
	delete(c.parts, name)
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.exited
}

// Close ends everything and removes what it wrote.
func (c *Cluster) Close() error {
	c.closeNode()
	for _, name := range []string{"kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"} {
		c.Kill(name) // nothing of it is needed any more, and an API server takes its time
	}
	_ = run(context.Background(), "ip", "link", "del", link) // it may not be there
	return errors.Join(os.RemoveAll(c.Dir), c.mine.Close())
}

func get(ctx context.Context, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	reply, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	_, _ = io.Copy(io.Discard, reply.Body)
	if reply.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, reply.Status)
	}
	return nil
}

func run(ctx context.Context, name string, args ...string) error {
	program, err := find(name)
	if err != nil {
		return err
	}
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said.String())
	}
	return nil
}
