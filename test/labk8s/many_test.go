package labk8s

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// many is how many pods start at once; LAB_PODS says another number, as far as the node takes them.
func many(t *testing.T) int {
	t.Helper()
	text := os.Getenv("LAB_PODS")
	if text == "" {
		return 100
	}
	n, err := strconv.Atoi(text)
	must(t, err)
	return n
}

// manyPods starts pods at once, measures the agent meanwhile, and replaces it as `kubectl rollout restart` does.
func (w *world) manyPods(t *testing.T, r *report) {
	n := many(t)
	agent := w.processOf(t, "assay-agent")
	before := cpuOf(agent)
	pods, began := w.createMany(t, n)
	var all, late []time.Duration
	var lastMain, lastSVID time.Time
	for i, p := range pods {
		got := w.until(t, p, began[i], "svid", cart)
		first := w.until(t, p, began[i], "main", "")
		all, late = append(all, got.At.Sub(began[i])), append(late, got.At.Sub(first.At))
		if first.At.After(lastMain) {
			lastMain = first.At
		}
		if got.At.After(lastSVID) {
			lastSVID = got.At
		}
	}
	r.add(fmt.Sprintf("%d pods at once: created -> SVID", n), all...)
	r.add(fmt.Sprintf("%d pods at once: main() -> SVID", n), late...)
	r.note(fmt.Sprintf("%d pods at once: last main() -> last SVID", n), lastSVID.Sub(lastMain).Round(time.Millisecond).String())
	r.note(fmt.Sprintf("%d pods at once: agent's CPU a pod", n), ((cpuOf(agent) - before) / time.Duration(n)).String())
	r.note(fmt.Sprintf("agent's memory at %d pods (VmRSS)", n), rssOf(agent))
	w.replaced(t, r, pods)
	deleted := time.Now()
	must(t, w.Client.CoreV1().Pods(shop).DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "many=yes"}))
	eventually(t, "the node has ended them", func() error {
		left, err := w.Client.CoreV1().Pods(shop).List(t.Context(), metav1.ListOptions{LabelSelector: "many=yes"})
		if err == nil && len(left.Items) > 0 {
			err = fmt.Errorf("%d pods are left", len(left.Items))
		}
		return err
	})
	r.note(fmt.Sprintf("%d pods deleted: all gone after", n), time.Since(deleted).Round(time.Millisecond).String())
	eventually(t, "their entries are gone", func() error {
		out, err := w.server("entry", "show", "-spiffeID", cart)
		if err != nil {
			return err
		}
		for _, p := range pods {
			if strings.Contains(out, string(p.UID)) {
				return fmt.Errorf("that of %s is there", p.Name)
			}
		}
		return nil
	})
}

func (w *world) createMany(t *testing.T, n int) (pods []*corev1.Pod, began []time.Time) {
	t.Helper()
	var mu sync.Mutex
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() {
			at := time.Now()
			p, err := w.Client.CoreV1().Pods(shop).Create(t.Context(),
				w.workload(fmt.Sprintf("many-%d", i), map[string]string{"app": "cart", "many": "yes"}), metav1.CreateOptions{})
			if err != nil {
				t.Errorf("create pod: %v", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			pods, began = append(pods, p), append(began, at)
		})
	}
	group.Wait()
	return pods, began
}

// replaced has the agent's DaemonSet start an agent in place of the one that runs: every stream is back, with
// the SVID that it had.
func (w *world) replaced(t *testing.T, r *report, pods []*corev1.Pod) {
	t.Helper()
	began := time.Now()
	w.kubectl(t, "-n", space, "rollout", "restart", "daemonset/assay-agent")
	w.kubectl(t, "-n", space, "rollout", "status", "daemonset/assay-agent", "--timeout=180s")
	var without []time.Duration
	for _, p := range pods {
		lost := w.until(t, p, began, "none", "").At
		without = append(without, w.until(t, p, lost, "svid", cart).At.Sub(lost))
	}
	r.add(fmt.Sprintf("agent replaced below %d pods: streams without an agent", len(pods)), without...)
	again := 0
	for _, line := range w.audit(t, `"event":"svid.x509.new","outcome":"allow"`, `"spiffe_id":"`+cart+`"`) {
		if line.Time.After(began) {
			again++
		}
	}
	if again > 0 {
		t.Errorf("%d SVIDs were signed again that are still valid", again)
	}
	r.note(fmt.Sprintf("agent replaced below %d pods: SVIDs signed again", len(pods)), fmt.Sprint(again))
}

// hammer measures what one attestation costs the agent, of a container that it knows.
func (w *world) hammer(t *testing.T, r *report) {
	p := w.workload("hammer", map[string]string{"app": "cart"})
	p.Spec.Containers[0].Args[0] = "hammer"
	agent, asked := w.processOf(t, "assay-agent"), w.askedKubelet(t)
	p, began := w.create(t, p)
	for _, one := range []struct{ kept, how string }{{"false", "on a new connection each"}, {"true", "on a connection that is kept"}} {
		w.until(t, p, began, "hammer", one.kept)
		before := cpuOf(agent)
		done := w.until(t, p, began, "hammered", "")
		spent := cpuOf(agent) - before
		n, err := strconv.Atoi(done.ID)
		must(t, err)
		if n == 0 {
			t.Fatal("it had no identity")
		}
		r.note("8 callers, "+one.how+": fetches", strconv.Itoa(n))
		r.note("8 callers, "+one.how+": agent's CPU for each", (spent / time.Duration(n)).Round(time.Microsecond).String())
		began = done.At
	}
	calls := w.askedKubelet(t) - asked
	r.note("8 callers: the kubelet's lists meanwhile", strconv.Itoa(calls))
	if calls > 0 {
		t.Errorf("the kubelet was asked %d times for what is known", calls)
	}
	w.gone(t, p)
}

// askedKubelet counts the lists of pods that anybody had from the kubelet, by its own metrics.
func (w *world) askedKubelet(t *testing.T) int {
	t.Helper()
	text := w.kubectl(t, "get", "--raw", "/api/v1/nodes/lab-node/proxy/metrics")
	n := 0
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "kubelet_http_requests_total{") || !strings.Contains(line, `path="pods"`) {
			continue
		}
		count, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(strings.TrimSpace(line), ' ')+1:]), 64)
		must(t, err)
		n += int(count)
	}
	return n
}
