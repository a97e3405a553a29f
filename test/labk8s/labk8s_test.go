package labk8s

import (
	"context"
	"encoding/json"
	"errors"
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
	"k8s.io/apimachinery/pkg/types"

	"github.com/assay-id/assay/test/lab/kube"
)

const (
	cart    = "spiffe://example.org/ns/shop/cart"
	till    = "spiffe://example.org/till"
	short   = "spiffe://example.org/ns/shop/short"
	guarded = "spiffe://example.org/ns/shop/guarded"
)

// identities are ClusterSPIFFEIDs for pods by their label app.
const identities = `apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata: {name: cart}
spec:
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/cart"
  podSelector: {matchLabels: {app: cart}}
---
apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata: {name: short}
spec:
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/short"
  podSelector: {matchLabels: {app: short}}
  ttl: 20s
---
apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata: {name: guarded}
spec:
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/guarded"
  podSelector: {matchLabels: {app: guarded}}
  scanPolicy: prod
`

func TestKubernetes(t *testing.T) {
	w := start(t)
	r := &report{}
	defer r.print(t)
	t.Run("the quickstart, as README.md says it", func(t *testing.T) {
		w.quickstart(t)
		r.note("the quickstart's commands -> pods may come", w.installed.Round(time.Millisecond).String())
		p, began := w.create(t, w.workload("first", nil))
		got := w.until(t, p, began, "svid", "spiffe://example.org/ns/shop/sa/default")
		r.note("kubectl apply of the quickstart -> the first SVID", got.At.Sub(w.applied).Round(time.Millisecond).String())
		if out := w.kubectl(t, "-n", space, "exec", "assay-server-0", "--", "assay-server", "entry", "show"); !strings.Contains(out, string(p.UID)) {
			t.Errorf("the server's command says %s", out)
		}
		w.isSocketVolume(t, p)
		w.leastPrivilege(t)
		w.gone(t, p)
	})
	if t.Failed() {
		return
	}
	w.more(t)
	w.kubectl(t, "delete", "-f", k8s+"quickstart/identities.yaml")
	w.apply(t, identities)
	w.entry(t, till, "k8s:ns:shop", "k8s:sa:default", "k8s:pod-label:role:till", "k8s:ns-label:team:red")
	rotating, rotatingSince := w.create(t, w.workload("rotating", map[string]string{"app": "short"}))
	// The server's pod is new, and who enforces policies lets agents reach it some seconds after it is ready.
	r.add("server and agent just replaced, policies in force: pod created -> SVID", w.until(t, rotating, rotatingSince, "svid", short).At.Sub(rotatingSince))

	t.Run("a pod has its identity as it starts", func(t *testing.T) { w.oneByOne(t, r) })
	p, began := w.create(t, w.workload("probe", map[string]string{"app": "cart"}))
	w.until(t, p, began, "svid", cart)
	t.Run("network policies keep out who has no business there", func(t *testing.T) { w.policies(t) })
	t.Run("every selector is there, and the true image", func(t *testing.T) { w.selectors(t, p) })
	t.Run("a label that is taken away takes the identity, and brings it back", func(t *testing.T) { w.labels(t, r, p) })
	t.Run("a label of the node reaches the agent's selectors", func(t *testing.T) { w.nodeLabel(t, r) })
	t.Run("an init container is told from its pod's main one", func(t *testing.T) { w.initContainer(t) })
	t.Run("the bundle is published", func(t *testing.T) { w.bundle(t) })
	t.Run("a CVE takes the identity, an Event says why, and a VEX statement brings it back", func(t *testing.T) { w.cve(t, r) })
	t.Run("the spire-controller-manager registers too", func(t *testing.T) { w.manager(t) })
	t.Run("the API server is away", func(t *testing.T) { w.withoutAPIServer(t, p) })
	t.Run("the kubelet is away", func(t *testing.T) { w.withoutKubelet(t, p) })
	t.Run("both are away", func(t *testing.T) { w.withoutBoth(t, r, p, rotating) })
	t.Run("many pods at once, and the agent replaced below them", func(t *testing.T) {
		w.Stop("netpol") // what it does for a hundred pods would be most of what is measured; its rules stay in force
		w.manyPods(t, r)
		must(t, w.StartPolicies())
	})
	t.Run("attestations of a container that is known", func(t *testing.T) { w.hammer(t, r) })
	t.Run("the chart, installed, upgraded and uninstalled beside it", func(t *testing.T) { w.chart(t, r, p) })
	t.Run("the agent's pod is deleted", func(t *testing.T) { w.agentDeleted(t, r, p) })
	t.Run("an SVID is renewed in time, through all of this", func(t *testing.T) {
		lost := ""
		n := 0
		for _, s := range w.lines(rotating, "main") {
			if s.What == "none" && n > 0 && !strings.Contains(s.Error, "Unavailable") { // that is an agent that was replaced
				lost += fmt.Sprintf(" %+v", s)
			}
			if s.What == "svid" && s.ID == short && s.At.After(rotatingSince) {
				n++
			}
		}
		if n < 2 || lost != "" {
			t.Errorf("%d SVIDs, lost meanwhile:%s", n, lost)
		}
		r.note("SVIDs of a pod with a lifetime of 20 s", fmt.Sprint(n))
	})
	t.Run("a pod that is deleted is gone, and its entry", func(t *testing.T) {
		began := time.Now()
		w.gone(t, p)
		eventually(t, "its entry is deleted", func() error {
			for _, line := range w.audit(t, `"event":"entry.delete"`, string(p.UID)) {
				if line.Time.After(began) {
					r.add("pod deleted -> its entry gone (the process had a second to end)", line.Time.Sub(began))
					return nil
				}
			}
			return errors.New("it is there")
		})
	})
	t.Run("the overlay high-security in its place, enforced", func(t *testing.T) { w.severe(t, r) })
}

