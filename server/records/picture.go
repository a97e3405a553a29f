package records

import (
	"context"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Snapshot returns all entries, nodes, bundles and verdicts as of one revision. Follow goes on from there.
func (r *Records) Snapshot(ctx context.Context) (*Snapshot, error) {
	items, rev, err := r.store.Range(ctx, picture, kv.PrefixEnd(picture), 0)
	if err != nil {
		return nil, fmt.Errorf("read picture: %w", err)
	}
	s := &Snapshot{Rev: rev}
	for i, it := range items {
		items[i] = kv.Item{} // what is read is garbage at once, not at the end
		kind, err := r.part(it.Key, it.Value, false)
		if err != nil {
			return nil, fmt.Errorf("read picture: %w", err)
		}
		switch v := kind.(type) {
		case EntryChange:
			s.Entries = append(s.Entries, v.Entry)
		case NodeChange:
			s.Nodes = append(s.Nodes, v.Node)
		case BundleChange:
			s.Bundles = append(s.Bundles, v.Bundle)
		case VerdictChange:
			s.Verdicts = append(s.Verdicts, v.Verdict)
		}
	}
	return s, nil
}

// Follow calls fn for every commit after the given revision that changes an entry, node, bundle
// or verdict, in order, once each, until ctx ends or fn returns an error, which it returns. It returns
// kv.ErrCompacted if it cannot go on from that revision: then the reader needs a new Snapshot.
func (r *Records) Follow(ctx context.Context, after kv.Rev, fn func(Change) error) error {
	return r.store.Watch(ctx, picture, after, func(c kv.Change) error {
		change := Change{Rev: c.Rev}
		for _, o := range c.Ops {
			kind, err := r.part(o.Key, o.Value, o.Delete)
			if err != nil {
				return fmt.Errorf("follow picture: %w", err)
			}
			switch v := kind.(type) {
			case EntryChange:
				change.Entries = append(change.Entries, v)
			case NodeChange:
				change.Nodes = append(change.Nodes, v)
			case BundleChange:
				change.Bundles = append(change.Bundles, v)
			case VerdictChange:
				change.Verdicts = append(change.Verdicts, v)
			}
		}
		return fn(change)
	})
}

// part reads one key of the picture: an EntryChange, NodeChange, BundleChange or VerdictChange. A
// kind of record that a later version added is nil: it is none of this version's business.
func (r *Records) part(key string, value []byte, deleted bool) (any, error) {
	var err error
	switch {
	case strings.HasPrefix(key, entryPrefix):
		c := EntryChange{ID: key[len(entryPrefix):]}
		if !deleted {
			c.Entry, err = r.decodeEntry(c.ID, value)
		}
		return c, wrapDamage(key, err)
	case strings.HasPrefix(key, nodePrefix):
		var c NodeChange
		c.ID, err = spiffeid.FromPath(r.td, "/"+key[len(nodePrefix):])
		if err == nil && !deleted {
			c.Node, err = r.words.decodeNode(c.ID, value)
		}
		return c, wrapDamage(key, err)
	case strings.HasPrefix(key, bundlePrefix):
		var c BundleChange
		c.TrustDomain, err = spiffeid.TrustDomainFromString(key[len(bundlePrefix):])
		if err == nil && !deleted {
			c.Bundle, err = decodeBundle(c.TrustDomain, value)
		}
		return c, wrapDamage(key, err)
	case strings.HasPrefix(key, verdictKeys):
		c := VerdictChange{Digest: strings.Clone(key[len(verdictKeys):])}
		err = checkDigest(c.Digest)
		if err == nil && !deleted {
			c.Verdict, err = r.words.decodeVerdict(c.Digest, value)
		}
		return c, wrapDamage(key, err)
	}
	return nil, nil
}

func (r *Records) decodeEntry(id string, value []byte) (*identity.Entry, error) {
	return r.words.decodeEntry(strings.Clone(id), value) // the key is longer than the ID
}

func wrapDamage(key string, err error) error {
	if err != nil {
		return damaged(key, err)
	}
	return nil
}
