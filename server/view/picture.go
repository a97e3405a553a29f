package view

import (
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// AgentPicture is what one agent may have at one revision. It is immutable, and its slices may be
// shared with other pictures.
type AgentPicture struct {
	// StoreID names the store that Rev counts in. Empty until the view has its first snapshot.
	StoreID string
	// Rev is the revision of the last change that concerned the agent. When an entry expires, the
	// picture changes without a new revision.
	Rev kv.Rev
	// Entries may be held by the agent, sorted by ID. Expired entries and node aliases are not
	// among them.
	Entries []*identity.Entry
	// Bundles has the own trust domain's bundle first, if it is stored yet, then those of the trust
	// domains that the entries federate with, sorted by trust domain. Ones that are not stored are
	// left out.
	Bundles []*identity.Bundle
	// Verdicts are those on the images that the agent has reported to run, sorted by digest.
	Verdicts []*records.Verdict

	body *body

	once     sync.Once
	checksum []byte // set by once
	bare     sync.Once
	plain    *AgentPicture // set by bare
}

// body is the part of a picture that agents with the same entries share.
type body struct {
	entries []*identity.Entry
	named   []spiffeid.TrustDomain // that entries federate with, sorted; stored or not
	bundles []*identity.Bundle

	once     sync.Once
	checksum []byte // set by once
	bare     sync.Once
	plain    *body // set by bare
}

func (b *body) names(td spiffeid.TrustDomain) bool {
	_, found := slices.BinarySearchFunc(b.named, td, spiffeid.TrustDomain.Compare)
	return found
}

// Entry returns the entry of that ID if the agent may hold it.
func (p *AgentPicture) Entry(id string) (*identity.Entry, bool) {
	at, found := slices.BinarySearchFunc(p.Entries, id, func(e *identity.Entry, id string) int {
		return strings.Compare(e.ID, id)
	})
	if !found {
		return nil, false
	}
	return p.Entries[at], true
}

// Checksum returns identity.Checksum of the entries and bundles, with identity.ChecksumVerdicts of the
// verdicts. That of entries and bundles is computed once however many agents share them. The caller
// must not change it.
func (p *AgentPicture) Checksum() []byte {
	p.once.Do(func() {
		held := make([]identity.HeldVerdict, len(p.Verdicts))
		for i, v := range p.Verdicts {
			held[i] = identity.HeldVerdict{Digest: v.Digest, Seq: v.Seq}
		}
		p.checksum = identity.ChecksumVerdicts(p.sumOfRest(), held)
	})
	return p.checksum
}

func (p *AgentPicture) sumOfRest() []byte {
	if p.body == nil { // made by hand
		return identity.Checksum(p.Entries, p.Bundles)
	}
	p.body.once.Do(func() { p.body.checksum = identity.Checksum(p.Entries, p.Bundles) })
	return p.body.checksum
}

// Plain returns the picture for an agent that knows nothing of verdicts: without them, and without the
// entries that demand one, of which such an agent could not tell when they are to be taken away.
func (p *AgentPicture) Plain() *AgentPicture {
	p.bare.Do(func() {
		var b *body
		if p.body != nil {
			b = p.body.bared()
		} else {
			b = (&body{entries: p.Entries, bundles: p.Bundles}).bared()
		}
		if len(p.Verdicts) == 0 && len(b.entries) == len(p.Entries) {
			p.plain = p
			return
		}
		p.plain = &AgentPicture{StoreID: p.StoreID, Rev: p.Rev, Entries: b.entries, Bundles: b.bundles, body: b}
	})
	return p.plain
}

// bared returns the body without gated entries, itself if there are none.
func (b *body) bared() *body {
	b.bare.Do(func() {
		if !slices.ContainsFunc(b.entries, (*identity.Entry).Gated) {
			b.plain = b
			return
		}
		kept := slices.DeleteFunc(slices.Clone(b.entries), (*identity.Entry).Gated)
		b.plain = &body{entries: kept, named: b.named, bundles: b.bundles}
	})
	return b.plain
}

// groups are the sets of aliases that agents have, each with what they lead to. A group is there as
// long as an agent belongs to it. A change to what its aliases lead to concerns, and so touches, each
// of these agents: the group is gone before anybody could find it out of date.
type groups struct {
	mu sync.Mutex // guards all of it among readers
	of map[string]*group
}

type group struct {
	key     string
	members int

	once sync.Once
	body *body // set by once
}

// join returns the group of a set of aliases and counts the caller in.
func (s *groups) join(key string) *group {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.of[key]
	if p == nil {
		p = &group{key: key}
		s.of[key] = p
	}
	p.members++
	return p
}

// leave takes one member out, and the group with the last.
func (s *groups) leave(p *group) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.members--; p.members == 0 {
		delete(s.of, p.key)
	}
}

