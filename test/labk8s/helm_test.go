package labk8s

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// release is a second Assay in the cluster, which Helm installs: what chart/README.md says that two need.
const release = "second"

// chart installs the chart with the real helm beside the quickstart, changes values of it, and takes it away again:
// pods get the identity of the trust domain whose socket they mount, and those of the first never notice.
func (w *world) chart(t *testing.T, r *report, first *corev1.Pod) {
	const volume = "/var/lib/assay/" + release
	must(t, os.MkdirAll(filepath.Join(w.Dir, "state", release), 0o755))
	text, err := os.ReadFile("testdata/volume.yaml")
	must(t, err)
	w.apply(t, strings.NewReplacer("name: lab\n", "name: "+release+"\n", "/var/lib/assay/volume", volume).Replace(string(text)))
	calm := time.Now()

	began := time.Now()
	w.helm(t, "install", release, k8s+"chart", "-n", release, "--create-namespace", "--wait", "--timeout", "3m", "-f", "testdata/second.yaml")
	r.note("helm install --wait", time.Since(began).Round(time.Millisecond).String())
	p := w.workload(release, nil)
	p.Spec.Volumes[0].CSI.Driver = release + ".csi.spiffe.io"
	p, made := w.create(t, p)
	got := w.until(t, p, made, "svid", "spiffe://second.example.org/ns/shop/sa/default")
	r.note("helm install -> the first SVID", got.At.Sub(began).Round(time.Millisecond).String())
	if out := w.kubectl(t, "-n", release, "exec", release+"-server-0", "--", "assay-server", "entry", "show"); !strings.Contains(out, string(p.UID)) {
		t.Errorf("the server's command says %s", out)
	}

	began = time.Now()
	w.helm(t, "upgrade", release, k8s+"chart", "-n", release, "--wait", "--timeout", "3m", "-f", "testdata/second.yaml",
		"--set", "defaultIdentity.template=spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/upgraded", "--set", "agent.logLevel=debug", "--set", "server.logLevel=debug")
	r.note("helm upgrade --wait, server and agents restarted", time.Since(began).Round(time.Millisecond).String())
	w.until(t, p, began, "svid", "spiffe://second.example.org/ns/shop/upgraded")
	for _, name := range []string{"server", "agent"} {
		if out := w.kubectl(t, "-n", release, "get", "configmap", release+"-"+name, "-o", "yaml"); !strings.Contains(out, `"debug"`) {
			t.Errorf("the upgrade did not reach %s", out)
		}
	}
	if out := w.helm(t, "history", release, "-n", release); !strings.Contains(out, "deployed") || !strings.Contains(out, "superseded") {
		t.Errorf("helm's history is %s", out)
	}

	w.gone(t, p) // first, as chart/README.md says: nobody would unmount its volume
	began = time.Now()
	w.helm(t, "uninstall", release, "-n", release, "--wait", "--timeout", "3m")
	r.note("helm uninstall --wait", time.Since(began).Round(time.Millisecond).String())
	w.left(t)
	if lines := w.lines(first, "main"); slices.ContainsFunc(lines, func(s said) bool { return s.At.After(calm) && s.What == "none" }) {
		t.Errorf("a pod of the first noticed: %v", lines)
	}
	w.another(t, first)
}

// left looks for what the release left behind: what helm made is gone, but for CRDs, which the first needs.
func (w *world) left(t *testing.T) {
	t.Helper()
	eventually(t, "nothing of the release is left", func() error {
		out, err := w.Kubectl(t.Context(), "get", "-A", "-o", "name", "-l", "app.kubernetes.io/instance="+release,
			"all,configmaps,secrets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,csidrivers,networkpolicies,poddisruptionbudgets,clusterspiffeids")
		if err == nil && strings.TrimSpace(out) != "" {
			err = fmt.Errorf("there is %s", out)
		}
		return err
	})
	if out := w.kubectl(t, "get", "crd", "clusterspiffeids.spire.spiffe.io", "-o", "name"); !strings.Contains(out, "clusterspiffeids") {
		t.Errorf("the CRDs say %s", out)
	}
	// The server's data is whose it was: Kubernetes keeps claims of StatefulSets, and README.md says so.
	if out := w.kubectl(t, "-n", release, "get", "pvc", "-o", "name"); !strings.Contains(out, "data-"+release+"-server-0") {
		t.Errorf("claims are %s", out)
	}
}

// helm runs the real one, which is built from its module.
func (w *world) helm(t *testing.T, args ...string) string {
	t.Helper()
	program := filepath.Join(w.bin, "tools", "helm")
	if w.helmBuilt == "" {
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "helm.sh/helm/v4/cmd/helm")
		build.Dir = "../../tools/deploy"
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build helm: %v\n%s", err, out)
		}
		w.helmBuilt = program
	}
	cmd := exec.CommandContext(t.Context(), program, append([]string{"--kubeconfig", w.Kubeconfig("admin")}, args...)...)
	home := filepath.Join(w.Dir, "helm") // nothing of whose machine this is
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}
