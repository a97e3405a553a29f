package issue_test

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/issue"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

var errAway = fmt.Errorf("nobody answers: %w", identity.ErrUnavailable)

func wantIDs(t *testing.T, c identity.X509Context, want ...string) {
	t.Helper()
	if want == nil {
		want = []string{}
	}
	if diff := cmp.Diff(want, ids(c)); diff != "" {
		t.Error(diff)
	}
}

func TestFirstUse(t *testing.T) {
	t.Run("entries come oldest first, with bundles and one per hint", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			other := spiffeid.RequireTrustDomainFromString("other.org")
			w.others = []*identity.Bundle{{TrustDomain: other}, {TrustDomain: spiffeid.RequireTrustDomainFromString("third.org")}}
			young, old := entry("young", 1, "a:1"), entry("old", 9, "a:1")
			young.Hint, old.Hint = "x", "x"
			plain, plain2 := entry("plain", 5, "a:1", "a:2"), entry("plain2", 4, "a:2")
			plain.FederatesWith = []spiffeid.TrustDomain{other}
			stored := entry("stored", 3, "a:1")
			stored.StoreSVID = true
			w.put(young, old, plain, plain2, stored, entry("not", 1, "a:3"))
			c, _ := w.fetch(set("a:1", "a:2"))
			wantIDs(t, c, "old", "plain", "plain2")
			if c.SVIDs[0].Hint != "x" || c.Bundle == nil || len(c.Federated) != 1 || c.Federated[0].TrustDomain != other || c.Rev != w.rev {
				t.Errorf("got %+v", c)
			}
			b, _ := w.issuer.Bundles(set("a:1", "a:2"))
			if b.Matched != 3 || len(b.Federated) != 1 || b.Own != c.Bundle {
				t.Errorf("bundles %+v", b)
			}
		})
	})
	t.Run("no match is no error and costs no signature", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			c, changed := w.fetch(set("a:1"))
			wantIDs(t, c)
			w.put(entry("e", 1, "a:1"))
			<-changed
		})
	})
	t.Run("a thousand callers at once are one batch", func(t *testing.T) {
		bubble(t, issue.Config{X509Size: 10}, func(w *world) {
			for n := range 20 {
				w.entries[fmt.Sprint("e", n)] = entry(fmt.Sprint("e", n), 1, fmt.Sprint("a:", n))
			}
			w.apply()
			var wg sync.WaitGroup
			for n := range 1000 {
				wg.Go(func() {
					c, _, err := w.issuer.X509(w.t.Context(), set(fmt.Sprint("a:", n%20)))
					if err != nil || len(c.SVIDs) != 1 {
						t.Errorf("got %v %v", c, err)
					}
				})
			}
			wg.Wait()
			if x, _ := w.signer.count(); x != 1 || len(w.signer.batches[0]) != 20 {
				t.Errorf("batches: %v", w.signer.batches)
			}
		})
	})
	t.Run("equal facts share one answer", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			a, _ := w.fetch(set("a:1"))
			b, _ := w.fetch(set("a:1"))
			if &a.SVIDs[0] != &b.SVIDs[0] {
				t.Error("two answers")
			}
		})
	})
	t.Run("more than a batch holds goes in several", func(t *testing.T) {
		bubble(t, issue.Config{X509Size: 2000}, func(w *world) {
			for n := range 1100 {
				w.entries[fmt.Sprint("e", n)] = entry(fmt.Sprint("e", n), 1, "a:1")
			}
			w.apply()
			c, _ := w.fetch(set("a:1"))
			if len(c.SVIDs) != 1100 {
				t.Errorf("got %d", len(c.SVIDs))
			}
			for _, b := range w.signer.batches {
				if len(b) > 500 {
					t.Errorf("batch of %d", len(b))
				}
			}
		})
	})
}