// Agent returns the picture of an agent, never nil. That of a banned or unknown agent has no entries.
func (v *View) Agent(id spiffeid.ID) *AgentPicture {
	v.mu.RLock()
	defer v.mu.RUnlock()
	a := v.graph.agent(id)
	if a == nil {
		return v.graph.noEntries()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return v.look(a)
}

// Follow returns the picture of an agent and a channel that is closed when another has taken its
// place. Whoever was busy meanwhile calls again and has the latest; the ones between are skipped.
func (v *View) Follow(id spiffeid.ID) (*AgentPicture, <-chan struct{}) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	a := v.graph.agent(id)
	if a == nil {
		return v.graph.noEntries(), v.graph.stranger.follow()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.wake == nil {
		a.wake = make(chan struct{})
	}
	return v.look(a), a.wake
}

// AgentRev returns the revision that Agent's picture would have, without computing one; 0 for an
// unknown agent.
func (v *View) AgentRev(id spiffeid.ID) kv.Rev {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if a := v.graph.agent(id); a != nil {
		return a.rev
	}
	return 0
}

// Node returns the record of a node.
func (v *View) Node(id spiffeid.ID) (*records.Node, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if a := v.graph.agent(id); a != nil {
		return a.node, true
	}
	return nil, false
}

// FollowNode returns the record of a node, nil if there is none, and a channel that is closed when
// the record has changed, also in ways that leave the picture as it is. While there is none, the
// channel may also be closed for nothing.
func (v *View) FollowNode(id spiffeid.ID) (*records.Node, <-chan struct{}) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	a := v.graph.agent(id)
	if a == nil {
		return nil, v.graph.stranger.follow()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	return a.node, a.changed
}

func (g *graph) agent(id spiffeid.ID) *agent {
	if x := g.vertices[id]; x != nil {
		return x.agent
	}
	return nil
}

// look returns the picture in force. The caller holds View.mu for reading, and a.mu.
func (v *View) look(a *agent) *AgentPicture {
	if a.picture == nil {
		if a.body == nil {
			v.m.computed.Inc()
			a.body = v.graph.compute(a)
		}
		b := a.body
		a.picture = &AgentPicture{StoreID: v.graph.storeID, Rev: a.rev, Entries: b.entries, Bundles: b.bundles, body: b}
		if !a.node.Banned {
			a.picture.Verdicts = v.graph.images.verdictsOf(a.id)
		}
	}
	return a.picture
}

func (g *graph) noEntries() *AgentPicture {
	b := g.compose(nil)
	return &AgentPicture{StoreID: g.storeID, Rev: g.rev, Bundles: b.bundles, body: b}
}

// compute returns what an agent may have: what its aliases lead to, which it shares with others, and
// what its own ID leads to.
func (g *graph) compute(a *agent) *body {
	if a.node.Banned {
		return g.compose(nil)
	}
	if a.group == nil {
		roots := g.aliasesOf(a.node.Selectors)
		a.group = g.groups.join(keyOf(roots))
		a.group.once.Do(func() { a.group.body = g.compose(g.reach(roots)) })
	}
	shared := a.group.body
	own := g.reach([]spiffeid.ID{a.id})
	if len(own) == 0 {
		return shared
	}
	return g.complete(union(own, shared.entries, byID), union(namedBy(own), shared.named, spiffeid.TrustDomain.Compare))
}

// union merges two sorted lists without duplicates into one. The first is the short one.
func union[T any](few, many []T, compare func(a, b T) int) []T {
	both := make([]T, 0, len(few)+len(many))
	for _, e := range few {
		at, found := slices.BinarySearchFunc(many, e, compare)
		both = append(append(both, many[:at]...), e)
		if found {
			at++
		}
		many = many[at:]
	}
	return append(both, many...)
}

// aliasesOf returns the SPIFFE IDs of the live aliases of a node with these selectors, sorted.
func (g *graph) aliasesOf(selectors attestor.Set) []spiffeid.ID {
	var ids []spiffeid.ID
	for _, s := range selectors.All() {
		for _, e := range g.aliases[s] {
			if g.live(e) && !g.reserved(e.SPIFFEID) && e.Selectors.In(selectors) {
				ids = append(ids, e.SPIFFEID)
			}
		}
	}
	slices.SortFunc(ids, compareIDs)
	return slices.Compact(ids)
}

func compareIDs(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) }

func keyOf(ids []spiffeid.ID) string {
	var b strings.Builder
	for _, id := range ids {
		b.WriteString(id.String())
		b.WriteByte(' ') // no SPIFFE ID contains one
	}
	return b.String()
}

// reach returns the live entries that can be reached downwards from the given IDs, sorted by ID.
func (g *graph) reach(roots []spiffeid.ID) []*identity.Entry {
	var found []*identity.Entry
	seen := make(map[spiffeid.ID]struct{}, len(roots))
	next := slices.Clone(roots)
	for len(next) > 0 {
		id := next[len(next)-1]
		next = next[:len(next)-1]
		x := g.vertices[id]
		if x == nil || len(x.children) == 0 {
			continue
		}
		if _, again := seen[id]; again {
			continue
		}
		seen[id] = struct{}{}
		for _, e := range x.children {
			if !g.live(e) {
				continue
			}
			found = append(found, e)
			if !g.reserved(e.SPIFFEID) {
				next = append(next, e.SPIFFEID)
			}
		}
	}
	slices.SortFunc(found, byID)
	return found
}

// compose adds to entries, sorted by ID, the bundles that belong to them.
func (g *graph) compose(entries []*identity.Entry) *body {
	return g.complete(entries, namedBy(entries))
}

// namedBy returns the trust domains that entries federate with, sorted.
func namedBy(entries []*identity.Entry) []spiffeid.TrustDomain {
	var names []spiffeid.TrustDomain
	seen := map[spiffeid.TrustDomain]struct{}{}
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			if _, again := seen[td]; !again {
				seen[td] = struct{}{}
				names = append(names, td)
			}
		}
	}
	slices.SortFunc(names, spiffeid.TrustDomain.Compare)
	return names
}

func (g *graph) complete(entries []*identity.Entry, named []spiffeid.TrustDomain) *body {
	b := &body{entries: entries, named: named}
	if own := g.bundles[g.td]; own != nil {
		b.bundles = append(b.bundles, own)
	}
	for _, td := range named {
		if other := g.bundles[td]; other != nil && td != g.td {
			b.bundles = append(b.bundles, other)
		}
	}
	return b
}
