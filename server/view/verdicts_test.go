package view

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view/viewtest"
)

func digestOf(digit string) string { return "sha256:" + strings.Repeat(digit, 64) }

func verdictOn(digit string, seq uint64, selectors ...string) *records.Verdict {
	return &records.Verdict{Digest: digestOf(digit), Seq: seq, Selectors: set(selectors...)}
}

func TestPermit(t *testing.T) {
	now := time.Unix(1000, 0)
	good := verdictOn("a", 1, "scan:policy:prod", "prov:policy:ci")
	good.TTL, good.JWTTTL = 10*time.Minute, 2*time.Minute
	short := verdictOn("b", 2, "scan:policy:prod")
	short.TTL = time.Minute
	ended := verdictOn("c", 3, "scan:policy:prod", "prov:policy:ci")
	ended.NotAfter = now
	failed := verdictOn("d", 4, "scan:status:prod:fail", "prov:policy:ci")
	failed.Policies = []records.PolicyVerdict{{Policy: "prod", Status: "fail", Summary: "CVE-2026-1 is critical"}}
	for _, c := range []struct {
		name      string
		selectors []string
		verdicts  []*records.Verdict
		want      string // of the error; "": permitted
		x509, jwt time.Duration
	}{
		{"an entry without a demand needs no verdict", []string{"unix:uid:1"}, nil, "", 0, 0},
		{"one with a demand needs one", []string{"unix:uid:1", "scan:policy:prod"}, nil, "no verdict on any image that the agent reported", 0, 0},
		{"a verdict that grants all is enough, and caps", []string{"unix:uid:1", "scan:policy:prod", "prov:policy:ci"}, []*records.Verdict{good}, "", 10 * time.Minute, 2 * time.Minute},
		{"of several the strictest caps", []string{"scan:policy:prod"}, []*records.Verdict{good, short}, "", time.Minute, 2 * time.Minute},
		{"two images do not make up for each other", []string{"scan:policy:prod", "prov:policy:ci"}, []*records.Verdict{short, failed}, "does not grant", 0, 0},
		{"a verdict that has ended grants nothing", []string{"scan:policy:prod"}, []*records.Verdict{ended}, "ended at", 0, 0},
		{"why is said", []string{"scan:policy:prod", "prov:policy:ci"}, []*records.Verdict{failed}, "does not grant scan:policy:prod: policy prod says fail (CVE-2026-1 is critical)", 0, 0},
		{"the image that the entry names must be it", []string{"image:id:" + digestOf("d"), "scan:policy:prod"}, []*records.Verdict{good, failed}, "does not grant", 0, 0},
		{"and may be", []string{"image:id:" + digestOf("a"), "scan:policy:prod"}, []*records.Verdict{good, short}, "", 10 * time.Minute, 2 * time.Minute},
		{"and be reported", []string{"image:id:" + digestOf("e"), "scan:policy:prod"}, []*records.Verdict{good}, "no verdict on image", 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &AgentPicture{Verdicts: c.verdicts}
			g, err := p.Permit(newEntry("e", id("/n"), id("/w"), c.selectors...), now)
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (!errors.Is(err, ErrEvidence) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			case g.X509 != c.x509 || g.JWT != c.jwt:
				t.Errorf("caps %s and %s", g.X509, g.JWT)
			}
		})
	}
}

