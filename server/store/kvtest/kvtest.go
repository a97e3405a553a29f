// Package kvtest is the suite that every kv.Store passes: each sentence of the interface's
// documentation has a test here. An implementation that passes can stand in for any other.
package kvtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
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
		"a cancelled context ends every call":                              testCancelled,
		"a closed store says so":                                           testClosed,
	} {
		t.Run(name, func(t *testing.T) {
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

// collect watches until n changes came.
func collect(t *testing.T, s kv.Store, prefix string, after kv.Rev, n int) []kv.Change {
	t.Helper()
	var got []kv.Change
	err := s.Watch(t.Context(), prefix, after, func(c kv.Change) error {
		got = append(got, c)
		if len(got) == n {
			return errStop
		}
		return nil
	})
	if !errors.Is(err, errStop) {
		t.Fatalf("watch: %v", err)
	}
	return got
}

func revs(changes []kv.Change) []kv.Rev {
	var list []kv.Rev
	for _, c := range changes {
		list = append(list, c.Rev)
	}
	return list
}

func never(t *testing.T) func(kv.Change) error {
	return func(c kv.Change) error {
		t.Errorf("watch saw revision %d", c.Rev)
		return errStop
	}
}

func testEmpty(t *testing.T, s kv.Store) {
	items, at, err := s.Range(t.Context(), "", "", 0)
	if err != nil || len(items) != 0 || at != 0 {
		t.Errorf("range: %v at %d, %v", items, at, err)
	}
	if rev, err := s.Rev(t.Context()); rev != 0 || err != nil {
		t.Errorf("revision: %d, %v", rev, err)
	}
	if s.ID() == "" || s.ID() != s.ID() {
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

func testConditions(t *testing.T, s kv.Store) {
	one := put(t, s, "a", "1")
	two := put(t, s, "b", "1")
	for _, c := range []struct {
		name string
		ifs  []kv.Cond
		ok   bool
	}{
		{"a key that must not exist exists", []kv.Cond{{Key: "a"}}, false},
		{"the revision is an older one", []kv.Cond{{Key: "b", Rev: one}}, false},
		{"the revision is in the future", []kv.Cond{{Key: "a", Rev: 99}}, false},
		{"a key that must exist does not", []kv.Cond{{Key: "c", Rev: one}}, false},
		{"one of several does not hold", []kv.Cond{{Key: "a", Rev: one}, {Key: "b"}}, false},
		{"all hold", []kv.Cond{{Key: "a", Rev: one}, {Key: "b", Rev: two}, {Key: "c"}}, true},
	} {
		before, rev, err := s.Range(t.Context(), "", "", 0)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Commit(t.Context(), kv.Txn{If: c.ifs, Ops: []kv.Op{kv.Put("d", []byte("x")), kv.Del("a")}})
		if c.ok {
			if err != nil || got != rev+1 {
				t.Errorf("%s: revision %d, %v", c.name, got, err)
			}
			continue
		}
		if !errors.Is(err, kv.ErrConflict) {
			t.Errorf("%s: %v", c.name, err)
		}
		after, at, err := s.Range(t.Context(), "", "", 0)
		if err != nil || at != rev || !cmp.Equal(before, after) {
			t.Errorf("%s: it wrote something", c.name)
		}
	}
	if _, err := s.Commit(t.Context(), kv.Txn{If: []kv.Cond{{Key: "a"}}, Ops: []kv.Op{kv.Put("a", nil)}}); err != nil {
		t.Errorf("a deleted key does not count as absent: %v", err)
	}
}

func testVerify(t *testing.T, s kv.Store) {
	put(t, s, "a", "1")
	put(t, s, "b", "1")
	if rev, err := s.Commit(t.Context(), kv.Txn{If: []kv.Cond{{Key: "a", Rev: 1}}}); rev != 2 || err != nil {
		t.Errorf("revision %d, %v", rev, err)
	}
	if _, err := s.Commit(t.Context(), kv.Txn{If: []kv.Cond{{Key: "a"}}}); !errors.Is(err, kv.ErrConflict) {
		t.Errorf("condition that does not hold: %v", err)
	}
	if rev, err := s.Rev(t.Context()); rev != 2 || err != nil {
		t.Errorf("revision moved to %d, %v", rev, err)
	}
}

func testDeleteMissing(t *testing.T, s kv.Store) {
	commit(t, s, kv.Put("a", nil), kv.Del("b"))
	commit(t, s, kv.Put("c", nil), kv.Del("a"))
	if got := keys(t, s, "", "", 0); !slices.Equal(got, []string{"c"}) {
		t.Errorf("keys %q", got)
	}
}

func testOwnership(t *testing.T, s kv.Store) {
	value := []byte("one")
	if _, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("a", value)}}); err != nil {
		t.Fatal(err)
	}
	copy(value, "XXX")
	items, _, err := s.Range(t.Context(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	copy(items[0].Value, "YYY")
	change := collect(t, s, "", 0, 1)[0]
	copy(change.Ops[0].Value, "ZZZ")
	again, _, err := s.Range(t.Context(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	log := collect(t, s, "", 0, 1)[0]
	if string(again[0].Value) != "one" || string(log.Ops[0].Value) != "one" {
		t.Errorf("item %q, log %q", again[0].Value, log.Ops[0].Value)
	}
}

func testBytes(t *testing.T, s kv.Store) {
	key, value := "\x00\xff/\n☃", []byte{0, 255, 0}
	commit(t, s, kv.Put(key, value))
	items, _, err := s.Range(t.Context(), key, key+"\x00", 1)
	if err != nil || len(items) != 1 || items[0].Key != key || !bytes.Equal(items[0].Value, value) {
		t.Errorf("items %v, %v", items, err)
	}
	change := collect(t, s, key, 0, 1)[0]
	if change.Ops[0].Key != key || !bytes.Equal(change.Ops[0].Value, value) {
		t.Errorf("change %v", change)
	}
}

func testLimits(t *testing.T, s kv.Store) {
	ops := func(n int) []kv.Op {
		var list []kv.Op
		for i := range n {
			list = append(list, kv.Put(fmt.Sprintf("k/%03d", i), []byte("v")))
		}
		return list
	}
	conds := func(n int) []kv.Cond {
		var list []kv.Cond
		for i := range n {
			list = append(list, kv.Cond{Key: fmt.Sprintf("c/%03d", i)})
		}
		return list
	}
	for _, c := range []struct {
		name string
		txn  kv.Txn
		ok   bool
	}{
		{"too many operations", kv.Txn{Ops: ops(kv.MaxOps + 1)}, false},
		{"too many conditions", kv.Txn{If: conds(kv.MaxOps + 1), Ops: ops(1)}, false},
		{"too many bytes", kv.Txn{Ops: []kv.Op{kv.Put("k", make([]byte, kv.MaxTxnBytes))}}, false},
		{"too long a key", kv.Txn{Ops: []kv.Op{kv.Put(strings.Repeat("k", kv.MaxKey+1), nil)}}, false},
		{"as much as is allowed", kv.Txn{If: conds(kv.MaxOps), Ops: ops(kv.MaxOps)}, true},
		{"as many bytes as are allowed", kv.Txn{Ops: []kv.Op{kv.Put("k", make([]byte, kv.MaxTxnBytes-1))}}, true},
		{"as long a key as is allowed", kv.Txn{Ops: []kv.Op{kv.Put(strings.Repeat("k", kv.MaxKey), nil)}}, true},
	} {
		before, err := s.Rev(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Commit(t.Context(), c.txn)
		switch {
		case c.ok && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case !c.ok && !errors.Is(err, kv.ErrTooLarge):
			t.Errorf("%s: %v", c.name, err)
		}
		if after, err := s.Rev(t.Context()); !c.ok && (after != before || err != nil) {
			t.Errorf("%s: revision went from %d to %d, %v", c.name, before, after, err)
		}
	}
	if _, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("", nil)}}); err == nil {
		t.Error("an empty key was accepted")
	}
}

func testDuplicateKey(t *testing.T, s kv.Store) {
	for _, ops := range [][]kv.Op{
		{kv.Put("a", nil), kv.Put("a", nil)},
		{kv.Put("a", nil), kv.Put("b", nil), kv.Del("a")},
	} {
		if _, err := s.Commit(t.Context(), kv.Txn{Ops: ops}); err == nil {
			t.Errorf("%v was accepted", ops)
		}
	}
	if got := keys(t, s, "", "", 0); got != nil {
		t.Errorf("it wrote %q", got)
	}
}

func testRace(t *testing.T, s kv.Store) {
	const racers = 50
	var won atomic.Int32
	var group sync.WaitGroup
	for i := range racers {
		group.Go(func() {
			_, err := s.Commit(t.Context(), kv.Txn{
				If:  []kv.Cond{{Key: "token"}},
				Ops: []kv.Op{kv.Put("token", nil), kv.Put(fmt.Sprintf("by/%d", i), nil)},
			})
			switch {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, kv.ErrConflict):
				t.Errorf("commit: %v", err)
			}
		})
	}
	group.Wait()
	if got := keys(t, s, "by/", kv.PrefixEnd("by/"), 0); won.Load() != 1 || len(got) != 1 {
		t.Errorf("%d won, and %q were written", won.Load(), got)
	}
	if rev, err := s.Rev(t.Context()); rev != 1 || err != nil {
		t.Errorf("revision %d, %v", rev, err)
	}
}

func testConcurrent(t *testing.T, s kv.Store) {
	const writers, each = 16, 20
	var mu sync.Mutex
	owner := map[kv.Rev]string{}
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			for i := range each {
				key := fmt.Sprintf("k/%02d/%02d", w, i)
				rev, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(key, []byte(key))}})
				if err != nil {
					t.Errorf("commit: %v", err)
					return
				}
				// An acknowledged write is there for everybody at once.
				items, at, err := s.Range(t.Context(), key, key+"\x00", 0)
				if err != nil || at < rev || len(items) != 1 || items[0].Rev != rev {
					t.Errorf("range after commit %d: %v at %d, %v", rev, items, at, err)
				}
				mu.Lock()
				owner[rev] = key
				mu.Unlock()
			}
		})
	}
	group.Wait()
	if len(owner) != writers*each {
		t.Fatalf("%d revisions for %d commits", len(owner), writers*each)
	}
	for _, c := range collect(t, s, "", 0, writers*each) {
		if len(c.Ops) != 1 || c.Ops[0].Key != owner[c.Rev] {
			t.Errorf("log of revision %d has %v, the writer of %q was told so", c.Rev, c.Ops, owner[c.Rev])
		}
	}
}

