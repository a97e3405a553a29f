package labk8s

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// managerPackage is the program that registers pods with a SPIRE server.
const managerPackage = "github.com/spiffe/spire-controller-manager/cmd"

// manager runs the real spire-controller-manager against our server, as a second way of registering: for
// resources of a class of its own.
func (w *world) manager(t *testing.T) {
	const managed = "spiffe://example.org/managed/shop"
	program := filepath.Join(w.bin, "peers", "spire-controller-manager")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, managerPackage)
	build.Dir = "../compat/peers/controller"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", managerPackage, err, out)
	}
	config := filepath.Join(t.TempDir(), "config.yaml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, `apiVersion: spire.spiffe.io/v1alpha1
kind: ControllerManagerConfig
clusterName: %s
clusterDomain: cluster.local
trustDomain: example.org
className: manager
entryIDPrefix: scm
spireServerSocketPath: %q
ignoreNamespaces: [kube-system]
metrics: {bindAddress: "0"}
health: {healthProbeBindAddress: "127.0.0.1:0"}
`, cluster, w.socket), 0o600))
	var log bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program, "-config", config)
	cmd.Env = append(os.Environ(), "ENABLE_WEBHOOKS=false", "KUBECONFIG="+w.Kubeconfig("admin"))
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the manager: %s", log.String())
		}
	}()
	w.apply(t, `apiVersion: spire.spiffe.io/v1alpha1
kind: ClusterSPIFFEID
metadata: {name: managed}
spec:
  className: manager
  spiffeIDTemplate: "spiffe://{{ .TrustDomain }}/managed/{{ .PodMeta.Namespace }}"
  podSelector: {matchLabels: {app: managed}}
`)
	p, began := w.create(t, w.workload("managed", map[string]string{"app": "managed"}))
	w.until(t, p, began, "svid", managed)
	if out := w.mustServer(t, "entry", "show", "-spiffeID", managed); !strings.Contains(out, "scm.") || strings.Contains(out, "kube."+cluster) {
		t.Errorf("the entries are %s", out)
	}
	w.gone(t, p)
	eventually(t, "the manager takes its entry back", func() error {
		out, err := w.server("entry", "show", "-spiffeID", managed)
		if err == nil && strings.Contains(out, "scm.") {
			err = fmt.Errorf("it is there: %s", out)
		}
		return err
	})
}
