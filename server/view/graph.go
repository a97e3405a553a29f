package view

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// graph holds entries as edges between SPIFFE IDs, and the nodes that stand at some of them.
// View.mu guards it; what readers may write is guarded as said at agent and at groups.
type graph struct {
	storeID string
	// rev is that of the last commit taken in: what is in the graph now. The view's progress follows
	// a moment later, for those who wait.
	rev kv.Rev
	td  spiffeid.TrustDomain
	// server is the ID below which node aliases hang.
	server spiffeid.ID
	// asOf is the time by which entries count as expired: that of the last advance.
	asOf time.Time

	entries  sorted[*identity.Entry] // by ID
	expiring sorted[*identity.Entry] // those that ever expire, by expiry
	vertices map[spiffeid.ID]*vertex
	bundles  map[spiffeid.TrustDomain]*identity.Bundle

	nodes    sorted[*agent]                 // by ID
	postings map[attestor.Selector]*posting // nodes by each of their selectors
	// aliases has each node alias under one of its selectors: the one that had the fewest.
	aliases map[attestor.Selector][]*identity.Entry

	images images

	groups groups
	// stranger is closed when a node appears, for those who follow a node that is not there.
	stranger stranger
}

// vertex is one SPIFFE ID that entries or a node refer to.
type vertex struct {
	id       spiffeid.ID
	children []*identity.Entry // whose parent this is, sorted by ID
	holders  []*identity.Entry // whose SPIFFE ID this is, sorted by ID
	agent    *agent            // the node of this ID, or nil
}

func newGraph(td spiffeid.TrustDomain) graph {
	return graph{
		td:       td,
		server:   spiffeid.RequireFromPath(td, "/spire/server"),
		entries:  sorted[*identity.Entry]{compare: byID},
		expiring: sorted[*identity.Entry]{compare: byExpiry},
		vertices: map[spiffeid.ID]*vertex{},
		bundles:  map[spiffeid.TrustDomain]*identity.Bundle{},
		nodes:    sorted[*agent]{compare: func(a, b *agent) int { return cmp.Compare(a.id.String(), b.id.String()) }},
		postings: map[attestor.Selector]*posting{},
		aliases:  map[attestor.Selector][]*identity.Entry{},
		images:   newImages(),
		groups:   groups{of: map[string]*group{}},
	}
}

func byID(a, b *identity.Entry) int { return strings.Compare(a.ID, b.ID) }

func byExpiry(a, b *identity.Entry) int {
	return cmp.Or(a.ExpiresAt.Compare(b.ExpiresAt), strings.Compare(a.ID, b.ID))
}

// reserved reports whether an ID is in the part of the trust domain that SPIRE's names live in. The
// API gives no entry such an ID; if one has it all the same, nothing hangs on it, so that it can
// neither collect the aliases below the server nor the entries of an agent.
func (g *graph) reserved(id spiffeid.ID) bool {
	path := id.Path()
	return id.TrustDomain() == g.td && (path == "/spire" || strings.HasPrefix(path, "/spire/"))
}

func (g *graph) entry(id string) *identity.Entry {
	e, _ := g.entries.get(func(o *identity.Entry) int { return strings.Compare(o.ID, id) })
	return e
}

// live reports whether an entry exists and has not expired.
func (g *graph) live(e *identity.Entry) bool { return e != nil && !e.Expired(g.asOf) }

// alias reports whether an entry names nodes instead of a workload.
func (g *graph) alias(e *identity.Entry) bool { return e.ParentID == g.server }

// apply takes in one commit and returns how many agents it concerns. An agent is concerned if a
// changed entry can be reached from it before the change or after, so both are walked.
func (g *graph) apply(c records.Change) int {
	g.rev = c.Rev
	w := g.walk(c.Rev)
	for _, change := range c.Entries {
		if old := g.entry(change.ID); g.live(old) {
			w.from(old)
		}
	}
	for _, change := range c.Entries {
		if old := g.entry(change.ID); old != nil {
			g.removeEntry(old)
		}
		if change.Entry != nil {
			g.addEntry(change.Entry)
		}
	}
	touched := w.touched
	for _, change := range c.Nodes {
		touched += g.applyNode(change, c.Rev)
	}
	for _, change := range c.Bundles {
		touched += g.applyBundle(change, c.Rev)
	}
	for _, change := range c.Verdicts {
		touched += g.applyVerdict(change, c.Rev)
	}
	w = g.walk(c.Rev)
	for _, change := range c.Entries {
		if now := g.entry(change.ID); g.live(now) {
			w.from(now)
		}
	}
	return touched + w.touched
}

func (g *graph) addEntry(e *identity.Entry) {
	g.entries.put(e)
	if !e.ExpiresAt.IsZero() {
		g.expiring.put(e)
	}
	parent := g.vertex(e.ParentID)
	parent.children = insert(parent.children, e)
	own := g.vertex(e.SPIFFEID)
	own.holders = insert(own.holders, e)
	if g.alias(e) {
		g.addAlias(e)
	}
}

