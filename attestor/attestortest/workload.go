package attestortest

import (
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/assay-id/assay/attestor"
)

// Workload is a workload attestor under test.
type Workload struct {
	Kind attestor.WorkloadKind
	// Config is the body of its configuration block, in HCL.
	Config string
	// Types are the selector types it may answer; empty means its own.
	Types []string
	// Cases are processes and what must be said of them, by the sentence that says why.
	Cases map[string]Case
	// Gone is a process that does not exist.
	Gone attestor.Process
	// README is the path of the attestor's README.md.
	README string
}

// Case is a process and its selectors, in text form and any order.
type Case struct {
	Process attestor.Process
	Want    []string
}

// RunWorkload checks a workload attestor.
func RunWorkload(t *testing.T, w Workload) {
	types := w.Types
	if len(types) == 0 {
		types = []string{w.Kind.Type}
	}
	checkConfig(t, "the configuration", w.Kind.Config, w.Config)
	opened, err := w.Kind.Open(mustDecode(t, w.Kind.Config, w.Config), fill(t, attestor.Needs{}))
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	closeAtEnd(t, opened)
	for why, c := range w.Cases {
		t.Run(why, func(t *testing.T) {
			got, err := opened.Attest(t.Context(), c.Process)
			if err != nil {
				t.Fatalf("attest: %v", err)
			}
			checkSelectors(t, got, types...)
			want := slices.Sorted(slices.Values(c.Want))
			if said := slices.Sorted(slices.Values(texts(got))); !slices.Equal(said, want) {
				t.Errorf("selectors are\n%q, want\n%q", said, want)
			}
			checkDocumented(t, readREADME(t, w.README), c.Want)
			again, err := opened.Attest(t.Context(), c.Process)
			if err != nil || !attestor.NewSet(again...).Equal(attestor.NewSet(got...)) {
				t.Errorf("asked again, it says %q, %v", texts(again), err)
			}
		})
	}
	t.Run("nothing is said of a process that is gone", func(t *testing.T) {
		got, err := opened.Attest(t.Context(), w.Gone)
		if err == nil || len(got) != 0 {
			t.Errorf("selectors %q, error %v", texts(got), err)
		}
	})
	t.Run("a canceled context is obeyed", func(t *testing.T) {
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		for why, c := range w.Cases {
			got, err := within(t, func() ([]attestor.Selector, error) { return opened.Attest(gone, c.Process) })
			if err == nil {
				t.Errorf("%s: no error, selectors %q", why, texts(got))
			}
		}
	})
	t.Run("many may ask at once", func(t *testing.T) {
		var all sync.WaitGroup
		for range 16 {
			for why, c := range w.Cases {
				all.Go(func() {
					got, err := opened.Attest(t.Context(), c.Process)
					if err != nil || len(got) != len(c.Want) {
						t.Errorf("%s: %d selectors, error %v", why, len(got), err)
					}
				})
			}
		}
		all.Wait()
	})
	if watcher, ok := opened.(attestor.Watcher); ok {
		t.Run("watching ends with its context", func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := within(t, func() (struct{}, error) {
				return struct{}{}, watcher.Watch(ctx, func(...int) {})
			}); err == nil {
				t.Log("watch returned nil")
			}
		})
	}
}
