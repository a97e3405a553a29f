package view

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/workloadapi/identity"
)

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func set(texts ...string) attestor.Set {
	var list []attestor.Selector
	for _, text := range texts {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			panic(err)
		}
		list = append(list, s)
	}
	return attestor.NewSet(list...)
}

func newEntry(id string, parent, spiffeID spiffeid.ID, selectors ...string) *identity.Entry {
	if len(selectors) == 0 {
		selectors = []string{"unix:uid:1"}
	}
	return &identity.Entry{ID: id, ParentID: parent, SPIFFEID: spiffeID, Selectors: set(selectors...)}
}

func newNode(name string, selectors ...string) *records.Node {
	return &records.Node{ID: id("/spire/agent/" + name), Selectors: set(selectors...)}
}

// start runs a view of the source until the test ends.
func start(t *testing.T, src Source, cfg Config) *View {
	t.Helper()
	v := New(src, td, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- v.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	<-v.Ready()
	return v
}

func names(p *AgentPicture) string {
	var ids []string
	for _, e := range p.Entries {
		ids = append(ids, e.ID)
	}
	return strings.Join(ids, " ")
}

func woken(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestWhoMayHaveWhat(t *testing.T) {
	server := id("/spire/server")
	for _, c := range []struct {
		name    string
		entries []*identity.Entry
		node    *records.Node
		want    string
	}{
		{"an entry below the agent", []*identity.Entry{newEntry("e", id("/spire/agent/a"), id("/w"))}, newNode("a"), "e"},
		{"not an entry below another agent", []*identity.Entry{newEntry("e", id("/spire/agent/b"), id("/w"))}, newNode("a"), ""},
		{
			"an entry below an alias of the node, but not the alias",
			[]*identity.Entry{newEntry("alias", server, id("/cluster"), "n:1"), newEntry("e", id("/cluster"), id("/w"))},
			newNode("a", "n:1", "n:2"), "e",
		},
		{
			"nothing by an alias that asks for a selector the node lacks",
			[]*identity.Entry{newEntry("alias", server, id("/cluster"), "n:1", "n:3"), newEntry("e", id("/cluster"), id("/w"))},
			newNode("a", "n:1", "n:2"), "",
		},
		{
			"nothing by an alias without selectors",
			[]*identity.Entry{
				{ID: "alias", ParentID: server, SPIFFEID: id("/cluster")}, newEntry("e", id("/cluster"), id("/w")),
			},
			newNode("a", "n:1"), "",
		},
		{
			"entries below entries",
			[]*identity.Entry{
				newEntry("1", id("/spire/agent/a"), id("/x")), newEntry("2", id("/x"), id("/y")), newEntry("3", id("/y"), id("/z")),
			},
			newNode("a"), "1 2 3",
		},
		{
			"entries in a circle, each once",
			[]*identity.Entry{
				newEntry("1", id("/spire/agent/a"), id("/x")), newEntry("2", id("/x"), id("/y")), newEntry("3", id("/y"), id("/x")),
			},
			newNode("a"), "1 2 3",
		},
		{
			"no circle that nothing leads to",
			[]*identity.Entry{newEntry("2", id("/x"), id("/y")), newEntry("3", id("/y"), id("/x"))},
			newNode("a"), "",
		},
		{
			"an entry that is its own parent, if something leads to it",
			[]*identity.Entry{newEntry("1", id("/spire/agent/a"), id("/x")), newEntry("self", id("/x"), id("/x"))},
			newNode("a"), "1 self",
		},
		{
			"no entry that is its own parent, if nothing leads to it",
			[]*identity.Entry{newEntry("self", id("/x"), id("/x"))},
			newNode("a"), "",
		},
		{
			"not another agent's entries, even if an entry claims its ID",
			[]*identity.Entry{newEntry("1", id("/spire/agent/a"), id("/spire/agent/b")), newEntry("2", id("/spire/agent/b"), id("/w"))},
			newNode("a"), "1",
		},
		{
			"no alias, even if an entry claims the server's ID",
			[]*identity.Entry{
				newEntry("1", id("/spire/agent/a"), server), newEntry("alias", server, id("/cluster"), "n:9"),
				newEntry("2", id("/cluster"), id("/w")),
			},
			newNode("a"), "1",
		},
		{
			"nothing, if banned",
			[]*identity.Entry{
				newEntry("e", id("/spire/agent/a"), id("/w")),
				newEntry("alias", server, id("/cluster"), "n:1"), newEntry("f", id("/cluster"), id("/w")),
			},
			&records.Node{ID: id("/spire/agent/a"), Selectors: set("n:1"), Banned: true}, "",
		},
		{"nothing, if unknown", []*identity.Entry{newEntry("e", id("/spire/agent/a"), id("/w"))}, newNode("b"), ""},
		{
			"nothing that has expired, nor what hangs on it",
			[]*identity.Entry{
				{ID: "1", ParentID: id("/spire/agent/a"), SPIFFEID: id("/x"), Selectors: set("u:1"), ExpiresAt: time.Unix(1, 0)},
				newEntry("2", id("/x"), id("/w")),
				{ID: "alias", ParentID: server, SPIFFEID: id("/cluster"), Selectors: set("n:1"), ExpiresAt: time.Unix(1, 0)},
				newEntry("3", id("/cluster"), id("/w")),
			},
			newNode("a", "n:1"), "",
		},
	} {
		t.Run("an agent has "+c.name, func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(c.node)
			src.PutEntries(c.entries...)
			v := start(t, src, Config{})
			if got := names(v.Agent(id("/spire/agent/a"))); got != c.want {
				t.Errorf("has %q, want %q", got, c.want)
			}
		})
	}
}

func TestOnlyTheConcernedAreWoken(t *testing.T) {
	server := id("/spire/server")
	setup := func(t *testing.T) (*viewtest.Source, *View) {
		src := viewtest.New("store")
		src.PutNodes(newNode("a", "n:1", "n:all"), newNode("b", "n:2", "n:all"), newNode("c", "n:1", "n:2", "n:all"))
		src.PutEntries(
			newEntry("alias1", server, id("/one"), "n:1", "n:all"), newEntry("alias2", server, id("/two"), "n:2", "n:all"),
			newEntry("own", id("/spire/agent/a"), id("/own")),
			newEntry("claim", id("/spire/agent/c"), id("/spire/agent/b")), // to no avail
			&identity.Entry{ID: "gone", ParentID: id("/spire/agent/b"), SPIFFEID: id("/gone"), Selectors: set("u:1"), ExpiresAt: time.Unix(1, 0)},
		)
		return src, start(t, src, Config{})
	}
	banned := newNode("b", "n:2", "n:all")
	banned.Banned = true
	renewed := newNode("b", "n:2", "n:all")
	renewed.Serial, renewed.AgentVersion = "7", "2.0"
	federated := newEntry("own", id("/spire/agent/a"), id("/own"))
	federated.FederatesWith = others[:1]
	for _, c := range []struct {
		name   string
		change records.Change
		want   string
	}{
		{"an entry below an agent wakes that agent", entryChange("e", newEntry("e", id("/spire/agent/b"), id("/w"))), "b"},
		{"an entry below an alias wakes its nodes", entryChange("e", newEntry("e", id("/one"), id("/w"))), "a c"},
		{"an entry below an entry wakes who has that", entryChange("e", newEntry("e", id("/own"), id("/w"))), "a"},
		{"an alias wakes its nodes", entryChange("e", newEntry("e", server, id("/three"), "n:1", "n:2")), "c"},
		{"an alias that moves wakes old and new nodes", entryChange("alias1", newEntry("alias1", server, id("/one"), "n:2")), "a b c"},
		{"a deleted alias wakes its nodes", entryChange("alias2", nil), "b c"},
		{"an alias without nodes wakes nobody", entryChange("e", newEntry("e", server, id("/three"), "n:all", "n:9")), ""},
		{"an entry below nothing wakes nobody", entryChange("e", newEntry("e", id("/nowhere"), id("/w"))), ""},
		{"an entry below an expired one wakes nobody", entryChange("e", newEntry("e", id("/gone"), id("/w"))), ""},
		{"an expired entry's end wakes nobody", entryChange("gone", nil), ""},
		{"an entry that was never there wakes nobody", entryChange("never", nil), ""},
		{"an entry that moves wakes its old and new agent", entryChange("own", newEntry("own", id("/spire/agent/b"), id("/own"))), "a b"},
		{"a ban wakes the agent", nodeChange(banned), "b"},
		{"a new serial wakes nobody", nodeChange(renewed), ""},
		{"other selectors wake the agent", nodeChange(newNode("b", "n:3")), "b"},
		{"the own bundle wakes all", bundleChange(td), "a b c"},
		{"a bundle that no entry names wakes nobody", bundleChange(others[1]), ""},
		{"a bundle wakes who has an entry that names it", bundleChange(others[0]), "a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			src, v := setup(t)
			src.PutEntries(federated)
			if err := v.Wait(t.Context(), 3); err != nil {
				t.Fatal(err)
			}
			wakes := map[string]<-chan struct{}{}
			before := map[string]*AgentPicture{}
			for _, name := range []string{"a", "b", "c"} {
				before[name], wakes[name] = v.Follow(id("/spire/agent/" + name))
			}
			rev := src.Commit(c.change)
			if err := v.Wait(t.Context(), rev); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, name := range []string{"a", "b", "c"} {
				now := v.Agent(id("/spire/agent/" + name))
				if woken(wakes[name]) {
					got = append(got, name)
					if now.Rev != rev || now == before[name] {
						t.Errorf("%s was woken for revision %d, want a new one of %d", name, now.Rev, rev)
					}
				} else if now != before[name] {
					t.Errorf("%s was not woken but has another picture", name)
				}
			}
			if diff := cmp.Diff(strings.Fields(c.want), got, cmp.Transformer("join", func(l []string) string { return strings.Join(l, " ") })); diff != "" {
				t.Errorf("woken (-want +got):\n%s", diff)
			}
		})
	}
}

