package records

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/assay-id/assay/server/store/kv"
)

const (
	sweepEvery = time.Minute
	sweepPage  = 500 // expiry keys looked at in one go
	// A clock that goes this much further than time has passed was set, or the machine slept. Deleting
	// cannot be undone, so there is this long to set a clock right that was set wrong; nobody gets what
	// has expired meanwhile.
	jumpAhead  = 2 * time.Minute
	sweepAfter = 15 * time.Minute
)

// jumps notices a wall clock that is set. Its zero value has seen nothing yet.
type jumps struct {
	wall  time.Time // when it last looked
	timer time.Time // the same moment, with a monotonic reading
	until time.Time // monotonic; the hold after a jump ahead
}

// hold reports whether the clock was set ahead lately and not back since. by is how far it jumped
// since the last look, 0 if it did not.
func (j *jumps) hold(wall time.Time) (held bool, by time.Duration) {
	wall = wall.Round(0) // without its monotonic reading
	timer := time.Now()
	if !j.wall.IsZero() {
		by = wall.Sub(j.wall) - timer.Sub(j.timer)
	}
	j.wall, j.timer = wall, timer
	switch {
	case by >= jumpAhead:
		j.until = timer.Add(sweepAfter)
	case by <= -jumpAhead:
		j.until = time.Time{}
	default:
		by = 0
	}
	return timer.Before(j.until), by
}

