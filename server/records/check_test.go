package records

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestCheck(t *testing.T) {
	// world returns a store with a record of each kind, and the entry that expires.
	world := func(t *testing.T) (kv.Store, *identity.Entry) {
		t.Helper()
		store := openStore(t)
		c := &clock{}
		c.set(noon)
		r, err := Open(t.Context(), store, domain, Config{Now: c.Now})
		if err != nil {
			t.Fatal(err)
		}
		e := entry("web", "unix:uid:1")
		e.ExpiresAt = noon.Add(time.Hour)
		e = create(t, r, e)
		create(t, r, entry("db", "unix:uid:2"))
		if err := r.CreateToken(t.Context(), "token", noon.Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := r.UpdateNode(t.Context(), agent("x509pop/1"), func(n *Node, _ bool) error { n.Serial = "7"; return nil }); err != nil {
			t.Fatal(err)
		}
		if _, _, err := r.UpdateBundle(t.Context(), domain, func(*identity.Bundle) error { return nil }); err != nil {
			t.Fatal(err)
		}
		if err := r.PutJournal(t.Context(), []Journal{{Kind: "x509", AuthorityID: "a", State: "active"}}, nil); err != nil {
			t.Fatal(err)
		}
		return store, e
	}
	value := func(t *testing.T, store kv.Store, key string) []byte {
		t.Helper()
		items, _, err := store.Range(t.Context(), key, key+"\x00", 1)
		if err != nil || len(items) != 1 {
			t.Fatalf("%s: %v, %v", key, items, err)
		}
		return items[0].Value
	}

	t.Run("a store that is in order has no findings, and is counted", func(t *testing.T) {
		store, _ := world(t)
		c, err := Check(t.Context(), store)
		if err != nil || len(c.Findings) > 0 {
			t.Fatalf("%v, %v", c.Findings, err)
		}
		if c.TrustDomain != domain || c.Entries != 2 || c.Nodes != 1 || c.Bundles != 1 || c.Tokens != 1 || len(c.Journal) != 1 || c.Bundle == nil || c.Rev == 0 {
			t.Errorf("%+v", c)
		}
	})
	t.Run("an empty store has none", func(t *testing.T) {
		if c, err := Check(t.Context(), openStore(t)); err != nil || len(c.Findings) > 0 {
			t.Errorf("%v, %v", c, err)
		}
	})

	for _, c := range []struct {
		name  string
		write func(t *testing.T, store kv.Store, e *identity.Entry) kv.Op
		want  string // key and what is said of it
	}{
		{"an entry that cannot be read", func(_ *testing.T, _ kv.Store, e *identity.Entry) kv.Op {
			return kv.Put(entryKey(e.ID), []byte{valueVersion, 0xff})
		}, "p/e/ID: it cannot be read"},
		{"an entry of a later version", func(_ *testing.T, _ kv.Store, e *identity.Entry) kv.Op {
			return kv.Put(entryKey(e.ID), []byte{valueVersion + 1})
		}, "written by a newer one"},
		{"an entry that is gone while its indexes are there", func(_ *testing.T, _ kv.Store, e *identity.Entry) kv.Op {
			return kv.Del(entryKey(e.ID))
		}, `points to entry "ID", which is not there`},
		{"an entry that is gone while it is to expire", func(_ *testing.T, _ kv.Store, e *identity.Entry) kv.Op {
			return kv.Del(entryKey(e.ID))
		}, "belongs to an entry that is not there"},
		{"an entry that could be created twice", func(_ *testing.T, _ kv.Store, e *identity.Entry) kv.Op {
			return kv.Del(similarKey(e))
		}, "this index key is missing (of ID)"},
		{"an entry that would never expire", func(_ *testing.T, _ kv.Store, e *identity.Entry) kv.Op {
			return kv.Del(entryExpiryKey(e))
		}, "this index key is missing"},
		{"an index that points elsewhere", func(_ *testing.T, _ kv.Store, e *identity.Entry) kv.Op {
			return kv.Put(similarKey(e), []byte("nobody"))
		}, `should point to "ID" and points to "nobody"`},
		{"two entries that are one", func(t *testing.T, store kv.Store, e *identity.Entry) kv.Op {
			return kv.Put(entryKey("zzz"), value(t, store, entryKey(e.ID)))
		}, "entry ID has the same SPIFFE ID, parent and selectors"},
		{"an alias index of nothing", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Put(aliasPrefix(hashToken("t"))+"x", nil)
		}, "points to an alias that is not there"},
		{"a token that would never expire", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Del(expiryKey(noon.Add(time.Minute+tokenGrace), kindToken, hashToken("token")))
		}, "this index key is missing"},
		{"a node that cannot be read", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Put(nodeKey(agent("x509pop/1")), nil)
		}, "p/n/spire/agent/x509pop/1: it cannot be read: no version byte"},
		{"a node whose ID is none", func(t *testing.T, store kv.Store, _ *identity.Entry) kv.Op {
			return kv.Put(nodePrefix+"a b", value(t, store, nodeKey(agent("x509pop/1"))))
		}, "p/n/a b: it cannot be read"},
		{"a bundle that cannot be read", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Put(bundleKey(domain), []byte{valueVersion, 0x0a, 0x02, 0x0a, 0x00})
		}, "p/b/example.org: it cannot be read"},
		{"a journal that cannot be read", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Put(journalKey("a"), nil)
		}, "j/a: it cannot be read"},
		{"a token that cannot be read", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Put(tokenKey(hashToken("token")), nil)
		}, "it cannot be read"},
		{"an expiry key that is none", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Put(expiryPrefix+"soon", nil)
		}, "x/soon: this expiry key cannot be read"},
		{"a key that is not in the schema", func(*testing.T, kv.Store, *identity.Entry) kv.Op {
			return kv.Put("q", nil)
		}, "q: no record of this version"},
		{"no schema", func(*testing.T, kv.Store, *identity.Entry) kv.Op { return kv.Del(schemaKey) },
			"m/schema: it is missing"},
		{"a schema that cannot be read", func(*testing.T, kv.Store, *identity.Entry) kv.Op { return kv.Put(schemaKey, nil) },
			"m/schema: it cannot be read"},
	} {
		t.Run("a store with "+c.name+" is told of", func(t *testing.T) {
			store, e := world(t)
			if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{c.write(t, store, e)}}); err != nil {
				t.Fatal(err)
			}
			out, err := Check(t.Context(), store)
			if err != nil {
				t.Fatal(err)
			}
			var all []string
			for _, f := range out.Findings {
				all = append(all, f.String())
			}
			text := strings.ReplaceAll(strings.Join(all, "\n"), e.ID, "ID")
			if !strings.Contains(text, c.want) {
				t.Errorf("want %q in\n%s", c.want, text)
			}
		})
	}
	t.Run("a store that cannot be read is an error", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Check(ctx, openStore(t)); err == nil {
			t.Error("no error")
		}
	})
}
