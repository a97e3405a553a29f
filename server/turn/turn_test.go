package turn

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

// line is a Stile whose only place is taken, and those who wait for it in the order they came.
type line struct {
	t      *testing.T
	stile  *Stile
	ctx    context.Context
	mu     sync.Mutex
	served []string
	done   sync.WaitGroup
}

func newLine(t *testing.T) *line {
	l := &line{t: t, stile: New(1, 1000), ctx: t.Context()}
	if err := l.stile.Enter(l.ctx, Usual, "first"); err != nil {
		t.Fatal(err)
	}
	return l
}

// join waits in line; when its turn comes it notes its name and leaves.
func (l *line) join(rank Rank, name string) {
	l.done.Go(func() {
		if err := l.stile.Enter(l.ctx, rank, name); err != nil {
			l.t.Errorf("%s: %v", name, err)
			return
		}
		l.mu.Lock()
		l.served = append(l.served, name)
		l.mu.Unlock()
		l.stile.Leave(name)
	})
	synctest.Wait() // it stands in line
}

// open gives the place back and returns who was served in which order.
func (l *line) open() []string {
	l.stile.Leave("first")
	l.done.Wait()
	return l.served
}

func TestTurns(t *testing.T) {
	t.Run("callers take turns, whoever has more waiting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLine(t)
			for range 4 {
				l.join(Usual, "greedy")
			}
			l.join(Usual, "modest")
			l.join(Usual, "other")
			want := []string{"greedy", "modest", "other", "greedy", "greedy", "greedy"}
			if got := l.open(); !slices.Equal(got, want) {
				t.Errorf("served %v, want %v", got, want)
			}
		})
	})
	t.Run("the urgent go first", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLine(t)
			l.join(Bulk, "bulk")
			l.join(Usual, "usual")
			l.join(Urgent, "urgent")
			if got := l.open(); !slices.Equal(got, []string{"urgent", "usual", "bulk"}) {
				t.Errorf("served %v", got)
			}
		})
	})
	t.Run("the urgent do not starve the others", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLine(t)
			l.join(Bulk, "bulk")
			for range 20 {
				l.join(Urgent, "urgent")
			}
			if at := slices.Index(l.open(), "bulk"); at != favour {
				t.Errorf("bulk was served after %d others, want %d", at, favour)
			}
		})
	})
	t.Run("no more may wait than the limit says", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLine(t)
			l.stile.limit = 2
			l.join(Usual, "a")
			l.join(Usual, "b")
			if err := l.stile.Enter(t.Context(), Urgent, "c"); !errors.Is(err, ErrFull) {
				t.Errorf("got %v", err)
			}
			l.open()
		})
	})
	t.Run("who gives up leaves the line", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLine(t)
			ctx, cancel := context.WithCancel(t.Context())
			gone := make(chan error)
			go func() { gone <- l.stile.Enter(ctx, Usual, "quitter") }()
			synctest.Wait()
			l.join(Usual, "patient")
			cancel()
			if err := <-gone; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if n := l.stile.Waiting(); n != 1 {
				t.Errorf("%d wait, want 1", n)
			}
			if got := l.open(); !slices.Equal(got, []string{"patient"}) {
				t.Errorf("served %v", got)
			}
		})
	})
}

func TestGreedyCallersLeaveRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewModest(9, 1000)
		ctx, cancel := context.WithCancel(t.Context())
		var waiting sync.WaitGroup
		for range 20 {
			waiting.Go(func() { _ = s.Enter(ctx, Usual, "greedy") })
		}
		synctest.Wait()
		if s.free != 4 || s.held["greedy"] != 5 {
			t.Errorf("%d places are free and the greedy one has %d", s.free, s.held["greedy"])
		}
		if err := s.Enter(t.Context(), Usual, "modest"); err != nil || s.Waiting() != 15 {
			t.Errorf("another got %v; %d wait", err, s.Waiting())
		}
		for range 20 {
			waiting.Go(func() { _ = s.Enter(ctx, Usual, "also greedy") })
		}
		synctest.Wait()
		if s.free == 0 {
			t.Error("two greedy callers left no room")
		}
		s.Leave("greedy")
		s.Leave("modest")
		synctest.Wait()
		if s.free == 0 || s.held["greedy"]+s.held["also greedy"] != 9-s.free {
			t.Errorf("%d places are free, held are %v", s.free, s.held)
		}
		cancel()
		waiting.Wait()
	})
}

func TestNoPlaceIsLost(t *testing.T) {
	t.Run("of one that serves everybody", func(t *testing.T) { loseNone(t, New(3, 1000), 3) })
	t.Run("of a modest one", func(t *testing.T) { loseNone(t, NewModest(3, 1000), 3) })
}

func loseNone(t *testing.T, s *Stile, places int) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	inside, most := 0, 0
	for i := range 200 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%3 == 0 {
				go cancel() // gives up at any moment
			}
			name := string(rune('a' + i%7))
			if s.Enter(ctx, Rank(i%ranks), name) != nil {
				return
			}
			mu.Lock()
			inside++
			most = max(most, inside)
			mu.Unlock()
			mu.Lock()
			inside--
			mu.Unlock()
			s.Leave(name)
		})
	}
	wg.Wait()
	if most > places {
		t.Errorf("%d were inside at a time, there are %d places", most, places)
	}
	if s.free != places || s.waiting != 0 || len(s.held) != 0 {
		t.Errorf("%d places are free, %d wait, held are %v; want %d and nobody", s.free, s.waiting, s.held, places)
	}
	for _, q := range s.queues {
		if len(q.callers)+len(q.turns) != 0 {
			t.Errorf("left behind: %v %v", q.callers, q.turns)
		}
	}
}