func TestPush(t *testing.T) {
	facts := set("a:1")
	t.Run("an entry for a present workload is signed before anybody asks", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			s := w.stream(facts)
			defer s.close()
			if c, err := s.last(); err != nil || len(c.SVIDs) != 0 {
				t.Fatal(c, err)
			}
			w.put(entry("e", 1, "a:1"))
			pass(10 * time.Millisecond)
			c, _ := s.last()
			wantIDs(t, c, "e")
			if s.count() != 2 {
				t.Errorf("woken %d times for one change", s.count()-1)
			}
		})
	})
	t.Run("a changed entry keeps its SVID until the new one is there", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(10 * time.Millisecond)
			before, _ := s.last()
			w.signer.set(func() { w.signer.delay = time.Second })
			e := entry("e", 1, "a:1")
			e.Revision = 1
			w.put(e)
			pass(100 * time.Millisecond)
			if c, _ := s.last(); c.SVIDs[0] != before.SVIDs[0] {
				t.Error("the old SVID was taken away")
			}
			pass(2 * time.Second)
			if c, _ := s.last(); c.SVIDs[0] == before.SVIDs[0] {
				t.Error("not signed again")
			}
		})
	})
	t.Run("an entry with another ID loses its SVID at once", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"), entry("f", 0, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(10 * time.Millisecond)
			w.signer.set(func() { w.signer.err = errAway })
			e := entry("e", 1, "a:1")
			e.SPIFFEID, e.Revision = spiffeid.RequireFromPath(td, "/else"), 1
			w.put(e)
			pass(10 * time.Millisecond)
			c, err := s.last()
			wantIDs(t, c, "f")
			if err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("a deleted entry is gone at once, while another is still being signed", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"), entry("f", 0, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(10 * time.Millisecond)
			w.signer.set(func() { w.signer.delay = time.Hour })
			delete(w.entries, "e")
			w.put(entry("g", 0, "a:1"))
			pass(3 * time.Second)
			c, _ := s.last()
			wantIDs(t, c, "f")
		})
	})
	t.Run("the last entry deleted leaves nothing, here and in what is kept", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(10 * time.Millisecond)
			if len(w.store.saved()) != 1 {
				t.Error("not kept")
			}
			w.delete("e")
			pass(0)
			c, err := s.last()
			if len(c.SVIDs) != 0 || err != nil {
				t.Error(c, err)
			}
			if len(w.store.saved()) != 0 {
				t.Error("still kept")
			}
		})
	})
	t.Run("a new bundle is pushed without signing", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(10 * time.Millisecond)
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence = 2
			w.apply()
			pass(0)
			if c, _ := s.last(); c.Bundle.Sequence != 2 {
				t.Error("not pushed")
			}
			if x, _ := w.signer.count(); x != 1 {
				t.Errorf("signed %d times", x)
			}
		})
	})
	t.Run("a change for others wakes nobody", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(10 * time.Millisecond)
			n := s.count()
			w.put(entry("x", 1, "a:2"))
			pass(time.Second)
			if s.count() != n {
				t.Error("woken")
			}
		})
	})
	t.Run("an entry that is not to be prefetched is signed when asked for", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			_, changed := w.fetch(facts)
			e := entry("e", 1, "a:1")
			e.NoPrefetch = true
			w.put(e)
			<-changed
			pass(time.Second)
			if x, _ := w.signer.count(); x != 0 {
				t.Error("was signed")
			}
			c, _ := w.fetch(facts)
			wantIDs(t, c, "e")
		})
	})
	t.Run("an entry that expires is gone at that moment", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			e := entry("e", 1, "a:1")
			e.ExpiresAt = time.Now().Add(10 * time.Second)
			w.put(e)
			s := w.stream(facts)
			defer s.close()
			pass(9 * time.Second)
			c, _ := s.last()
			wantIDs(t, c, "e")
			pass(time.Second)
			c, _ = s.last()
			wantIDs(t, c)
		})
	})
	t.Run("facts that only ask for bundles cost no signature", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			_, changed := w.issuer.Bundles(facts)
			w.put(entry("e", 1, "a:1"))
			<-changed
			b, _ := w.issuer.Bundles(facts)
			pass(time.Second)
			if x, _ := w.signer.count(); x != 0 || b.Matched != 1 {
				t.Errorf("signed %d times, matched %d", x, b.Matched)
			}
		})
	})
}

func TestServedFromBeforeTheRestart(t *testing.T) {
	facts := set("a:1")
	bubble(t, issue.Config{}, func(w *world) {
		w.put(entry("e", 1, "a:1"), entry("changed", 0, "a:1"), entry("moved", 0, "a:1"), entry("gone", 0, "a:1"))
		before, _ := w.fetch(facts)
		w.store.old = w.store.saved()
		if len(w.store.old) != 4 {
			t.Fatalf("kept %d", len(w.store.old))
		}
		w.stop()
		if _, _, err := w.issuer.X509(w.t.Context(), set("a:1", "b:new")); err != nil {
			t.Errorf("a stopped issuer gives what it has: %v", err)
		}
		changed, moved := entry("changed", 0, "a:1"), entry("moved", 0, "a:1")
		changed.Revision = 1
		moved.Revision, moved.SPIFFEID = 1, spiffeid.RequireFromPath(td, "/elsewhere")
		delete(w.entries, "gone")
		w.put(changed, moved)
		w.signer.set(func() { w.signer.err = errAway })
		w.start(issue.Config{})
		c, _ := w.fetch(facts)
		wantIDs(t, c, "e", "changed")
		if c.SVIDs[0] != before.SVIDs[0] {
			t.Error("what is kept is not what is served")
		}
		w.signer.set(func() { w.signer.err = nil; w.signer.batches = nil })
		w.issuer.Retry()
		pass(time.Minute)
		c, _ = w.fetch(facts)
		for _, b := range w.signer.batches {
			for _, id := range b {
				if id == "e" {
					t.Error("what was not changed was signed again")
				}
			}
		}
		wantIDs(t, c, "e", "changed", "moved")
	})
	t.Run("what expired meanwhile is not served", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			w.fetch(facts)
			w.store.old = w.store.saved()
			w.stop()
			pass(2 * time.Hour)
			w.signer.set(func() { w.signer.err = errAway })
			w.start(issue.Config{})
			if _, _, err := w.issuer.X509(w.t.Context(), facts); !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
		})
	})
}

