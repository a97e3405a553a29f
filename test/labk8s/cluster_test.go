// Package labk8s holds the tests on a whole private Kubernetes: the built server as a StatefulSet, the built
// agent as a DaemonSet, and pods that get, lose and regain their identity. `make lab-k8s` runs them and prints
// the times.
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

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/kube"
)

const (
	space = "assay"
	// patience is how long anything may take on a busy machine before it counts as not happening.
	patience = 3 * time.Minute
)

// world is a cluster with a server and an agent in it.
type world struct {
	*kube.Cluster
	bin       string
	run       string // where the server's and the agent's sockets are on the node
	appImage  string // digest of the configuration of the image that pods run
	agentNode string // the alias that entries have for a parent
}

func start(t *testing.T) *world {
	t.Helper()
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	if err := kube.Available(filepath.Join(bin, "k8s"), true); err != nil {
		lab.Missing(t, "Kubernetes", err)
	}
	ctx := t.Context()
	c, err := kube.Start(ctx, filepath.Join(bin, "k8s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{"kubelet", "containerd"} {
				t.Logf("%s: %s", name, tail(c.Log(name)))
			}
			logs, _ := filepath.Glob(filepath.Join(c.PodLogs(), space+"_*", "*", "*.log"))
			for _, path := range logs {
				t.Logf("%s: %s", path, tail(path))
			}
		}
		if err := c.Close(); err != nil {
			t.Errorf("close cluster: %v", err)
		}
	})
	w := &world{Cluster: c, bin: bin, run: filepath.Join(c.Dir, "run"), agentNode: "spiffe://example.org/k8s/lab"}
	pod := filepath.Join(t.TempDir(), "pod")
	build := exec.CommandContext(ctx, "go", "build", "-o", pod, "../lab/kube/pod")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build pod: %v: %s", err, out)
	}
	began := time.Now()
	if err := c.StartNode(ctx, pod); err != nil {
		t.Fatal(err)
	}
	t.Logf("node is ready after %s", time.Since(began).Round(time.Millisecond))
	if w.appImage, err = c.Import(ctx, "lab.local/app:1", map[string]string{"/pod": pod}, "/pod"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"assay-server", "assay-agent"} {
		if _, err := c.Import(ctx, "lab.local/"+name+":1", map[string]string{"/" + name: filepath.Join(bin, name)}, "/"+name); err != nil {
			t.Fatal(err)
		}
	}
	w.install(t)
	return w
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

const serverConfig = `server {
  trust_domain = "example.org"
  bind_address = "` + kube.NodeIP + `"
  bind_port = 8081
  data_dir = "/run/assay/server/data"
  socket_path = "/run/assay/server/api.sock"
  audit_log_file = "-"
}
node_attestor "k8s_psat" {
  cluster "lab" {
    service_account_allow_list = ["assay:agent"]
    allowed_node_label_keys = ["zone"]
  }
}
key_manager "disk" {}
`

const agentConfig = `agent {
  trust_domain = "example.org"
  server_address = "` + kube.NodeIP + `"
  server_port = 8081
  data_dir = "/run/assay/agent-data"
  trust_bundle_path = "/run/assay/bundle.pem"
  socket_path = "/run/assay/agent/public/api.sock"
  admin_socket_path = "/run/assay/agent/private/admin.sock"
  log_level = "debug"
}
node_attestor "k8s_psat" { cluster = "lab" }
workload_attestor "k8s" {
  runtime_socket_path = "/run/cri/cd.sock"
  kubelet_address = "` + kube.NodeIP + `"
  enable_namespace_labels = true
}
key_manager "disk" {}
`

