package kvtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/assay-id/assay/server/store/kv"
)

// maxSteps bounds a history.
const maxSteps = 64

// model is what a store must be like: all there is, and all that was ever committed.
type model struct {
	items     map[string]kv.Item
	log       []kv.Change // of revision i+1 at i
	compacted kv.Rev
}

func (m *model) rev() kv.Rev { return kv.Rev(len(m.log)) }

// holds reports whether a transaction's conditions do.
func (m *model) holds(t kv.Txn) bool {
	return !slices.ContainsFunc(t.If, func(c kv.Cond) bool { return m.items[c.Key].Rev != c.Rev })
}

func (m *model) commit(t kv.Txn) {
	change := kv.Change{Rev: m.rev() + 1, Ops: t.Ops}
	m.log = append(m.log, change)
	for _, o := range t.Ops {
		if o.Delete {
			delete(m.items, o.Key)
			continue
		}
		m.items[o.Key] = kv.Item{Key: o.Key, Value: o.Value, Rev: change.Rev}
	}
}

// History plays a history that was made of any bytes on the store that open opens, again and again the
// same one, and compares it with a model after each step.
func History(t *testing.T, open func(t *testing.T) kv.Store, history []byte) {
	t.Helper()
	s := open(t)
	defer func() { closeStore(t, s) }()
	m := &model{items: map[string]kv.Item{}}
	next := func() int {
		if len(history) == 0 {
			return 0
		}
		b := history[0]
		history = history[1:]
		return int(b)
	}
	key := func() string { return fmt.Sprintf("%c/%d", 'a'+rune(next()%2), next()%4) } // few, so that they meet
	for step := 0; len(history) > 0 && step < maxSteps; step++ {
		switch next() % 8 {
		case 0:
			id := s.ID()
			closeStore(t, s)
			if s = open(t); s.ID() != id {
				t.Fatalf("step %d: the store was %s and is %s", step, id, s.ID())
			}
		case 1:
			upTo := min(kv.Rev(next()%(maxSteps+1)), m.rev())
			if err := s.Compact(t.Context(), upTo); err != nil {
				t.Fatalf("step %d: compact up to %d: %v", step, upTo, err)
			}
			m.compacted = max(m.compacted, upTo)
		default:
			txn := kv.Txn{}
			for range next() % 3 {
				k := key()
				rev := m.items[k].Rev
				if next()%4 == 0 {
					rev = kv.Rev(next() % maxSteps)
				}
				txn.If = append(txn.If, kv.Cond{Key: k, Rev: rev})
			}
			for range 1 + next()%3 {
				k, v := key(), next()
				if slices.ContainsFunc(txn.Ops, func(o kv.Op) bool { return o.Key == k }) {
					continue
				}
				if v%4 == 0 {
					txn.Ops = append(txn.Ops, kv.Del(k))
				} else {
					txn.Ops = append(txn.Ops, kv.Put(k, []byte(strings.Repeat("v", v))))
				}
			}
			rev, err := s.Commit(t.Context(), txn)
			switch {
			case !m.holds(txn):
				if !errors.Is(err, kv.ErrConflict) {
					t.Fatalf("step %d: %+v: got %v, want a conflict", step, txn, err)
				}
			case err != nil || rev != m.rev()+1:
				t.Fatalf("step %d: %+v: revision %d after %d, %v", step, txn, rev, m.rev(), err)
			default:
				m.commit(txn)
			}
		}
		m.compare(t, s, step, kv.Rev(next()%maxSteps))
	}
}

var errEnough = errors.New("enough")

// compare compares all items, and what a watcher sees that asks from a revision on.
func (m *model) compare(t *testing.T, s kv.Store, step int, from kv.Rev) {
	t.Helper()
	want := make([]kv.Item, 0, len(m.items))
	for _, item := range m.items {
		want = append(want, item)
	}
	slices.SortFunc(want, func(a, b kv.Item) int { return strings.Compare(a.Key, b.Key) })
	got, rev, err := s.Range(t.Context(), "", "", 0)
	if err != nil || rev != m.rev() {
		t.Fatalf("step %d: revision %d, want %d, %v", step, rev, m.rev(), err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("step %d: items (-want +got):\n%s", step, diff)
	}
	if from < m.compacted || from > m.rev() {
		err := s.Watch(t.Context(), "", from, func(kv.Change) error { return nil })
		if !errors.Is(err, kv.ErrCompacted) {
			t.Fatalf("step %d: watch from %d of %d…%d: %v", step, from, m.compacted, m.rev(), err)
		}
		return
	}
	after := m.log[from:]
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if len(after) == 0 {
		return // it would wait
	}
	seen := 0
	err = s.Watch(ctx, "", from, func(c kv.Change) error {
		if diff := cmp.Diff(after[seen], c, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("step %d: change %d after %d (-want +got):\n%s", step, seen, from, diff)
		}
		if seen++; seen == len(after) {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		t.Fatalf("step %d: watch from %d: %d of %d changes, %v", step, from, seen, len(after), err)
	}
}
