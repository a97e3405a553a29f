package boltkv

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/assay-id/assay/server/store/kv"
)

// A watcher takes this much of the log at a time, so that neither a read transaction stays open
// while it works nor much memory is held for it.
const (
	watchChanges = 512
	watchBytes   = 1 << 20
)

// Range returns the items with start <= key < end.
func (s *Store) Range(ctx context.Context, start, end string, limit int) ([]kv.Item, kv.Rev, error) {
	var list []kv.Item
	var rev kv.Rev
	size := 0
	err := s.view(ctx, func(tx *bbolt.Tx, at kv.Rev) error {
		rev = at
		defer func() { s.touched(max(size, pageGuess)) }()
		stop := []byte(end)
		cursor := tx.Bucket(itemsBucket).Cursor()
		for k, v := cursor.Seek([]byte(start)); k != nil; k, v = cursor.Next() {
			if end != "" && bytes.Compare(k, stop) >= 0 {
				return nil
			}
			itemRev, value, err := decodeItem(k, v)
			if err != nil {
				return fmt.Errorf("%w: key %q: %w", ErrDamaged, k, err)
			}
			size += itemHeader + len(k) + len(value)
			list = append(list, kv.Item{Key: string(k), Value: bytes.Clone(value), Rev: itemRev})
			if len(list) == limit {
				return nil
			}
			if len(list)%1024 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	return list, rev, nil
}

// Watch calls fn for every commit after the given revision that touches the prefix. fn is called
// outside of any transaction and lock, so it may take its time and use the store.
func (s *Store) Watch(ctx context.Context, prefix string, after kv.Rev, fn func(kv.Change) error) error {
	for {
		s.mu.Lock()
		wake := s.wake
		s.mu.Unlock()
		changes, seen, more, err := s.readLog(ctx, []byte(prefix), after)
		if err != nil {
			return err
		}
		for _, c := range changes {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(c); err != nil {
				return err
			}
		}
		after = seen
		if more {
			continue
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// readLog returns the next changes after a revision that touch the prefix, the last revision it
// looked at, and whether there are more.
func (s *Store) readLog(ctx context.Context, prefix []byte, after kv.Rev) (changes []kv.Change, seen kv.Rev, more bool, err error) {
	seen = after
	err = s.view(ctx, func(tx *bbolt.Tx, at kv.Rev) error {
		if after < compacted(tx) || after > at {
			return kv.ErrCompacted
		}
		size := 0
		cursor := tx.Bucket(logBucket).Cursor()
		for k, v := cursor.Seek(logKey(after + 1)); k != nil; k, v = cursor.Next() {
			if len(changes) >= watchChanges || size >= watchBytes {
				more = true
				return nil
			}
			change := kv.Change{Rev: kv.Rev(binary.BigEndian.Uint64(k))}
			err := decodeLog(change.Rev, v, func(key, value []byte, del bool) {
				if !bytes.HasPrefix(key, prefix) {
					return
				}
				size += len(key) + len(value)
				change.Ops = append(change.Ops, kv.Op{Key: string(key), Value: bytes.Clone(value), Delete: del})
			})
			if err != nil {
				return fmt.Errorf("%w: log of revision %d: %w", ErrDamaged, change.Rev, err)
			}
			if len(change.Ops) > 0 {
				changes = append(changes, change)
			}
			seen = change.Rev
		}
		return nil
	})
	return changes, seen, more, err
}