// gone deletes a pod and waits until it is.
func (w *world) gone(t *testing.T, p *corev1.Pod) {
	t.Helper()
	must(t, w.Client.CoreV1().Pods(p.Namespace).Delete(t.Context(), p.Name, metav1.DeleteOptions{}))
	eventually(t, "the pod has ended", func() error {
		if _, err := w.Client.CoreV1().Pods(p.Namespace).Get(t.Context(), p.Name, metav1.GetOptions{}); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
}

// isSocketVolume looks at the volume of the CSI driver: it shows the socket, and can be no more than that.
func (w *world) isSocketVolume(t *testing.T, p *corev1.Pod) {
	t.Helper()
	mount := filepath.Join(w.KubeletDir(), "pods", string(p.UID), "volumes", "kubernetes.io~csi", "spiffe", "mount")
	if err := os.WriteFile(filepath.Join(mount, "x"), nil, 0o600); err == nil {
		t.Error("the volume can be written to")
	}
	if _, err := os.Stat(filepath.Join(mount, "api.sock")); err != nil {
		t.Error(err)
	}
}

// leastPrivilege looks at what the kernel lets the processes do, whatever the manifests say.
func (w *world) leastPrivilege(t *testing.T) {
	t.Helper()
	const ptrace = "0000000000080000" // CAP_SYS_PTRACE
	for name, capabilities := range map[string]string{"assay-server": "0000000000000000", "assay-agent": ptrace} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.processOf(t, name)))
		must(t, err)
		for _, want := range []string{"CapEff:\t" + capabilities, "CapBnd:\t" + capabilities, "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(string(text), want+"\n") {
				t.Errorf("%s has not %q:\n%s", name, want, text)
			}
		}
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", w.processOf(t, name)))
		must(t, err)
		if root, _, _ := strings.Cut(string(mounts), "\n"); !strings.Contains(root, " / ") || !strings.Contains(root, " ro,") {
			t.Errorf("%s's root is %s", name, root)
		}
	}
}

// oneByOne starts pods one after the other.
func (w *world) oneByOne(t *testing.T, r *report) {
	var main, entry, svid, late []time.Duration
	for i := range 10 {
		p, began := w.create(t, w.workload(fmt.Sprintf("one-%d", i), map[string]string{"app": "cart"}))
		got := w.until(t, p, began, "svid", cart)
		first := w.until(t, p, began, "main", "")
		main, svid, late = append(main, first.At.Sub(began)), append(svid, got.At.Sub(began)), append(late, got.At.Sub(first.At))
		for _, line := range w.audit(t, `"event":"entry.create"`, string(p.UID)) {
			entry = append(entry, line.Time.Sub(began))
		}
	}
	r.add("pod created -> its main()", main...)
	r.add("pod created -> its entry", entry...)
	r.add("pod created -> SVID in the workload", svid...)
	r.add("main() -> SVID in the workload", late...)
}

func (w *world) selectors(t *testing.T, p *corev1.Pod) {
	all := w.explain(t, p)
	for _, want := range []string{
		"k8s:ns:shop", "k8s:sa:default", "k8s:node-name:" + kube.NodeName, "k8s:pod-uid:" + string(p.UID), "k8s:pod-name:probe",
		"k8s:pod-label:app:cart", "k8s:ns-label:team:red", "k8s:pod-image:lab.local/app:1", "k8s:pod-image-count:1", "k8s:pod-init-image-count:0",
		"k8s:container-name:main", "k8s:container-image:lab.local/app:1", "image:id:" + w.appImage, "image:platform:linux/amd64",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("no %s in %s", want, all)
		}
	}
}

