package view

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestList(t *testing.T) {
	yes, hint := true, "h"
	list := []*identity.Entry{
		newEntry("1", id("/p"), id("/x"), "t:a", "t:b", "t:c"),
		newEntry("2", id("/p"), id("/y"), "t:a", "t:b"),
		newEntry("3", id("/q"), id("/x"), "t:a"),
		newEntry("4", id("/q"), id("/z"), "t:d"),
	}
	list[0].FederatesWith = others
	list[1].FederatesWith = others[:1]
	list[2].FederatesWith = others[1:]
	list[2].Hint, list[3].Downstream = hint, true
	src := viewtest.New("store")
	src.PutEntries(list...)
	v := start(t, src, Config{})
	x, q, nowhere := id("/x"), id("/q"), id("/nowhere")
	for _, c := range []struct {
		name   string
		filter EntryFilter
		want   string
	}{
		{"everything", EntryFilter{}, "1 2 3 4"},
		{"by SPIFFE ID", EntryFilter{SPIFFEID: &x}, "1 3"},
		{"by parent", EntryFilter{ParentID: &q}, "3 4"},
		{"by both", EntryFilter{SPIFFEID: &x, ParentID: &q}, "3"},
		{"by an ID nobody has", EntryFilter{SPIFFEID: &nowhere}, ""},
		{"by a parent nobody has", EntryFilter{ParentID: &nowhere}, ""},
		{"by exact selectors", EntryFilter{Selectors: set("t:b", "t:a"), Match: types.SelectorMatch_MATCH_EXACT}, "2"},
		{"by a subset of selectors", EntryFilter{Selectors: set("t:a", "t:b"), Match: types.SelectorMatch_MATCH_SUBSET}, "2 3"},
		{"by a superset of selectors", EntryFilter{Selectors: set("t:a", "t:b"), Match: types.SelectorMatch_MATCH_SUPERSET}, "1 2"},
		{"by any selector", EntryFilter{Selectors: set("t:b", "t:d"), Match: types.SelectorMatch_MATCH_ANY}, "1 2 4"},
		{"by exact trust domains", EntryFilter{FederatesWith: []spiffeid.TrustDomain{others[1], others[0]}, FederatesMatch: types.FederatesWithMatch_MATCH_EXACT}, "1"},
		{"by a subset of trust domains", EntryFilter{FederatesWith: others[:1], FederatesMatch: types.FederatesWithMatch_MATCH_SUBSET}, "2"},
		{"by a superset of trust domains", EntryFilter{FederatesWith: others[:1], FederatesMatch: types.FederatesWithMatch_MATCH_SUPERSET}, "1 2"},
		{"by any trust domain", EntryFilter{FederatesWith: others, FederatesMatch: types.FederatesWithMatch_MATCH_ANY}, "1 2 3"},
		{"by hint", EntryFilter{Hint: &hint}, "3"},
		{"by downstream", EntryFilter{Downstream: &yes}, "4"},
		{"by a way of matching there is not", EntryFilter{Selectors: set("t:a"), Match: 99}, ""},
	} {
		t.Run("entries are found "+c.name, func(t *testing.T) {
			got, next := v.ListEntries(c.filter, "", 0)
			if names(&AgentPicture{Entries: got}) != c.want || next != "" {
				t.Errorf("found %q, want %q; next is %q", names(&AgentPicture{Entries: got}), c.want, next)
			}
			if n := v.CountEntries(c.filter); n != len(strings.Fields(c.want)) {
				t.Errorf("counted %d", n)
			}
			var paged []string
			for after := ""; ; {
				var page []*identity.Entry
				page, after = v.ListEntries(c.filter, after, 1)
				for _, e := range page {
					paged = append(paged, e.ID)
				}
				if after == "" {
					break
				}
			}
			if got := strings.Join(paged, " "); got != c.want {
				t.Errorf("in pages of one: %q, want %q", got, c.want)
			}
		})
	}

	t.Run("a token of an entry that is gone, or of none, goes on behind its place", func(t *testing.T) {
		for token, want := range map[string]string{"1": "2 3 4", "2-gone": "3 4", "zzz": "", "\x00": "1 2 3 4"} {
			if got, _ := v.ListEntries(EntryFilter{}, token, 0); names(&AgentPicture{Entries: got}) != want {
				t.Errorf("behind %q: %q, want %q", token, names(&AgentPicture{Entries: got}), want)
			}
		}
	})

	t.Run("every entry that stays is listed exactly once while others come and go", func(t *testing.T) {
		src := viewtest.New("store")
		var all []*identity.Entry
		for i := range 10_000 {
			all = append(all, newEntry(fmt.Sprintf("e%05d", i), id("/p"), id("/x")))
		}
		src.PutEntries(all...)
		v := start(t, src, Config{})
		seen := map[string]int{}
		r := rand.New(rand.NewPCG(1, 4))
		for after := ""; ; {
			var page []*identity.Entry
			page, after = v.ListEntries(EntryFilter{}, after, 100)
			for _, e := range page {
				seen[e.ID]++
			}
			if after == "" {
				break
			}
			var c records.Change
			for range 50 { // odd ones go, new ones come
				gone := fmt.Sprintf("e%05d", r.IntN(5_000)*2+1)
				if slices.ContainsFunc(c.Entries, func(o records.EntryChange) bool { return o.ID == gone }) {
					continue
				}
				fresh := newEntry(gone+"-new", id("/p"), id("/x"))
				c.Entries = append(c.Entries, records.EntryChange{ID: gone}, records.EntryChange{ID: fresh.ID, Entry: fresh})
			}
			if err := v.Wait(t.Context(), src.Commit(c)); err != nil {
				t.Fatal(err)
			}
		}
		for i := 0; i < 10_000; i += 2 {
			if n := seen[fmt.Sprintf("e%05d", i)]; n != 1 {
				t.Fatalf("e%05d was listed %d times", i, n)
			}
		}
		for name, n := range seen {
			if n != 1 {
				t.Fatalf("%s was listed %d times", name, n)
			}
		}
	})

	t.Run("nodes are listed in pages", func(t *testing.T) {
		src := viewtest.New("store")
		var nodes []*records.Node
		for i := range 9_000 {
			nodes = append(nodes, newNode(fmt.Sprintf("%05d", i), fmt.Sprint("n:", i%3)))
		}
		src.PutNodes(nodes...)
		v := start(t, src, Config{})
		if got := v.Nodes(); len(got) != 9_000 || v.NodeCount() != 9_000 || got[8_999].ID != nodes[8_999].ID {
			t.Errorf("%d nodes", len(got))
		}
		keep := func(n *records.Node) bool { return n.Selectors.Has(attestor.Selector{Type: "n", Value: "1"}) }
		count, pages := 0, 0
		for after := ""; ; pages++ {
			var page []*records.Node
			page, after = v.ListNodes(keep, after, 1_000)
			if !slices.IsSortedFunc(page, func(a, b *records.Node) int { return strings.Compare(a.ID.String(), b.ID.String()) }) {
				t.Error("a page is not sorted")
			}
			count += len(page)
			if after == "" {
				break
			}
		}
		if count != 3_000 || pages != 3 {
			t.Errorf("%d nodes on %d pages before the last", count, pages)
		}
	})

	t.Run("the own bundle comes first", func(t *testing.T) {
		src := viewtest.New("store")
		first := spiffeid.RequireTrustDomainFromString("a.test")
		src.PutBundles(&identity.Bundle{TrustDomain: others[0]}, &identity.Bundle{TrustDomain: td}, &identity.Bundle{TrustDomain: first})
		v := start(t, src, Config{})
		var got []spiffeid.TrustDomain
		for _, b := range v.Bundles() {
			got = append(got, b.TrustDomain)
		}
		if !slices.Equal(got, []spiffeid.TrustDomain{td, first, others[0]}) {
			t.Errorf("bundles are %v", got)
		}
	})
}

