package issue_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/issue"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestRenewal(t *testing.T) {
	facts := set("a:1")
	t.Run("a followed SVID is renewed around half of its life, for as long as it is followed", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			pass(26 * time.Minute)
			if s.count() != 1 {
				t.Error("too early")
			}
			pass(8 * time.Minute)
			if s.count() != 2 {
				t.Error("too late")
			}
			pass(10 * time.Hour)
			if n := s.count(); n < 18 || n > 25 {
				t.Errorf("%d renewals in ten hours", n)
			}
			s.close()
			before, _ := w.signer.count()
			pass(10 * time.Hour)
			if after, _ := w.signer.count(); after > before+2 {
				t.Errorf("%d signatures for nobody", after-before)
			}
			if x, _ := w.issuer.Counts(); x != 0 {
				t.Errorf("%d SVIDs held that have expired", x)
			}
		})
	})
	t.Run("while the server is away what is valid is served, and nothing that has expired", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			w.signer.set(func() { w.signer.err = errAway })
			pass(58 * time.Minute)
			c, err := s.last()
			wantIDs(t, c, "e")
			if err != nil {
				t.Error(err)
			}
			if n := w.missing(); n != 0 {
				t.Errorf("%v identities are missing while one is valid", n)
			}
			pass(2 * time.Minute)
			c, err = s.last()
			if n := w.missing(); n != 1 {
				t.Errorf("%v identities are missing", n)
			}
			if len(c.SVIDs) != 0 || !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("got %v %v", ids(c), err)
			}
			if _, _, err := w.issuer.X509(w.t.Context(), facts); !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
			pass(time.Hour)
			tries, _ := w.signer.count()
			if tries > 1000 {
				t.Errorf("%d tries in an hour and a half", tries)
			}
			w.signer.set(func() { w.signer.err = nil })
			w.issuer.Retry()
			pass(10 * time.Millisecond)
			c, err = s.last()
			wantIDs(t, c, "e")
			if err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("a failed first signature comes by itself when the server is back", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.signer.set(func() { w.signer.err = errAway })
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Second)
			if _, err := s.last(); !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
			w.signer.set(func() { w.signer.err = nil })
			pass(20 * time.Second)
			c, _ := s.last()
			wantIDs(t, c, "e")
		})
	})
	t.Run("an entry the server does not know yet is asked for again with the next picture", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.signer.set(func() { w.signer.errs["e"] = identity.ErrUnknownEntry })
			w.put(entry("e", 1, "a:1"), entry("f", 0, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(10 * time.Millisecond)
			c, _ := s.last()
			wantIDs(t, c, "f")
			w.signer.set(func() { delete(w.signer.errs, "e") })
			w.put(entry("unrelated", 0, "a:9"))
			pass(10 * time.Millisecond)
			c, _ = s.last()
			wantIDs(t, c, "e", "f")
		})
	})
	t.Run("what can be had is not held up long by what cannot", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("f", 0, "a:1"))
			w.fetch(facts)
			w.signer.set(func() { w.signer.delay = time.Hour })
			w.put(entry("e", 1, "a:1"))
			began := time.Now()
			c, _ := w.fetch(facts)
			wantIDs(t, c, "f")
			if took := time.Since(began); took > 3*time.Second {
				t.Errorf("took %v", took)
			}
		})
	})
	t.Run("a caller who gives up does not stop the signing", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			w.signer.set(func() { w.signer.delay = time.Second })
			ctx, cancel := context.WithTimeout(w.t.Context(), time.Millisecond)
			defer cancel()
			if _, _, err := w.issuer.X509(ctx, facts); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
			pass(2 * time.Second)
			w.fetch(facts)
			if x, _ := w.signer.count(); x != 1 {
				t.Errorf("signed %d times", x)
			}
		})
	})
	t.Run("a clock that jumps ahead is noticed within half a minute", func(t *testing.T) {
		var mu sync.Mutex
		var ahead time.Duration
		now := func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(ahead) }
		bubble(t, issue.Config{Now: now}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Second)
			w.signer.set(func() { w.signer.x509TTL = 3 * time.Hour })
			mu.Lock()
			ahead = 45 * time.Minute
			mu.Unlock()
			pass(31 * time.Second)
			if s.count() != 2 {
				t.Errorf("got %d answers", s.count())
			}
		})
	})
}