// label sets a label of a pod, or takes it away where value is null, and returns when.
func (w *world) label(t *testing.T, p *corev1.Pod, key, value string) time.Time {
	t.Helper()
	began := time.Now()
	_, err := w.Client.CoreV1().Pods(p.Namespace).Patch(t.Context(), p.Name, types.MergePatchType,
		fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, key, value), metav1.PatchOptions{})
	must(t, err)
	return began
}

// labels takes labels away and gives them back: one that a ClusterSPIFFEID selects by, with which the entry
// goes, and one that an entry asks for, which stays where it is.
func (w *world) labels(t *testing.T, r *report, p *corev1.Pod) {
	role, began := w.create(t, w.workload("role", map[string]string{"role": "till"}))
	w.until(t, role, began, "svid", till)
	for _, one := range []struct {
		what, key, value, id string
		pod                  *corev1.Pod
	}{
		{"of a ClusterSPIFFEID", "app", `"cart"`, cart, p}, {"of an entry", "role", `"till"`, till, role},
	} {
		var gone, back []time.Duration
		for range 5 {
			began := w.label(t, one.pod, one.key, "null")
			gone = append(gone, w.until(t, one.pod, began, "none", "").At.Sub(began))
			began = w.label(t, one.pod, one.key, one.value)
			back = append(back, w.until(t, one.pod, began, "svid", one.id).At.Sub(began))
		}
		r.add("label "+one.what+" removed -> open stream has lost the SVID", gone...)
		r.add("label "+one.what+" given back -> SVID", back...)
	}
	w.gone(t, role)
}

func (w *world) nodeLabel(t *testing.T, r *report) {
	began := time.Now()
	_, err := w.Client.CoreV1().Nodes().Patch(t.Context(), kube.NodeName, types.MergePatchType, []byte(`{"metadata":{"labels":{"zone":"b"}}}`), metav1.PatchOptions{})
	must(t, err)
	eventually(t, "the selector is there", func() error {
		out, err := w.server("agent", "list")
		if err == nil && !strings.Contains(out, "agent_node_label:zone:b") {
			id := agentID(out)
			if out, err = w.server("agent", "show", "-spiffeID", id); err == nil && !strings.Contains(out, "agent_node_label:zone:b") {
				err = fmt.Errorf("agent is %s", out)
			}
		}
		return err
	})
	r.add("label of the node changed -> in the agent's selectors", time.Since(began))
}

func agentID(list string) string {
	for field := range strings.FieldsSeq(list) {
		if strings.HasPrefix(field, "spiffe://") && strings.Contains(field, "k8s_psat") {
			return strings.Trim(field, `",`)
		}
	}
	return ""
}

func (w *world) initContainer(t *testing.T) {
	const id = "spiffe://example.org/shop/init"
	w.entry(t, id, "k8s:ns:shop", "k8s:container-name:setup")
	two := w.workload("two", map[string]string{"app": "none"})
	two.Spec.InitContainers = slices.Clone(two.Spec.Containers)
	two.Spec.InitContainers[0].Name = "setup"
	made, began := w.create(t, two)
	eventually(t, "the init container has its own identity", func() error {
		all := w.lines(made, "setup")
		if !slices.ContainsFunc(all, func(s said) bool { return s.At.After(began) && s.What == "svid" && s.ID == id }) {
			return fmt.Errorf("it says %v", all)
		}
		return nil
	})
	w.gone(t, made)
}

// bundle looks for the trust domain's bundle where the configuration has it published.
func (w *world) bundle(t *testing.T) {
	want := strings.TrimSpace(w.mustServer(t, "bundle", "show"))
	for what, args := range map[string][]string{
		"ConfigMap":          {"-n", space, "get", "configmap", "assay-bundle", "-o", `jsonpath={.data.bundle\.pem}`},
		"ClusterTrustBundle": {"get", "clustertrustbundle", "assay.example.org:workloads:workloads", "-o", "jsonpath={.spec.trustBundle}"},
	} {
		eventually(t, "the bundle is in the "+what, func() error {
			out, err := w.Kubectl(t.Context(), args...)
			if err == nil && strings.TrimSpace(out) != want {
				err = fmt.Errorf("it is %q, not %q", out, want)
			}
			return err
		})
	}
}

// explain asks the agent what it knows of a pod's process.
func (w *world) explain(t *testing.T, p *corev1.Pod) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(w.bin, "assay-agent"), "explain", "-pid", fmt.Sprint(w.mainPID(t, p)),
		"-socketPath", w.admin(), "-output", "json").CombinedOutput()
	if err != nil && !json.Valid(out) {
		t.Fatalf("explain: %v: %s", err, out)
	}
	var said struct {
		Findings []struct {
			Selectors []struct{ Type, Value string }
		}
	}
	must(t, json.Unmarshal(out, &said))
	var all []string
	for _, f := range said.Findings {
		for _, s := range f.Selectors {
			all = append(all, s.Type+":"+s.Value)
		}
	}
	return strings.Join(all, "\n")
}
