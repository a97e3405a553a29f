// Package kvtest is the suite that every kv.Store passes: each sentence of the interface's
// documentation has a test here. An implementation that passes can stand in for any other.
package kvtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/server/store/kv"
)

// Run runs the suite. fresh returns a new, empty store each time; the suite closes it.
func Run(t *testing.T, fresh func(t *testing.T) kv.Store) {
	for name, test := range map[string]func(*testing.T, kv.Store){
		"an empty store is at revision zero":                               testEmpty,
		"commits number the revisions one by one":                          testRevisions,
		"range returns what lies between start and end, in order":          testRange,
		"range is one consistent picture while others write":               testRangeConsistent,
		"conditions decide all or nothing":                                 testConditions,
		"a transaction without operations checks its conditions":           testVerify,
		"deleting what is not there is no error":                           testDeleteMissing,
		"values are the store's own":                                       testOwnership,
		"keys and values may be any bytes":                                 testBytes,
		"what is over a limit is refused and writes nothing":               testLimits,
		"a key in two operations is refused":                               testDuplicateKey,
		"of many racing writers exactly one wins":                          testRace,
		"many writers and readers at once lose nothing":                    testConcurrent,
		"a watcher sees every commit once, in order, from where it asked":  testWatch,
		"a watcher sees its prefix only, and operations in their order":    testWatchPrefix,
		"a watcher that is behind catches up while others write":           testWatchCatchUp,
		"a watcher may use the store, and stops with its function's error": testWatchFn,
		"a watcher never sees a revision that readers do not":              testWatchAfterCommit,
		"compacted and future revisions cannot be watched":                 testCompact,
		"compaction wakes nobody and keeps every item":                     testCompactKeeps,
		"a canceled context ends every call":                               testCancelled,
		"a closed store says so":                                           testClosed,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of it is waiting for a disk
			s := fresh(t)
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			test(t, s)
		})
	}
	t.Run("two stores have different identities", func(t *testing.T) {
		a, b := fresh(t), fresh(t)
		defer closeStore(t, a)
		defer closeStore(t, b)
		if a.ID() == "" || a.ID() == b.ID() {
			t.Errorf("identities are %q and %q", a.ID(), b.ID())
		}
	})
}

// RunReopen checks that what was written is there when the store is opened again. place makes a new
// place for a store; what it returns opens the store there.
func RunReopen(t *testing.T, place func(t *testing.T) (open func(t *testing.T) kv.Store)) {
	t.Run("identity, revision, items, log and compaction survive", func(t *testing.T) {
		open := place(t)
		s := open(t)
		id := s.ID()
		for i := range 10 {
			put(t, s, fmt.Sprintf("k/%d", i), "v")
		}
		if err := s.Compact(t.Context(), 4); err != nil {
			t.Fatal(err)
		}
		before, _, err := s.Range(t.Context(), "", "", 0)
		if err != nil {
			t.Fatal(err)
		}
		closeStore(t, s)

		s = open(t)
		defer closeStore(t, s)
		after, rev, err := s.Range(t.Context(), "", "", 0)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, after); diff != "" {
			t.Errorf("items changed (-before +after):\n%s", diff)
		}
		if rev != 10 || s.ID() != id {
			t.Errorf("revision %d, identity %q; want 10, %q", rev, s.ID(), id)
		}
		if err := s.Watch(t.Context(), "", 3, never(t)); !errors.Is(err, kv.ErrCompacted) {
			t.Errorf("watch from 3 returned %v", err)
		}
		if got := revs(collect(t, s, "", 4, 6)); !slices.Equal(got, []kv.Rev{5, 6, 7, 8, 9, 10}) {
			t.Errorf("watched revisions %v", got)
		}
		if rev := put(t, s, "k/11", "v"); rev != 11 {
			t.Errorf("next revision is %d", rev)
		}
	})
}

var errStop = errors.New("stop")

