package world

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
)

// Digest returns a config digest made of one hexadecimal digit.
func Digest(digit string) string { return "sha256:" + strings.Repeat(digit, 64) }

// Selector is the public form of "type:value".
func Selector(text string) *types.Selector {
	kind, value, _ := strings.Cut(text, ":")
	return &types.Selector{Type: kind, Value: value}
}

// Image is a workload attestor that finds this process in a container of an image, as the engine's
// attestor does. The image can be exchanged, and more be said than is true.
type Image struct {
	mu    sync.Mutex
	facts []attestor.Selector
}

// Running is the attestor of containers that run the image with the digest; the other facts are
// "type:value".
func Running(digest string, facts ...string) *Image {
	i := &Image{}
	i.Set(digest, facts...)
	return i
}

// RunningManifest is the attestor of an engine that keeps images by manifest and says no config digest.
func RunningManifest(digest string) *Image {
	return &Image{facts: []attestor.Selector{{Type: "image", Value: "manifest:" + digest}}}
}

// Set changes what it says from now on.
func (i *Image) Set(digest string, facts ...string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.facts = []attestor.Selector{{Type: "image", Value: "id:" + digest}}
	for _, text := range facts {
		kind, value, _ := strings.Cut(text, ":")
		i.facts = append(i.facts, attestor.Selector{Type: kind, Value: value})
	}
}

// Attest implements attestor.Workload.
func (i *Image) Attest(context.Context, attestor.Process) ([]attestor.Selector, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.facts, nil
}

// In makes an agent find its workloads in containers.
func In(i *Image) func(*agent.Config) {
	return func(c *agent.Config) {
		c.WorkloadAttestors = append(c.WorkloadAttestors, agent.WorkloadAttestor{Type: "image", Workload: i})
	}
}

// Verdict says what the server has decided of an image from now on.
func (w *World) Verdict(digest string, selectors ...string) *records.Verdict {
	w.t.Helper()
	return w.VerdictUntil(digest, time.Time{}, selectors...)
}

// VerdictUntil is Verdict for one that ends to count.
func (w *World) VerdictUntil(digest string, notAfter time.Time, selectors ...string) *records.Verdict {
	w.t.Helper()
	list := make([]attestor.Selector, len(selectors))
	for n, text := range selectors {
		kind, value, _ := strings.Cut(text, ":")
		list[n] = attestor.Selector{Type: kind, Value: value}
	}
	v, _, err := w.Records.UpdateVerdict(w.Context(), digest, func(v *records.Verdict) error {
		v.Selectors, v.NotAfter = attestor.NewSet(list...), notAfter
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}
