package boltkv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/assay-id/assay/server/store/kv"
)

// Bounds of one group, so that one slow disk write does not pin much memory.
const (
	maxGroup      = 1024
	maxGroupBytes = 8 << 20
)

// request is one Commit under way.
type request struct {
	txn   kv.Txn
	size  int
	taken bool // mu guards it: the request is part of a group, its outcome is certain to come

	lead chan struct{} // closed when this caller must take the next group to the disk
	done chan struct{} // closed when the two below are set
	rev  kv.Rev
	err  error
}

// Commit writes t. Callers that arrive while another group is being written form the next one, which
// the first of them leads. If ctx ends before t is part of a group, nothing is written; after that
// the outcome is awaited, so that the caller always knows it.
func (s *Store) Commit(ctx context.Context, t kv.Txn) (kv.Rev, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := checkTxn(t); err != nil {
		return 0, err
	}
	if len(t.Ops) == 0 {
		return s.verify(ctx, t.If)
	}
	if s.readOnly {
		return 0, ErrReadOnly
	}
	r := &request{txn: t, size: t.Size(), lead: make(chan struct{}), done: make(chan struct{})}
	s.mu.Lock()
	s.queue = append(s.queue, r)
	if !s.leading {
		s.leading = true
		close(r.lead)
	}
	s.mu.Unlock()

	select {
	case <-r.done:
		return r.rev, r.err
	case <-r.lead:
		s.leadGroup()
		return r.rev, r.err
	case <-ctx.Done():
	}
	if s.withdraw(r) {
		return 0, ctx.Err()
	}
	select {
	case <-r.done:
	case <-r.lead:
		s.leadGroup()
	}
	return r.rev, r.err
}

// withdraw takes r out of the queue, unless it is part of a group or appointed to lead one.
func (s *Store) withdraw(r *request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-r.lead:
		return false
	default:
	}
	if r.taken {
		return false
	}
	s.queue = slices.DeleteFunc(s.queue, func(q *request) bool { return q == r })
	return true
}

// checkTxn refuses what no store takes.
func checkTxn(t kv.Txn) error {
	if len(t.Ops) > kv.MaxOps || len(t.If) > kv.MaxOps {
		return fmt.Errorf("%w: %d operations and %d conditions, the limit is %d of each", kv.ErrTooLarge, len(t.Ops), len(t.If), kv.MaxOps)
	}
	if size := t.Size(); size > kv.MaxTxnBytes {
		return fmt.Errorf("%w: %d bytes, the limit is %d", kv.ErrTooLarge, size, kv.MaxTxnBytes)
	}
	seen := make(map[string]struct{}, len(t.Ops))
	for _, o := range t.Ops {
		if err := checkKey(o.Key); err != nil {
			return err
		}
		if _, twice := seen[o.Key]; twice {
			return fmt.Errorf("commit: key %q is in two operations", o.Key)
		}
		seen[o.Key] = struct{}{}
	}
	for _, c := range t.If {
		if err := checkKey(c.Key); err != nil {
			return err
		}
	}
	return nil
}

func checkKey(key string) error {
	if key == "" {
		return errors.New("commit: empty key")
	}
	if len(key) > kv.MaxKey {
		return fmt.Errorf("%w: key of %d bytes, the limit is %d", kv.ErrTooLarge, len(key), kv.MaxKey)
	}
	return nil
}

// verify answers a transaction without operations.
func (s *Store) verify(ctx context.Context, conds []kv.Cond) (kv.Rev, error) {
	var rev kv.Rev
	err := s.view(ctx, func(tx *bbolt.Tx, at kv.Rev) error {
		rev = at
		return check(tx.Bucket(itemsBucket), conds)
	})
	if err != nil {
		return 0, err
	}
	return rev, nil
}

// check returns kv.ErrConflict unless all conditions hold.
func check(items *bbolt.Bucket, conds []kv.Cond) error {
	for _, c := range conds {
		var rev kv.Rev
		if v := items.Get([]byte(c.Key)); v != nil {
			var err error
			if rev, _, err = decodeItem([]byte(c.Key), v); err != nil {
				return fmt.Errorf("%w: key %q: %w", ErrDamaged, c.Key, err)
			}
		}
		if rev != c.Rev {
			return kv.ErrConflict
		}
	}
	return nil
}

