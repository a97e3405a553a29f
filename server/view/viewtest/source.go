// Package viewtest has a source of records in memory for the tests of server/view and of what stands
// on it. Unlike a real store it can forget its log, change its identity and go on at will.
package viewtest

import (
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Source is a view.Source. It is safe for concurrent use.
type Source struct {
	mu        sync.Mutex
	id        string
	rev       kv.Rev
	compacted kv.Rev
	entries   map[string]*identity.Entry
	nodes     map[spiffeid.ID]*records.Node
	bundles   map[spiffeid.TrustDomain]*identity.Bundle
	verdicts  map[string]*records.Verdict
	log       []records.Change // those after compacted
	wake      chan struct{}    // closed and replaced by each commit, compaction and change of identity
}

// New returns an empty source whose store has the given ID.
func New(storeID string) *Source {
	return &Source{
		id:      storeID,
		entries: map[string]*identity.Entry{},
		nodes:   map[spiffeid.ID]*records.Node{},
		bundles: map[spiffeid.TrustDomain]*identity.Bundle{}, verdicts: map[string]*records.Verdict{},
		wake: make(chan struct{}),
	}
}

// Commit applies a change as the next revision, which it returns. The change's own Rev is ignored.
func (s *Source) Commit(c records.Change) kv.Rev {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rev++
	c.Rev = s.rev
	for _, e := range c.Entries {
		put(s.entries, e.ID, e.Entry)
	}
	for _, n := range c.Nodes {
		put(s.nodes, n.ID, n.Node)
	}
	for _, b := range c.Bundles {
		put(s.bundles, b.TrustDomain, b.Bundle)
	}
	for _, v := range c.Verdicts {
		put(s.verdicts, v.Digest, v.Verdict)
	}
	s.log = append(s.log, c)
	s.wakeAll()
	return s.rev
}

func put[K comparable, V any](m map[K]*V, key K, value *V) {
	if value == nil {
		delete(m, key)
		return
	}
	m[key] = value
}

// PutEntries creates or replaces entries in one commit.
func (s *Source) PutEntries(entries ...*identity.Entry) kv.Rev {
	var c records.Change
	for _, e := range entries {
		c.Entries = append(c.Entries, records.EntryChange{ID: e.ID, Entry: e})
	}
	return s.Commit(c)
}

// DeleteEntries deletes entries in one commit.
func (s *Source) DeleteEntries(ids ...string) kv.Rev {
	var c records.Change
	for _, id := range ids {
		c.Entries = append(c.Entries, records.EntryChange{ID: id})
	}
	return s.Commit(c)
}

// PutNodes creates or replaces nodes in one commit.
func (s *Source) PutNodes(nodes ...*records.Node) kv.Rev {
	var c records.Change
	for _, n := range nodes {
		c.Nodes = append(c.Nodes, records.NodeChange{ID: n.ID, Node: n})
	}
	return s.Commit(c)
}

// DeleteNode deletes a node.
func (s *Source) DeleteNode(id spiffeid.ID) kv.Rev {
	return s.Commit(records.Change{Nodes: []records.NodeChange{{ID: id}}})
}

// PutBundles creates or replaces bundles in one commit.
func (s *Source) PutBundles(bundles ...*identity.Bundle) kv.Rev {
	var c records.Change
	for _, b := range bundles {
		c.Bundles = append(c.Bundles, records.BundleChange{TrustDomain: b.TrustDomain, Bundle: b})
	}
	return s.Commit(c)
}

// PutVerdicts creates or replaces verdicts in one commit.
func (s *Source) PutVerdicts(verdicts ...*records.Verdict) kv.Rev {
	var c records.Change
	for _, v := range verdicts {
		c.Verdicts = append(c.Verdicts, records.VerdictChange{Digest: v.Digest, Verdict: v})
	}
	return s.Commit(c)
}

// DeleteVerdict deletes a verdict.
func (s *Source) DeleteVerdict(digest string) kv.Rev {
	return s.Commit(records.Change{Verdicts: []records.VerdictChange{{Digest: digest}}})
}

// Skip does commits that nobody is told of, because the log of them is gone at once: a follower gets
// kv.ErrCompacted and has to take a snapshot.
func (s *Source) Skip(changes ...records.Change) {
	for _, c := range changes {
		s.Commit(c)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = nil
	s.compacted = s.rev + 1 // also those that have seen everything must notice
	s.rev++
	s.wakeAll()
}

// Restore gives the store another identity and revision, as if a backup had been put in its place.
func (s *Source) Restore(storeID string, rev kv.Rev) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.id, s.rev, s.compacted, s.log = storeID, rev, rev, nil
	s.wakeAll()
}

func (s *Source) wakeAll() {
	close(s.wake)
	s.wake = make(chan struct{})
}

// StoreID returns the ID of the store.
func (s *Source) StoreID() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id
}

// Snapshot returns all that is there.
func (s *Source) Snapshot(context.Context) (*records.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &records.Snapshot{
		Rev:      s.rev,
		Entries:  slices.Collect(maps.Values(s.entries)),
		Nodes:    slices.Collect(maps.Values(s.nodes)),
		Bundles:  slices.Collect(maps.Values(s.bundles)),
		Verdicts: slices.Collect(maps.Values(s.verdicts)),
	}, nil
}

// Follow calls fn for every commit after the given revision, until ctx ends.
func (s *Source) Follow(ctx context.Context, after kv.Rev, fn func(records.Change) error) error {
	id := s.StoreID()
	for {
		s.mu.Lock()
		if s.id != id || after < s.compacted || after > s.rev {
			s.mu.Unlock()
			return kv.ErrCompacted
		}
		at, _ := slices.BinarySearchFunc(s.log, after+1, func(c records.Change, rev kv.Rev) int {
			return int(c.Rev) - int(rev) //nolint:gosec // tests do not count that far
		})
		news, wake := slices.Clone(s.log[at:]), s.wake
		s.mu.Unlock()
		for _, c := range news {
			if err := fn(c); err != nil {
				return err
			}
			after = c.Rev
		}
		if len(news) > 0 {
			continue
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