func entryChange(id string, e *identity.Entry) records.Change {
	return records.Change{Entries: []records.EntryChange{{ID: id, Entry: e}}}
}

func nodeChange(n *records.Node) records.Change {
	return records.Change{Nodes: []records.NodeChange{{ID: n.ID, Node: n}}}
}

func bundleChange(name spiffeid.TrustDomain) records.Change {
	return records.Change{Bundles: []records.BundleChange{{TrustDomain: name, Bundle: &identity.Bundle{TrustDomain: name, Sequence: 9}}}}
}

func TestRun(t *testing.T) {
	t.Run("a reader waits for its own write", func(t *testing.T) {
		src := viewtest.New("store")
		v := start(t, src, Config{})
		rev := src.PutEntries(newEntry("e", id("/p"), id("/w")))
		if err := v.Wait(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		if _, found := v.Entry("e"); !found {
			t.Error("the entry is not there")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := v.Wait(ctx, rev+1); !errors.Is(err, context.Canceled) {
			t.Errorf("waiting for the future gave %v", err)
		}
	})

	t.Run("a compacted log is no gap, and wakes only those it concerns", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(newNode("a"), newNode("b"))
		src.PutBundles(&identity.Bundle{TrustDomain: td, Sequence: 1}, &identity.Bundle{TrustDomain: others[0], Sequence: 1})
		src.PutEntries(newEntry("1", id("/spire/agent/a"), id("/x")), newEntry("2", id("/spire/agent/b"), id("/y")))
		reg := prometheus.NewPedanticRegistry()
		v := start(t, src, Config{Metrics: reg})
		_, wakeA := v.Follow(id("/spire/agent/a"))
		_, wakeB := v.Follow(id("/spire/agent/b"))
		src.Skip(
			entryChange("1", nil), entryChange("3", newEntry("3", id("/spire/agent/a"), id("/z"))),
			records.Change{Bundles: []records.BundleChange{{TrustDomain: others[0]}}},
			nodeChange(newNode("c")),
		)
		snap, _ := src.Snapshot(t.Context())
		if err := v.Wait(t.Context(), snap.Rev); err != nil {
			t.Fatal(err)
		}
		if !woken(wakeA) || woken(wakeB) {
			t.Errorf("a woken: %v, b woken: %v; want a alone", woken(wakeA), woken(wakeB))
		}
		if got := names(v.Agent(id("/spire/agent/a"))); got != "3" {
			t.Errorf("a has %q", got)
		}
		if _, found := v.Bundle(others[0]); found {
			t.Error("the deleted bundle is still there")
		}
		if _, found := v.Node(id("/spire/agent/c")); !found {
			t.Error("the new node is not there")
		}
	})

	t.Run("another store replaces every picture", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(newNode("a"))
		v := start(t, src, Config{})
		_, wake := v.Follow(id("/spire/agent/a"))
		src.Restore("restored", 1)
		<-wake
		if now := v.Agent(id("/spire/agent/a")); now.StoreID != "restored" || now.Rev != 1 {
			t.Errorf("picture is of %q at %d", now.StoreID, now.Rev)
		}
	})

	t.Run("an error of the source ends it", func(t *testing.T) {
		broken := errors.New("disk on fire")
		v := New(failing{err: broken}, td, Config{})
		if err := v.Run(t.Context()); !errors.Is(err, broken) {
			t.Errorf("run returned %v", err)
		}
	})

	t.Run("before the first snapshot pictures are empty", func(t *testing.T) {
		v := New(viewtest.New("store"), td, Config{})
		if p := v.Agent(id("/spire/agent/a")); p == nil || p.StoreID != "" || p.Rev != 0 || len(p.Entries) != 0 {
			t.Errorf("picture is %+v", p)
		}
		if woken(v.Ready()) {
			t.Error("it says that it is ready")
		}
	})
}