func TestAuthorities(t *testing.T) {
	facts := set("a:1")
	t.Run("what a tainted authority signed is replaced at once and served until then", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			before, _ := s.last()
			w.signer.rotate()
			w.bundle = &identity.Bundle{TrustDomain: td, Sequence: 2, X509: []identity.X509Authority{
				{Certificate: w.signer.ca}, {Certificate: w.bundle.X509[0].Certificate, Tainted: true},
			}}
			w.signer.set(func() { w.signer.delay = time.Second })
			w.apply()
			pass(100 * time.Millisecond)
			c, _ := s.last()
			if c.SVIDs[0] != before.SVIDs[0] || c.Bundle.Sequence != 2 {
				t.Error("not served meanwhile")
			}
			pass(2 * time.Second)
			c, _ = s.last()
			if c.SVIDs[0] == before.SVIDs[0] {
				t.Error("not replaced")
			}
			pass(time.Minute)
			if x, _ := w.signer.count(); x != 2 {
				t.Errorf("signed %d times", x)
			}
		})
	})
	t.Run("what a tainted authority signed for nobody present is replaced too", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			pass(time.Minute)
			s.close()
			pass(5 * time.Minute) // nobody follows it any more
			old := w.bundle.X509[0].Certificate
			w.signer.rotate()
			w.bundle = &identity.Bundle{TrustDomain: td, Sequence: 2, X509: []identity.X509Authority{
				{Certificate: w.signer.ca}, {Certificate: old, Tainted: true},
			}}
			w.apply()
			pass(time.Second)
			if x, _ := w.signer.count(); x != 2 {
				t.Errorf("signed %d times", x)
			}
		})
	})
	t.Run("a server that goes on signing with a tainted authority is asked again, at a pace", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence, w.bundle.X509[0].Tainted = 2, true
			w.apply()
			pass(10 * time.Second)
			x, _ := w.signer.count()
			if x < 5 || x > 60 {
				t.Errorf("signed %d times", x)
			}
			w.signer.rotate()
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence = 3
			w.bundle.X509 = append(w.bundle.X509, identity.X509Authority{Certificate: w.signer.ca})
			w.apply()
			pass(2 * time.Second)
			x, _ = w.signer.count()
			pass(time.Minute)
			if again, _ := w.signer.count(); again != x {
				t.Errorf("signed %d times after the authority was replaced", again-x)
			}
		})
	})
	t.Run("who signed what is held is known", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"), entry("f", 2, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			first, changed := w.issuer.Holding()
			if len(first.By) != 1 || first.By[0].X509 != 2 || first.By[0].JWT != 0 {
				t.Fatalf("holds %+v", first)
			}
			if _, _, err := w.issuer.JWT(w.t.Context(), facts, []string{"x"}, spiffeid.RequireFromPath(td, "/e")); err != nil {
				t.Fatal(err)
			}
			select {
			case <-changed:
			default:
				t.Error("nobody was woken")
			}
			second, _ := w.issuer.Holding()
			if len(second.By) != 2 || second.Latest[1] != "k1" {
				t.Errorf("holds %+v", second)
			}
			w.put(entry("g", 3, "a:1"))
			pass(time.Second)
			if third, _ := w.issuer.Holding(); third.By[0].X509+third.By[1].X509 != 3 || third.Latest != second.Latest {
				t.Errorf("holds %+v", third)
			}
			w.delete("e", "f", "g")
			pass(time.Second)
			if none, _ := w.issuer.Holding(); len(none.By) != 0 {
				t.Errorf("holds %+v", none)
			}
		})
	})
	t.Run("what a revoked authority signed is not served any more", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			w.signer.rotate()
			w.signer.set(func() { w.signer.err = errAway })
			w.bundle = &identity.Bundle{TrustDomain: td, Sequence: 2, X509: []identity.X509Authority{{Certificate: w.signer.ca}}}
			w.apply()
			pass(100 * time.Millisecond)
			if c, err := s.last(); len(c.SVIDs) != 0 || !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("got %v %v", ids(c), err)
			}
		})
	})
	t.Run("an SVID of an authority that the bundle does not have yet is kept", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.signer.rotate()
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence = 2
			w.apply()
			pass(time.Minute)
			c, _ := s.last()
			wantIDs(t, c, "e")
			if x, _ := w.signer.count(); x != 1 {
				t.Errorf("signed %d times", x)
			}
		})
	})
}
