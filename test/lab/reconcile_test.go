package lab_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// reconciled is how many pods the server finds at its start: ten thousand, or what LAB_RECONCILE says.
func reconciled(t *testing.T) int {
	t.Helper()
	text := os.Getenv("LAB_RECONCILE")
	if text == "" {
		return 10_000
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// reconcile has a server that knows nothing of the cluster's pods find them all, and then one more. Times are
// printed; what is judged is that each change is an entry, and nothing is looked at twice.
func (r *registrar) reconcile(t *testing.T) {
	n := reconciled(t)
	if err := r.site.Server().Stop(time.Minute); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	r.makePods(t, n)
	t.Logf("%d pods were made in %s", n, time.Since(began).Round(time.Millisecond))
	if err := r.site.StartServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	r.counts(n)
	after := cpu(t, r.site.Server().PID())
	t.Logf("%d pods found from cold, the server's start included: CPU %s, %s after its start", n, after, time.Since(began).Round(time.Millisecond))
	before := r.events()
	r.pod("shop", "one-more")
	r.counts(n + 1)
	t.Logf("one more pod: CPU %s", cpu(t, r.site.Server().PID())-after)
	now := r.events()
	if created := now["entry.create"] - before["entry.create"]; created != 1 {
		t.Errorf("%d entries were made for one pod", created)
	}
	if now["kubernetes lists"] != before["kubernetes lists"] {
		t.Errorf("all entries were listed for one pod: %v, then %v", before, now)
	}
}

// makePods makes pods of the node, which has no kubelet.
func (r *registrar) makePods(t *testing.T, n int) {
	t.Helper()
	config := rest.CopyConfig(r.kube.Config)
	config.QPS, config.Burst = 10_000, 10_000
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	var next atomic.Int64
	group, ctx := errgroup.WithContext(t.Context())
	for range 16 {
		group.Go(func() error {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				_, err := client.CoreV1().Pods("shop").Create(ctx, &corev1.Pod{
					ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("many-%d", i), Labels: map[string]string{"app": "web"}},
					Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "main", Image: "none.local/x:1"}}},
				}, metav1.CreateOptions{})
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
}

// counts waits until the server has as many entries.
func (r *registrar) counts(want int) {
	r.t.Helper()
	r.eventually(fmt.Sprintf("there are %d entries", want), func() error {
		out, err := r.site.ServerCLI(r.t.Context(), "entry", "count")
		if err == nil && !strings.HasPrefix(out, strconv.Itoa(want)+" ") {
			err = fmt.Errorf("the server says %s", out)
		}
		return err
	})
}

// events counts the lines of the server's audit log by event, and the lists of all entries that the registrar
// asked for.
func (r *registrar) events() map[string]int {
	r.t.Helper()
	file, err := os.Open(filepath.Join(r.site.ServerData(), "audit.log"))
	if err != nil {
		r.t.Fatal(err)
	}
	defer file.Close()
	count := map[string]int{}
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var line struct{ Event, Caller string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			r.t.Fatal(err)
		}
		count[line.Event]++
		if line.Event == "entry.list" && strings.HasPrefix(line.Caller, "kubernetes/") {
			count["kubernetes lists"]++
		}
	}
	return count
}

// cpu is the processor time of a process, which the kernel counts in hundredths of a second.
func cpu(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var user, system int64
	_, _ = fmt.Sscan(fields[11], &user)
	_, _ = fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * 10 * time.Millisecond
}