func testWatch(t *testing.T, s kv.Store) {
	for i := range 3 {
		put(t, s, "k", fmt.Sprint(i))
	}
	if got := revs(collect(t, s, "k", 0, 3)); !slices.Equal(got, []kv.Rev{1, 2, 3}) {
		t.Errorf("from the start: %v", got)
	}
	if got := collect(t, s, "k", 2, 1); got[0].Rev != 3 || string(got[0].Ops[0].Value) != "2" {
		t.Errorf("from revision 2: %v", got)
	}
	// From now on: the watcher sleeps until the commit comes.
	got := make(chan kv.Change)
	var group sync.WaitGroup
	group.Go(func() {
		err := s.Watch(t.Context(), "k", 3, func(c kv.Change) error {
			got <- c
			if c.Rev == 5 {
				return errStop
			}
			return nil
		})
		if !errors.Is(err, errStop) {
			t.Errorf("watch: %v", err)
		}
	})
	put(t, s, "k", "x")
	if c := <-got; c.Rev != 4 {
		t.Errorf("got revision %d", c.Rev)
	}
	commit(t, s, kv.Del("k"))
	if c := <-got; c.Rev != 5 || !c.Ops[0].Delete {
		t.Errorf("got %v", c)
	}
	group.Wait()
}

func testWatchPrefix(t *testing.T, s kv.Store) {
	commit(t, s, kv.Put("b/2", []byte("2")), kv.Put("a", nil), kv.Put("b/1", []byte("1")))
	commit(t, s, kv.Put("a", []byte("x")), kv.Put("b", nil))
	commit(t, s, kv.Put("b0", nil))
	commit(t, s, kv.Del("b/2"), kv.Put("a", nil), kv.Put("b/3", nil))
	got := collect(t, s, "b/", 0, 2)
	want := []kv.Change{
		{Rev: 1, Ops: []kv.Op{kv.Put("b/2", []byte("2")), kv.Put("b/1", []byte("1"))}},
		{Rev: 4, Ops: []kv.Op{kv.Del("b/2"), kv.Put("b/3", nil)}},
	}
	empty := cmp.Comparer(bytes.Equal)
	if diff := cmp.Diff(want, got, empty); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
}

