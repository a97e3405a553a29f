package labk8s

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// away is how long parts stay away beyond what a test needs. Ten minutes are passed by hand: LAB_AWAY=10m.
func away(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("LAB_AWAY")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	must(t, err)
	return d
}

// withoutAPIServer starts what is attested anew while nobody can be asked who pods are: the container of a pod
// starts again, and another process in it.
func (w *world) withoutAPIServer(t *testing.T, p *corev1.Pod) {
	again := w.workload("again", map[string]string{"app": "cart"})
	again.Spec.RestartPolicy = corev1.RestartPolicyAlways
	again, began := w.create(t, again)
	w.until(t, again, began, "svid", cart)
	w.Kill("kube-apiserver")
	ended := time.Now()
	must(t, syscall.Kill(w.mainPID(t, again), syscall.SIGKILL))
	first := w.until(t, again, ended, "main", "") // the kubelet starts it without the API server
	got := w.until(t, again, first.At, "svid", cart)
	t.Logf("a new container has its SVID %s after its start", got.At.Sub(first.At))
	w.another(t, p)
	must(t, w.StartAPIServer(t.Context()))
	w.until(t, p, w.label(t, p, "app", "null"), "none", "")
	w.until(t, p, w.label(t, p, "app", `"cart"`), "svid", cart)
	w.gone(t, again)
}

// withoutKubelet changes labels and attests anew while the kubelet is away.
func (w *world) withoutKubelet(t *testing.T, p *corev1.Pod) {
	w.Stop("kubelet")
	w.another(t, p)
	w.until(t, p, w.label(t, p, "app", "null"), "none", "")
	w.until(t, p, w.label(t, p, "app", `"cart"`), "svid", cart)
	must(t, w.StartKubelet(t.Context()))
	next, began := w.create(t, w.workload("after-kubelet", map[string]string{"app": "cart"}))
	w.until(t, next, began, "svid", cart)
	w.gone(t, next)
}

// withoutBoth shows that nothing is noticed while nobody but the runtime answers.
func (w *world) withoutBoth(t *testing.T, r *report, p *corev1.Pod) {
	w.Kill("kube-apiserver")
	w.Stop("kubelet")
	began := time.Now()
	w.another(t, p)
	if d := away(t); d > 0 {
		select {
		case <-time.After(d):
		case <-t.Context().Done():
		}
		w.another(t, p)
		r.note("API server and kubelet away, nothing noticed for", time.Since(began).Round(time.Second).String())
	}
	if all := w.explain(t, p); !strings.Contains(all, "k8s:sa:default") {
		t.Errorf("a pod that is known says %s", all)
	}
	if slices.ContainsFunc(w.lines(p, "main"), func(s said) bool { return s.At.After(began) && s.What == "none" }) {
		t.Errorf("the pod noticed: %v", w.lines(p, "main"))
	}
	must(t, w.StartAPIServer(t.Context()))
	must(t, w.StartKubelet(t.Context()))
	w.until(t, p, w.label(t, p, "app", "null"), "none", "")
	w.until(t, p, w.label(t, p, "app", `"cart"`), "svid", cart)
}

// another runs one more process in a pod's container, which fetches the pod's identity.
func (w *world) another(t *testing.T, p *corev1.Pod) {
	t.Helper()
	began := time.Now()
	out, err := w.Exec(t.Context(), w.containerID(t, p), "/pod", "fetch", "unix:///spiffe-workload-api/api.sock")
	if err != nil || !strings.Contains(out, cart) {
		t.Errorf("another process of the container says %s (%v)", out, err)
	}
	t.Logf("another process had it within %s", time.Since(began).Round(time.Millisecond))
}

// containerID is that of a pod's container, by its process: it is asked for while the API server is away.
func (w *world) containerID(t *testing.T, p *corev1.Pod) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", w.mainPID(t, p)))
	must(t, err)
	line, _, _ := strings.Cut(string(text), "\n")
	return line[strings.LastIndexByte(line, '/')+1:]
}

// agentDeleted deletes the agent's pod, which no rollout prepares.
func (w *world) agentDeleted(t *testing.T, r *report, p *corev1.Pod) {
	pods, err := w.Client.CoreV1().Pods(space).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=assay-agent"})
	must(t, err)
	if len(pods.Items) != 1 {
		t.Fatal(errors.New("there is not one agent"))
	}
	began := time.Now()
	must(t, w.Client.CoreV1().Pods(space).Delete(t.Context(), pods.Items[0].Name, metav1.DeleteOptions{}))
	lost := w.until(t, p, began, "none", "").At
	r.add("agent's pod deleted by hand: stream without an agent", w.until(t, p, lost, "svid", cart).At.Sub(lost))
}
