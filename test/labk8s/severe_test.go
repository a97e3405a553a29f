package labk8s

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab/kube"
)

const (
	severeIdentity = "spiffe://example.org/ns/shop/severe"
	severeManifest = `
apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata: {name: severe}
spec:
  className: assay
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/severe"
  podSelector: {matchLabels: {app: severe}}
`
)

// severe puts the overlay high-security in place of what is there, with its policies in force: what they let through
// is enough for a pod to have its identity, and nothing else gets through, in or out.
func (w *world) severe(t *testing.T, r *report) {
	w.kubectl(t, "-n", shop, "delete", "pods", "--all") // while there is a driver to unmount their volumes
	w.kubectl(t, "delete", "-k", "overlay-standby", "--ignore-not-found", "--timeout=180s")
	must(t, os.MkdirAll(filepath.Join(w.Dir, "state", "severe"), 0o755))
	text, err := os.ReadFile("testdata/volume.yaml")
	must(t, err)
	w.apply(t, strings.NewReplacer("name: lab\n", "name: severe\n", "/var/lib/assay/volume", "/var/lib/assay/severe").Replace(string(text)))

	began := time.Now()
	w.kubectl(t, "apply", "-k", k8s+"overlays/high-security")
	w.kubectl(t, "-n", space, "rollout", "status", "statefulset/assay-server", "--timeout=180s")
	for _, what := range []string{"daemonset/assay-agent", "daemonset/assay-csi"} {
		w.kubectl(t, "-n", "assay-agents", "rollout", "status", what, "--timeout=180s")
	}
	w.apply(t, severeManifest)
	p, made := w.create(t, w.workload("severe", map[string]string{"app": "severe"}))
	got := w.until(t, p, made, "svid", severeIdentity)
	r.note("overlay high-security applied -> the first SVID", got.At.Sub(began).Round(time.Millisecond).String())

	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", kube.NodeIP+":0")
	must(t, err)
	defer l.Close()
	elsewhere := l.Addr().String()
	w.reaches(t, p, "a pod", "a port of the node", elsewhere, true)
	for _, name := range []string{"assay-server", "assay-agent", "assay-csi"} {
		w.keptIn(t, name, elsewhere)
	}
	w.reaches(t, p, "a pod", "the server's port for agents", "assay-server."+space+".svc.cluster.local:8081", false)
}

// keptIn tries to leave the network of a pod of ours.
func (w *world) keptIn(t *testing.T, name, address string) {
	t.Helper()
	eventually(t, name+" does not reach what it has no business with", func() error {
		out, err := exec.CommandContext(t.Context(), "nsenter", "--net", "--target", strconv.Itoa(w.processOf(t, name)), w.pod, "dial", address).CombinedOutput()
		if err != nil || !strings.Contains(string(out), `"what":"closed"`) {
			return fmt.Errorf("dial says %s (%w)", out, err)
		}
		return nil
	})
}
