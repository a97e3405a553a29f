package workloadapi

import (
	"sync"

	"github.com/assay-id/assay/attestor"
)

// proved is what certain facts come to. It is immutable, and shared by all connections of which the same
// is proved: the workers of one service have hundreds.
type proved struct {
	facts  attestor.Set
	key    string   // facts.Key()
	digest string   // stands for facts in audit lines
	types  []string // selector types, for audit lines
	shown  []string // selectors that audit lines may show
}

// maxShared bounds how many sets of facts are known by key; each connection keeps what it has itself.
const maxShared = 1024

// shelf keeps sets that were proved lately, so that equal ones are one in memory.
type shelf struct {
	mu  sync.Mutex // guards the map
	all map[string]*proved
}

// take returns what the facts come to, as it was for others if it can. make is called if not.
func (h *shelf) take(facts attestor.Set, make func(facts attestor.Set, key string) *proved) *proved {
	key := facts.Key()
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.all[key]; p != nil {
		return p
	}
	p := make(facts, key)
	if len(h.all) >= maxShared {
		clear(h.all) // those in use stay with those that use them
	}
	if h.all == nil {
		h.all = map[string]*proved{}
	}
	h.all[key] = p
	return p
}

// prove returns what facts come to.
func (s *Server) prove(facts attestor.Set) *proved {
	return s.shelf.take(facts, func(facts attestor.Set, key string) *proved {
		p := &proved{facts: facts, key: key, digest: digest(key)}
		for _, sel := range facts.All() { // in order of types
			if n := len(p.types); n == 0 || p.types[n-1] != sel.Type {
				p.types = append(p.types, sel.Type)
			}
			if s.logged[sel.Type] {
				p.shown = append(p.shown, sel.String())
			}
		}
		return p
	})
}