// failing is a source that only fails.
type failing struct{ err error }

func (failing) StoreID() string                                                    { return "store" }
func (f failing) Snapshot(context.Context) (*records.Snapshot, error)              { return nil, f.err }
func (f failing) Follow(context.Context, kv.Rev, func(records.Change) error) error { return f.err }

func TestExpiry(t *testing.T) {
	t.Run("entries leave the pictures when they expire, the earliest first", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(newNode("a", "n:1"))
			begin := time.Now()
			at := func(e *identity.Entry, d time.Duration) *identity.Entry {
				e.ExpiresAt = begin.Add(d)
				return e
			}
			v := start(t, src, Config{})
			src.PutEntries(
				at(newEntry("day", id("/spire/agent/a"), id("/x")), 24*time.Hour),
				at(newEntry("hour", id("/spire/agent/a"), id("/y")), time.Hour),
				newEntry("below", id("/y"), id("/z")),
				at(newEntry("alias", id("/spire/server"), id("/site"), "n:1"), 2*time.Hour),
				newEntry("site", id("/site"), id("/s")),
			)
			synctest.Wait()
			for _, want := range []struct {
				after time.Duration
				names string
			}{{0, "below day hour site"}, {time.Hour, "day site"}, {2 * time.Hour, "day"}, {24 * time.Hour, ""}} {
				p, wake := v.Follow(id("/spire/agent/a"))
				if d := time.Since(begin); d != want.after || names(p) != want.names {
					t.Fatalf("after %v has %q, want %q after %v", d, names(p), want.names, want.after)
				}
				if want.names != "" {
					<-wake
				}
			}
			if e, found := v.Entry("day"); !found || e.ID != "day" {
				t.Error("an expired entry is no longer listed")
			}
			if got := v.EntriesBySPIFFEID(id("/x")); len(got) != 0 {
				t.Error("an expired entry still gives its standing")
			}
			// An administrator prolongs it.
			_, wake := v.Follow(id("/spire/agent/a"))
			src.PutEntries(at(newEntry("day", id("/spire/agent/a"), id("/x")), 48*time.Hour))
			<-wake
			if got := names(v.Agent(id("/spire/agent/a"))); got != "day" {
				t.Errorf("has %q, want the prolonged entry", got)
			}
		})
	})
}

