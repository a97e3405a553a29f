package labk8s

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/assay-id/assay/test/lab/kube"
)

// report collects the times for the end. They are printed, never judged: machines differ.
type report struct {
	rows []string
}

func (r *report) add(what string, times ...time.Duration) {
	if len(times) == 0 {
		return
	}
	slices.Sort(times)
	at := func(p int) time.Duration { return times[min(len(times)-1, len(times)*p/100)].Round(time.Millisecond) }
	r.rows = append(r.rows, fmt.Sprintf("%-62s %4d %10s %10s", what, len(times), at(50), at(99)))
}

func (r *report) note(what, value string) {
	r.rows = append(r.rows, fmt.Sprintf("%-62s %15s", what, value))
}

func (r *report) String() string {
	return fmt.Sprintf("%-62s %4s %10s %10s\n%s\n", "Kubernetes on one node", "n", "p50", "p99", strings.Join(r.rows, "\n"))
}

// many is how many pods start at once.
const many = 100

func TestKubernetes(t *testing.T) {
	w := start(t)
	r := &report{}
	defer func() {
		t.Logf("\n%s", r)
		if path := os.Getenv("LAB_REPORT"); path != "" {
			if err := os.WriteFile(path, []byte(r.String()), 0o600); err != nil {
				t.Error(err)
			}
		}
	}()
	const cart = "spiffe://example.org/shop/cart"
	entry := w.entry(t, cart, "k8s:ns:shop", "k8s:sa:default", "k8s:pod-label:app:cart", "k8s:ns-label:team:red")
	label := func(p *corev1.Pod, value string) time.Time {
		t.Helper()
		patch := fmt.Sprintf(`{"metadata":{"labels":{"app":%s}}}`, value)
		began := time.Now()
		_, err := w.Client.CoreV1().Pods(p.Namespace).Patch(t.Context(), p.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		must(t, err)
		return began
	}

	t.Run("a pod has its identity as it starts", func(t *testing.T) {
		var main, svid, late []time.Duration
		for i := range 10 {
			p, began := w.create(t, w.workload(fmt.Sprintf("one-%d", i), map[string]string{"app": "cart"}))
			got := w.until(t, p, began, "svid", cart)
			first := w.until(t, p, began, "main", "")
			main, svid, late = append(main, first.At.Sub(began)), append(svid, got.At.Sub(began)), append(late, got.At.Sub(first.At))
		}
		r.add("pod created -> its main()", main...)
		r.add("pod created -> SVID in the workload", svid...)
		r.add("main() -> SVID in the workload", late...)
	})
	p, began := w.create(t, w.workload("probe", map[string]string{"app": "cart"}))
	w.until(t, p, began, "svid", cart)

	t.Run("every selector is there, and the true image", func(t *testing.T) {
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
	})
	t.Run("a label that is taken away takes the identity, and brings it back", func(t *testing.T) {
		var gone, back []time.Duration
		for range 10 {
			began := label(p, "null")
			gone = append(gone, w.until(t, p, began, "none", "").At.Sub(began))
			began = label(p, `"cart"`)
			back = append(back, w.until(t, p, began, "svid", cart).At.Sub(began))
		}
		r.add("label removed -> open stream has lost the SVID", gone...)
		r.add("label given back -> SVID", back...)
	})
	t.Run("the entry's end takes the identity", func(t *testing.T) {
		began := time.Now()
		w.mustServer(t, "entry", "delete", "-entryID", entry)
		r.add("entry deleted -> open stream has lost the SVID", w.until(t, p, began, "none", "").At.Sub(began))
		began = time.Now()
		entry = w.entry(t, cart, "k8s:ns:shop", "k8s:sa:default", "k8s:pod-label:app:cart", "k8s:ns-label:team:red")
		r.add("entry created -> SVID", w.until(t, p, began, "svid", cart).At.Sub(began))
	})
	t.Run("a label of the node reaches the agent's selectors", func(t *testing.T) {
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
	})
	t.Run("an init container is told from its pod's main one", func(t *testing.T) {
		w.entry(t, "spiffe://example.org/shop/init", "k8s:container-name:setup")
		two := w.workload("two", map[string]string{"app": "cart"})
		two.Spec.InitContainers = slices.Clone(two.Spec.Containers)
		two.Spec.InitContainers[0].Name = "setup"
		two.Spec.Containers[0].Name = "other"
		made, began := w.create(t, two)
		eventually(t, "the init container has its own identity", func() error {
			all := w.lines(made, "setup")
			if !slices.ContainsFunc(all, func(s said) bool { return s.At.After(began) && s.What == "svid" }) {
				return fmt.Errorf("it says %v", all)
			}
			return nil
		})
	})
	t.Run("a volume of the CSI driver shows the socket, and nothing else", func(t *testing.T) { w.csi(t, cart) })
	t.Run("the API server may be away", func(t *testing.T) {
		w.Stop("kube-apiserver")
		pid := w.mainPID(t, p)
		if all := w.explain(t, p); pid == 0 || !strings.Contains(all, "k8s:sa:default") {
			t.Errorf("a pod that is known says %s", all)
		}
		must(t, w.StartAPIServer(t.Context()))
		eventually(t, "the watch is back", func() error {
			began := label(p, "null")
			_ = w.until(t, p, began, "none", "")
			return nil
		})
		w.until(t, p, label(p, `"cart"`), "svid", cart)
	})
	t.Run("the kubelet may be restarted", func(t *testing.T) {
		w.Stop("kubelet")
		w.until(t, p, label(p, "null"), "none", "")
		w.until(t, p, label(p, `"cart"`), "svid", cart)
		must(t, w.StartKubelet(t.Context()))
		again, began := w.create(t, w.workload("after-kubelet", map[string]string{"app": "cart"}))
		w.until(t, again, began, "svid", cart)
	})
	t.Run("a hundred pods at once", func(t *testing.T) { w.hundred(t, r, cart) })
	t.Run("the agent's pod is replaced", func(t *testing.T) {
		pods, err := w.Client.CoreV1().Pods(space).List(t.Context(), metav1.ListOptions{LabelSelector: "app=agent"})
		must(t, err)
		began := time.Now()
		must(t, w.Client.CoreV1().Pods(space).Delete(t.Context(), pods.Items[0].Name, metav1.DeleteOptions{}))
		lost := w.until(t, p, began, "none", "").At
		r.add("agent's pod replaced: streams without an agent", w.until(t, p, lost, "svid", cart).At.Sub(lost))
	})
	t.Run("a pod that is deleted is gone", func(t *testing.T) {
		must(t, w.Client.CoreV1().Pods("shop").Delete(t.Context(), p.Name, metav1.DeleteOptions{}))
		eventually(t, "its process ends", func() error {
			if _, err := w.Client.CoreV1().Pods("shop").Get(t.Context(), p.Name, metav1.GetOptions{}); err == nil {
				return fmt.Errorf("pod is there")
			}
			return nil
		})
	})
}

// csi runs the driver beside the real kubelet and has a pod use it.
func (w *world) csi(t *testing.T, id string) {
	const driver = "csi.spiffe.io"
	sockets := filepath.Join(w.run, "agent", "public")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(w.bin, "assay-csi"), "run", "-driverName", driver, "-nodeID", kube.NodeName,
		"-socketDir", sockets, "-kubeletDir", w.KubeletDir())
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	must(t, cmd.Start())
	defer func() {
		cancel()
		if err := cmd.Wait(); t.Failed() {
			t.Logf("driver ended with %v: %s", err, log.String())
		}
	}()
	no, yes := false, true
	_, err := w.Client.StorageV1().CSIDrivers().Create(t.Context(), &storagev1.CSIDriver{
		ObjectMeta: metav1.ObjectMeta{Name: driver},
		Spec: storagev1.CSIDriverSpec{
			AttachRequired: &no, PodInfoOnMount: &yes, VolumeLifecycleModes: []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral},
		},
	}, metav1.CreateOptions{})
	must(t, err)
	p := w.workload("by-csi", map[string]string{"app": "cart"})
	p.Spec.Volumes = []corev1.Volume{{Name: "spiffe", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: driver, ReadOnly: &yes}}}}
	made, began := w.create(t, p)
	w.until(t, made, began, "svid", id)
	mount := filepath.Join(w.KubeletDir(), "pods", string(made.UID), "volumes", "kubernetes.io~csi", "spiffe", "mount")
	if err := os.WriteFile(filepath.Join(mount, "x"), nil, 0o600); err == nil {
		t.Error("the volume can be written to")
	}
	must(t, w.Client.CoreV1().Pods("shop").Delete(t.Context(), p.Name, metav1.DeleteOptions{}))
	eventually(t, "the volume is unmounted", func() error {
		if _, err := os.Lstat(mount); !os.IsNotExist(err) {
			return fmt.Errorf("its target is there: %w", errors.Join(err, os.ErrExist))
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join(sockets, "api.sock")); err != nil {
		t.Errorf("the agent's socket went with the volume: %v", err)
	}
}

func agentID(list string) string {
	for field := range strings.FieldsSeq(list) {
		if strings.HasPrefix(field, "spiffe://") && strings.Contains(field, "k8s_psat") {
			return strings.Trim(field, `",`)
		}
	}
	return ""
}

// hundred starts pods at once and measures the agent meanwhile.
func (w *world) hundred(t *testing.T, r *report, id string) {
	agent := w.processOf(t, "assay-agent")
	before := cpuOf(agent)
	var pods []*corev1.Pod
	var began []time.Time
	var mu sync.Mutex
	var group sync.WaitGroup
	for i := range many {
		group.Go(func() {
			at := time.Now()
			p, err := w.Client.CoreV1().Pods("shop").Create(t.Context(), w.workload(fmt.Sprintf("many-%d", i), map[string]string{"app": "cart"}), metav1.CreateOptions{})
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
	var all, late []time.Duration
	var lastMain, lastSVID time.Time
	for i, p := range pods {
		got := w.until(t, p, began[i], "svid", id)
		first := w.until(t, p, began[i], "main", "")
		all, late = append(all, got.At.Sub(began[i])), append(late, got.At.Sub(first.At))
		if first.At.After(lastMain) {
			lastMain = first.At
		}
		if got.At.After(lastSVID) {
			lastSVID = got.At
		}
	}
	r.add(fmt.Sprintf("%d pods at once: created -> SVID", many), all...)
	r.add(fmt.Sprintf("%d pods at once: main() -> SVID", many), late...)
	r.note(fmt.Sprintf("%d pods at once: last main() -> last SVID", many), lastSVID.Sub(lastMain).Round(time.Millisecond).String())
	r.note(fmt.Sprintf("%d pods at once: agent's CPU a pod", many), ((cpuOf(agent) - before) / many).String())
	r.note(fmt.Sprintf("agent's memory at %d pods (VmRSS)", many), rssOf(agent))
	must(t, w.Client.CoreV1().Pods("shop").DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{FieldSelector: "metadata.name!=probe"}))
	eventually(t, "the node has ended them", func() error {
		left, err := w.Client.CoreV1().Pods("shop").List(t.Context(), metav1.ListOptions{})
		if err == nil && len(left.Items) > 1 {
			err = fmt.Errorf("%d pods are left", len(left.Items))
		}
		return err
	})
}

// mainPID is the process of a pod's container, as the node sees it.
func (w *world) mainPID(t *testing.T, p *corev1.Pod) int {
	t.Helper()
	found := 0
	each(func(pid int, dir string) {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if strings.Contains(string(text), "pod"+string(p.UID)+"/") && strings.Contains(string(line), "watch") {
			found = pid
		}
	})
	if found == 0 {
		t.Fatalf("pod %s has no process", p.Name)
	}
	return found
}

func (w *world) processOf(t *testing.T, name string) int {
	t.Helper()
	found := 0
	each(func(pid int, dir string) {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if strings.Contains(string(text), "kubepods") && strings.HasPrefix(string(line), "/"+name) {
			found = pid
		}
	})
	if found == 0 {
		t.Fatalf("no process of %s", name)
	}
	return found
}

func each(f func(pid int, dir string)) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		var pid int
		if _, err := fmt.Sscan(filepath.Base(dir), &pid); err == nil {
			f(pid, dir)
		}
	}
}

// explain asks the agent what it knows of a pod's process.
func (w *world) explain(t *testing.T, p *corev1.Pod) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(w.bin, "assay-agent"), "explain", "-pid", fmt.Sprint(w.mainPID(t, p)),
		"-socketPath", filepath.Join(w.run, "agent", "private", "admin.sock"), "-output", "json").CombinedOutput()
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

// cpuOf is the processor time of a process, which the kernel counts in hundredths of a second.
func cpuOf(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var user, system int64
	_, _ = fmt.Sscan(fields[11], &user)
	_, _ = fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * 10 * time.Millisecond
}

func rssOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}
	return "?"
}
