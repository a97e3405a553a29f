package records

import (
	"context"
	"errors"
	"fmt"

	"github.com/assay-id/assay/server/store/kv"
)

// Journal returns the authorities that server/ca wrote down, sorted by authority ID.
func (r *Records) Journal(ctx context.Context) ([]Journal, error) {
	items, _, err := r.store.Range(ctx, journalKeys, kv.PrefixEnd(journalKeys), 0)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	list := make([]Journal, len(items))
	for i, it := range items {
		if list[i], err = decodeJournal(it.Key[len(journalKeys):], it.Value); err != nil {
			return nil, fmt.Errorf("read journal: %w", damaged(it.Key, err))
		}
	}
	return list, nil
}

// PutJournal writes lines by their authority ID, and deletes others, all of it or nothing. Only the
// server's CA calls it. An ID in both lists is written.
func (r *Records) PutJournal(ctx context.Context, upserts []Journal, deletes []string) error {
	var t kv.Txn
	seen := make(map[string]struct{}, len(upserts)+len(deletes))
	for _, j := range upserts {
		if j.AuthorityID == "" {
			return errors.New("write journal: authority without ID")
		}
		value, err := encodeJournal(j)
		if err != nil {
			return fmt.Errorf("write journal: %w", err)
		}
		seen[j.AuthorityID] = struct{}{}
		t.Ops = append(t.Ops, kv.Put(journalKey(j.AuthorityID), value))
	}
	for _, id := range deletes {
		if _, written := seen[id]; written || id == "" {
			continue
		}
		seen[id] = struct{}{}
		t.Ops = append(t.Ops, kv.Del(journalKey(id)))
	}
	if len(t.Ops) == 0 {
		return nil
	}
	if _, err := r.store.Commit(ctx, t); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
}
