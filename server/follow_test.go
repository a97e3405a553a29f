package server

import (
	"context"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"

	"github.com/assay-id/assay/attestor"
)

// follower is a judge that hands out whom it admitted.
type follower struct {
	honest
	agents chan attestor.Admitted
}

func (f follower) Follow(ctx context.Context, agents attestor.Admitted) error {
	f.agents <- agents
	<-ctx.Done()
	return nil
}

func TestAJudgeThatFollowsItsNodes(t *testing.T) {
	f := follower{agents: make(chan attestor.Admitted, 1)}
	kind := honestKind()
	kind.Open = func(any, attestor.Needs) (attestor.Judge, error) { return f, nil }
	w := start(t, func(c *Config) { c.Judges = []Judge{{Kind: kind}} })
	path, _, conn := w.agent("one")
	agents := <-f.agents
	// The picture may have to catch up with the admission.
	for known := false; !known; {
		for range agents.Each() {
			known = true
		}
		if t.Context().Err() != nil {
			t.Fatal("the agent is not among the admitted")
		}
	}
	line := func(event string) map[string]any {
		for _, l := range w.audit() {
			if l["event"] == event && l["caller"] == "attestor/honest" {
				return l
			}
		}
		return nil
	}
	t.Run("other selectors are in force, and in the audit log with whom they come from", func(t *testing.T) {
		if err := agents.Update(t.Context(), "honest/one", []attestor.Selector{{Type: "honest", Value: "host:b"}}); err != nil {
			t.Fatal(err)
		}
		a, err := w.agents().GetAgent(w.context(), &agentv1.GetAgentRequest{Id: id(path)})
		for late := time.Now().Add(30 * time.Second); err == nil && a.GetSelectors()[0].GetValue() != "host:b" && time.Now().Before(late); {
			a, err = w.agents().GetAgent(w.context(), &agentv1.GetAgentRequest{Id: id(path)})
		}
		if err != nil || a.GetSelectors()[0].GetValue() != "host:b" {
			t.Fatalf("%v, %v", a, err)
		}
		l := line("agent.refresh")
		if l == nil || l["outcome"] != "allow" || !strings.HasSuffix(l["agent_id"].(string), path) || l["rev"] == nil {
			t.Errorf("audit line %v", l)
		}
	})
	t.Run("the same selectors again are no decision", func(t *testing.T) {
		before := len(w.audit())
		if err := agents.Update(t.Context(), "honest/one", []attestor.Selector{{Type: "honest", Value: "host:b"}}); err != nil {
			t.Fatal(err)
		}
		if after := len(w.audit()); after != before {
			t.Errorf("%d lines more", after-before)
		}
	})
	t.Run("the agent of a node that is no more is cut off, and the audit log says so", func(t *testing.T) {
		if err := agents.Evict(t.Context(), "honest/one"); err != nil {
			t.Fatal(err)
		}
		if l := line("agent.evict"); l == nil || l["outcome"] != "allow" || !strings.HasSuffix(l["agent_id"].(string), path) {
			t.Errorf("audit line %v", l)
		}
		if _, err := agentv1.NewAgentClient(conn).RenewAgent(w.context(), &agentv1.RenewAgentRequest{}); err == nil {
			t.Error("the agent can still renew its SVID")
		}
	})
}