func TestExpiryBesideACommit(t *testing.T) {
	agentID := id("/spire/agent/a")
	e := newEntry("e", agentID, id("/w"))
	e.ExpiresAt = time.Unix(100, 0)
	now := time.Unix(99, 0)
	v := New(viewtest.New("store"), td, Config{Now: func() time.Time { return now }})
	v.apply("store", records.Change{
		Rev:     5,
		Nodes:   []records.NodeChange{{ID: agentID, Node: newNode("a")}},
		Entries: []records.EntryChange{{ID: e.ID, Entry: e}},
	})
	v.progress.rev = 4 // as it is for a moment: the commit is in the graph, and nobody was told
	now = e.ExpiresAt
	v.tick()
	if p := v.Agent(agentID); p.Rev != 5 || len(p.Entries) != 0 {
		t.Errorf("the picture has revision %d and %d entries, want 5 and none: a revision never goes back", p.Rev, len(p.Entries))
	}
	if p := v.Agent(id("/spire/agent/nobody")); p.Rev != 5 {
		t.Errorf("the picture of an unknown agent has revision %d, want 5", p.Rev)
	}
}

func TestFollow(t *testing.T) {
	t.Run("equal nodes share what they hold", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(newNode("a", "n:1"), newNode("b", "n:1"), newNode("c", "n:1"))
		src.PutEntries(newEntry("alias", id("/spire/server"), id("/one"), "n:1"), newEntry("e", id("/one"), id("/w")))
		v := start(t, src, Config{})
		a, b := v.Agent(id("/spire/agent/a")), v.Agent(id("/spire/agent/b"))
		if a.body != b.body {
			t.Error("two equal nodes have two bodies")
		}
		rev := src.PutNodes(newNode("a", "n:2"))
		if err := v.Wait(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		if got := names(v.Agent(id("/spire/agent/a"))); got != "" {
			t.Errorf("a left the alias and still has %q", got)
		}
		if c := v.Agent(id("/spire/agent/c")); c.body != b.body {
			t.Error("a node that left took the group with it")
		}
	})

	t.Run("whoever follows an unknown agent hears of its arrival", func(t *testing.T) {
		src := viewtest.New("store")
		v := start(t, src, Config{})
		_, wake := v.Follow(id("/spire/agent/a"))
		n, changed := v.FollowNode(id("/spire/agent/a"))
		if n != nil {
			t.Errorf("there is a node %v", n)
		}
		src.PutNodes(newNode("a"))
		<-wake
		<-changed
		if n, _ := v.FollowNode(id("/spire/agent/a")); n == nil {
			t.Error("the node is not there")
		}
	})

	t.Run("whoever follows a record hears of every change to it", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(newNode("a"))
		v := start(t, src, Config{})
		_, changed := v.FollowNode(id("/spire/agent/a"))
		n := newNode("a")
		n.AgentVersion = "2"
		src.PutNodes(n)
		<-changed
		got, changed := v.FollowNode(id("/spire/agent/a"))
		if got.AgentVersion != "2" {
			t.Errorf("has version %q", got.AgentVersion)
		}
		src.DeleteNode(n.ID)
		<-changed
		if got, _ := v.FollowNode(n.ID); got != nil {
			t.Error("the node is still there")
		}
	})

	t.Run("readers and the writer do not get in each other's way", func(t *testing.T) {
		src := viewtest.New("store")
		r := rand.New(rand.NewPCG(1, 3))
		w := &world{draw: r.IntN, now: time.Now()}
		v := start(t, src, Config{})
		stop := make(chan struct{})
		var readers sync.WaitGroup
		for i := range 4 {
			readers.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					p, _ := v.Follow(agentIDs[(i+n)%len(agentIDs)])
					p.Checksum()
					v.FollowNode(agentIDs[n%len(agentIDs)])
					v.ListEntries(EntryFilter{}, "", 5)
					v.AgentRev(agentIDs[0])
					v.Bundles()
				}
			})
		}
		var rev kv.Rev
		for range 500 {
			rev = src.Commit(w.change())
		}
		if err := v.Wait(t.Context(), rev); err != nil {
			t.Error(err)
		}
		close(stop)
		readers.Wait()
	})
}
