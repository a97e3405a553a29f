package robust

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab/site"
)

// TestKill kills a server again and again while 32 callers create entries, and delete some.
func TestKill(t *testing.T) {
	t.Parallel()
	rounds := 20
	if testing.Short() {
		rounds = 5
	}
	s := newSite(t)
	s.LogLevel = "info"
	h := newHistory()
	start(t, s)
	var slowest time.Duration
	for round := range rounds {
		killDuringCreates(t, s, h, round)
		// The store is whole before anybody could have repaired it.
		mustCheck(t, s)
		began := time.Now()
		start(t, s)
		slowest = max(slowest, time.Since(began))
		conn := dial(t, s)
		h.check(t, conn)
		h.revision(t, conn)
		if t.Failed() {
			t.Fatalf("after round %d", round)
		}
	}
	t.Logf("%d entries after %d rounds at revision %d; the slowest restart took %v", len(h.held), rounds, h.rev, slowest.Round(time.Millisecond))
	stop(t, s)
	mustCheck(t, s)
}

// killDuringCreates ends the server with kill -9 in the middle of it all.
func killDuringCreates(t *testing.T, s *site.Site, h *history, round int) {
	t.Helper()
	conn := dial(t, s)
	ctx := patiently(t)
	server := s.Server()
	killAfter := int64(40 + rand.IntN(400))
	var acknowledged atomic.Int64
	var kill sync.Once
	var callers sync.WaitGroup
	for w := range 32 {
		callers.Go(func() {
			for i := 0; ; i++ {
				made, err := h.create(ctx, conn, newEntry("/node", fmt.Sprintf("/r%d/w%d/%d", round, w, i)))
				if err != nil {
					select {
					case <-server.Done():
					default:
						// The connection breaks a moment before the process is gone.
						<-server.Done()
					}
					return
				}
				if i%5 == 4 {
					if err := h.remove(ctx, conn, made); err != nil {
						return
					}
				}
				if acknowledged.Add(1) >= killAfter {
					kill.Do(server.Kill)
				}
			}
		})
	}
	callers.Wait()
	if n := acknowledged.Load(); n < killAfter {
		t.Fatalf("round %d: only %d of %d creations were acknowledged: %s", round, n, killAfter, site.Tail(s.ServerLog(), 5))
	}
	_ = conn.Close()
}
