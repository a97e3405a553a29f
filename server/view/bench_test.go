package view

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/workloadapi/identity"
)

func sel(value string) attestor.Selector { return attestor.Selector{Type: "node", Value: value} }

func benchEntry(id string, parent spiffeid.ID) *identity.Entry {
	return &identity.Entry{
		ID: id, ParentID: parent, SPIFFEID: spiffeid.RequireFromPath(td, "/ns/default/sa/"+id),
		Selectors: attestor.NewSet(
			attestor.Selector{Type: "k8s", Value: "ns:default"},
			attestor.Selector{Type: "k8s", Value: "sa:" + id},
			attestor.Selector{Type: "k8s", Value: "container-name:main"},
		),
		CreatedAt: time.Unix(1000, 0),
	}
}

// crowd fills a view with n nodes of one cluster and n entries, one below each node, and an alias
// for the cluster that the nodes do not match for want of a label.
func crowd(n int) (*View, *records.Snapshot) {
	snap := &records.Snapshot{Rev: 1}
	for i := range n {
		id := spiffeid.RequireFromPathf(td, "/spire/agent/x509pop/%06d", i)
		snap.Nodes = append(snap.Nodes, &records.Node{ID: id, Selectors: attestor.NewSet(sel("cluster:one"), sel(fmt.Sprint("name:", i)))})
		snap.Entries = append(snap.Entries, benchEntry(fmt.Sprintf("entry-%06d-0000-0000-000000000000", i), id))
	}
	v := New(viewtest.New("store"), td, Config{})
	v.apply("store", v.graph.difference(snap))
	for _, n := range snap.Nodes { // everybody looks, so that there is something to invalidate
		v.Follow(n.ID)
	}
	return v, snap
}

// BenchmarkChange is the promise that the cost of a change does not depend on what it does not
// concern: the numbers of the sub-benchmarks of one kind are about the same.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000} {
		v, _ := crowd(n)
		rev := kv.Rev(1)
		commit := func(c records.Change) {
			rev++
			c.Rev = rev
			v.apply("store", c)
		}
		node := spiffeid.RequireFromPath(td, "/spire/agent/x509pop/one")
		commit(records.Change{Nodes: []records.NodeChange{{ID: node, Node: &records.Node{
			ID: node, Selectors: attestor.NewSet(sel("cluster:one"), sel("label:special")),
		}}}})
		server := spiffeid.RequireFromPath(td, "/spire/server")
		place := spiffeid.RequireFromPath(td, "/special")
		alias := &identity.Entry{ID: "alias", ParentID: server, SPIFFEID: place, Selectors: attestor.NewSet(sel("cluster:one"), sel("label:special"))}
		commit(records.Change{Entries: []records.EntryChange{{ID: "alias", Entry: alias}}})
		v.Follow(node)

		own, aliased := benchEntry("own", node), benchEntry("aliased", place)
		chained := benchEntry("chained", aliased.SPIFFEID)
		commit(records.Change{Entries: []records.EntryChange{{ID: "aliased", Entry: aliased}}})
		for _, kind := range []struct {
			name  string
			entry *identity.Entry
		}{{"entry below an agent", own}, {"entry below an alias", aliased}, {"entry below an entry", chained}, {"the alias itself", alias}} {
			b.Run(fmt.Sprintf("%s among %d", kind.name, n), func(b *testing.B) {
				for b.Loop() {
					commit(records.Change{Entries: []records.EntryChange{{ID: kind.entry.ID, Entry: kind.entry}}})
					v.Follow(node)
				}
			})
		}
		b.Run(fmt.Sprintf("a node among %d", n), func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				commit(records.Change{Nodes: []records.NodeChange{{ID: node, Node: &records.Node{
					ID: node, Selectors: attestor.NewSet(sel("cluster:one"), sel("label:special"), sel(fmt.Sprint("round:", i%2))),
				}}}})
				v.Follow(node)
			}
		})
	}
}

// BenchmarkChangeForAll is a change that concerns every one of n nodes with the same 1,000 entries,
// and with or without an entry of its own, all of whom then look at their pictures.
func BenchmarkChangeForAll(b *testing.B) {
	for _, own := range []bool{false, true} {
		const n = 10_000
		v, snap := crowd(n)
		server := spiffeid.RequireFromPath(td, "/spire/server")
		place := spiffeid.RequireFromPath(td, "/all")
		c := records.Change{Rev: 2, Entries: []records.EntryChange{{ID: "alias", Entry: &identity.Entry{
			ID: "alias", ParentID: server, SPIFFEID: place, Selectors: attestor.NewSet(sel("cluster:one")),
		}}}}
		for i := range 1_000 {
			e := benchEntry(fmt.Sprint("shared-", i), place)
			c.Entries = append(c.Entries, records.EntryChange{ID: e.ID, Entry: e})
		}
		for _, e := range snap.Entries {
			if !own {
				c.Entries = append(c.Entries, records.EntryChange{ID: e.ID})
			}
		}
		v.apply("store", c)
		rev := kv.Rev(2)
		e := benchEntry("shared-0", place)
		b.Run(fmt.Sprintf("own entries %v", own), func(b *testing.B) {
			for b.Loop() {
				rev++
				v.apply("store", records.Change{Rev: rev, Entries: []records.EntryChange{{ID: e.ID, Entry: e}}})
				for _, node := range snap.Nodes {
					v.Follow(node.ID)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/agent")
		})
	}
}

// BenchmarkList walks through 100,000 entries in pages of 1,000, in their public form.
func BenchmarkList(b *testing.B) {
	v, _ := crowd(100_000)
	for b.Loop() {
		after, seen := "", 0
		for {
			page, next := v.ListEntries(EntryFilter{}, after, 1_000)
			for _, e := range page {
				if e.Wire() != nil {
					seen++
				}
			}
			if after = next; after == "" {
				break
			}
		}
		if seen != 100_000 {
			b.Fatalf("saw %d", seen)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100_000, "ns/entry")
}

// BenchmarkSnapshot takes in 100,000 entries and nodes at once.
func BenchmarkSnapshot(b *testing.B) {
	_, snap := crowd(100_000)
	var before, after runtime.MemStats
	var v *View
	for b.Loop() {
		runtime.KeepAlive(v) // the one before may go from here on
		v = nil              //nolint:ineffassign,wastedassign // so that it is not counted
		runtime.GC()
		runtime.ReadMemStats(&before)
		v = New(viewtest.New("store"), td, Config{})
		v.apply("store", v.graph.difference(snap))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/100_000, "B/entry+node")
	runtime.KeepAlive(v)
	runtime.KeepAlive(snap)
}

// BenchmarkAgent is what each signing request asks.
func BenchmarkAgent(b *testing.B) {
	v, snap := crowd(100_000)
	i := 0
	for b.Loop() {
		i = (i + 7919) % len(snap.Nodes)
		if _, found := v.Agent(snap.Nodes[i].ID).Entry(snap.Entries[i].ID); !found {
			b.Fatal("not found")
		}
	}
}
