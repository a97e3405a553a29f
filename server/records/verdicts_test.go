package records

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestVerdicts(t *testing.T) {
	r, clock := open(t)
	ctx := t.Context()
	put := func(t *testing.T, digest, selector string) *Verdict {
		t.Helper()
		v, _, err := r.UpdateVerdict(ctx, digest, func(v *Verdict) error { v.Selectors = sel(selector); return nil })
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	var first *Verdict

	t.Run("a verdict that is written can be read", func(t *testing.T) {
		first = put(t, digest, "scan:policy:prod")
		got, err := r.Verdict(ctx, digest)
		if err != nil || got.Seq != first.Seq || !got.Selectors.Equal(sel("scan:policy:prod")) || !got.UpdatedAt.Equal(noon) {
			t.Errorf("%+v, %v", got, err)
		}
	})
	t.Run("each change counts one on, and none does not", func(t *testing.T) {
		now := noon.Add(time.Minute)
		clock.set(now)
		second := put(t, digest, "scan:status:prod:fail")
		if second.Seq != first.Seq+1 || !second.UpdatedAt.Equal(now) {
			t.Errorf("%+v after %+v", second, first)
		}
		before, _ := r.store.Rev(ctx)
		clock.set(now.Add(time.Minute))
		if again := put(t, digest, "scan:status:prod:fail"); again.Seq != second.Seq || !again.UpdatedAt.Equal(second.UpdatedAt) {
			t.Errorf("nothing changed, but the verdict became %+v", again)
		}
		if after, _ := r.store.Rev(ctx); after != before {
			t.Error("nothing changed, but something was written")
		}
	})
	t.Run("a verdict made again begins above all numbers it had", func(t *testing.T) {
		last, err := r.Verdict(ctx, digest)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.DeleteVerdict(ctx, digest); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Verdict(ctx, digest); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted, but: %v", err)
		}
		if again := put(t, digest, "scan:policy:prod"); again.Seq <= last.Seq {
			t.Errorf("sequence number %d after %d", again.Seq, last.Seq)
		}
	})
	t.Run("deleting what is not there is not found", func(t *testing.T) {
		if _, err := r.DeleteVerdict(ctx, strings.Replace(digest, "0", "f", 1)); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("many writers lose nothing", func(t *testing.T) {
		before, err := r.Verdict(ctx, digest)
		if err != nil {
			t.Fatal(err)
		}
		var work sync.WaitGroup
		for i := range 8 {
			work.Go(func() {
				_, _, err := r.UpdateVerdict(ctx, digest, func(v *Verdict) error {
					v.Policies = append(v.Policies, PolicyVerdict{Policy: fmt.Sprint(i), Status: "pass"})
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		work.Wait()
		after, err := r.Verdict(ctx, digest)
		if err != nil || len(after.Policies) != 8 || after.Seq != before.Seq+8 {
			t.Errorf("%+v, %v", after, err)
		}
	})
	t.Run("what no verdict may say is refused", func(t *testing.T) {
		for name, c := range map[string]struct {
			digest string
			change func(*Verdict)
			want   string
		}{
			"no digest":              {"latest", func(*Verdict) {}, "no image digest"},
			"a short digest":         {digest[:40], func(*Verdict) {}, "no image digest"},
			"a digest in upper case": {strings.ToUpper(digest), func(*Verdict) {}, "no image digest"},
			"a fact of an attestor":  {digest, func(v *Verdict) { v.Selectors = sel("unix:uid:0") }, "none of scan, sig and prov"},
			"too many selectors": {digest, func(v *Verdict) {
				var texts []string
				for i := range maxVerdictSelectors + 1 {
					texts = append(texts, fmt.Sprint("scan:n:", i))
				}
				v.Selectors = sel(texts...)
			}, "the limit is"},
			"a negative lifetime": {digest, func(v *Verdict) { v.TTL = -1 }, "negative"},
		} {
			_, _, err := r.UpdateVerdict(ctx, c.digest, func(v *Verdict) error { c.change(v); return nil })
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: got %v, want %q", name, err, c.want)
			}
		}
	})
	t.Run("a summary is cut between characters", func(t *testing.T) {
		v, _, err := r.UpdateVerdict(ctx, digest, func(v *Verdict) error {
			v.Policies = []PolicyVerdict{{Policy: "p", Summary: strings.Repeat("ü", MaxSummary)}}
			return nil
		})
		if err != nil || len(v.Policies[0].Summary) > MaxSummary || strings.Trim(v.Policies[0].Summary, "ü") != "" {
			t.Errorf("%d bytes, %v", len(v.Policies[0].Summary), err)
		}
	})
}

func TestVerdictsInThePicture(t *testing.T) {
	r, _ := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	snap, err := r.Snapshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	changes := make(chan Change, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.Follow(ctx, snap.Rev, func(c Change) error { changes <- c; return nil })
	}()
	v, rev, err := r.UpdateVerdict(ctx, digest, func(v *Verdict) error { v.Selectors = sel("scan:policy:prod"); return nil })
	if err != nil {
		t.Fatal(err)
	}
	if c := <-changes; c.Rev != rev || len(c.Verdicts) != 1 || c.Verdicts[0].Digest != digest || c.Verdicts[0].Verdict.Seq != v.Seq {
		t.Errorf("change %+v", c)
	}
	if snap, err = r.Snapshot(ctx); err != nil || len(snap.Verdicts) != 1 || snap.Verdicts[0].Seq != v.Seq {
		t.Errorf("snapshot %+v, %v", snap, err)
	}
	if checked, err := Check(ctx, r.store); err != nil || checked.Verdicts != 1 || len(checked.Findings) != 0 {
		t.Errorf("check %+v, %v", checked, err)
	}
	if _, err := r.DeleteVerdict(ctx, digest); err != nil {
		t.Fatal(err)
	}
	if c := <-changes; len(c.Verdicts) != 1 || c.Verdicts[0].Digest != digest || c.Verdicts[0].Verdict != nil {
		t.Errorf("change %+v", c)
	}
	cancel()
	<-done
}