func testWatchCatchUp(t *testing.T, s kv.Store) {
	const before, during = 300, 100
	var group sync.WaitGroup
	for w := range 10 {
		group.Go(func() {
			for i := range before / 10 {
				put(t, s, fmt.Sprintf("k/%d/%d", w, i), "v")
			}
		})
	}
	group.Wait()
	group.Go(func() {
		for i := range during {
			put(t, s, fmt.Sprintf("l/%d", i), "v")
		}
	})
	for range 3 {
		group.Go(func() {
			for i, c := range collect(t, s, "", 0, before+during) {
				if c.Rev != kv.Rev(i+1) {
					t.Errorf("change %d has revision %d", i, c.Rev)
					return
				}
			}
		})
	}
	group.Wait()
}

func testWatchFn(t *testing.T, s kv.Store) {
	put(t, s, "a", "1")
	err := s.Watch(t.Context(), "a", 0, func(c kv.Change) error {
		if _, _, err := s.Range(t.Context(), "", "", 0); err != nil {
			return err
		}
		if err := s.Compact(t.Context(), c.Rev); err != nil {
			return err
		}
		if _, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("a", nil)}}); err != nil {
			return err
		}
		if c.Rev == 3 {
			return errStop
		}
		return nil
	})
	if !errors.Is(err, errStop) {
		t.Errorf("watch: %v", err)
	}
}

