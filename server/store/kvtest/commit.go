package kvtest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/server/store/kv"
)

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