// leadGroup takes the waiting requests, the caller's among them, to the disk, appoints the next
// leader if more have come meanwhile, and answers.
func (s *Store) leadGroup() {
	s.mu.Lock()
	n, bytes := 0, 0
	for n < len(s.queue) && n < maxGroup && (n == 0 || bytes+s.queue[n].size <= maxGroupBytes) {
		s.queue[n].taken = true
		bytes += s.queue[n].size
		n++
	}
	group := slices.Clone(s.queue[:n])
	s.queue = slices.Delete(s.queue, 0, n)
	s.mu.Unlock()

	s.write(group)

	s.mu.Lock()
	if len(s.queue) > 0 {
		close(s.queue[0].lead)
	} else {
		s.leading = false
	}
	s.mu.Unlock()
	for _, r := range group {
		close(r.done)
	}
}

// write sets rev and err of every request of the group.
func (s *Store) write(group []*request) {
	fail := func(err error) {
		for _, r := range group {
			r.rev, r.err = 0, err
		}
	}
	if err := s.enter(); err != nil {
		fail(err)
		return
	}
	defer s.leave()
	s.writing.Lock()
	defer s.writing.Unlock()
	if broken := s.broken.Load(); broken != nil {
		fail(broken.err)
		return
	}
	start := time.Now()
	var last kv.Rev
	size := 0
	for _, r := range group {
		size += r.size + len(r.txn.Ops)*pageGuess
	}
	err := s.guard(func() error {
		var err error
		last, err = s.apply(group)
		return err
	})
	if err != nil {
		fail(s.settle(err))
		s.broadcast() // who waits for a revision that did not come looks again
		return
	}
	if last > 0 {
		s.room.found()
		s.mu.Lock()
		s.durable = last
		s.mu.Unlock()
		s.broadcast()
		s.touchedBy(size)
		s.commitSeconds.Observe(time.Since(start).Seconds())
		s.groupSize.Observe(float64(len(group)))
	}
}

// apply writes the group in one transaction of bbolt and returns the last revision it made, 0 if it
// made none because no request's conditions held. Each request sees what those before it wrote.
func (s *Store) apply(group []*request) (kv.Rev, error) {
	tx, err := s.db.Begin(true)
	if err != nil {
		return 0, fmt.Errorf("write store: %w", err)
	}
	defer tx.Rollback() //nolint:errcheck // after a commit there is nothing to roll back
	items, log := tx.Bucket(itemsBucket), tx.Bucket(logBucket)
	log.FillPercent = 1 // only ever appended to
	rev, wrote := revision(tx), false
	for _, r := range group {
		if r.err = check(items, r.txn.If); r.err != nil {
			continue
		}
		rev, wrote = rev+1, true
		r.rev = rev
		for _, o := range r.txn.Ops {
			if o.Delete {
				err = items.Delete([]byte(o.Key))
			} else {
				err = items.Put([]byte(o.Key), encodeItem(o.Key, rev, o.Value))
			}
			if err != nil {
				return 0, fmt.Errorf("write key: %w", err)
			}
		}
		if err := log.Put(logKey(rev), encodeLog(rev, r.txn.Ops)); err != nil {
			return 0, fmt.Errorf("write log: %w", err)
		}
	}
	if !wrote {
		return 0, nil
	}
	if err := items.SetSequence(uint64(rev)); err != nil {
		return 0, fmt.Errorf("write revision: %w", err)
	}
	if err := tx.Commit(); err != nil {
		return 0, fmt.Errorf("write store: %w", err)
	}
	return rev, nil
}

// settle finds out what a failed write left behind. Usually nothing: bbolt writes beside what is in
// use and points to it last. If that pointer was written and only its fsync failed, nobody can say
// what a restart will find, so the store must not go on (and fsync must not be tried again: Linux
// reports a lost write once).
func (s *Store) settle(err error) error {
	if s.broken.Load() != nil {
		return err
	}
	s.mu.Lock()
	durable := s.durable
	s.mu.Unlock()
	check := s.guard(func() error {
		return s.db.View(func(tx *bbolt.Tx) error {
			if revision(tx) > durable {
				return errNotDurable
			}
			return nil
		})
	})
	if check != nil {
		return s.breakDown(fmt.Errorf("write store %s: %w; it is not known what is on the disk: restart the server", s.path, err))
	}
	if full := asFull(err); full != nil {
		s.room.missed(full)
		return full
	}
	return err
}
