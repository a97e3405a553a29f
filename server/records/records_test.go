package records

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("example.org")
	other  = spiffeid.RequireTrustDomainFromString("other.test")
	noon   = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

// clock is a settable time.
type clock struct{ now atomic.Int64 }

func (c *clock) Now() time.Time        { return time.Unix(c.now.Load(), 0).UTC() }
func (c *clock) set(t time.Time)       { c.now.Store(t.Unix()) }
func agent(path string) spiffeid.ID    { return spiffeid.RequireFromPath(domain, "/spire/agent/"+path) }
func sel(texts ...string) attestor.Set { return attestor.NewSet(selectors(texts...)...) }

func selectors(texts ...string) []attestor.Selector {
	var list []attestor.Selector
	for _, text := range texts {
		kind, value, _ := strings.Cut(text, ":")
		list = append(list, attestor.Selector{Type: kind, Value: value})
	}
	return list
}

func openStore(t testing.TB) kv.Store {
	t.Helper()
	s, err := boltkv.Open(filepath.Join(t.TempDir(), "store.db"), boltkv.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// afterRead is a store that calls then when so many of its reads are done.
type afterRead struct {
	kv.Store
	reads int
	then  func()
}

func (s *afterRead) Range(ctx context.Context, start, end string, limit int) ([]kv.Item, kv.Rev, error) {
	items, rev, err := s.Store.Range(ctx, start, end, limit)
	if s.reads--; s.reads == 0 {
		s.then()
	}
	return items, rev, err
}

// open returns records in a new store; at the end of the test the tree of keys must be whole.
func open(t testing.TB) (*Records, *clock) {
	t.Helper()
	c := &clock{}
	c.set(noon)
	r, err := Open(t.Context(), openStore(t), domain, Config{Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { checkTree(t, r.store) })
	return r, c
}

// checkTree checks what keys.go says about keys that go together.
func checkTree(t testing.TB, store kv.Store) {
	t.Helper()
	c, err := Check(context.Background(), store)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range c.Findings {
		t.Error(f)
	}
}

func entry(path string, selectors ...string) *identity.Entry {
	return &identity.Entry{
		SPIFFEID:  spiffeid.RequireFromPath(domain, "/"+path),
		ParentID:  agent("x509pop/1"),
		Selectors: sel(selectors...),
	}
}

func create(t testing.TB, r *Records, e *identity.Entry) *identity.Entry {
	t.Helper()
	results, _, err := r.CreateEntries(t.Context(), []*identity.Entry{e})
	if err == nil {
		err = results[0].Err
	}
	if err != nil {
		t.Fatalf("create entry: %v", err)
	}
	return results[0].Entry
}

// equal compares entries, nodes and bundles by what is stored.
var equal = cmp.Options{
	cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }),
	cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b }),
	cmp.Comparer(attestor.Set.Equal),
	cmp.Comparer(time.Time.Equal),
}

func TestOpen(t *testing.T) {
	store := openStore(t)
	if _, err := Open(t.Context(), store, domain, Config{}); err != nil {
		t.Fatal(err)
	}
	t.Run("the same trust domain is welcome again", func(t *testing.T) {
		if _, err := Open(t.Context(), store, domain, Config{}); err != nil {
			t.Error(err)
		}
	})
	t.Run("another trust domain is refused in one sentence", func(t *testing.T) {
		_, err := Open(t.Context(), store, other, Config{})
		want := `open records: the store belongs to trust domain "example.org", this server is configured for "other.test": name another data_dir for it, or set trust_domain back`
		if err == nil || err.Error() != want {
			t.Errorf("error %v", err)
		}
	})
	t.Run("many servers may open an empty store at once", func(t *testing.T) {
		store := openStore(t)
		var group sync.WaitGroup
		for range 10 {
			group.Go(func() {
				if _, err := Open(t.Context(), store, domain, Config{}); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	})
	t.Run("a store that another server takes after any of our reads is opened", func(t *testing.T) {
		for read := 1; ; read++ {
			store := &afterRead{Store: openStore(t), reads: read}
			store.then = func() {
				if _, err := Open(t.Context(), store.Store, domain, Config{}); err != nil {
					t.Error(err)
				}
			}
			if _, err := Open(t.Context(), store, domain, Config{}); err != nil {
				t.Errorf("taken after read %d: %v", read, err)
			}
			if store.reads > 0 {
				break // it was opened with fewer reads
			}
		}
	})
	t.Run("what a newer server wrote is refused", func(t *testing.T) {
		for name, value := range map[string][]byte{
			"schema version 99": append([]byte{1}, 0x08, 99),
			"value version 9":   {9, 0x08, 1},
		} {
			store := openStore(t)
			if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(schemaKey, value)}}); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), store, domain, Config{}); err == nil || !strings.Contains(err.Error(), "newer") {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("keys of somebody else are refused", func(t *testing.T) {
		store := openStore(t)
		if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("foo", nil)}}); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), store, domain, Config{}); !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
	})
}

