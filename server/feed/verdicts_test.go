package feed

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

func digest(digit string) string { return "sha256:" + strings.Repeat(digit, 64) }

func reportOf(r *feedv1.Running) *feedv1.FollowRequest {
	return &feedv1.FollowRequest{Message: &feedv1.FollowRequest_Running{Running: r}}
}

func speaking(running ...string) *feedv1.FollowRequest {
	return helloOf(&feedv1.Hello{Capabilities: []string{"verdicts"}, Running: running})
}

func verdict(digit string, seq uint64, policy string) *records.Verdict {
	return &records.Verdict{
		Digest: digest(digit), Seq: seq, Selectors: attestor.NewSet(attestor.Selector{Type: "scan", Value: "policy:" + policy}),
		Policies: []records.PolicyVerdict{{Policy: policy, Status: "pass", Summary: "nothing found"}},
	}
}

func gated(id string, n int) *identity.Entry {
	e := entry(id, agentID(n), 0)
	e.Selectors = attestor.Union(e.Selectors, attestor.NewSet(attestor.Selector{Type: "scan", Value: "policy:prod"}))
	return e
}

// verdictsOf are the digests' last digits with the sequence numbers.
func (a *agent) seqs() map[string]uint64 {
	held := map[string]uint64{}
	for digest, v := range a.verdicts {
		held[digest[len(digest)-1:]] = v.Seq
	}
	return held
}

func TestVerdicts(t *testing.T) {
	src := viewtest.New("store")
	src.PutNodes(node(1), node(2))
	src.PutEntries(entry("plain", agentID(1), 0), gated("gated", 1))
	src.PutVerdicts(verdict("a", 1, "prod"), verdict("b", 2, "prod"), verdict("c", 3, "prod"))
	h := open(t, src, Config{})
	a := newAgent()
	a.speaks, a.running = true, []string{digest("a"), digest("d")}
	a.dial(t, h, 1)
	a.hello(t)
	a.next(t)

	t.Run("an agent gets the verdicts on what it runs, and the entries that demand one", func(t *testing.T) {
		if diff := cmp.Diff(map[string]uint64{"a": 1}, a.seqs()); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"gated", "plain"}, a.got); diff != "" {
			t.Error(diff)
		}
		if v := a.verdicts[digest("a")]; !v.Selectors.Has(attestor.Selector{Type: "scan", Value: "policy:prod"}) || v.Policies[0].Summary != "nothing found" {
			t.Errorf("verdict %+v", v)
		}
		if diff := cmp.Diff([]string{"verdicts", "authorities"}, a.capabilities); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("a change of a verdict is sent, alone", func(t *testing.T) {
		rev := src.PutVerdicts(verdict("a", 5, "prod"))
		a.next(t)
		if len(a.got) != 0 || a.full || a.rev != uint64(rev) || a.seqs()["a"] != 5 {
			t.Errorf("got %v, %v at %d", a.got, a.seqs(), a.rev)
		}
	})
	t.Run("a verdict on what it does not run is not", func(t *testing.T) {
		src.PutVerdicts(verdict("b", 6, "prod"))
		rev := src.PutVerdicts(verdict("d", 7, "prod")) // which it does
		a.next(t)
		if a.rev != uint64(rev) || len(a.seqs()) != 2 {
			t.Errorf("got %v at %d", a.seqs(), a.rev)
		}
	})
	t.Run("a report of what has changed is answered with the verdicts", func(t *testing.T) {
		a.send(t, reportOf(&feedv1.Running{Digests: []string{digest("b")}, RemovedDigests: []string{digest("a")}}))
		a.next(t)
		if diff := cmp.Diff(map[string]uint64{"b": 6, "d": 7}, a.seqs()); diff != "" {
			t.Error(diff)
		}
		a.send(t, reportOf(&feedv1.Running{Digests: []string{digest("c")}, Full: true}))
		a.next(t)
		if diff := cmp.Diff(map[string]uint64{"c": 3}, a.seqs()); diff != "" {
			t.Error(diff)
		}
		a.running = []string{digest("c")}
	})
	t.Run("a deleted verdict is taken away", func(t *testing.T) {
		src.DeleteVerdict(digest("c"))
		a.next(t)
		if len(a.seqs()) != 0 {
			t.Error(a.seqs())
		}
		src.PutVerdicts(verdict("c", 9, "prod"))
		a.next(t)
	})
	t.Run("an agent that comes back gets only what is new", func(t *testing.T) {
		a.cancel()
		src.PutVerdicts(verdict("d", 10, "prod"))
		a.running = append(a.running, digest("d"))
		h.caughtUp(t)
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if a.full || len(a.got) != 0 {
			t.Errorf("full=%v with %v", a.full, a.got)
		}
		if diff := cmp.Diff(map[string]uint64{"c": 9, "d": 10}, a.seqs()); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("who runs what is known, and of a stream that was replaced no longer asked", func(t *testing.T) {
		if got := h.view.Runners(digest("d")); len(got) != 1 || got[0] != agentID(1) {
			t.Errorf("runners %v", got)
		}
	})
	t.Run("for an agent that knows no verdicts, entries that demand one do not exist", func(t *testing.T) {
		old := newAgent()
		old.dial(t, h, 1)
		old.hello(t)
		old.next(t)
		if diff := cmp.Diff([]string{"plain"}, old.got); diff != "" || len(old.verdicts) != 0 {
			t.Error(diff, old.verdicts)
		}
		src.PutEntries(gated("another", 1), entry("more", agentID(1), 0))
		old.next(t)
		if diff := cmp.Diff([]string{"more"}, old.got); diff != "" {
			t.Error(diff)
		}
		p := h.view.Agent(agentID(1))
		if len(p.Entries) != 4 {
			t.Fatalf("the picture has %d entries", len(p.Entries))
		}
		for _, e := range Authorized(p, nil) {
			if e.GetId() == "gated" || e.GetId() == "another" {
				t.Errorf("entry %q is handed to a SPIRE agent", e.GetId())
			}
		}
	})
}
