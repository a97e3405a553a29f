package workloadapi

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

func TestQuota(t *testing.T) {
	fill := func(q *quota, uid uint32) (leaves []func()) {
		for {
			leave, ok := q.take(uid)
			if !ok {
				return leaves
			}
			leaves = append(leaves, leave)
		}
	}
	q := newQuota(100)
	first := fill(q, 1)
	if len(first) != 50 {
		t.Errorf("one user got %d of 100", len(first))
	}
	second := fill(q, 2)
	if len(second) != 25 {
		t.Errorf("a second got %d", len(second))
	}
	if third := fill(q, 3); len(third) == 0 {
		t.Error("a third got nothing")
	}
	for _, leave := range slices.Concat(first, second) {
		leave()
	}
	if len(q.users) != 1 {
		t.Errorf("users without places are remembered: %v", q.users)
	}
	if again := fill(q, 2); len(again) < 40 {
		t.Errorf("places given back are lost: got %d", len(again))
	}
}

func TestTurnstile(t *testing.T) {
	t.Run("users are served in turn, however many wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ts := newTurnstile(1)
			if err := ts.enter(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			var mu sync.Mutex
			var order []uint32
			queue := func(uid uint32) {
				go func() {
					if err := ts.enter(t.Context(), uid); err != nil {
						t.Error(err)
					}
					mu.Lock()
					order = append(order, uid)
					mu.Unlock()
					ts.leave()
				}()
				synctest.Wait()
			}
			for range 5 {
				queue(1)
			}
			queue(2)
			queue(3)
			ts.leave()
			synctest.Wait()
			if want := []uint32{1, 2, 3, 1, 1, 1, 1}; !slices.Equal(order, want) {
				t.Errorf("order was %v, want %v", order, want)
			}
			if ts.free != 1 || len(ts.waiting) != 0 || len(ts.turns) != 0 {
				t.Errorf("left behind: %d free, %v, %v", ts.free, ts.waiting, ts.turns)
			}
		})
	})
	t.Run("who gives up leaves no trace, and no place is lost", func(t *testing.T) {
		ts := newTurnstile(3)
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(t.Context())
				if i%3 == 0 {
					go cancel()
				}
				defer cancel()
				switch err := ts.enter(ctx, uint32(i%5)); {
				case err == nil:
					ts.leave()
				case !errors.Is(err, context.Canceled):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if ts.free != 3 || len(ts.waiting) != 0 || len(ts.turns) != 0 {
			t.Errorf("left behind: %d free, %v, %v", ts.free, ts.waiting, ts.turns)
		}
	})
}
