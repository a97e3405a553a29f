package verdict

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// TestWhatAnybodyCanWriteOpensNoGate: a label that reads like a verdict, on the container, on the image or
// in the environment, is a claim whatever it says; and what a report or a statement says of itself stays a
// name.
func TestWhatAnybodyCanWriteOpensNoGate(t *testing.T) {
	demands := []attestor.Selector{
		{Type: "scan", Value: "policy:prod"}, {Type: "sig", Value: "policy:release"}, {Type: "prov", Value: "policy:release"},
	}
	var spoofed []attestor.Selector
	for _, d := range demands {
		key, value, _ := strings.Cut(d.Value, ":")
		for _, text := range []string{d.Type + ":" + d.Value, d.Value, key + "=" + value} {
			for _, where := range []string{"runtime:", "image:", "env:", ""} {
				spoofed = append(spoofed, attestor.Selector{Type: "claim", Value: where + text})
			}
			spoofed = append(spoofed, attestor.Selector{Type: "docker", Value: "label:" + text}, attestor.Selector{Type: "docker", Value: "env:" + text},
				attestor.Selector{Type: "k8s", Value: "pod-label:" + text})
		}
	}
	set := attestor.NewSet(spoofed...)
	for _, d := range demands {
		e := &identity.Entry{Selectors: attestor.NewSet(d, attestor.Selector{Type: "docker", Value: "label:app:shop"})}
		if !e.Gated() || e.Gates().Len() != 1 {
			t.Errorf("%s is no gate: %v", d, e.Gates().Strings())
		}
		if e.Gates().In(set) {
			t.Errorf("claims open %s", d)
		}
	}
	for _, s := range spoofed {
		if identity.Gating(s) {
			t.Errorf("%s is a gate", s)
		}
	}
	t.Run("nor does a report whose names read like a verdict", func(t *testing.T) {
		w := newWorld(t, prod)
		image := config(1)
		text := strings.ReplaceAll(string(scan{image: image, at: w.now(), findings: []string{critical}}.json(t)), `"shop"`, `"scan:policy:prod"`)
		text = strings.ReplaceAll(text, `"lib"`, `"prov:policy:release"`)
		if !json.Valid([]byte(text)) {
			t.Fatal(text)
		}
		if _, err := w.Push(t.Context(), admin, Document{Image: "reg/scan-policy-prod@" + image, Content: []byte(text)}); err != nil {
			t.Fatal(err)
		}
		w.wantGate(image, false)
		v, err := w.rec.Verdict(t.Context(), image)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range v.Selectors.All() {
			if s.Type != "scan" || strings.HasPrefix(s.Value, "policy:") {
				t.Errorf("its workloads get %s", s)
			}
		}
	})
}
