package view

import (
	"cmp"
	"iter"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

// EntryFilter says which entries to list: those to which all set fields apply. The zero value lists
// every entry.
type EntryFilter struct {
	// SPIFFEID and ParentID are what the entry has; nil: any.
	SPIFFEID *spiffeid.ID
	ParentID *spiffeid.ID
	// Selectors are compared with the entry's as Match says; empty: any.
	Selectors attestor.Set
	// Match: EXACT, the same set; SUBSET, the entry's are all among the filter's; SUPERSET, the
	// filter's are all among the entry's; ANY, at least one is in both.
	Match types.SelectorMatch_MatchBehavior
	// FederatesWith is compared with the entry's likewise, in any order; empty: any. An entry that
	// federates with nobody is no match, not even as a subset.
	FederatesWith  []spiffeid.TrustDomain
	FederatesMatch types.FederatesWithMatch_MatchBehavior
	// Hint and Downstream are what the entry has; nil: any.
	Hint       *string
	Downstream *bool
	// Keep, if not nil, is asked about entries that all else applies to.
	Keep func(*identity.Entry) bool
}

func (f *EntryFilter) matches(e *identity.Entry) bool {
	return (f.SPIFFEID == nil || e.SPIFFEID == *f.SPIFFEID) &&
		(f.ParentID == nil || e.ParentID == *f.ParentID) &&
		(f.Hint == nil || e.Hint == *f.Hint) &&
		(f.Downstream == nil || e.Downstream == *f.Downstream) &&
		(f.Selectors.Len() == 0 || matchesSelectors(e.Selectors, f.Selectors, f.Match)) &&
		(len(f.FederatesWith) == 0 || matchesFederates(e.FederatesWith, f.FederatesWith, f.FederatesMatch)) &&
		(f.Keep == nil || f.Keep(e))
}

func matchesSelectors(has, want attestor.Set, match types.SelectorMatch_MatchBehavior) bool {
	switch match {
	case types.SelectorMatch_MATCH_EXACT:
		return has.Equal(want)
	case types.SelectorMatch_MATCH_SUBSET:
		return has.Len() > 0 && has.In(want)
	case types.SelectorMatch_MATCH_SUPERSET:
		return want.In(has)
	case types.SelectorMatch_MATCH_ANY:
		return slices.ContainsFunc(want.All(), has.Has)
	}
	return false
}

func matchesFederates(has, want []spiffeid.TrustDomain, match types.FederatesWithMatch_MatchBehavior) bool {
	if len(has) == 0 {
		return false
	}
	switch match {
	case types.FederatesWithMatch_MATCH_EXACT:
		return within(has, want) && within(want, has)
	case types.FederatesWithMatch_MATCH_SUBSET:
		return within(has, want)
	case types.FederatesWithMatch_MATCH_SUPERSET:
		return within(want, has)
	case types.FederatesWithMatch_MATCH_ANY:
		return slices.ContainsFunc(want, func(td spiffeid.TrustDomain) bool { return slices.Contains(has, td) })
	}
	return false
}

// within reports whether every one of a is also in b.
func within(a, b []spiffeid.TrustDomain) bool {
	return !slices.ContainsFunc(a, func(td spiffeid.TrustDomain) bool { return !slices.Contains(b, td) })
}

// stretch is how many entries are looked at before others get a chance at the lock: a search through
// everything must not keep a commit waiting.
const stretch = 4096

// ListEntries returns at most limit matching entries (0 or less: all of them) with IDs behind after,
// sorted by ID, expired ones and node aliases included. next is what to pass as after for the page
// that follows, or empty at the end; it may be that only then it turns out that there are no more.
// Each entry that exists throughout a walk over all pages is returned exactly once, whatever happens
// to others meanwhile.
func (v *View) ListEntries(f EntryFilter, after string, limit int) (entries []*identity.Entry, next string) {
	for {
		var done bool
		entries, after, done = v.listSome(&f, after, limit, entries)
		if done {
			return entries, after
		}
	}
}

// listSome goes on with a list for one stretch. It returns where it stopped, and whether that is the
// end of the page; the end of all entries is the empty string.
func (v *View) listSome(f *EntryFilter, after string, limit int, entries []*identity.Entry) (_ []*identity.Entry, stopped string, done bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	looked := 0
	for e := range v.graph.candidates(f, after) {
		if limit > 0 && len(entries) == limit {
			return entries, after, true
		}
		if looked++; looked > stretch {
			return entries, after, false
		}
		if after = e.ID; f.matches(e) {
			entries = append(entries, e)
		}
	}
	return entries, "", true
}

// candidates yields the entries behind an ID among which all matching ones are, sorted by ID.
func (g *graph) candidates(f *EntryFilter, after string) iter.Seq[*identity.Entry] {
	var list []*identity.Entry
	switch {
	case f.SPIFFEID != nil:
		if x := g.vertices[*f.SPIFFEID]; x != nil {
			list = x.holders
		}
	case f.ParentID != nil:
		if x := g.vertices[*f.ParentID]; x != nil {
			list = x.children
		}
	default:
		return g.entries.after(func(e *identity.Entry) int { return strings.Compare(e.ID, after) })
	}
	at, found := slices.BinarySearchFunc(list, after, func(e *identity.Entry, id string) int {
		return strings.Compare(e.ID, id)
	})
	if found {
		at++
	}
	return slices.Values(list[at:])
}

// CountEntries returns how many entries match.
func (v *View) CountEntries(f EntryFilter) int {
	count, after, done := 0, "", false
	var some []*identity.Entry
	for !done {
		some, after, done = v.listSome(&f, after, 0, some[:0])
		count += len(some)
	}
	return count
}

// EntryCount returns how many entries there are.
func (v *View) EntryCount() int {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.graph.entries.size
}

// Entry returns the entry of that ID, also if it has expired.
func (v *View) Entry(id string) (*identity.Entry, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	e := v.graph.entry(id)
	return e, e != nil
}

// EntriesBySPIFFEID returns the entries that give the SPIFFE ID, sorted by ID, expired ones left out:
// those from which a caller's standing (admin, downstream) may be read.
func (v *View) EntriesBySPIFFEID(id spiffeid.ID) []*identity.Entry {
	v.mu.RLock()
	defer v.mu.RUnlock()
	x := v.graph.vertices[id]
	if x == nil {
		return nil
	}
	now := v.cfg.Now()
	var live []*identity.Entry
	for _, e := range x.holders {
		if !e.Expired(now) {
			live = append(live, e)
		}
	}
	return live
}

// Nodes returns all nodes, banned ones included, sorted by ID.
func (v *View) Nodes() []*records.Node {
	nodes, _ := v.ListNodes(nil, "", 0)
	return nodes
}

// NodeCount returns how many nodes there are, banned ones included.
func (v *View) NodeCount() int {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.graph.nodes.size
}

// ListNodes returns at most limit nodes (0 or less: all of them) that keep accepts (nil: any) with
// IDs behind after, sorted by ID, and where to go on: as ListEntries does.
func (v *View) ListNodes(keep func(*records.Node) bool, after string, limit int) (nodes []*records.Node, next string) {
	for {
		some, stopped, end := v.nodesBehind(after)
		for _, n := range some {
			if limit > 0 && len(nodes) == limit {
				return nodes, after
			}
			if after = n.ID.String(); keep == nil || keep(n) {
				nodes = append(nodes, n)
			}
		}
		if end {
			return nodes, ""
		}
		after = stopped
	}
}

// nodesBehind returns up to a stretch of nodes, the ID of the last, and whether that is all.
// Callers' functions are called without the lock.
func (v *View) nodesBehind(after string) (some []*records.Node, last string, end bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for a := range v.graph.nodes.after(func(a *agent) int { return cmp.Compare(a.id.String(), after) }) {
		if len(some) == stretch {
			return some, last, false
		}
		some = append(some, a.node)
		last = a.id.String()
	}
	return some, last, true
}

// Bundles returns the bundles of all trust domains, the own one first, the others sorted by name.
func (v *View) Bundles() []*identity.Bundle {
	v.mu.RLock()
	defer v.mu.RUnlock()
	bundles := make([]*identity.Bundle, 0, len(v.graph.bundles))
	for _, b := range v.graph.bundles {
		bundles = append(bundles, b)
	}
	slices.SortFunc(bundles, func(a, b *identity.Bundle) int {
		if a.TrustDomain == v.graph.td || b.TrustDomain == v.graph.td {
			return cmp.Compare(rank(a.TrustDomain == v.graph.td), rank(b.TrustDomain == v.graph.td))
		}
		return a.TrustDomain.Compare(b.TrustDomain)
	})
	return bundles
}

func rank(first bool) int {
	if first {
		return 0
	}
	return 1
}
