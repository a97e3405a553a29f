package view

import (
	"iter"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// agent is a node with what is kept for it. The graph's writer may change all of it.
type agent struct {
	id   spiffeid.ID
	node *records.Node
	rev  kv.Rev // of the last change that concerns its picture
	// places are where it stands in the posting lists of its selectors. Banned nodes stand in none.
	places []place

	// mu guards the following among readers, who hold View.mu for reading.
	mu      sync.Mutex
	picture *AgentPicture // nil until somebody asks
	body    *body         // what picture was last made of; nil if that may have changed
	group   *group        // which the picture was computed with; nil if the aliases may have changed
	wake    chan struct{} // closed when picture is no longer in force; nil while nobody follows
	changed chan struct{} // closed when node is replaced; nil while nobody follows
}

// posting lists the nodes that have one selector, in no order. Each element and its agent know each
// other's place, so taking a node out costs the same however many others have the selector.
type posting struct {
	selector attestor.Selector
	slots    []slot
}

type slot struct {
	agent *agent
	place int // index into agent.places
}

type place struct {
	posting *posting
	slot    int // index into posting.slots
}

func (g *graph) post(a *agent) {
	a.places = make([]place, 0, a.node.Selectors.Len())
	for _, s := range a.node.Selectors.All() {
		p := g.postings[s]
		if p == nil {
			p = &posting{selector: s}
			g.postings[s] = p
		}
		p.slots = append(p.slots, slot{agent: a, place: len(a.places)})
		a.places = append(a.places, place{posting: p, slot: len(p.slots) - 1})
	}
}

func (g *graph) unpost(a *agent) {
	for _, at := range a.places {
		p := at.posting
		last := len(p.slots) - 1
		moved := p.slots[last]
		p.slots[at.slot] = moved
		moved.agent.places[moved.place].slot = at.slot
		p.slots[last] = slot{}
		p.slots = p.slots[:last]
		if last == 0 {
			delete(g.postings, p.selector)
		}
	}
	a.places = nil
}

// nodesWith yields the nodes, banned ones left out, that have all of the selectors. An empty set
// names no node: an alias without selectors would otherwise be every node's.
func (g *graph) nodesWith(selectors attestor.Set) iter.Seq[*agent] {
	var rarest *posting
	for _, s := range selectors.All() {
		p := g.postings[s]
		if p == nil {
			return func(func(*agent) bool) {}
		}
		if rarest == nil || len(p.slots) < len(rarest.slots) {
			rarest = p
		}
	}
	return func(yield func(*agent) bool) {
		if rarest == nil {
			return
		}
		for _, s := range rarest.slots {
			if selectors.In(s.agent.node.Selectors) && !yield(s.agent) {
				return
			}
		}
	}
}

// applyNode takes in a node and returns 1 if its picture is concerned, else 0. A new serial or
// version wakes those who follow the record, but leaves the picture as it is.
func (g *graph) applyNode(c records.NodeChange, rev kv.Rev) int {
	if c.Node == nil || c.Node.Banned {
		g.images.report(c.ID, nil) // whoever comes back has to report anew
	}
	x := g.vertices[c.ID]
	if x == nil || x.agent == nil {
		if c.Node == nil {
			return 0
		}
		g.addNode(c.Node, rev)
		return 1
	}
	a := x.agent
	if a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
	if c.Node != nil && c.Node.Banned == a.node.Banned && c.Node.Selectors.Equal(a.node.Selectors) {
		a.node = c.Node
		return 0
	}
	g.regroup(a, rev)
	g.unpost(a)
	if c.Node == nil {
		g.nodes.remove(a)
		x.agent = nil
		g.drop(x)
		return 1
	}
	a.node = c.Node
	if !a.node.Banned {
		g.post(a)
	}
	return 1
}

func (g *graph) addNode(n *records.Node, rev kv.Rev) {
	x := g.vertex(n.ID)
	a := &agent{id: x.id, node: n, rev: rev}
	x.agent = a
	g.nodes.put(a)
	if !n.Banned {
		g.post(a)
	}
	g.stranger.wakeAll()
}

// regroup marks an agent's picture as out of date whose aliases, or what they lead to, have changed: what it shares
// with others is not what it was. It wakes those who follow it.
func (g *graph) regroup(a *agent, rev kv.Rev) {
	if a.group != nil {
		g.groups.leave(a.group)
		a.group = nil
	}
	g.touch(a, rev)
}

// touch is regroup of an agent of which only what hangs on its own ID has changed.
func (g *graph) touch(a *agent, rev kv.Rev) {
	a.body = nil
	g.outdate(a, rev)
}

// outdate marks an agent's picture as out of date whose entries and bundles are still the same, and
// wakes those who follow it.
func (g *graph) outdate(a *agent, rev kv.Rev) {
	a.rev = rev
	a.picture = nil
	if a.wake != nil {
		close(a.wake)
		a.wake = nil
	}
}

func (g *graph) touchAll(rev kv.Rev) int {
	for a := range g.nodes.all() {
		g.regroup(a, rev)
	}
	g.stranger.wakeAll()
	return g.nodes.size
}

// addAlias indexes a node alias under that of its selectors which leads to the fewest others, so
// that one which all aliases have (the cluster's name) does not lead to all of them.
func (g *graph) addAlias(e *identity.Entry) {
	if e.Selectors.Len() == 0 {
		return
	}
	best := slices.MinFunc(e.Selectors.All(), func(a, b attestor.Selector) int {
		return len(g.aliases[a]) - len(g.aliases[b])
	})
	g.aliases[best] = insert(g.aliases[best], e)
}

func (g *graph) removeAlias(e *identity.Entry) {
	for _, s := range e.Selectors.All() {
		list := g.aliases[s]
		if _, found := slices.BinarySearchFunc(list, e, byID); !found {
			continue
		}
		if list = remove(list, e); list == nil {
			delete(g.aliases, s)
		} else {
			g.aliases[s] = list
		}
	}
}

// stranger is the wake channel of everybody who follows a node that does not exist: rare enough to
// share one, so that asking after nodes cannot fill the memory.
type stranger struct {
	mu   sync.Mutex // guards wake among readers
	wake chan struct{}
}

func (s *stranger) follow() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wake == nil {
		s.wake = make(chan struct{})
	}
	return s.wake
}

func (s *stranger) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wake != nil {
		close(s.wake)
		s.wake = nil
	}
}