func TestBounds(t *testing.T) {
	t.Run("SVIDs beyond the size go when nobody follows them, the longest unused first", func(t *testing.T) {
		bubble(t, issue.Config{X509Size: 3}, func(w *world) {
			for n := range 10 {
				w.entries[fmt.Sprint("e", n)] = entry(fmt.Sprint("e", n), 1, fmt.Sprint("a:", n))
			}
			w.apply()
			s := w.stream(set("a:0"))
			defer s.close()
			for n := 1; n < 10; n++ {
				w.fetch(set(fmt.Sprint("a:", n)))
				pass(time.Second)
			}
			if x, _ := w.issuer.Counts(); x < 10 {
				t.Errorf("%d held while all may be followed", x)
			}
			// Their renewal wakes nobody but the stream, and after it nobody follows the others.
			pass(2 * time.Hour)
			if x, _ := w.issuer.Counts(); x > 3 {
				t.Errorf("%d held", x)
			}
			c, _ := s.last()
			wantIDs(t, c, "e0")
		})
	})
	t.Run("facts that nobody follows are forgotten", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			for n := range 20000 {
				w.issuer.Bundles(set(fmt.Sprint("a:", n)))
			}
			s := w.stream(set("a:1"))
			defer s.close()
			w.put(entry("e", 1, "a:1"))
			pass(time.Second)
			c, _ := s.last()
			wantIDs(t, c, "e")
		})
	})
}

func TestKeyTypes(t *testing.T) {
	for _, kind := range []issue.KeyType{issue.KeyEC256, issue.KeyEC384, issue.KeyRSA2048} {
		t.Run("keys are of the type "+string(kind), func(t *testing.T) {
			bubble(t, issue.Config{KeyType: kind}, func(w *world) {
				w.put(entry("e", 1, "a:1"))
				c, _ := w.fetch(set("a:1"))
				got := ""
				switch k := c.SVIDs[0].Key.(type) {
				case *ecdsa.PrivateKey:
					got = map[string]string{"P-256": "ec-p256", "P-384": "ec-p384"}[k.Curve.Params().Name]
				case *rsa.PrivateKey:
					got = fmt.Sprint("rsa-", k.N.BitLen())
				}
				if got != string(kind) {
					t.Errorf("got %s", got)
				}
			})
		})
	}
	t.Run("another type is refused", func(t *testing.T) {
		if _, err := issue.New(nil, nil, nil, issue.Config{KeyType: "dsa"}); err == nil {
			t.Error("it is not")
		}
	})
}

// BenchmarkFetch measures what a stream costs that asks for what is there.
func BenchmarkFetch(b *testing.B) {
	w := &world{t: b, signer: newSigner(b), store: &memory{}, entries: map[string]*identity.Entry{}}
	benchmark(b, w, set("a:1"))
}

func benchmark(b *testing.B, w *world, facts attestor.Set) {
	w.view = newView()
	w.bundle = &identity.Bundle{TrustDomain: td, Sequence: 1}
	for n := range 1000 {
		e := entry(fmt.Sprint("x", n), 1, fmt.Sprint("b:", n))
		w.entries[e.ID] = e
	}
	w.put(entry("e", 1, "a:1"))
	w.start(issue.Config{})
	defer w.stop()
	if _, _, err := w.issuer.X509(b.Context(), facts); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, _, err := w.issuer.X509(b.Context(), facts); err != nil {
			b.Fatal(err)
		}
	}
}

func TestStop(t *testing.T) {
	bubble(t, issue.Config{}, func(w *world) {
		w.put(entry("e", 1, "a:1"))
		w.signer.set(func() { w.signer.delay = time.Hour })
		got := make(chan error, 1)
		go func() {
			_, _, err := w.issuer.X509(w.t.Context(), set("a:1"))
			got <- err
		}()
		synctest.Wait()
		w.stop()
		if err := <-got; !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("who waits at the end is told %v", err)
		}
		if _, _, err := w.issuer.JWT(w.t.Context(), set("a:1"), []string{"x"}, spiffeid.ID{}); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("who asks after the end is told %v", err)
		}
	})
}
