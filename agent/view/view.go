// Package view is the agent's picture of what its node may have: entries and bundles at a revision
// of the server, and the verdicts on the images that run at the node.
//
// A picture is immutable. Apply builds the next one from the present one and a change, and
// publishes it by swapping a pointer and closing a channel: readers never wait for the writer, nor
// the writer for them, and a reader that is slow sees only the newest picture.
//
// Why it is so: a workload that connects costs one match, and a change on the server makes every
// open stream match again, so matching must not look at all entries. Each entry is filed under its
// rarest selector; a set of facts looks only at the entries filed under the facts it has.
package view

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// ErrDrift says that applying an update did not lead to the picture the server meant. The picture
// in force stays; the caller asks for a full one.
var ErrDrift = errors.New("picture differs from the server's")

// Update is one change of the picture, whole. Its values are not changed once handed over.
type Update struct {
	// StoreID names the store that Rev belongs to; empty with a SPIRE server, which has none.
	StoreID string
	// Rev is the server's revision that the picture has once the update is applied.
	Rev uint64
	// Full says that all that was held before is forgotten.
	Full bool

	// Entries, Bundles and Verdicts are new or changed; the removed ones are entry IDs, trust domains and image
	// digests.
	Entries         []*identity.Entry
	RemovedEntries  []string
	Bundles         []*identity.Bundle
	RemovedBundles  []spiffeid.TrustDomain
	Verdicts        []*identity.Verdict
	RemovedVerdicts []string

	// Checksum is what identity.Checksum, or with verdicts identity.ChecksumVerdicts, must give for the
	// new picture; empty: not checked.
	Checksum []byte
	// MadeAt is when the server made the picture; zero: unknown.
	MadeAt time.Time
}

// Picture is what the node may have at a revision. It is immutable and safe for concurrent use.
type Picture struct {
	// StoreID and Rev are those of the last Update.
	StoreID string
	Rev     uint64
	// Bundles by trust domain, the own one and those the entries federate with.
	Bundles map[spiffeid.TrustDomain]*identity.Bundle
	// Verdicts by digest, those included that have ended to count.
	Verdicts map[string]*identity.Verdict

	// asOf is the time by which verdicts count as ended, and lapsed says that none counts.
	asOf   time.Time
	lapsed bool

	entries map[string]*identity.Entry
	sorted  []*identity.Entry // by ID
	index   map[attestor.Selector][]*identity.Entry
	filed   map[string]attestor.Selector // entry ID: where index has it
	count   map[attestor.Selector]int    // how many entries name the selector
	held    bool
	serial  uint64
}

// Serial is another number when what is held is another, and only then: the revision also moves when
// a commit that is nothing to this node is heard of. It means nothing outside this process.
func (p *Picture) Serial() uint64 { return p.serial }

// Held reports whether there ever was a picture; false only before the first Apply.
func (p *Picture) Held() bool { return p.held }

// Entry returns the entry with the ID.
func (p *Picture) Entry(id string) (*identity.Entry, bool) {
	e, ok := p.entries[id]
	return e, ok
}

// Entries returns all entries ordered by ID. The caller must not change the slice.
func (p *Picture) Entries() []*identity.Entry { return p.sorted }

// BundleList returns the bundles ordered by trust domain.
func (p *Picture) BundleList() []*identity.Bundle {
	return slices.SortedFunc(maps.Values(p.Bundles), func(a, b *identity.Bundle) int {
		return a.TrustDomain.Compare(b.TrustDomain)
	})
}

// Match returns the entries whose selectors are all in what Facts makes of facts, ordered by
// identity.Older. Entries without selectors match nobody.
func (p *Picture) Match(facts attestor.Set) []*identity.Entry {
	facts = p.Facts(facts)
	var found []*identity.Entry
	for _, fact := range facts.All() {
		for _, e := range p.index[fact] {
			if e.Selectors.In(facts) {
				found = append(found, e)
			}
		}
	}
	slices.SortFunc(found, identity.Older)
	return found
}

// Near is an entry that facts do not match, and why.
type Near struct {
	Entry   *identity.Entry
	Missing []attestor.Selector // in order; at least one
}

// Nearest returns at most n entries that what Facts makes of facts does not match, those with the fewest
// missing selectors first, among them those with the most selectors present. It looks at every entry: it is
// for people who ask why, not for serving.
func (p *Picture) Nearest(facts attestor.Set, n int) []Near {
	facts = p.Facts(facts)
	var near []Near
	for _, e := range p.sorted {
		if missing := e.Selectors.Missing(facts); len(missing) > 0 {
			near = append(near, Near{Entry: e, Missing: missing})
		}
	}
	present := func(x Near) int { return x.Entry.Selectors.Len() - len(x.Missing) }
	slices.SortStableFunc(near, func(a, b Near) int {
		if d := len(a.Missing) - len(b.Missing); d != 0 {
			return d
		}
		return present(b) - present(a)
	})
	return near[:min(n, len(near))]
}