func TestSorted(t *testing.T) {
	t.Run("it holds what a sorted slice would", func(t *testing.T) {
		r := rand.New(rand.NewPCG(1, 5))
		s := sorted[int]{compare: func(a, b int) int { return a - b }}
		var model []int
		for step := range 40_000 {
			n := r.IntN(6_000)
			at, found := slices.BinarySearch(model, n)
			// Grows for the first half and shrinks for the second, so that chunks split and merge.
			if grow := step < 20_000; grow == (r.IntN(4) > 0) {
				s.put(n)
				if !found {
					model = slices.Insert(model, at, n)
				}
			} else {
				s.remove(n)
				if found {
					model = slices.Delete(model, at, at+1)
				}
			}
			if _, has := s.get(func(o int) int { return o - n }); has != slices.Contains(model, n) {
				t.Fatalf("step %d: has %d: %v", step, n, has)
			}
			if step%500 == 0 {
				if got := slices.Collect(s.all()); !slices.Equal(got, model) || s.size != len(model) {
					t.Fatalf("step %d: %d elements, want %d", step, len(got), len(model))
				}
				behind := slices.Collect(s.after(func(o int) int { return o - n }))
				at, found := slices.BinarySearch(model, n)
				if found {
					at++
				}
				if !slices.Equal(behind, model[at:]) {
					t.Fatalf("step %d: %d elements behind %d, want %d", step, len(behind), n, len(model)-at)
				}
			}
		}
	})
}
