package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Bundle returns the bundle of a trust domain, or ErrNotFound.
func (r *Records) Bundle(ctx context.Context, td spiffeid.TrustDomain) (*identity.Bundle, error) {
	b, _, err := r.bundle(ctx, td)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	return b, nil
}

func (r *Records) bundle(ctx context.Context, td spiffeid.TrustDomain) (*identity.Bundle, kv.Item, error) {
	item, found, err := r.get(ctx, bundleKey(td))
	switch {
	case err != nil:
		return nil, kv.Item{}, err
	case !found:
		return nil, kv.Item{}, ErrNotFound
	}
	b, err := decodeBundle(td, item.Value)
	if err != nil {
		return nil, kv.Item{}, damaged(item.Key, err)
	}
	return b, item, nil
}

// UpdateBundle creates or changes the bundle of a trust domain: change is called with a copy (of an
// empty bundle, if none exists), perhaps several times, and its error is returned as it is. Sequence
// is kept here: it grows by one with each change, and if nothing changes, nothing is written. It
// returns the bundle and the revision of the commit that last wrote it, or ErrConflict.
//
// The own bundle begins with 1. Another one begins with the store's next revision, so that a bundle
// that was deleted and made again has no sequence number that readers have seen before.
func (r *Records) UpdateBundle(ctx context.Context, td spiffeid.TrustDomain, change func(*identity.Bundle) error) (*identity.Bundle, kv.Rev, error) {
	if td.IsZero() {
		return nil, 0, errors.New("update bundle: missing trust domain")
	}
	var b *identity.Bundle
	var rev kv.Rev
	err := r.retry(ctx, "bundle", func() error {
		at, err := r.store.Rev(ctx)
		if err != nil {
			return fmt.Errorf("update bundle: %w", err)
		}
		var item kv.Item
		b, item, err = r.bundle(ctx, td)
		exists := err == nil
		if errors.Is(err, ErrNotFound) {
			b = &identity.Bundle{}
			if td != r.td {
				b.Sequence = uint64(at)
			}
		} else if err != nil {
			return fmt.Errorf("update bundle: %w", err)
		}
		sequence := b.Sequence
		b = b.Clone()
		if err := change(b); err != nil {
			return err
		}
		b.TrustDomain, b.Sequence = td, sequence
		value, err := encodeBundle(b)
		if err != nil {
			return fmt.Errorf("update bundle: %w", err)
		}
		if exists && bytes.Equal(value, item.Value) {
			rev = item.Rev
			return nil
		}
		b.Sequence = sequence + 1
		if value, err = encodeBundle(b); err != nil {
			return fmt.Errorf("update bundle: %w", err)
		}
		rev, err = r.store.Commit(ctx, kv.Txn{
			If:  []kv.Cond{{Key: bundleKey(td), Rev: item.Rev}},
			Ops: []kv.Op{kv.Put(bundleKey(td), value)},
		})
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return b, rev, nil
}

// DeleteBundle deletes the bundle of another trust domain. Entries that federate with it stay and
// get it no more. It returns the revision of the commit, or ErrNotFound.
func (r *Records) DeleteBundle(ctx context.Context, td spiffeid.TrustDomain) (kv.Rev, error) {
	if td == r.td {
		return 0, errors.New("delete bundle: it is the server's own")
	}
	var rev kv.Rev
	err := r.retry(ctx, "bundle", func() error {
		item, found, err := r.get(ctx, bundleKey(td))
		if err == nil && !found {
			err = ErrNotFound
		}
		if err != nil {
			return fmt.Errorf("delete bundle: %w", err)
		}
		rev, err = r.store.Commit(ctx, kv.Txn{
			If:  []kv.Cond{{Key: item.Key, Rev: item.Rev}},
			Ops: []kv.Op{kv.Del(item.Key)},
		})
		return err
	})
	return rev, err
}
