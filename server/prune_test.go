package server

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
)

func TestExpiredAgentsAreForgotten(t *testing.T) {
	w := start(t, func(c *Config) { c.CA.AgentTTL = time.Second })
	join := func(w *world, names ...string) {
		t.Helper()
		for _, name := range names {
			if _, _, err := w.attest("honest", []byte(name), "because"); err != nil {
				t.Fatal(err)
			}
		}
	}
	again := func(change func(*Config)) {
		t.Helper()
		if err := w.stop(); err != nil {
			t.Fatal(err)
		}
		before := w
		w = start(t, func(c *Config) {
			c.DataDir, c.SocketPath = before.cfg.DataDir, before.cfg.SocketPath
			change(c)
		})
	}
	wait := func(want ...string) {
		t.Helper()
		var got []string
		for late := time.Now().Add(time.Minute); time.Now().Before(late) && !slices.Equal(got, want); {
			resp, err := w.agents().ListAgents(w.context(), &agentv1.ListAgentsRequest{})
			if err != nil {
				t.Fatal(err)
			}
			got = nil
			for _, a := range resp.GetAgents() {
				got = append(got, strings.TrimPrefix(a.GetId().GetPath(), "/spire/agent/honest/"))
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("there are %v, want %v", got, want)
		}
	}
	later := func(c *Config) { c.Now = func() time.Time { return time.Now().Add(10 * time.Minute) } }
	join(w, "banned", "once", "old")
	if _, err := w.agents().BanAgent(w.context(), &agentv1.BanAgentRequest{Id: id("/spire/agent/honest/banned")}); err != nil {
		t.Fatal(err)
	}
	again(func(*Config) {})
	join(w, "fresh")

	again(func(c *Config) { later(c); c.PruneExpiredFor = time.Minute })
	wait("banned", "fresh", "once")
	eventually(t, func() error { // it is gone before the line is there
		if !slices.ContainsFunc(w.audit(), func(line map[string]any) bool { return line["event"] == "agent.prune" }) {
			return errors.New("no audit line of agent.prune")
		}
		return nil
	})
	if line := w.lastAudit("agent.prune"); line["outcome"] != "allow" || line["agent_id"] != "spiffe://example.org/spire/agent/honest/old" || line["rev"] == nil {
		t.Errorf("audit line %v", line)
	}
	again(func(*Config) {}) // the look before is over
	wait("banned", "fresh", "once")

	again(func(c *Config) { later(c); c.PruneExpiredFor, c.PruneOnce = time.Minute, true })
	wait("banned", "fresh")
}