// View holds the picture in force. Use New.
type View struct {
	now   func() time.Time
	state atomic.Pointer[state]
	mu    sync.Mutex // serializes what replaces the state
}

type state struct {
	picture *Picture
	next    chan struct{} // closed when the state is replaced
}

// New returns a view with an empty picture at revision 0. The clock says when verdicts end to count; nil is
// time.Now.
func New(now func() time.Time) *View {
	if now == nil {
		now = time.Now
	}
	v := &View{now: now}
	v.state.Store(&state{picture: empty(), next: make(chan struct{})})
	return v
}

func empty() *Picture {
	return &Picture{
		Bundles:  map[spiffeid.TrustDomain]*identity.Bundle{},
		Verdicts: map[string]*identity.Verdict{},
		entries:  map[string]*identity.Entry{},
		index:    map[attestor.Selector][]*identity.Entry{},
		filed:    map[string]attestor.Selector{},
		count:    map[attestor.Selector]int{},
	}
}

// Picture returns the picture in force.
func (v *View) Picture() *Picture { return v.state.Load().picture }

// Follow returns the picture in force and a channel that is closed when it is replaced.
func (v *View) Follow() (*Picture, <-chan struct{}) {
	s := v.state.Load()
	return s.picture, s.next
}

// Entries returns all entries of the picture in force, ordered by ID.
func (v *View) Entries() []*identity.Entry { return v.Picture().Entries() }

// Rev returns the server's revision of the picture in force.
func (v *View) Rev() uint64 { return v.Picture().Rev }

