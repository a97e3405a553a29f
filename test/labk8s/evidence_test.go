package labk8s

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

const badCVE = "CVE-2026-0001"

// cve has Trivy Operator's report on a pod's image come, find something, and a VEX statement say that it does
// not matter.
func (w *world) cve(t *testing.T, r *report) {
	p, began := w.create(t, w.workload("guarded", map[string]string{"app": "guarded"}))
	w.until(t, p, began, "none", "")
	began = w.scanned(t)
	r.add("VulnerabilityReport without findings -> SVID", w.until(t, p, began, "svid", guarded).At.Sub(began))
	began = w.scanned(t, badCVE)
	r.add("VulnerabilityReport with a critical CVE -> stream has lost the SVID", w.until(t, p, began, "none", "").At.Sub(began))
	w.event(t, p, corev1.EventTypeWarning, "IdentityWithdrawn", badCVE)
	vex := filepath.Join(t.TempDir(), "vex.json")
	text, err := json.Marshal(map[string]any{
		"@context": "https://openvex.dev/ns/v0.2.0", "@id": "https://example.org/vex/1", "author": "Security team",
		"timestamp": time.Now().UTC().Format(time.RFC3339), "version": 1,
		"statements": []any{map[string]any{
			"vulnerability": map[string]any{"name": badCVE}, "status": "not_affected", "justification": "vulnerable_code_not_in_execute_path",
			"products": []any{map[string]any{"@id": "pkg:oci/app@" + strings.ReplaceAll(w.appImage, ":", "%3A")}},
		}},
	})
	must(t, err)
	must(t, os.WriteFile(vex, text, 0o600))
	began = time.Now()
	w.mustServer(t, "evidence", "push", "-image", w.appImage, "-source", "security-team", "-vex", vex)
	r.add("VEX statement pushed -> SVID", w.until(t, p, began, "svid", guarded).At.Sub(began))
	w.event(t, p, corev1.EventTypeNormal, "IdentityRestored", "prod")
	w.gone(t, p)
}

// scanned writes a VulnerabilityReport on the pods' image as Trivy Operator does.
func (w *world) scanned(t *testing.T, found ...string) time.Time {
	t.Helper()
	list := []any{}
	for _, id := range found {
		list = append(list, map[string]any{
			"vulnerabilityID": id, "resource": "libshop", "installedVersion": "1.0", "fixedVersion": "", "severity": "CRITICAL", "title": "x",
			"packagePURL": "pkg:golang/example.org/libshop@1.0",
		})
	}
	report := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "aquasecurity.github.io/v1alpha1", "kind": "VulnerabilityReport", "metadata": map[string]any{"name": "pod-guarded", "namespace": shop},
		"report": map[string]any{
			"updateTimestamp": time.Now().UTC().Format(time.RFC3339Nano), "scanner": map[string]any{"name": "Trivy", "vendor": "Aqua Security", "version": "0.65.0"},
			"artifact": map[string]any{"repository": "app", "digest": w.appImage}, "summary": map[string]any{"criticalCount": int64(len(found))}, "vulnerabilities": list,
		},
	}}
	of := schema.GroupVersionResource{Group: "aquasecurity.github.io", Version: "v1alpha1", Resource: "vulnerabilityreports"}
	began := time.Now()
	_, err := w.dyn.Resource(of).Namespace(shop).Apply(t.Context(), report.GetName(), report, metav1.ApplyOptions{FieldManager: "trivy-operator", Force: true})
	must(t, err)
	return began
}

// event waits for an Event at a pod.
func (w *world) event(t *testing.T, p *corev1.Pod, kind, reason, says string) {
	t.Helper()
	eventually(t, "an Event "+reason, func() error {
		list, err := w.Client.CoreV1().Events(p.Namespace).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(p.UID)})
		if err != nil {
			return err
		}
		var seen []string
		for _, e := range list.Items {
			if e.Type == kind && e.Reason == reason && strings.Contains(e.Message, says) {
				return nil
			}
			seen = append(seen, e.Reason+": "+e.Message)
		}
		return fmt.Errorf("there are %q", seen)
	})
}
