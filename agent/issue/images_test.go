package issue_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/issue"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

func digest(digit string) string { return "sha256:" + strings.Repeat(digit, 64) }

func in(digit string) attestor.Set { return set("unix:uid:1", "image:id:"+digest(digit)) }

// decide says what the server has decided of an image from now on.
func (w *world) decide(digit string, selectors ...string) {
	w.t.Helper()
	w.rev++
	v := &identity.Verdict{Digest: digest(digit), Seq: w.rev, Selectors: set(selectors...)}
	if err := w.view.Apply(view.Update{StoreID: "s", Rev: w.rev, Verdicts: []*identity.Verdict{v}}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) runs(want ...string) {
	w.t.Helper()
	synctest.Wait()
	got, _ := w.issuer.Running()
	for n, digit := range want {
		want[n] = digest(digit)
	}
	if !slices.Equal(got, want) {
		w.t.Errorf("images %v run, want %v", got, want)
	}
}

func TestRunning(t *testing.T) {
	bubble(t, issue.Config{}, func(w *world) {
		_, changed := w.issuer.Running()
		s := w.stream(in("b"))
		other := w.stream(in("a"))
		w.runs("a", "b")
		select {
		case <-changed:
		default:
			t.Error("nobody was told")
		}
		_, changed = w.issuer.Running()
		w.stream(set("unix:uid:2", "image:id:"+digest("a"))).close()
		w.runs("a", "b")
		select {
		case <-changed:
			t.Error("nothing changed, but somebody was told")
		default:
		}
		other.close()
		pass(5 * time.Minute)
		w.runs("a", "b") // who asks now and then finds its verdict
		for range 30 {
			pass(time.Minute)
		}
		w.runs("b") // and who does not is forgotten in the end
		s.close()
	})
}

func TestWithdrawal(t *testing.T) {
	bubble(t, issue.Config{}, func(w *world) {
		w.put(entry("gated", 9, "unix:uid:1", "scan:policy:prod"), entry("plain", 1, "unix:uid:1"))
		w.decide("a", "scan:policy:prod")
		w.decide("b", "scan:policy:prod")
		a, b := w.stream(in("a")), w.stream(in("b"))
		defer a.close()
		defer b.close()
		holds := func(s *stream, want ...string) identity.X509Context {
			t.Helper()
			pass(10 * time.Millisecond)
			c, err := s.last()
			if diff := cmp.Diff(want, ids(c)); err != nil || diff != "" {
				t.Fatal(err, diff)
			}
			return c
		}
		first := holds(a, "gated", "plain").SVIDs[0]
		token := func(facts attestor.Set) string {
			t.Helper()
			svids, _, err := w.issuer.JWT(w.t.Context(), facts, []string{"x"}, spiffeid.RequireFromPath(td, "/gated"))
			if err != nil {
				t.Fatal(err)
			}
			if len(svids) == 0 {
				return ""
			}
			return svids[0].Token
		}
		held := token(in("a"))
		_, calls := w.signer.count()
		if token(in("b")) != held {
			t.Error("the token does not come from the cache")
		}

		w.decide("a", "scan:status:prod:fail")
		holds(a, "plain")
		holds(b, "gated", "plain")
		if token(in("a")) != "" {
			t.Error("a condemned image gets a token")
		}
		if token(in("b")) != held {
			t.Error("another image's workload lost its token")
		}
		if _, now := w.signer.count(); now != calls {
			t.Error("something was signed anew")
		}
		w.decide("b", "scan:status:prod:fail")
		holds(b, "plain")
		w.decide("a", "scan:policy:prod")
		if again := holds(a, "gated", "plain").SVIDs[0]; slices.Equal(again.Chain[0], first.Chain[0]) {
			t.Error("what may have been revoked meanwhile is given out again")
		}
		if again := token(in("a")); again == "" || again == held {
			t.Error("the old token is given out again, or none")
		}
	})
}

func TestAWithdrawalBeatsATokenThatIsBeingSigned(t *testing.T) {
	bubble(t, issue.Config{}, func(w *world) {
		w.put(entry("gated", 9, "unix:uid:1", "scan:policy:prod"))
		w.decide("a", "scan:policy:prod")
		w.signer.set(func() { w.signer.delay = time.Second })
		type answer struct {
			svids []*identity.JWTSVID
			err   error
		}
		got := make(chan answer, 1)
		go func() {
			svids, _, err := w.issuer.JWT(context.Background(), in("a"), []string{"x"}, spiffeid.ID{})
			got <- answer{svids, err}
		}()
		pass(500 * time.Millisecond)
		w.decide("a", "scan:status:prod:fail")
		pass(time.Second)
		if a := <-got; len(a.svids) != 0 || a.err != nil {
			t.Errorf("got %d tokens, %v", len(a.svids), a.err)
		}
	})
}

func TestImagesKeptOverARestart(t *testing.T) {
	bubble(t, issue.Config{}, func(w *world) {
		w.decide("a", "scan:policy:prod")
		w.stop()
		w.start(issue.Config{})
		w.runs("a") // so that the server does not take the verdict back
		for range 12 {
			pass(time.Minute)
		}
		w.runs()
	})
}

func TestTheServerIsToldByWhatIsAskedFor(t *testing.T) {
	bubble(t, issue.Config{}, func(w *world) {
		gated, plain := entry("gated", 0, "unix:uid:1", "scan:policy:prod"), entry("plain", 0, "unix:uid:1")
		gated.Revision, plain.Revision = 3, 1
		w.put(gated, plain)
		w.decide("a", "scan:policy:prod")
		w.decide("b", "scan:status:prod:fail")
		s := w.stream(in("a"))
		defer s.close()
		pass(time.Second)
		seq := w.view.Picture().Verdicts[digest("a")].Seq
		got := map[string]identity.Asked{}
		w.signer.set(func() {
			for _, a := range w.signer.asked {
				got[a.EntryID] = a
			}
		})
		want := map[string]identity.Asked{
			"plain": {EntryID: "plain", Revision: 1},
			"gated": {EntryID: "gated", Revision: 3, Verdicts: []identity.HeldVerdict{{Digest: digest("a"), Seq: seq}}},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}
