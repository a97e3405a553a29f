package view

import (
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var _ Source = (*records.Records)(nil)

func TestOverTheRealRecords(t *testing.T) {
	store, err := boltkv.Open(filepath.Join(t.TempDir(), "store.db"), boltkv.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	rec, err := records.Open(t.Context(), store, td, records.Config{})
	if err != nil {
		t.Fatal(err)
	}
	v := start(t, rec, Config{})
	see := func(t *testing.T, rev kv.Rev, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Wait(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
	}
	agentID := id("/spire/agent/x509pop/one")

	t.Run("what is written can be seen", func(t *testing.T) {
		_, rev, err := rec.UpdateNode(t.Context(), agentID, func(n *records.Node, _ bool) error {
			n.Type, n.Selectors = "x509pop", set("x509pop:cn:one")
			return nil
		})
		see(t, rev, err)
		_, rev, err = rec.UpdateBundle(t.Context(), others[0], func(*identity.Bundle) error { return nil })
		see(t, rev, err)
		alias := newEntry("alias", id("/spire/server"), id("/site"), "x509pop:cn:one")
		below := newEntry("below", id("/site"), id("/w"))
		below.FederatesWith = []spiffeid.TrustDomain{others[0]}
		results, rev, err := rec.CreateEntries(t.Context(), []*identity.Entry{alias, below})
		see(t, rev, err)
		for _, r := range results {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
		if p := v.Agent(agentID); names(p) != results[1].Entry.ID || p.StoreID != rec.StoreID() || len(p.Bundles) != 1 {
			t.Errorf("picture has %q and %d bundles", names(p), len(p.Bundles))
		}
	})

	t.Run("a write that changes nothing does not keep its writer waiting", func(t *testing.T) {
		_, rev, err := rec.UpdateNode(t.Context(), agentID, func(*records.Node, bool) error { return nil })
		see(t, rev, err)
		_, rev, err = rec.UpdateBundle(t.Context(), others[0], func(*identity.Bundle) error { return nil })
		see(t, rev, err)
	})

	t.Run("a view of the same store made later is the same", func(t *testing.T) {
		again := start(t, rec, Config{})
		if names(again.Agent(agentID)) != names(v.Agent(agentID)) || again.EntryCount() != v.EntryCount() || again.NodeCount() != 1 {
			t.Errorf("the later view has %q of %d entries", names(again.Agent(agentID)), again.EntryCount())
		}
	})

	t.Run("a change goes from commit to picture", func(t *testing.T) {
		p, wake := v.Follow(agentID)
		_, rev, err := rec.UpdateEntry(t.Context(), p.Entries[0].ID, func(e *identity.Entry) error {
			e.Hint = "changed"
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		<-wake
		if now := v.Agent(agentID); now.Rev != rev || now.Entries[0].Hint != "changed" || now.Entries[0].Revision != 1 {
			t.Errorf("picture of revision %d has %+v", now.Rev, now.Entries[0])
		}
		_, wake = v.Follow(agentID)
		rev, err = rec.DeleteNode(t.Context(), agentID)
		see(t, rev, err)
		if !woken(wake) || names(v.Agent(agentID)) != "" {
			t.Error("an evicted agent still has entries")
		}
	})
}