// install puts server and agent into the cluster, as an operator does.
func (w *world) install(t *testing.T) {
	t.Helper()
	ctx, c := t.Context(), w.Client
	must(t, os.MkdirAll(w.run, 0o755))
	_, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: space}}, metav1.CreateOptions{})
	must(t, err)
	_, err = c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"team": "red"}}}, metav1.CreateOptions{})
	must(t, err)
	rule := func(group, resource string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{resource}, Verbs: verbs}
	}
	for account, rules := range map[string][]rbacv1.PolicyRule{
		"server": {rule("authentication.k8s.io", "tokenreviews", "create"), rule("", "nodes", "get", "list", "watch"), rule("", "pods", "get")},
		"agent":  {rule("", "pods", "list", "watch"), rule("", "nodes/pods", "get"), rule("", "namespaces", "list", "watch")},
	} {
		_, err := c.CoreV1().ServiceAccounts(space).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: account}}, metav1.CreateOptions{})
		must(t, err)
		name := metav1.ObjectMeta{Name: "assay-" + account}
		_, err = c.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: name, Rules: rules}, metav1.CreateOptions{})
		must(t, err)
		_, err = c.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
			ObjectMeta: name, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: name.Name},
			Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: space, Name: account}},
		}, metav1.CreateOptions{})
		must(t, err)
	}
	_, err = c.CoreV1().ConfigMaps(space).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "assay"}, Data: map[string]string{"server.hcl": serverConfig, "agent.hcl": agentConfig},
	}, metav1.CreateOptions{})
	must(t, err)

	server := w.template("server")
	server.Spec.Containers[0].Args = []string{"run", "-config", "/etc/assay/server.hcl"}
	_, err = c.AppsV1().StatefulSets(space).Create(ctx, &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "server"},
		Spec:       appsv1.StatefulSetSpec{Selector: &metav1.LabelSelector{MatchLabels: server.Labels}, Template: server, ServiceName: "server"},
	}, metav1.CreateOptions{})
	must(t, err)
	eventually(t, "the server gives its bundle", func() error {
		out, err := w.server("bundle", "show")
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(w.run, "bundle.pem"), []byte(out), 0o644)
	})
	agent := w.template("agent")
	agent.Spec.HostPID = true
	agent.Spec.Containers[0].Args = []string{"run", "-config", "/etc/assay/agent.hcl"}
	agent.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "MY_NODE_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "spec.nodeName"}}}}
	seconds := int64(600)
	w.mount(&agent.Spec, "cri", filepath.Dir(w.RuntimeSocket()), "/run/cri", true)
	agent.Spec.Volumes = append(agent.Spec.Volumes, corev1.Volume{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "spire-agent", Audience: "spire-server", ExpirationSeconds: &seconds}}},
	}}})
	agent.Spec.Containers[0].VolumeMounts = append(agent.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "token", MountPath: "/var/run/secrets/tokens"})
	_, err = c.AppsV1().DaemonSets(space).Create(ctx, &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "agent"},
		Spec:       appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: agent.Labels}, Template: agent},
	}, metav1.CreateOptions{})
	must(t, err)
	w.mustServer(t, "entry", "create", "-node", "-spiffeID", w.agentNode, "-selector", "k8s_psat:cluster:lab")
	eventually(t, "the agent attests", func() error {
		out, err := w.server("agent", "list")
		if err != nil {
			return err
		}
		if !strings.Contains(out, "k8s_psat/lab/") {
			return fmt.Errorf("agents: %s", out)
		}
		return nil
	})
}

// template is the pod of the server or the agent: no privileges but root's in its own container.
func (w *world) template(name string) corev1.PodTemplateSpec {
	grace, no := int64(1), false
	spec := corev1.PodSpec{
		ServiceAccountName: name, HostNetwork: true, TerminationGracePeriodSeconds: &grace,
		Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Containers: []corev1.Container{{
			Name: name, Image: "lab.local/assay-" + name + ":1", ImagePullPolicy: corev1.PullNever,
			SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no, Privileged: &no},
			VolumeMounts:    []corev1.VolumeMount{{Name: "config", MountPath: "/etc/assay"}},
		}},
		Volumes: []corev1.Volume{{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "assay"}}}}},
	}
	w.mount(&spec, "run", w.run, "/run/assay", false)
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": name}}, Spec: spec}
}

// mount mounts a folder of the node.
func (*world) mount(spec *corev1.PodSpec, name, from, to string, readOnly bool) {
	spec.Volumes = append(spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: from}}})
	for i := range spec.Containers {
		spec.Containers[i].VolumeMounts = append(spec.Containers[i].VolumeMounts, corev1.VolumeMount{Name: name, MountPath: to, ReadOnly: readOnly})
	}
}

// server runs a command of the server's.
func (w *world) server(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	args = append(args, "-socketPath", filepath.Join(w.run, "server", "api.sock"))
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
	args := []string{"entry", "create", "-parentID", w.agentNode, "-spiffeID", id, "-output", "json"}
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

// workload is a pod that watches the Workload API.
func (w *world) workload(name string, labels map[string]string) *corev1.Pod {
	grace, no := int64(1), false
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Labels: labels},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: &grace, AutomountServiceAccountToken: &no,
			Containers: []corev1.Container{{
				Name: "main", Image: "lab.local/app:1", ImagePullPolicy: corev1.PullNever, Args: []string{"watch", "unix:///run/spiffe/api.sock"},
			}},
		},
	}
	w.mount(&p.Spec, "spiffe", filepath.Join(w.run, "agent", "public"), "/run/spiffe", true)
	return p
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

// lines reads what a pod said, from the file that the runtime keeps of it.
func (w *world) lines(p *corev1.Pod, container string) []said {
	path := filepath.Join(w.PodLogs(), p.Namespace+"_"+p.Name+"_"+string(p.UID), container, "0.log")
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	var all []said
	for lines := bufio.NewScanner(file); lines.Scan(); {
		_, text, ok := strings.Cut(lines.Text(), " F ")
		var one said
		if ok && json.Unmarshal([]byte(text), &one) == nil {
			all = append(all, one)
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
