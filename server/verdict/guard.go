package verdict

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
)

// held is what the guard makes of one evaluation.
type held struct {
	digests map[string]map[string]bool // by policy
	guards  map[string]*stored.EvidenceGuard
	events  []event
}

func (h held) holds(i *image, policy string) bool { return h.digests[policy][i.digest] }

// restless is how long after a start an image that nobody is seen to run counts as if one did: agents
// take a while to come back and say what they run, and a guard that counted nothing would hold nothing.
const restless = 10 * time.Minute

// weight is how many workloads an image stands for: the agents that run it.
func (s *Service) weight(i *image, now time.Time) int {
	n := len(s.View.Runners(i.digest))
	if n == 0 && !i.seenAt.IsZero() && now.Sub(s.started) < restless {
		return 1
	}
	return n
}

// guard says which of the withdrawals that the verdicts ask for are to be held back. All images of one
// evaluation have one cause and are asked for together. What was held stays held until the verdict
// changes or an operator lets it go.
func (s *Service) guard(now time.Time, images []*image, verdicts [][]policy.Verdict) held {
	h := held{digests: map[string]map[string]bool{}, guards: map[string]*stored.EvidenceGuard{}}
	for n, p := range s.rules.Policies {
		if p.Mode != policy.Enforce || p.Blast == (policy.BlastGuard{}) || s.releasing == p.Name {
			continue
		}
		captives, asked := map[string]bool{}, 0
		var leaving []*image
		for k, i := range images {
			m := i.force[p.Name]
			if verdicts[k][n].Allowed || !m.GetAllowed() {
				continue
			}
			if m.GetHeld() {
				captives[i.digest] = true
				continue
			}
			if w := s.weight(i, now); w > 0 {
				asked += w
				leaving = append(leaving, i)
			}
		}
		if asked > 0 {
			s.ask(&h, p, now, leaving, asked, captives)
		}
		h.digests[p.Name] = captives
	}
	return h
}

// ask puts the question, and notes what comes of it.
func (s *Service) ask(h *held, p *policy.ScanPolicy, now time.Time, leaving []*image, asked int, captives map[string]bool) {
	running := 0
	for _, i := range s.state.images {
		if i.force[p.Name].GetAllowed() {
			running += s.weight(i, now)
		}
	}
	g := &stored.EvidenceGuard{}
	if old := s.state.guards[p.Name]; old != nil {
		g = proto.CloneOf(old)
	}
	var past []policy.Withdrawal
	g.Recent = slices.DeleteFunc(g.GetRecent(), func(w *stored.EvidenceWithdrawal) bool {
		return now.Sub(timeOf(w.GetAt())) > p.Blast.Window
	})
	for _, w := range g.GetRecent() {
		past = append(past, policy.Withdrawal{At: timeOf(w.GetAt()), Workloads: int(w.GetWorkloads())})
	}
	answer := p.Blast.Check(now, past, running, asked)
	if answer.Go {
		for _, i := range leaving {
			g.Recent = append(g.Recent, &stored.EvidenceWithdrawal{
				Digest: i.digest, At: nanos(now), Workloads: int32(min(s.weight(i, now), 1<<30)), //nolint:gosec // bounded
			})
		}
		if len(g.GetRecent()) > maxRecent {
			g.Recent = g.Recent[len(g.Recent)-maxRecent:]
		}
	} else {
		var list []string
		for _, i := range leaving {
			captives[i.digest] = true
			list = append(list, i.digest)
		}
		if g.GetTrippedAt() == 0 {
			g.TrippedAt = nanos(now)
		}
		slices.Sort(list)
		h.events = append(h.events, event{Type: eventGuard, Policy: p.Name, Reason: answer.Text, Digests: list[:min(len(list), 1000)], Count: len(list)})
		s.m.guards.WithLabelValues(p.Name).Inc()
		s.cfg.Log.WithField("policy", p.Name).WithField("images", len(list)).Error("The blast guard holds withdrawals back: " + answer.Text)
		s.note(audit.Line{Event: "guard.hold", Outcome: audit.Allow, Caller: "policy", Policy: p.Name, Reason: answer.Text, Facts: list})
	}
	s.state.guards[p.Name], h.guards[p.Name] = g, g
}

// maxRecent bounds what is remembered of withdrawals; the window has forgotten older ones long before.
const maxRecent = 5000

// ErrNoPolicy says that there is no scan policy of the name.
var ErrNoPolicy = errors.New("there is no such scan_policy")

// Release lets go what the guard of a policy holds back, and returns the images that it was.
func (s *Service) Release(ctx context.Context, name, who string) ([]string, error) {
	s.mu.Lock()
	if !slices.ContainsFunc(s.rules.Policies, func(p *policy.ScanPolicy) bool { return p.Name == name }) {
		s.mu.Unlock()
		return nil, fmt.Errorf("release %q: %w", name, ErrNoPolicy)
	}
	var list []string
	for digest, i := range s.state.images {
		if i.force[name].GetHeld() {
			list = append(list, digest)
		}
	}
	slices.Sort(list)
	now := s.cfg.Now()
	s.releasing = name
	if g := s.state.guards[name]; g != nil {
		g.TrippedAt = 0
	}
	s.note(audit.Line{Event: "guard.release", Outcome: audit.Allow, Caller: who, Policy: name, Facts: list})
	err := s.evaluate(ctx, "release by "+who, list)
	s.releasing = ""
	err = errors.Join(err, s.alertNow(ctx, event{Type: eventRelease, Policy: name, Digests: list, Count: len(list)}, who, now))
	s.mu.Unlock()
	s.settle(ctx)
	if err != nil {
		return nil, fmt.Errorf("release %q: %w", name, err)
	}
	return list, nil
}