// Wait returns when there is a picture to serve from, or with ctx's error.
func (v *View) Wait(ctx context.Context) error {
	for {
		p, next := v.Follow()
		if p.Held() {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Apply makes the update part of the picture and publishes it, or returns an error wrapping ErrDrift
// and leaves the picture as it was. An update that changes nothing of what is held moves the
// revision without waking anybody, because nothing that a workload sees has changed.
func (v *View) Apply(u Update) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	next, changed, err := v.state.Load().picture.apply(u)
	if err != nil {
		return err
	}
	if changed { // otherwise verdicts might end unheard
		next.asOf = v.now()
	}
	v.publish(next, changed)
	return nil
}

// publish puts a picture in force, and wakes those who follow if it is another one to them. mu is held.
func (v *View) publish(next *Picture, changed bool) {
	now := v.state.Load()
	if !changed {
		v.state.Store(&state{picture: next, next: now.next})
		return
	}
	v.state.Store(&state{picture: next, next: make(chan struct{})})
	close(now.next)
}

func (p *Picture) apply(u Update) (next *Picture, changed bool, err error) {
	if u.Full {
		next = full(u)
	} else {
		if u.StoreID != p.StoreID {
			return nil, false, fmt.Errorf("apply revision %d: store %q is not the held %q: %w", u.Rev, u.StoreID, p.StoreID, ErrDrift)
		}
		next = p.delta(u)
	}
	next.StoreID, next.Rev, next.held, next.lapsed = u.StoreID, u.Rev, true, p.lapsed
	if len(u.Checksum) > 0 && !bytes.Equal(u.Checksum, next.checksum()) {
		return nil, false, fmt.Errorf("apply revision %d: checksum over %d entries, %d bundles and %d verdicts: %w",
			u.Rev, len(next.sorted), len(next.Bundles), len(next.Verdicts), ErrDrift)
	}
	if u.Full {
		changed = !p.same(next)
	} else {
		changed = len(u.Entries)+len(u.RemovedEntries)+len(u.Bundles)+len(u.RemovedBundles)+
			len(u.Verdicts)+len(u.RemovedVerdicts) > 0
	}
	if !changed {
		same := *p
		same.StoreID, same.Rev = u.StoreID, u.Rev
		return &same, false, nil
	}
	next.serial = p.serial + 1
	return next, true, nil
}

// full builds a picture from nothing else than the update.
func full(u Update) *Picture {
	p := empty()
	for _, b := range u.Bundles {
		p.Bundles[b.TrustDomain] = b
	}
	for _, verdict := range u.Verdicts {
		p.Verdicts[verdict.Digest] = verdict
	}
	for _, e := range u.Entries {
		p.entries[e.ID] = e
	}
	for _, e := range p.entries {
		for _, s := range e.Selectors.All() {
			p.count[s]++
		}
	}
	p.sorted = slices.SortedFunc(maps.Values(p.entries), byID)
	for _, e := range p.sorted {
		if where, ok := p.rarest(e); ok { // nobody else has these slices yet: they may grow in place
			p.index[where] = append(p.index[where], e)
			p.filed[e.ID] = where
		}
	}
	return p
}

// delta builds the next picture; buckets that change are copied, all others shared.
func (p *Picture) delta(u Update) *Picture {
	next := &Picture{
		Bundles: p.Bundles, Verdicts: p.Verdicts,
		entries: p.entries, sorted: p.sorted, index: p.index, filed: p.filed, count: p.count,
	}
	if len(u.Verdicts)+len(u.RemovedVerdicts) > 0 {
		next.Verdicts = maps.Clone(p.Verdicts)
		for _, digest := range u.RemovedVerdicts {
			delete(next.Verdicts, digest)
		}
		for _, verdict := range u.Verdicts {
			next.Verdicts[verdict.Digest] = verdict
		}
	}
	if len(u.Bundles)+len(u.RemovedBundles) > 0 {
		next.Bundles = maps.Clone(p.Bundles)
		for _, td := range u.RemovedBundles {
			delete(next.Bundles, td)
		}
		for _, b := range u.Bundles {
			next.Bundles[b.TrustDomain] = b
		}
	}
	if len(u.Entries)+len(u.RemovedEntries) == 0 {
		return next
	}
	next.entries = maps.Clone(p.entries)
	next.index = maps.Clone(p.index)
	next.filed = maps.Clone(p.filed)
	next.count = maps.Clone(p.count)
	gone := make(map[string]bool, len(u.RemovedEntries)+len(u.Entries))
	for _, id := range u.RemovedEntries {
		gone[id] = true
		next.drop(id)
	}
	for _, e := range u.Entries {
		gone[e.ID] = true
		next.drop(e.ID)
		next.entries[e.ID] = e
		for _, s := range e.Selectors.All() {
			next.count[s]++
		}
		next.file(e)
	}
	// What stays is in order already, which makes the sort one pass over it.
	next.sorted = make([]*identity.Entry, 0, len(next.entries))
	for _, e := range p.sorted {
		if !gone[e.ID] {
			next.sorted = append(next.sorted, e)
		}
	}
	for id := range gone {
		if e, ok := next.entries[id]; ok {
			next.sorted = append(next.sorted, e)
		}
	}
	slices.SortFunc(next.sorted, byID)
	return next
}

func byID(a, b *identity.Entry) int { return strings.Compare(a.ID, b.ID) }

// file puts the entry into the index. The slice it adds to may be shared with an older picture, so
// it is replaced and never grown in place.
func (p *Picture) file(e *identity.Entry) {
	if where, ok := p.rarest(e); ok {
		p.index[where] = append(slices.Clip(p.index[where]), e)
		p.filed[e.ID] = where
	}
}

// rarest returns the selector of the entry that fewest entries name.
func (p *Picture) rarest(e *identity.Entry) (rarest attestor.Selector, ok bool) {
	for i, s := range e.Selectors.All() {
		if i == 0 || p.count[s] < p.count[rarest] {
			rarest, ok = s, true
		}
	}
	return rarest, ok
}

func (p *Picture) drop(id string) {
	old, ok := p.entries[id]
	if !ok {
		return
	}
	delete(p.entries, id)
	for _, s := range old.Selectors.All() {
		if p.count[s]--; p.count[s] == 0 {
			delete(p.count, s)
		}
	}
	where, ok := p.filed[id]
	if !ok {
		return
	}
	delete(p.filed, id)
	rest := slices.DeleteFunc(slices.Clone(p.index[where]), func(e *identity.Entry) bool { return e.ID == id })
	if len(rest) == 0 {
		delete(p.index, where)
		return
	}
	p.index[where] = rest
}

// same reports whether both pictures hold the same things, which a full picture after a reconnection
// usually does.
func (p *Picture) same(o *Picture) bool {
	if p.held != o.held || len(p.sorted) != len(o.sorted) {
		return false
	}
	for i, e := range p.sorted {
		n := o.sorted[i]
		if e.ID != n.ID || e.Revision != n.Revision || !e.CreatedAt.Equal(n.CreatedAt) {
			return false
		}
	}
	if !maps.EqualFunc(p.Verdicts, o.Verdicts, func(a, b *identity.Verdict) bool { return a.Seq == b.Seq }) {
		return false
	}
	return maps.EqualFunc(p.Bundles, o.Bundles, func(a, b *identity.Bundle) bool {
		return a.Sequence == b.Sequence && a.RefreshHint == b.RefreshHint &&
			slices.EqualFunc(a.X509, b.X509, func(x, y identity.X509Authority) bool {
				return x.Tainted == y.Tainted && x.Certificate.Equal(y.Certificate)
			}) &&
			slices.EqualFunc(a.JWT, b.JWT, sameKey) && slices.EqualFunc(a.WIT, b.WIT, sameKey)
	})
}

func sameKey(x, y identity.JWTAuthority) bool { return x.Tainted == y.Tainted && x.KeyID == y.KeyID }