// Run sweeps, and compacts the store's log, every minute until ctx ends. What goes wrong is logged
// and tried again the next time.
func (r *Records) Run(ctx context.Context) error {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	var marks []mark
	var clock jumps
	for {
		now := r.cfg.Now()
		held, by := clock.hold(now)
		if by != 0 {
			r.cfg.Log.WithField("by", by.Round(time.Second).String()).
				Warn("the clock was set, or the machine slept; after a jump ahead nothing that has expired is deleted for a while")
		}
		if !held {
			if err := r.Sweep(ctx, now); err != nil && ctx.Err() == nil {
				r.cfg.Log.WithError(err).Warn("cannot delete what has expired, will try again")
			}
		}
		var err error
		if marks, err = r.compact(ctx, marks, now); err != nil && ctx.Err() == nil {
			r.cfg.Log.WithError(err).Warn("cannot compact the store, will try again")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// mark says which revision the store had at some time.
type mark struct {
	at  time.Time
	rev kv.Rev
}

// compact forgets commits that are too old or too many, and returns the marks for the next time. The
// store knows no times, so they are noted here; commits from before a restart count as made at it.
func (r *Records) compact(ctx context.Context, marks []mark, now time.Time) ([]mark, error) {
	rev, err := r.store.Rev(ctx)
	if err != nil {
		return marks, err
	}
	marks = append(marks, mark{at: now, rev: rev})
	var upTo kv.Rev
	if keep := kv.Rev(r.cfg.KeepRevisions); rev > keep { //nolint:gosec // not negative
		upTo = rev - keep
	}
	old := 0
	for old < len(marks) && now.Sub(marks[old].at) >= r.cfg.KeepFor {
		upTo = max(upTo, marks[old].rev)
		old++
	}
	if upTo == 0 {
		return marks, nil
	}
	if err := r.store.Compact(ctx, upTo); err != nil {
		return marks, err
	}
	return slices.Delete(marks, 0, old), nil
}

// Sweep deletes the entries and join tokens whose time is over at now. What somebody changes at the
// same moment is left for the next sweep.
func (r *Records) Sweep(ctx context.Context, now time.Time) error {
	start, end := expiryPrefix, expiryBefore(now.Unix()+1)
	for {
		items, _, err := r.store.Range(ctx, start, end, sweepPage)
		if err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		if err := r.sweep(ctx, items); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		if len(items) < sweepPage {
			return nil
		}
		start = items[len(items)-1].Key + "\x00"
	}
}

// sweep deals with some expiry keys.
func (r *Records) sweep(ctx context.Context, items []kv.Item) error {
	var pieces []*piece
	kinds := make([]string, len(items))
	for i, it := range items {
		at, kind, id, err := parseExpiryKey(it.Key)
		if err != nil {
			return err
		}
		p := &piece{at: i}
		switch kind {
		case kindEntry:
			p.txn, err = r.expiredEntry(ctx, it.Key, id, at)
		case kindToken:
			p.txn, err = r.expiredToken(ctx, it.Key, id, at)
		default: // of a later version
			continue
		}
		if err != nil {
			return err
		}
		kinds[i] = kind
		pieces = append(pieces, p)
	}
	// An alias that expires itself is in two pieces, and waits for the next sweep.
	pieces, _ = distinct(pieces)
	r.commit(ctx, pieces)
	for try := 0; ; try++ {
		var again []*piece
		for _, p := range pieces {
			switch {
			case p.err == nil:
				r.swept.WithLabelValues(kinds[p.at]).Inc()
			case !errors.Is(p.err, kv.ErrConflict):
				return p.err
			case try == 0: // perhaps because of a neighbor in the transaction
				again = append(again, p)
			}
		}
		if len(again) == 0 {
			return nil
		}
		for _, p := range again {
			r.commit(ctx, []*piece{p})
		}
		pieces = again
	}
}

// expiredEntry returns what deletes an entry that was to expire at a Unix time, or only the expiry
// key if that was changed.
func (r *Records) expiredEntry(ctx context.Context, key, id string, at int64) (kv.Txn, error) {
	// Unless it is created, or changed back, at this moment.
	stale := func(rev kv.Rev) kv.Txn {
		return kv.Txn{If: []kv.Cond{{Key: entryKey(id), Rev: rev}}, Ops: []kv.Op{kv.Del(key)}}
	}
	e, rev, err := r.entry(ctx, id)
	switch {
	case errors.Is(err, ErrNotFound):
		return stale(0), nil
	case err != nil:
		return kv.Txn{}, err
	case unix(e.ExpiresAt) != at:
		return stale(rev), nil
	}
	return deletionOf(e, rev), nil // the expiry key is one of its index keys
}

// maxAliases is how many aliases of one token are deleted in one transaction.
const maxAliases = 20

// expiredToken returns what deletes a join token that nobody used by a Unix time, and the aliases that were made
// with it if no node came to be; or only the expiry key, if that is of a token of the same name before this one.
func (r *Records) expiredToken(ctx context.Context, key, hash string, at int64) (kv.Txn, error) {
	item, found, err := r.get(ctx, tokenKey(hash))
	if err != nil {
		return kv.Txn{}, err
	}
	t := kv.Txn{If: []kv.Cond{{Key: tokenKey(hash), Rev: item.Rev}}} // 0: nor must it come to be in between
	if found {
		expires, err := decodeToken(item.Value)
		if err != nil {
			return kv.Txn{}, damaged("token", err)
		}
		if unix(expires.Add(tokenGrace)) != at {
			t.Ops = []kv.Op{kv.Del(key)}
			return t, nil
		}
		t.Ops = []kv.Op{kv.Del(item.Key)}
	}
	token := kv.Txn{If: slices.Clip(t.If), Ops: append(slices.Clip(t.Ops), kv.Del(key))}
	ids, err := r.aliases(ctx, hash)
	if err != nil {
		return kv.Txn{}, err
	}
	if len(ids) <= maxAliases {
		t.Ops = append(t.Ops, kv.Del(key))
	} else { // the rest with the next sweep
		ids = ids[:maxAliases]
	}
	for _, id := range ids {
		e, rev, err := r.entry(ctx, id)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return kv.Txn{}, err
		}
		_, _, err = r.node(ctx, e.ParentID)
		if err == nil { // all aliases of a token have the same parent: the node is there
			return token, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return kv.Txn{}, err
		}
		d := deletionOf(e, rev)
		// The node must not be admitted in between.
		t.If = append(t.If, append(d.If, kv.Cond{Key: nodeKey(e.ParentID)})...)
		t.Ops = append(t.Ops, d.Ops...)
	}
	return t, nil
}