func TestDeleteEntriesIf(t *testing.T) {
	store := &afterRead{Store: openStore(t)}
	r, err := Open(t.Context(), store, domain, Config{})
	if err != nil {
		t.Fatal(err)
	}
	mine := create(t, r, entry("mine", "a:1"))
	store.reads, store.then = 1, func() { // between what is read and what is deleted
		_, _, err := r.UpdateEntry(t.Context(), mine.ID, func(e *identity.Entry) error { e.Hint = "theirs"; return nil })
		if err != nil {
			t.Error(err)
		}
	}
	still := func(e *identity.Entry) bool { return e.Hint == "" }
	errs, _, err := r.DeleteEntriesIf(t.Context(), []string{mine.ID}, still)
	if err != nil || !errors.Is(errs[0], ErrNotFound) {
		t.Errorf("%v, %v", errs, err)
	}
	if e, err := r.Entry(t.Context(), mine.ID); err != nil || e.Hint != "theirs" {
		t.Errorf("it is %v, %v", e, err)
	}
}

func TestCreateEntries(t *testing.T) {
	t.Run("an entry gets an ID, a time and revision 0, and is there", func(t *testing.T) {
		r, _ := open(t)
		in := entry("web", "unix:uid:1000", "docker:label:app:web")
		in.CreatedAt, in.Revision, in.DNSNames = noon.Add(time.Hour), 7, []string{"web"}
		e := create(t, r, in)
		if len(e.ID) != 36 || e.ID[14] != '7' || !e.CreatedAt.Equal(noon) || e.Revision != 0 {
			t.Errorf("created %+v", e)
		}
		if in.ID != "" || in.Revision != 7 {
			t.Error("the argument was changed")
		}
		got, err := r.Entry(t.Context(), e.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e, got, equal); diff != "" {
			t.Errorf("stored another one (-created +stored):\n%s", diff)
		}
	})
	t.Run("an entry that is similar to another one is not made, and that one is returned", func(t *testing.T) {
		r, _ := open(t)
		first := create(t, r, entry("web", "a:1", "b:2"))
		similar := entry("web", "b:2", "a:1", "a:1")
		similar.Hint, similar.ID = "else", "own-id"
		results, rev, err := r.CreateEntries(t.Context(), []*identity.Entry{similar, entry("web", "a:1"), entry("db", "a:1", "b:2")})
		if err != nil || rev == 0 {
			t.Fatalf("revision %d, %v", rev, err)
		}
		if !errors.Is(results[0].Err, ErrExists) || results[0].Entry.ID != first.ID {
			t.Errorf("similar entry: %+v", results[0])
		}
		if results[1].Err != nil || results[2].Err != nil {
			t.Errorf("others: %v, %v", results[1].Err, results[2].Err)
		}
	})
	t.Run("an ID is taken only once", func(t *testing.T) {
		r, _ := open(t)
		a, b := entry("a", "a:1"), entry("b", "b:1")
		a.ID, b.ID = "same", "same"
		results, _, err := r.CreateEntries(t.Context(), []*identity.Entry{a, b})
		if err != nil || results[0].Err != nil {
			t.Fatal(err, results[0].Err)
		}
		if !errors.Is(results[1].Err, ErrExists) || results[1].Entry.SPIFFEID != a.SPIFFEID {
			t.Errorf("second: %+v", results[1])
		}
	})
	t.Run("two similar ones in one batch: the first is made, the second told so", func(t *testing.T) {
		r, _ := open(t)
		results, _, err := r.CreateEntries(t.Context(), []*identity.Entry{entry("a", "a:1"), entry("a", "a:1"), entry("a", "a:1")})
		if err != nil {
			t.Fatal(err)
		}
		if results[0].Err != nil {
			t.Errorf("first: %v", results[0].Err)
		}
		for _, res := range results[1:] {
			if !errors.Is(res.Err, ErrExists) || res.Entry.ID != results[0].Entry.ID {
				t.Errorf("later: %+v", res)
			}
		}
	})
	t.Run("one bad item fails no other", func(t *testing.T) {
		r, _ := open(t)
		create(t, r, entry("17", "a:17"))
		var batch []*identity.Entry
		for i := range 250 {
			batch = append(batch, entry(fmt.Sprint(i), fmt.Sprintf("a:%d", i)))
		}
		batch[3] = nil
		batch[5].FederatesWith = []spiffeid.TrustDomain{other}
		batch[7].ID = strings.Repeat("x", 300)
		var huge []attestor.Selector
		for i := range 300 {
			huge = append(huge, attestor.Selector{Type: "t", Value: strings.Repeat("v", 4000) + fmt.Sprint(i)})
		}
		batch[9].Selectors = attestor.NewSet(huge...)
		results, _, err := r.CreateEntries(t.Context(), batch)
		if err != nil {
			t.Fatal(err)
		}
		var missing *MissingBundleError
		for i, res := range results {
			switch i {
			case 3, 7:
				if res.Err == nil || res.Entry != nil {
					t.Errorf("item %d: %+v", i, res)
				}
			case 5:
				if !errors.Is(res.Err, ErrBundle) || !errors.As(res.Err, &missing) || missing.TrustDomain != other {
					t.Errorf("item %d: %v", i, res.Err)
				}
			case 9:
				if !errors.Is(res.Err, kv.ErrTooLarge) {
					t.Errorf("item %d: %v", i, res.Err)
				}
			case 17:
				if !errors.Is(res.Err, ErrExists) {
					t.Errorf("item %d: %v", i, res.Err)
				}
			default:
				if res.Err != nil || res.Entry == nil {
					t.Errorf("item %d: %v", i, res.Err)
				}
			}
		}
		snapshot, err := r.Snapshot(t.Context())
		if err != nil || len(snapshot.Entries) != 246 {
			t.Errorf("%d entries, %v", len(snapshot.Entries), err)
		}
	})
	t.Run("of 50 who create the same entry at once exactly one does", func(t *testing.T) {
		r, _ := open(t)
		var made atomic.Int32
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() {
				results, _, err := r.CreateEntries(t.Context(), []*identity.Entry{entry("a", "a:1"), entry("b", "a:1")})
				if err != nil {
					t.Error(err)
					return
				}
				for _, res := range results {
					switch {
					case res.Err == nil:
						made.Add(1)
					case !errors.Is(res.Err, ErrExists) || res.Entry == nil:
						t.Errorf("result %+v", res)
					}
				}
			})
		}
		group.Wait()
		if made.Load() != 2 {
			t.Errorf("%d were made", made.Load())
		}
	})
	t.Run("an entry may be its own parent and federate with a known trust domain", func(t *testing.T) {
		r, _ := open(t)
		if _, _, err := r.UpdateBundle(t.Context(), other, func(*identity.Bundle) error { return nil }); err != nil {
			t.Fatal(err)
		}
		e := entry("probe", "a:1")
		e.ParentID = e.SPIFFEID
		e.FederatesWith = []spiffeid.TrustDomain{domain, other}
		create(t, r, e)
	})
	t.Run("nothing is tried with a canceled context", func(t *testing.T) {
		r, _ := open(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := r.CreateEntries(ctx, []*identity.Entry{entry("a", "a:1")}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestUpdateEntry(t *testing.T) {
	t.Run("an update bumps the revision and keeps ID and creation time", func(t *testing.T) {
		r, c := open(t)
		e := create(t, r, entry("a", "a:1"))
		c.set(noon.Add(time.Hour))
		for want := int64(1); want <= 3; want++ {
			got, rev, err := r.UpdateEntry(t.Context(), e.ID, func(e *identity.Entry) error {
				e.ID, e.CreatedAt, e.Revision = "x", time.Time{}, 99
				e.DNSNames = append(e.DNSNames, "name")
				return nil
			})
			if err != nil || rev == 0 || got.ID != e.ID || !got.CreatedAt.Equal(noon) || got.Revision != want || len(got.DNSNames) != int(want) {
				t.Errorf("update: %+v, %d, %v", got, rev, err)
			}
		}
	})
	t.Run("an entry cannot become similar to another one", func(t *testing.T) {
		r, _ := open(t)
		a, b := create(t, r, entry("a", "a:1")), create(t, r, entry("b", "a:1"))
		become := func(e *identity.Entry) error { e.SPIFFEID = a.SPIFFEID; return nil }
		if _, _, err := r.UpdateEntry(t.Context(), b.ID, become); !errors.Is(err, ErrExists) {
			t.Errorf("update: %v", err)
		}
		// The place is free once the other one has left it.
		leave := func(e *identity.Entry) error { e.Selectors = sel("c:1"); return nil }
		if _, _, err := r.UpdateEntry(t.Context(), a.ID, leave); err != nil {
			t.Fatal(err)
		}
		if _, _, err := r.UpdateEntry(t.Context(), b.ID, become); err != nil {
			t.Errorf("update: %v", err)
		}
	})
	t.Run("expiry and alias indexes follow", func(t *testing.T) {
		r, _ := open(t)
		e := create(t, r, entry("a", "a:1"))
		node := agent("join_token/secret")
		for _, change := range []func(*identity.Entry){
			func(e *identity.Entry) { e.ExpiresAt = noon.Add(time.Hour + time.Millisecond) },
			func(e *identity.Entry) { e.ParentID, e.Selectors = node, sel("spiffe_id:"+node.String()) },
			func(e *identity.Entry) { e.ExpiresAt = noon.Add(2 * time.Hour) },
			func(e *identity.Entry) { e.ExpiresAt, e.ParentID = time.Time{}, agent("x") },
		} {
			_, _, err := r.UpdateEntry(t.Context(), e.ID, func(e *identity.Entry) error { change(e); return nil })
			if err != nil {
				t.Fatal(err)
			}
			checkTree(t, r.store)
		}
	})
	t.Run("50 at once all get through, one after the other", func(t *testing.T) {
		r, _ := open(t)
		e := create(t, r, entry("a", "a:1"))
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() {
				_, _, err := r.UpdateEntry(t.Context(), e.ID, func(e *identity.Entry) error { e.X509SVIDTTL += time.Second; return nil })
				if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		got, err := r.Entry(t.Context(), e.ID)
		if err != nil || got.Revision != 50 || got.X509SVIDTTL != 50*time.Second {
			t.Errorf("entry %+v, %v", got, err)
		}
	})
	t.Run("what cannot be is refused", func(t *testing.T) {
		r, _ := open(t)
		e := create(t, r, entry("a", "a:1"))
		nothing := func(*identity.Entry) error { return nil }
		if _, _, err := r.UpdateEntry(t.Context(), "none", nothing); !errors.Is(err, ErrNotFound) {
			t.Errorf("missing entry: %v", err)
		}
		want := errors.New("no")
		if _, _, err := r.UpdateEntry(t.Context(), e.ID, func(*identity.Entry) error { return want }); err != want { //nolint:errorlint // returned as it is
			t.Errorf("error of change: %v", err)
		}
		federate := func(e *identity.Entry) error { e.FederatesWith = []spiffeid.TrustDomain{other}; return nil }
		if _, _, err := r.UpdateEntry(t.Context(), e.ID, federate); !errors.Is(err, ErrBundle) {
			t.Errorf("missing bundle: %v", err)
		}
	})
}

func TestDeleteEntries(t *testing.T) {
	r, _ := open(t)
	var ids []string
	for i := range 120 {
		e := entry("a", fmt.Sprintf("a:%d", i))
		e.ExpiresAt = noon.Add(time.Hour)
		ids = append(ids, create(t, r, e).ID)
	}
	ask := append(slices.Clone(ids), "none", ids[0])
	errs, rev, err := r.DeleteEntries(t.Context(), ask)
	if err != nil || rev == 0 {
		t.Fatalf("revision %d, %v", rev, err)
	}
	for i, err := range errs {
		if i < len(ids) && err != nil || i >= len(ids) && !errors.Is(err, ErrNotFound) {
			t.Errorf("item %d: %v", i, err)
		}
	}
	if s, err := r.Snapshot(t.Context()); err != nil || len(s.Entries) != 0 {
		t.Errorf("%d entries are left, %v", len(s.Entries), err)
	}
	create(t, r, entry("a", "a:1")) // the place is free again
	if _, err := r.Entry(t.Context(), ids[0]); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

func TestRacingUpdatesAndDeletes(t *testing.T) {
	r, _ := open(t)
	var group sync.WaitGroup
	for round := range 10 {
		e := create(t, r, entry("a", fmt.Sprintf("a:%d", round)))
		var deleted atomic.Int32
		for i := range 6 {
			group.Go(func() {
				_, _, err := r.UpdateEntry(t.Context(), e.ID, func(e *identity.Entry) error {
					e.ExpiresAt = noon.Add(time.Duration(i+1) * time.Hour)
					return nil
				})
				if err != nil && !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
			})
			group.Go(func() {
				errs, _, err := r.DeleteEntries(t.Context(), []string{e.ID})
				switch {
				case err != nil:
					t.Error(err)
				case errs[0] == nil:
					deleted.Add(1)
				case !errors.Is(errs[0], ErrNotFound):
					t.Error(errs[0])
				}
			})
		}
		group.Wait()
		if deleted.Load() != 1 {
			t.Errorf("deleted %d times", deleted.Load())
		}
	}
}

func TestManyEqualEntriesInOneBatch(t *testing.T) {
	r, _ := open(t)
	one := entry("web", "unix:uid:1")
	batch := make([]*identity.Entry, 20_000) // looked at one after the other, each with all that are left: 200 million looks
	for i := range batch {
		batch[i] = one
	}
	results, _, err := r.CreateEntries(t.Context(), batch)
	if err != nil || results[0].Err != nil {
		t.Fatalf("got %v, %v", results[0].Err, err)
	}
	for i, got := range results[1:] {
		if !errors.Is(got.Err, ErrExists) || got.Entry.ID != results[0].Entry.ID {
			t.Fatalf("entry %d: got %+v", i+1, got)
		}
	}
}
