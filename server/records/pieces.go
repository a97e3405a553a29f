package records

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/server/store/kv"
)

// piece is one item of a batch: what must hold for it and what it writes. Pieces are packed into as
// few transactions as the store's limits allow.
type piece struct {
	at    int // index in the caller's batch
	tries int
	txn   kv.Txn

	// What came of it. err is kv.ErrConflict if the condition of any piece in the same transaction
	// did not hold.
	rev kv.Rev
	err error
}

// maxParallel is how many transactions of one batch are under way at the same time. They share one
// write to the disk.
const maxParallel = 16

// commit writes the pieces, whose keys must all be different, and sets rev and err of each.
func (r *Records) commit(ctx context.Context, pieces []*piece) {
	var group errgroup.Group
	group.SetLimit(maxParallel)
	for _, pack := range packs(pieces) {
		group.Go(func() error {
			var t kv.Txn
			for _, p := range pack {
				t.If = append(t.If, p.txn.If...)
				t.Ops = append(t.Ops, p.txn.Ops...)
			}
			rev, err := r.store.Commit(ctx, t)
			for _, p := range pack {
				p.rev, p.err = rev, err
			}
			return nil
		})
	}
	_ = group.Wait() // none returns an error
}

// packs groups pieces. One that is too large on its own gets a pack of its own, and the store says so.
func packs(pieces []*piece) [][]*piece {
	var list [][]*piece
	var conds, ops, bytes int
	for i, p := range pieces {
		c, o, b := len(p.txn.If), len(p.txn.Ops), p.txn.Size()
		if i == 0 || conds+c > kv.MaxOps || ops+o > kv.MaxOps || bytes+b > kv.MaxTxnBytes {
			list = append(list, nil)
			conds, ops, bytes = 0, 0, 0
		}
		conds, ops, bytes = conds+c, ops+o, bytes+b
		list[len(list)-1] = append(list[len(list)-1], p)
	}
	return list
}

// settle sorts out what a round of commits left: it returns the pieces to try again, those with a
// conflict for which explain, which reads the store, has found no reason that would stay.
func settle(pieces []*piece, explain func(*piece) error) (again []*piece) {
	for _, p := range pieces {
		if !errors.Is(p.err, kv.ErrConflict) {
			continue
		}
		if p.err = explain(p); p.err != nil {
			continue
		}
		if p.tries++; p.tries >= maxTries {
			p.err = ErrConflict
			continue
		}
		again = append(again, p)
	}
	return again
}
