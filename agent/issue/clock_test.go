package issue_test

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/assay-id/assay/agent/issue"
)

// setClock is a wall clock that a test sets. As one that was set, it tells nothing of the time that has
// passed: the issuer gets no monotonic reading to hold on to.
type setClock struct{ off atomic.Int64 }

func (c *setClock) Now() time.Time      { return time.Now().Round(0).Add(time.Duration(c.off.Load())) }
func (c *setClock) set(d time.Duration) { c.off.Store(int64(d)) }

func TestClock(t *testing.T) {
	facts := set("a:1")
	const many = 50
	fill := func(w *world) {
		for n := range many {
			w.put(entry(fmt.Sprintf("e%02d", n), n, "a:1"))
		}
	}
	t.Run("a clock that is set a day ahead and back has nothing signed anew", func(t *testing.T) {
		clock := new(setClock)
		bubble(t, issue.Config{Now: clock.Now}, func(w *world) {
			fill(w)
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			before, err := s.last()
			if err != nil || len(before.SVIDs) != many {
				t.Fatalf("%d SVIDs, %v", len(before.SVIDs), err)
			}

			clock.set(24 * time.Hour)
			calls, _ := w.signer.count()
			pass(10 * time.Minute)
			if c, err := s.last(); err == nil || len(c.SVIDs) != 0 {
				t.Errorf("%d SVIDs are served that the clock says have expired, %v", len(c.SVIDs), err)
			}
			if now, _ := w.signer.count(); now-calls > 100 {
				t.Errorf("the server was asked %d times in ten minutes", now-calls)
			}

			clock.set(0)
			pass(31 * time.Second)
			calls, _ = w.signer.count()
			after, err := s.last()
			if err != nil || len(after.SVIDs) != many {
				t.Fatalf("%d SVIDs are back, %v", len(after.SVIDs), err)
			}
			for n := range before.SVIDs {
				if before.SVIDs[n] != after.SVIDs[n] {
					t.Errorf("%s was signed anew", before.SVIDs[n].EntryID)
				}
			}
			pass(10 * time.Minute)
			if now, _ := w.signer.count(); now != calls {
				t.Errorf("the server was asked %d times more", now-calls)
			}
		})
	})
	t.Run("who asks finds at once that the clock was set, or that the machine slept, and so do those who follow", func(t *testing.T) {
		clock := new(setClock)
		bubble(t, issue.Config{Now: clock.Now}, func(w *world) {
			fill(w)
			s := w.stream(facts)
			defer s.close()
			pass(time.Minute)
			if c, err := s.last(); err != nil || len(c.SVIDs) != many {
				t.Fatalf("%d SVIDs, %v", len(c.SVIDs), err)
			}
			w.signer.set(func() { w.signer.err = errors.New("the server is away") })

			clock.set(24 * time.Hour)
			if c, _, err := w.issuer.X509(w.t.Context(), facts); err == nil || len(c.SVIDs) != 0 {
				t.Errorf("who asks is given %d that have expired, %v", len(c.SVIDs), err)
			}
			if c, err := s.last(); err == nil || len(c.SVIDs) != 0 {
				t.Errorf("who follows has %d that have expired, %v", len(c.SVIDs), err)
			}

			clock.set(0)
			if c, _, err := w.issuer.X509(w.t.Context(), facts); err != nil || len(c.SVIDs) != many {
				t.Errorf("who asks is given %d of %d, %v", len(c.SVIDs), many, err)
			}
			if c, err := s.last(); err != nil || len(c.SVIDs) != many {
				t.Errorf("who follows has %d of %d, %v", len(c.SVIDs), many, err)
			}
		})
	})
	t.Run("behind a clock that is a day late SVIDs are renewed all the same", func(t *testing.T) {
		clock := new(setClock)
		clock.set(-24 * time.Hour)
		bubble(t, issue.Config{Now: clock.Now}, func(w *world) {
			fill(w)
			s := w.stream(facts)
			defer s.close()
			for range 100 {
				pass(3 * time.Minute)
				c, err := s.last()
				if err != nil || len(c.SVIDs) != many {
					t.Fatalf("%d SVIDs, %v", len(c.SVIDs), err)
				}
				for _, svid := range c.SVIDs {
					if !time.Now().Before(svid.NotAfter) {
						t.Fatalf("%s was served that had expired by everybody else's clock", svid.EntryID)
					}
				}
			}
		})
	})
	t.Run("an SVID that has really expired is let go in the end", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			s := w.stream(facts)
			pass(time.Minute)
			s.close()
			pass(28 * time.Hour)
			if x509, _ := w.issuer.Counts(); x509 != 0 {
				t.Errorf("%d are held", x509)
			}
		})
	})
}
