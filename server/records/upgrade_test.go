package records

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// downgrade makes of a store what version 1 would have made.
func downgrade(t *testing.T, store kv.Store, list []*identity.Entry) {
	t.Helper()
	for _, e := range list {
		if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Del(similarKey(e)), kv.Put(similarKeyV1(e), []byte(e.ID))}}); err != nil {
			t.Fatal(err)
		}
	}
	value, err := encodeSchema(domain, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(schemaKey, value)}}); err != nil {
		t.Fatal(err)
	}
}

func TestUpgrade(t *testing.T) {
	// old returns a store of version 1 and its entries.
	old := func(t *testing.T) (kv.Store, []*identity.Entry) {
		t.Helper()
		store := openStore(t)
		r, err := Open(t.Context(), store, domain, Config{})
		if err != nil {
			t.Fatal(err)
		}
		var list []*identity.Entry
		for i := range 250 { // more than one transaction takes
			list = append(list, create(t, r, entry(fmt.Sprintf("web/%d", i), "unix:uid:1")))
		}
		downgrade(t, store, list)
		return store, list
	}
	sound := func(t *testing.T, store kv.Store) {
		t.Helper()
		c, err := Check(t.Context(), store)
		if err != nil || len(c.Findings) > 0 {
			t.Fatalf("%v, %v", c.Findings, err)
		}
	}

	t.Run("a store of version 1 is in order before and after, and its entries are still unique", func(t *testing.T) {
		store, list := old(t)
		sound(t, store)
		r, err := Open(t.Context(), store, domain, Config{})
		if err != nil {
			t.Fatal(err)
		}
		sound(t, store)
		again := *list[7]
		again.ID = ""
		results, _, err := r.CreateEntries(t.Context(), []*identity.Entry{&again})
		if err != nil || !errors.Is(results[0].Err, ErrExists) || results[0].Entry.ID != list[7].ID {
			t.Errorf("%+v, %v", results, err)
		}
		items, _, err := store.Range(t.Context(), similarIndex, kv.PrefixEnd(similarIndex), 0)
		if err != nil || len(items) != len(list) {
			t.Errorf("%d index keys of %d entries, %v", len(items), len(list), err)
		}
		for _, it := range items {
			if !strings.HasPrefix(it.Key, "i/s/web/") {
				t.Errorf("key %s", it.Key)
			}
		}
	})

	t.Run("an upgrade that was broken off is done again", func(t *testing.T) {
		store, list := old(t)
		for _, e := range list[:100] {
			if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Del(similarKeyV1(e)), kv.Put(similarKey(e), []byte(e.ID))}}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Open(t.Context(), store, domain, Config{}); err != nil {
			t.Fatal(err)
		}
		sound(t, store)
	})

	t.Run("a store that is up to date is not written to", func(t *testing.T) {
		store, _ := old(t)
		if _, err := Open(t.Context(), store, domain, Config{}); err != nil {
			t.Fatal(err)
		}
		before, err := store.Rev(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), store, domain, Config{}); err != nil {
			t.Fatal(err)
		}
		if after, err := store.Rev(t.Context()); err != nil || after != before {
			t.Errorf("revision %d, then %d, %v", before, after, err)
		}
	})

	t.Run("a damaged entry stops the upgrade and nothing else is lost", func(t *testing.T) {
		store, list := old(t)
		key := entryKey(list[3].ID)
		if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(key, []byte{valueVersion, 0xff})}}); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), store, domain, Config{}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), key) {
			t.Errorf("got %v", err)
		}
		items, _, err := store.Range(t.Context(), similarIndex, kv.PrefixEnd(similarIndex), 0)
		if err != nil || len(items) != len(list) {
			t.Errorf("%d index keys of %d entries, %v", len(items), len(list), err)
		}
	})
}
