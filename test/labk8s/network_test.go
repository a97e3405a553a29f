package labk8s

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// policies tries, from pods that may and from pods that may not, what the shipped NetworkPolicies are about. That
// the rest of the suite runs below them is the other half of it.
func (w *world) policies(t *testing.T) {
	const monitoring = "monitoring"
	_, err := w.Client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: monitoring}}, metav1.CreateOptions{})
	must(t, err)
	stranger, began := w.create(t, w.workload("stranger", nil))
	scraper := w.workload("scraper", nil)
	scraper.Namespace = monitoring
	scraper, _ = w.create(t, scraper)
	w.until(t, stranger, began, "main", "")
	w.until(t, scraper, began, "main", "")
	server, agent := w.address(t, "assay-server"), w.address(t, "assay-agent")
	for _, one := range []struct {
		what    string
		address string
		// who reaches it
		stranger, scraper bool
	}{
		{"the server's port for agents, by its service's name", "assay-server." + space + ".svc.cluster.local:8081", true, true},
		{"the server's port for agents", server + ":8081", true, true},
		{"the server's metrics", server + ":9988", false, true},
		{"the server's health", server + ":8080", false, false},
		{"the agent's metrics", agent + ":9989", false, true},
		{"the agent's health", agent + ":8082", false, false},
	} {
		w.reaches(t, stranger, "a pod", one.what, one.address, one.stranger)
		w.reaches(t, scraper, "a pod of the namespace monitoring", one.what, one.address, one.scraper)
		// What is kept from pods is there: the node's own probes get through.
		if !strings.HasPrefix(one.address, "assay") {
			conn, err := (&net.Dialer{Timeout: time.Minute}).DialContext(t.Context(), "tcp", one.address)
			if err != nil {
				t.Errorf("the node does not reach %s: %v", one.what, err)
				continue
			}
			_ = conn.Close()
		}
	}
	w.gone(t, stranger)
	w.gone(t, scraper)
}

// reaches dials from within a pod until it gets through, or does not, as it should.
func (w *world) reaches(t *testing.T, from *corev1.Pod, who, what, address string, should bool) {
	t.Helper()
	eventually(t, fmt.Sprintf("that %s reaches %s is %v", who, what, should), func() error {
		out, err := w.Exec(t.Context(), w.containerID(t, from), "/pod", "dial", address)
		if err != nil || !strings.Contains(out, `"what":"open"`) && !strings.Contains(out, `"what":"closed"`) {
			return fmt.Errorf("dial says %s (%w)", out, err)
		}
		if strings.Contains(out, `"what":"open"`) != should {
			return fmt.Errorf("dial says %s", out)
		}
		return nil
	})
}

// address is that of the one pod of ours with a name.
func (w *world) address(t *testing.T, name string) string {
	t.Helper()
	pods, err := w.Client.CoreV1().Pods(space).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=" + name})
	must(t, err)
	if len(pods.Items) != 1 || pods.Items[0].Status.PodIP == "" {
		t.Fatalf("there are %d pods of %s", len(pods.Items), name)
	}
	return pods.Items[0].Status.PodIP
}
