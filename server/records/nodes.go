package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/kv"
)

// Node returns the node with the ID, or ErrNotFound.
func (r *Records) Node(ctx context.Context, id spiffeid.ID) (*Node, error) {
	n, _, err := r.node(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("read node: %w", err)
	}
	return n, nil
}

func (r *Records) node(ctx context.Context, id spiffeid.ID) (*Node, kv.Item, error) {
	if !id.MemberOf(r.td) || id.Path() == "" {
		return nil, kv.Item{}, ErrNotFound
	}
	item, found, err := r.get(ctx, nodeKey(id))
	switch {
	case err != nil:
		return nil, kv.Item{}, err
	case !found:
		return nil, kv.Item{}, ErrNotFound
	}
	n, err := r.words.decodeNode(id, item.Value)
	if err != nil {
		return nil, kv.Item{}, damaged(item.Key, err)
	}
	return n, item, nil
}

// UpdateNode creates or changes one node: change is called with a copy (of an empty node, if none
// exists), perhaps several times, and its error is returned as it is. If nothing changes, nothing is
// written. It returns the node and the revision of the commit that last wrote it, or ErrConflict.
func (r *Records) UpdateNode(ctx context.Context, id spiffeid.ID, change func(n *Node, exists bool) error) (*Node, kv.Rev, error) {
	if !id.MemberOf(r.td) || id.Path() == "" {
		return nil, 0, fmt.Errorf("update node: %q is no agent of trust domain %q", id, r.td.Name())
	}
	var n *Node
	var rev kv.Rev
	err := r.retry(ctx, "node", func() error {
		var item kv.Item
		var err error
		n, item, err = r.node(ctx, id)
		exists := err == nil
		var had []string
		if errors.Is(err, ErrNotFound) {
			n = &Node{ID: id}
		} else if err != nil {
			return fmt.Errorf("update node: %w", err)
		} else {
			had = n.Clone().Parts
		}
		if err := change(n, exists); err != nil {
			return err
		}
		n.ID = id
		value, err := encodeNode(n)
		if err != nil {
			return err
		}
		if exists && bytes.Equal(value, item.Value) {
			rev = item.Rev
			return nil
		}
		// What is returned is what a reader of the store gets.
		if n, err = r.words.decodeNode(id, value); err != nil {
			return fmt.Errorf("update node: %w", err)
		}
		t := kv.Txn{
			If:  []kv.Cond{{Key: nodeKey(id), Rev: item.Rev}},
			Ops: []kv.Op{kv.Put(nodeKey(id), value)},
		}
		if err := r.moveParts(ctx, &t, id, had, n.Parts); err != nil {
			return fmt.Errorf("update node: %w", err)
		}
		rev, err = r.store.Commit(ctx, t)
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return n, rev, nil
}

// moveParts makes the index of a node's parts that of those it has now. Who owned a part when this looked must
// own it still at the commit.
func (r *Records) moveParts(ctx context.Context, t *kv.Txn, id spiffeid.ID, had, has []string) error {
	path := strings.TrimPrefix(id.Path(), "/")
	for _, part := range had {
		if slices.Contains(has, part) {
			continue
		}
		item, found, err := r.get(ctx, partKey(part))
		if err != nil {
			return err
		}
		if found && string(item.Value) == path {
			t.If = append(t.If, kv.Cond{Key: item.Key, Rev: item.Rev})
			t.Ops = append(t.Ops, kv.Del(item.Key))
		}
	}
	for _, part := range has {
		if slices.Contains(had, part) {
			continue
		}
		item, found, err := r.get(ctx, partKey(part))
		switch {
		case err != nil:
			return err
		case found && string(item.Value) != path:
			return fmt.Errorf("%w: %q proves %q", ErrTaken, part, string(item.Value))
		}
		t.If = append(t.If, kv.Cond{Key: partKey(part), Rev: item.Rev})
		t.Ops = append(t.Ops, kv.Put(partKey(part), []byte(path)))
	}
	return nil
}

// DeleteNode deletes a node, and with it the aliases that its join token was created with: they were
// given to this very node, and nobody else may come to them. It returns the revision of the commit,
// or ErrNotFound.
func (r *Records) DeleteNode(ctx context.Context, id spiffeid.ID) (kv.Rev, error) {
	return r.DeleteNodeIf(ctx, id, func(*Node) bool { return true })
}

// DeleteNodeIf is DeleteNode for a node that is, when it is deleted, as still says. For one that is not it
// returns ErrNotFound.
func (r *Records) DeleteNodeIf(ctx context.Context, id spiffeid.ID, still func(*Node) bool) (kv.Rev, error) {
	var rev kv.Rev
	err := r.retry(ctx, "node", func() error {
		n, item, err := r.node(ctx, id)
		if err == nil && !still(n) {
			err = ErrNotFound
		}
		if err != nil {
			return fmt.Errorf("delete node: %w", err)
		}
		own := &piece{txn: kv.Txn{
			If:  []kv.Cond{{Key: item.Key, Rev: item.Rev}},
			Ops: []kv.Op{kv.Del(item.Key)},
		}}
		if err := r.moveParts(ctx, &own.txn, id, n.Parts, nil); err != nil {
			return fmt.Errorf("delete node: %w", err)
		}
		var pieces []*piece
		if hash, ok := tokenOf(id); ok {
			if pieces, err = r.aliasDeletions(ctx, hash); err != nil {
				return fmt.Errorf("delete node: %w", err)
			}
		}
		// The usual node has one alias at most, and all is one transaction. Where an operator made
		// more than fit, the node goes last, so that a failure leaves something to delete.
		all := packs(append(pieces, own))
		for _, pack := range all {
			var t kv.Txn
			for _, p := range pack {
				t.If, t.Ops = append(t.If, p.txn.If...), append(t.Ops, p.txn.Ops...)
			}
			if rev, err = r.store.Commit(ctx, t); err != nil {
				return err
			}
		}
		return nil
	})
	return rev, err
}

// aliasDeletions returns what deletes the alias entries of a join token.
func (r *Records) aliasDeletions(ctx context.Context, tokenHash string) ([]*piece, error) {
	ids, err := r.aliases(ctx, tokenHash)
	if err != nil {
		return nil, err
	}
	var pieces []*piece
	for _, id := range ids {
		t, err := r.deletion(ctx, id, anyEntry)
		if errors.Is(err, ErrNotFound) { // deleted since
			continue
		}
		if err != nil {
			return nil, err
		}
		pieces = append(pieces, &piece{txn: t})
	}
	return pieces, nil
}

// aliases returns the IDs of the alias entries of a join token.
func (r *Records) aliases(ctx context.Context, tokenHash string) ([]string, error) {
	prefix := aliasPrefix(tokenHash)
	items, _, err := r.store.Range(ctx, prefix, kv.PrefixEnd(prefix), 0)
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(items))
	for i, it := range items {
		ids[i] = it.Key[len(prefix):]
	}
	return ids, nil
}