func closeStore(t *testing.T, s kv.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func put(t *testing.T, s kv.Store, key, value string) kv.Rev {
	t.Helper()
	return commit(t, s, kv.Put(key, []byte(value)))
}

func commit(t *testing.T, s kv.Store, ops ...kv.Op) kv.Rev {
	t.Helper()
	rev, err := s.Commit(t.Context(), kv.Txn{Ops: ops})
	if err != nil {
		t.Fatalf("commit: %v", err)
	}
	return rev
}

func keys(t *testing.T, s kv.Store, start, end string, limit int) []string {
	t.Helper()
	items, _, err := s.Range(t.Context(), start, end, limit)
	if err != nil {
		t.Fatalf("range: %v", err)
	}
	var list []string
	for _, it := range items {
		list = append(list, it.Key)
	}
	return list
}

func testEmpty(t *testing.T, s kv.Store) {
	items, at, err := s.Range(t.Context(), "", "", 0)
	if err != nil || len(items) != 0 || at != 0 {
		t.Errorf("range: %v at %d, %v", items, at, err)
	}
	if rev, err := s.Rev(t.Context()); rev != 0 || err != nil {
		t.Errorf("revision: %d, %v", rev, err)
	}
	if id := s.ID(); id == "" || s.ID() != id {
		t.Errorf("identity %q", s.ID())
	}
}

func testRevisions(t *testing.T, s kv.Store) {
	for want := kv.Rev(1); want <= 5; want++ {
		if rev := commit(t, s, kv.Put("a", nil), kv.Put(fmt.Sprintf("b/%d", want), []byte("x"))); rev != want {
			t.Fatalf("revision %d, want %d", rev, want)
		}
	}
	items, at, err := s.Range(t.Context(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if rev, err := s.Rev(t.Context()); rev != 5 || at != 5 || err != nil {
		t.Errorf("revision %d, range at %d, %v", rev, at, err)
	}
	if items[0].Key != "a" || items[0].Rev != 5 || items[1].Rev != 1 || len(items[0].Value) != 0 {
		t.Errorf("items %v", items)
	}
}

func testRange(t *testing.T, s kv.Store) {
	commit(t, s, kv.Put("b", nil), kv.Put("a/2", nil), kv.Put("a/1", nil), kv.Put("a", nil), kv.Put("a/\xff", nil), kv.Put("a0", nil))
	for _, c := range []struct {
		start, end string
		limit      int
		want       []string
	}{
		{"", "", 0, []string{"a", "a/1", "a/2", "a/\xff", "a0", "b"}},
		{"a/", kv.PrefixEnd("a/"), 0, []string{"a/1", "a/2", "a/\xff"}},
		{"a/", kv.PrefixEnd("a/"), 2, []string{"a/1", "a/2"}},
		{"a/2", "", 2, []string{"a/2", "a/\xff"}},
		{"a/1", "a/2", 0, []string{"a/1"}},
		{"a/1", "a/1\x00", 1, []string{"a/1"}},
		{"b", "a", 0, nil},
		{"c", "", 0, nil},
	} {
		if got := keys(t, s, c.start, c.end, c.limit); !slices.Equal(got, c.want) {
			t.Errorf("range %q to %q, limit %d: %q, want %q", c.start, c.end, c.limit, got, c.want)
		}
	}
}

func testRangeConsistent(t *testing.T, s kv.Store) {
	const pairs = 40
	both := func(i int) kv.Txn {
		v := fmt.Appendf(nil, "%d", i)
		return kv.Txn{Ops: []kv.Op{kv.Put("a", v), kv.Put("z", v)}}
	}
	var group sync.WaitGroup
	var done atomic.Bool
	group.Go(func() {
		defer done.Store(true)
		for i := range pairs {
			if _, err := s.Commit(t.Context(), both(i)); err != nil {
				t.Errorf("commit: %v", err)
			}
		}
	})
	var last kv.Rev
	for !done.Load() {
		items, at, err := s.Range(t.Context(), "", "", 0)
		if err != nil {
			t.Fatal(err)
		}
		if len(items) == 2 && (!bytes.Equal(items[0].Value, items[1].Value) || items[0].Rev != at) {
			t.Fatalf("half a commit in the picture at %d: %v", at, items)
		}
		if at < last {
			t.Fatalf("picture went back from %d to %d", last, at)
		}
		last = at
	}
	group.Wait()
}

func testCancelled(t *testing.T, s kv.Store) {
	put(t, s, "a", "1")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.Range(ctx, "", "", 0); !errors.Is(err, context.Canceled) {
		t.Errorf("range: %v", err)
	}
	if _, err := s.Rev(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("rev: %v", err)
	}
	if _, err := s.Commit(ctx, kv.Txn{Ops: []kv.Op{kv.Put("b", nil)}}); !errors.Is(err, context.Canceled) {
		t.Errorf("commit: %v", err)
	}
	if err := s.Compact(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("compact: %v", err)
	}
	if err := s.Watch(ctx, "", 0, never(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("watch: %v", err)
	}
	if got := keys(t, s, "", "", 0); !slices.Equal(got, []string{"a"}) {
		t.Errorf("keys %q", got)
	}
	// A sleeping watcher wakes.
	ctx, cancel = context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := s.Watch(ctx, "", 1, never(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("watch: %v", err)
		}
	})
	cancel()
	group.Wait()
	// Writers that give up while they wait either wrote or did not, and know which.
	var wrote atomic.Int64
	for i := range 40 {
		ctx, cancel := context.WithCancel(t.Context())
		group.Go(func() {
			if _, err := s.Commit(ctx, kv.Txn{Ops: []kv.Op{kv.Put(fmt.Sprintf("c/%d", i), nil)}}); err == nil {
				wrote.Add(1)
			}
		})
		group.Go(cancel)
	}
	group.Wait()
	if got := len(keys(t, s, "c/", "c0", 0)); got != int(wrote.Load()) {
		t.Errorf("%d writers were told that they wrote, %d did", wrote.Load(), got)
	}
}

func testClosed(t *testing.T, s kv.Store) {
	put(t, s, "a", "1")
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			if err := s.Watch(t.Context(), "", 1, never(t)); !errors.Is(err, kv.ErrClosed) {
				t.Errorf("watch: %v", err)
			}
		})
	}
	for i := range 20 {
		group.Go(func() {
			_, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(fmt.Sprintf("z/%d", i), nil)}, If: []kv.Cond{{Key: "a"}}})
			if !errors.Is(err, kv.ErrConflict) && !errors.Is(err, kv.ErrClosed) {
				t.Errorf("commit while closing: %v", err)
			}
		})
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	group.Wait()
	if _, _, err := s.Range(t.Context(), "", "", 0); !errors.Is(err, kv.ErrClosed) {
		t.Errorf("range: %v", err)
	}
	if _, err := s.Rev(t.Context()); !errors.Is(err, kv.ErrClosed) {
		t.Errorf("rev: %v", err)
	}
	if _, err := s.Commit(t.Context(), kv.Txn{}); !errors.Is(err, kv.ErrClosed) {
		t.Errorf("commit: %v", err)
	}
	if err := s.Compact(t.Context(), 1); !errors.Is(err, kv.ErrClosed) {
		t.Errorf("compact: %v", err)
	}
}