func testWatchAfterCommit(t *testing.T, s kv.Store) {
	const n = 60
	var group sync.WaitGroup
	group.Go(func() {
		seen := 0
		err := s.Watch(t.Context(), "", 0, func(c kv.Change) error {
			seen++
			if rev, err := s.Rev(t.Context()); err != nil || rev < c.Rev {
				t.Errorf("watch saw %d when the store was at %d, %v", c.Rev, rev, err)
			}
			if seen == n {
				return errStop
			}
			return nil
		})
		if !errors.Is(err, errStop) {
			t.Errorf("watch: %v", err)
		}
	})
	for i := range n {
		put(t, s, "k", fmt.Sprint(i))
	}
	group.Wait()
}

func testCompact(t *testing.T, s kv.Store) {
	for i := range 10 {
		put(t, s, fmt.Sprintf("k/%d", i), "v")
	}
	if err := s.Watch(t.Context(), "", 11, never(t)); !errors.Is(err, kv.ErrCompacted) {
		t.Errorf("watch from the future: %v", err)
	}
	for _, upTo := range []kv.Rev{0, 5, 5, 3} { // again, and backwards, change nothing
		if err := s.Compact(t.Context(), upTo); err != nil {
			t.Errorf("compact up to %d: %v", upTo, err)
		}
	}
	for _, after := range []kv.Rev{0, 4} {
		if err := s.Watch(t.Context(), "none/", after, never(t)); !errors.Is(err, kv.ErrCompacted) {
			t.Errorf("watch from %d: %v", after, err)
		}
	}
	if got := revs(collect(t, s, "", 5, 5)); !slices.Equal(got, []kv.Rev{6, 7, 8, 9, 10}) {
		t.Errorf("from 5: %v", got)
	}
	if err := s.Compact(t.Context(), 10); err != nil {
		t.Error(err)
	}
	if rev := put(t, s, "k", "v"); rev != 11 {
		t.Errorf("revision after compaction is %d", rev)
	}
	if got := revs(collect(t, s, "", 10, 1)); !slices.Equal(got, []kv.Rev{11}) {
		t.Errorf("from 10: %v", got)
	}
}

func testCompactKeeps(t *testing.T, s kv.Store) {
	want := map[string]kv.Rev{}
	for i := range 20 {
		key := fmt.Sprintf("k/%d", i)
		want[key] = put(t, s, key, "v")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := s.Watch(ctx, "", 20, never(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("watch: %v", err)
		}
	})
	if err := s.Compact(t.Context(), 20); err != nil {
		t.Fatal(err)
	}
	items, at, err := s.Range(t.Context(), "", "", 0)
	if err != nil || at != 20 {
		t.Errorf("range at %d: %v", at, err)
	}
	got := map[string]kv.Rev{}
	for _, it := range items {
		got[it.Key] = it.Rev
	}
	if !maps.Equal(got, want) {
		t.Errorf("items %v, want %v", got, want)
	}
	cancel()
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
