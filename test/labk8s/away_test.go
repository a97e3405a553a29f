package labk8s

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// away is how long both parts stay away: longer than a kubelet's or a token's answer is held by anybody, and than the
// lifetime of the shortest SVID. Ten minutes are passed by hand: LAB_AWAY=10m.
func away(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("LAB_AWAY")
	if text == "" {
		return 25 * time.Second
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

// withoutBoth shows that nothing is noticed while nobody but the runtime answers: the stream of one pod stays as it is,
// new processes are attested and served all the while, and the SVID of a pod that has a short life is renewed.
func (w *world) withoutBoth(t *testing.T, r *report, p, rotating *corev1.Pod) {
	w.Kill("kube-apiserver")
	w.Stop("kubelet")
	began := time.Now()
	d, asked, renewed := away(t), 0, began
	for until := began.Add(d); time.Now().Before(until); asked++ {
		w.another(t, p)
		select {
		case <-time.After(min(d/5, 10*time.Second)): // the passing of the time is what is tried
		case <-t.Context().Done():
		}
	}
	w.another(t, p)
	for range 2 { // that of before ends, and the one that took its place
		renewed = w.until(t, rotating, renewed, "svid", short).At
	}
	r.note("API server and kubelet away, nothing noticed for", time.Since(began).Round(time.Second).String())
	r.note("processes attested and served meanwhile", fmt.Sprint(asked+1))
	if all := w.explain(t, p); !strings.Contains(all, "k8s:sa:default") {
		t.Errorf("a pod that is known says %s", all)
	}
	for _, one := range []*corev1.Pod{p, rotating} {
		if slices.ContainsFunc(w.lines(one, "main"), func(s said) bool { return s.At.After(began) && s.What == "none" }) {
			t.Errorf("pod %s noticed: %v", one.Name, w.lines(one, "main"))
		}
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

// agentDeleted deletes the agent's pod, which no rollout prepares: Kubernetes starts the next one when it is gone, and
// the node is without an agent that long. With the component hot-standby another agent is there already.
func (w *world) agentDeleted(t *testing.T, r *report, p *corev1.Pod) {
	r.add("agent's pod deleted by hand: stream without an agent", w.deleteAgent(t, p))
	w.kubectl(t, "apply", "-k", "overlay-standby")
	var without []time.Duration
	for range 3 {
		eventually(t, "two agents are ready", func() error {
			pods, err := w.agentPods(t)
			if err != nil || len(pods) != 2 {
				return fmt.Errorf("there are %d pods (%w)", len(pods), err)
			}
			for _, one := range pods {
				ready := slices.ContainsFunc(one.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue })
				if one.DeletionTimestamp != nil || !ready {
					return fmt.Errorf("%s is not", one.Name)
				}
			}
			return nil
		})
		began := time.Now()
		without = append(without, w.deleteAgent(t, p))
		for _, line := range w.audit(t, `"event":"svid.x509.new","outcome":"allow"`, `"spiffe_id":"`+cart+`"`) {
			if line.Time.After(began) {
				t.Error("an SVID was signed again that is still valid")
			}
		}
	}
	r.add("agent's pod deleted by hand, another stands by: stream without an agent", without...)
	eventually(t, "an agent stands by", func() error {
		serves, stand := w.agents(t)
		if len(stand) != 1 {
			return fmt.Errorf("%d do", len(stand))
		}
		r.note("memory of the agent that serves, and of the one that stands by (VmRSS)", rssOf(serves)+", "+rssOf(stand[0]))
		return nil
	})
}

// agents are the processes of this installation's agents on the node: the one that serves, and those that stand by.
// One that was installed beside it may still be ending.
func (w *world) agents(t *testing.T) (serves int, stand []int) {
	t.Helper()
	eventually(t, "an agent serves", func() error {
		serves, stand = 0, nil
		pods, err := w.agentPods(t)
		if err != nil {
			return err
		}
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			return err
		}
		holds := map[string]bool{} // the node's data directory is locked by the agent that serves
		for line := range strings.Lines(string(locks)) {
			if fields := strings.Fields(line); len(fields) > 4 && fields[1] == "FLOCK" {
				holds[fields[4]] = true
			}
		}
		each(func(pid int, dir string) {
			line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
			switch {
			case podOf(pods, pid) < 0, !strings.HasPrefix(string(line), "/bin/assay-agent\x00run"):
			case holds[strconv.Itoa(pid)]:
				serves = pid
			default:
				stand = append(stand, pid)
			}
		})
		if serves == 0 {
			return errors.New("none does")
		}
		return nil
	})
	return serves, stand
}

// deleteAgent deletes the pod of the agent that serves, and returns how long a stream was without one.
func (w *world) deleteAgent(t *testing.T, p *corev1.Pod) time.Duration {
	t.Helper()
	serves, _ := w.agents(t)
	pods, err := w.agentPods(t)
	must(t, err)
	i := podOf(pods, serves)
	if i < 0 {
		t.Fatalf("none of %d pods is that of the agent that serves", len(pods))
	}
	began := time.Now()
	must(t, w.Client.CoreV1().Pods(space).Delete(t.Context(), pods[i].Name, metav1.DeleteOptions{}))
	lost := w.until(t, p, began, "none", "").At
	return w.until(t, p, lost, "svid", cart).At.Sub(lost)
}

// podOf is which of the pods a process is in, or negative.
func podOf(pods []corev1.Pod, pid int) int {
	cgroup, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return slices.IndexFunc(pods, func(one corev1.Pod) bool { return strings.Contains(string(cgroup), "pod"+string(one.UID)+"/") })
}

func (w *world) agentPods(t *testing.T) ([]corev1.Pod, error) {
	list, err := w.Client.CoreV1().Pods(space).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name in (assay-agent, assay-agent-standby)"})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}