func TestAVerdictConcernsWhoRunsTheImage(t *testing.T) {
	src := viewtest.New("store")
	src.PutNodes(newNode("a"), newNode("b"), newNode("c"))
	v := start(t, src, Config{})
	a, b := id("/spire/agent/a"), id("/spire/agent/b")
	_, fresh := v.FollowDigests()
	v.SetRunning(a, 1, []string{digestOf("a"), digestOf("b")})

	t.Run("an image that nobody ran before is news", func(t *testing.T) {
		if !woken(fresh) {
			t.Error("it is not")
		}
		digests, fresh := v.FollowDigests()
		if len(digests) != 2 {
			t.Errorf("images %v", digests)
		}
		v.SetRunning(b, 2, []string{digestOf("b")})
		if woken(fresh) {
			t.Error("one that another runs already is news")
		}
		v.SetRunning(b, 2, []string{digestOf("b"), digestOf("c")})
		if !woken(fresh) {
			t.Error("a third is not")
		}
	})
	t.Run("only those who run it are woken", func(t *testing.T) {
		_, wakeA := v.Follow(a)
		_, wakeB := v.Follow(b)
		_, wakeC := v.Follow(id("/spire/agent/c"))
		rev := src.PutVerdicts(verdictOn("a", 1, "scan:policy:prod"))
		if err := v.Wait(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		if !woken(wakeA) || woken(wakeB) || woken(wakeC) {
			t.Errorf("woken: %v %v %v", woken(wakeA), woken(wakeB), woken(wakeC))
		}
		if p := v.Agent(a); p.Rev != rev || len(p.Verdicts) != 1 {
			t.Errorf("picture %d with %v", p.Rev, p.Verdicts)
		}
	})
	t.Run("an agent that starts to run an image gets its verdict without a commit", func(t *testing.T) {
		p, wake := v.Follow(b)
		v.SetRunning(b, 2, []string{digestOf("a")})
		if !woken(wake) {
			t.Fatal("it is not woken")
		}
		if now := v.Agent(b); len(now.Verdicts) != 1 || now.Rev < p.Rev {
			t.Errorf("picture %d with %v", now.Rev, now.Verdicts)
		}
	})
	t.Run("one that starts to run an image without a verdict is left alone", func(t *testing.T) {
		_, wake := v.Follow(b)
		v.SetRunning(b, 2, []string{digestOf("a"), digestOf("f")})
		if woken(wake) {
			t.Error("it is woken")
		}
	})
	t.Run("an agent whose stream ended keeps what it reported for a while, but not for ever", func(t *testing.T) {
		v.Leave(b, 2)
		if len(v.Agent(b).Verdicts) != 1 {
			t.Error("it lost its verdicts at once")
		}
		v.forget(b, 2)
		if len(v.Agent(b).Verdicts) != 0 || len(v.Runners(digestOf("f"))) != 0 {
			t.Error("it still has them")
		}
	})
	t.Run("a stream that comes back in time is not forgotten", func(t *testing.T) {
		v.SetRunning(b, 3, []string{digestOf("a")})
		v.Leave(b, 3)
		v.SetRunning(b, 4, []string{digestOf("a")})
		v.forget(b, 3)
		if len(v.Agent(b).Verdicts) != 1 {
			t.Error("it was")
		}
		v.SetRunning(b, 3, nil)
		if len(v.Agent(b).Verdicts) != 1 {
			t.Error("an old stream speaks for it")
		}
	})
	t.Run("an evicted agent has to report anew", func(t *testing.T) {
		if err := v.Wait(t.Context(), src.DeleteNode(b)); err != nil {
			t.Fatal(err)
		}
		if err := v.Wait(t.Context(), src.PutNodes(newNode("b"))); err != nil {
			t.Fatal(err)
		}
		if len(v.Agent(b).Verdicts) != 0 {
			t.Error("it has not")
		}
	})
}

// BenchmarkVerdict is the promise that the cost of a verdict grows with the agents that run the image
// and with nothing else.
func BenchmarkVerdict(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		v, snap := crowd(n)
		for i, node := range snap.Nodes {
			v.SetRunning(node.ID, uint64(i), []string{fmt.Sprintf("sha256:%064x", i), digestOf("f")})
		}
		rev, seq := kv.Rev(1), uint64(0)
		commit := func(digest string) {
			rev, seq = rev+1, seq+1
			v.apply("store", records.Change{Rev: rev, Verdicts: []records.VerdictChange{{
				Digest: digest, Verdict: &records.Verdict{Digest: digest, Seq: seq},
			}}})
		}
		look := func(ids ...spiffeid.ID) {
			for _, id := range ids {
				v.Follow(id)
			}
		}
		b.Run(fmt.Sprintf("on an image of one agent among %d", n), func(b *testing.B) {
			for b.Loop() {
				commit(fmt.Sprintf("sha256:%064x", 7))
				look(snap.Nodes[7].ID)
			}
		})
	}
}
