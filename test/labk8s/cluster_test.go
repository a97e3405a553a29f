// Package labk8s holds the tests on a whole private Kubernetes: what deploy/k8s has is applied as its README.md
// says, and pods get, lose and regain their identity. `make lab-k8s` runs them and prints the times.
package labk8s

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/kube"
)

const (
	space   = "assay"
	cluster = "quickstart"
	k8s     = "../../deploy/k8s/"
	// patience is how long anything may take on a busy machine before it counts as not happening.
	patience = 3 * time.Minute
	// shop is the namespace of the pods, which may do as little as Kubernetes lets pods do.
	shop = "shop"
	// nodeAlias is the parent of entries that are made by hand.
	nodeAlias = "spiffe://example.org/k8s/lab"
)

// world is a cluster with a server and an agent in it.
type world struct {
	*kube.Cluster
	dyn       dynamic.Interface
	bin       string
	pod       string // the program that pods run
	appImage  string // digest of the configuration of the image that pods run
	socket    string // the server's, for its commands
	installed time.Duration
	applied   time.Time // when the quickstart was
	helmBuilt string
}

func start(t *testing.T) *world {
	t.Helper()
	bin, err := filepath.Abs("../../bin")
	must(t, err)
	if err := kube.Available(filepath.Join(bin, "k8s"), true); err != nil {
		lab.Missing(t, "Kubernetes", err)
	}
	ctx := t.Context()
	c, err := kube.Start(ctx, filepath.Join(bin, "k8s"))
	must(t, err)
	w := &world{Cluster: c, bin: bin, socket: filepath.Join(c.Dir, "server.sock")}
	t.Cleanup(func() {
		if t.Failed() {
			w.tellAll(t)
		}
		if err := c.Close(); err != nil {
			t.Errorf("close cluster: %v", err)
		}
	})
	w.dyn, err = dynamic.NewForConfig(c.Config)
	must(t, err)
	pod := filepath.Join(t.TempDir(), "pod")
	w.pod = pod
	build := exec.CommandContext(ctx, "go", "build", "-o", pod, "../lab/kube/pod")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build pod: %v: %s", err, out)
	}
	began := time.Now()
	must(t, c.StartNode(ctx, pod))
	t.Logf("node is ready after %s", time.Since(began).Round(time.Millisecond))
	w.appImage, err = c.Import(ctx, "lab.local/app:1", map[string]string{"/pod": pod}, "/pod")
	must(t, err)
	for _, name := range []string{"assay-server", "assay-agent", "assay-csi"} { // of `make images`
		must(t, c.Load(ctx, filepath.Join(bin, "images", name+".tar")))
	}
	must(t, c.WaitForNames(ctx))
	return w
}

// tellAll logs what may say why a test failed.
func (w *world) tellAll(t *testing.T) {
	t.Helper()
	for _, name := range []string{"kubelet", "containerd", "kube-proxy", "netpol"} {
		t.Logf("%s: %s", name, tail(w.Log(name)))
	}
	logs, _ := filepath.Glob(filepath.Join(w.PodLogs(), "[^"+shop[:1]+"]*", "*", "*.log"))
	for _, path := range logs {
		t.Logf("%s: %s", path, tail(path))
	}
}

func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, is func() error) {
	t.Helper()
	late := time.Now().Add(patience)
	for {
		err := is()
		if err == nil {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("never: %s: %v", what, err)
		}
		<-time.After(20 * time.Millisecond) // between looks at a real system that tells nobody
	}
}

// kubectl runs the real one.
func (w *world) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.Kubectl(t.Context(), args...)
	must(t, err)
	return out
}

// apply applies a manifest that is written here.
func (w *world) apply(t *testing.T, manifest string) {
	t.Helper()
	path := filepath.Join(w.Dir, "manifest.yaml")
	must(t, os.WriteFile(path, []byte(manifest), 0o600))
	w.kubectl(t, "apply", "-f", path)
}

// quickstart runs the commands of kubectl that README.md of deploy/k8s begins with, with a volume for the server's
// claim: there is no storage class here.
func (w *world) quickstart(t *testing.T) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Join(w.Dir, "state", "volume"), 0o755))
	w.kubectl(t, "apply", "-f", "testdata/volume.yaml")
	text, err := os.ReadFile(k8s + "README.md")
	must(t, err)
	_, block, _ := strings.Cut(string(text), "```\n")
	block, _, _ = strings.Cut(block, "```\n")
	began, n := time.Now(), 0
	w.applied = began
	for line := range strings.Lines(block) {
		line, _, _ = strings.Cut(line, "#")
		line, ours := strings.CutPrefix(line, "kubectl ")
		if !ours {
			continue // the images are there
		}
		args := strings.Fields(line)
		for i, arg := range args {
			if strings.HasPrefix(arg, "deploy/") {
				args[i] = filepath.Join("../..", arg)
			}
		}
		w.kubectl(t, args...)
		n++
	}
	if n < 4 {
		t.Fatalf("README.md has %d commands of kubectl", n)
	}
	w.installed = time.Since(began)
	_, err = w.Client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: shop, Labels: map[string]string{"team": "red", "pod-security.kubernetes.io/enforce": "restricted"},
	}}, metav1.CreateOptions{})
	must(t, err)
}