func (g *graph) removeEntry(e *identity.Entry) {
	g.entries.remove(e)
	if !e.ExpiresAt.IsZero() {
		g.expiring.remove(e)
	}
	parent := g.vertices[e.ParentID]
	parent.children = remove(parent.children, e)
	g.drop(parent)
	// Looked up after the parent is gone: an entry may be its own parent.
	if own := g.vertices[e.SPIFFEID]; own != nil {
		own.holders = remove(own.holders, e)
		g.drop(own)
	}
	if g.alias(e) {
		g.removeAlias(e)
	}
}

func (g *graph) vertex(id spiffeid.ID) *vertex {
	x := g.vertices[id]
	if x == nil {
		x = &vertex{id: id}
		g.vertices[id] = x
	}
	return x
}

// drop forgets a vertex that nothing refers to any more.
func (g *graph) drop(x *vertex) {
	if len(x.children) == 0 && len(x.holders) == 0 && x.agent == nil {
		delete(g.vertices, x.id)
	}
}

func insert(list []*identity.Entry, e *identity.Entry) []*identity.Entry {
	at, _ := slices.BinarySearchFunc(list, e, byID)
	return slices.Insert(list, at, e)
}

func remove(list []*identity.Entry, e *identity.Entry) []*identity.Entry {
	if at, found := slices.BinarySearchFunc(list, e, byID); found {
		list = slices.Delete(list, at, at+1)
	}
	if len(list) == 0 {
		return nil
	}
	return list
}

// applyBundle takes in a bundle. The own one concerns every agent; another concerns those that have
// an entry which names it. Agents whose picture nobody has looked at since it last changed may count
// as concerned without being so.
func (g *graph) applyBundle(c records.BundleChange, rev kv.Rev) int {
	if c.Bundle == nil {
		delete(g.bundles, c.TrustDomain)
	} else {
		g.bundles[c.TrustDomain] = c.Bundle
	}
	if c.TrustDomain == g.td {
		return g.touchAll(rev)
	}
	touched := 0
	for a := range g.nodes.all() {
		if a.picture == nil || a.picture.body.names(c.TrustDomain) {
			g.regroup(a, rev)
			touched++
		}
	}
	return touched
}

// advance moves the time by which entries count as expired to now and returns how many agents that
// concerns. The clock may have been set back: then entries come to life again.
func (g *graph) advance(now time.Time) int {
	from, to := g.asOf, now
	if to.Before(from) {
		from, to = to, from
	}
	var toggled []*identity.Entry
	for e := range g.expiring.after(func(o *identity.Entry) int { return expiryAfter(o, from) }) {
		if e.ExpiresAt.After(to) {
			break
		}
		toggled = append(toggled, e)
	}
	before := g.walk(g.rev)
	for _, e := range toggled {
		if g.live(e) {
			before.from(e)
		}
	}
	g.asOf = now
	after := g.walk(g.rev)
	for _, e := range toggled {
		if g.live(e) {
			after.from(e)
		}
	}
	return before.touched + after.touched
}

// nextExpiry returns the earliest expiry that is still to come.
func (g *graph) nextExpiry() (time.Time, bool) {
	for e := range g.expiring.after(func(o *identity.Entry) int { return expiryAfter(o, g.asOf) }) {
		return e.ExpiresAt, true
	}
	return time.Time{}, false
}

// expiryAfter puts every entry that expires at t or before on the near side.
func expiryAfter(e *identity.Entry, t time.Time) int {
	if e.ExpiresAt.After(t) {
		return 1
	}
	return -1
}

// walker goes upwards from changed entries to the agents they belong to. One walker serves one
// state of the graph: what it has visited it does not visit again.
type walker struct {
	g       *graph
	rev     kv.Rev
	seen    map[spiffeid.ID]struct{}
	next    []spiffeid.ID
	touched int
}

func (g *graph) walk(rev kv.Rev) *walker { return &walker{g: g, rev: rev} }

// from touches every agent that a live entry belongs to.
func (w *walker) from(e *identity.Entry) {
	w.above(e)
	for len(w.next) > 0 {
		id := w.next[len(w.next)-1]
		w.next = w.next[:len(w.next)-1]
		if _, seen := w.seen[id]; seen {
			continue
		}
		if w.seen == nil {
			w.seen = map[spiffeid.ID]struct{}{}
		}
		w.seen[id] = struct{}{}
		x := w.g.vertices[id]
		if x == nil {
			continue
		}
		if x.agent != nil {
			w.g.touch(x.agent, w.rev)
			w.touched++
		}
		if w.g.reserved(id) {
			continue
		}
		for _, holder := range x.holders {
			if w.g.live(holder) {
				w.above(holder)
			}
		}
	}
}

// above takes the one step from an entry to its parent, or from a node alias to its nodes.
func (w *walker) above(e *identity.Entry) {
	if !w.g.alias(e) {
		w.next = append(w.next, e.ParentID)
		return
	}
	for a := range w.g.nodesWith(e.Selectors) {
		w.g.regroup(a, w.rev)
		w.touched++
	}
}
