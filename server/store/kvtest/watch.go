package kvtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/server/store/kv"
)

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