// more applies an overlay with what the tests need beyond the quickstart, as README.md says, and waits until it
// is in force.
func (w *world) more(t *testing.T) {
	t.Helper()
	w.kubectl(t, "apply", "-f", "testdata/reports.yaml")
	w.kubectl(t, "apply", "-k", "overlay")
	for _, what := range []string{"statefulset/assay-server", "daemonset/assay-agent"} {
		w.kubectl(t, "-n", space, "rollout", "status", what, "--timeout=180s")
	}
	w.findServer(t)
	w.mustServer(t, "entry", "create", "-node", "-spiffeID", nodeAlias, "-selector", "k8s_psat:cluster:"+cluster)
}

// findServer leads a short path to the socket in the server's pod: that of a socket may have 107 bytes.
func (w *world) findServer(t *testing.T) {
	t.Helper()
	pod, err := w.Client.CoreV1().Pods(space).Get(t.Context(), "assay-server-0", metav1.GetOptions{})
	must(t, err)
	_ = os.Remove(w.socket) // that of the last pod
	must(t, os.Symlink(filepath.Join(w.KubeletDir(), "pods", string(pod.UID), "volumes/kubernetes.io~empty-dir/run/server/api.sock"), w.socket))
}

// audit returns the lines of the server's audit log whose text has all of these in it.
func (w *world) audit(t *testing.T, has ...string) []auditLine {
	t.Helper()
	file, err := os.Open(filepath.Join(w.Dir, "state", "volume", "server", "audit.log"))
	must(t, err)
	defer file.Close()
	var found []auditLine
	for lines := bufio.NewScanner(file); lines.Scan(); {
		text := lines.Text()
		var one auditLine
		if !slices.ContainsFunc(has, func(s string) bool { return !strings.Contains(text, s) }) && json.Unmarshal([]byte(text), &one) == nil {
			found = append(found, one)
		}
	}
	return found
}

type auditLine struct {
	Time    time.Time
	Event   string
	EntryID string `json:"entry_id"`
}

// admin is the agent's admin socket.
func (w *world) admin() string { return filepath.Join(w.Dir, "run", "agent", "private", "admin.sock") }

// server runs a command of the server's.
func (w *world) server(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	args = append(args, "-socketPath", w.socket)
	out, err := exec.CommandContext(ctx, filepath.Join(w.bin, "assay-server"), args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("assay-server %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

func (w *world) mustServer(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.server(args...)
	must(t, err)
	return out
}

// entry makes an entry for pods of the node and returns its ID.
func (w *world) entry(t *testing.T, id string, selectors ...string) string {
	t.Helper()
	args := []string{"entry", "create", "-parentID", nodeAlias, "-spiffeID", id, "-output", "json"}
	for _, s := range selectors {
		args = append(args, "-selector", s)
	}
	var made struct {
		Results []struct{ Entry struct{ ID string } }
	}
	out := w.mustServer(t, args...)
	if err := json.Unmarshal([]byte(out), &made); err != nil || len(made.Results) != 1 {
		t.Fatalf("entry create says %s (%v)", out, err)
	}
	return made.Results[0].Entry.ID
}

// workload is a pod that watches the Workload API, whose socket the CSI driver shows it.
func (*world) workload(name string, labels map[string]string) *corev1.Pod {
	grace, no, yes, user := int64(1), false, true, int64(1000)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: shop, Labels: labels},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: &grace, AutomountServiceAccountToken: &no,
			Containers: []corev1.Container{{
				Name: "main", Image: "lab.local/app:1", ImagePullPolicy: corev1.PullNever, Args: []string{"watch", "unix:///spiffe-workload-api/api.sock"},
				VolumeMounts: []corev1.VolumeMount{{Name: "spiffe", MountPath: "/spiffe-workload-api", ReadOnly: true}},
				SecurityContext: &corev1.SecurityContext{
					RunAsNonRoot: &yes, RunAsUser: &user, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
					Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
					SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
				},
			}},
			Volumes: []corev1.Volume{{Name: "spiffe", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: "csi.spiffe.io", ReadOnly: &yes}}}},
		},
	}
}

// create makes a pod and returns when it was asked for.
func (w *world) create(t *testing.T, p *corev1.Pod) (*corev1.Pod, time.Time) {
	t.Helper()
	var made *corev1.Pod
	var began time.Time
	// The namespace's service account is made a moment after the namespace.
	eventually(t, "the pod is accepted", func() error {
		began = time.Now()
		var err error
		made, err = w.Client.CoreV1().Pods(p.Namespace).Create(t.Context(), p, metav1.CreateOptions{})
		return err
	})
	return made, began
}

// said is a line of a pod's.
type said struct {
	At              time.Time
	What, ID, Error string
}

// lines reads what a pod said, from the files that the runtime keeps of it, one for each start.
func (w *world) lines(p *corev1.Pod, container string) []said {
	paths, _ := filepath.Glob(filepath.Join(w.PodLogs(), p.Namespace+"_"+p.Name+"_"+string(p.UID), container, "*.log"))
	slices.Sort(paths)
	var all []said
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			_, text, ok := strings.Cut(line, " F ")
			var one said
			if ok && json.Unmarshal([]byte(text), &one) == nil {
				all = append(all, one)
			}
		}
	}
	return all
}

// until waits for a line after a moment.
func (w *world) until(t *testing.T, p *corev1.Pod, after time.Time, what, id string) said {
	t.Helper()
	var found said
	eventually(t, fmt.Sprintf("pod %s says %s %s", p.Name, what, id), func() error {
		all := w.lines(p, "main")
		i := slices.IndexFunc(all, func(s said) bool { return s.At.After(after) && s.What == what && (id == "" || s.ID == id) })
		if i < 0 {
			return fmt.Errorf("it says %v", all[max(0, len(all)-3):])
		}
		found = all[i]
		return nil
	})
	return found
}
