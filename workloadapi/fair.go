package workloadapi

import (
	"context"
	"sync"
)

// quota shares a number of places between users without knowing how many users there are: a user
// may take one more only while it holds fewer than are free. One greedy user gets half of all, two
// get a third each, and one that comes later still finds room. (Dynamic thresholds, as switches
// share their packet memory: Choudhury and Hahne, 1998.)
type quota struct {
	mu    sync.Mutex // guards the rest
	free  int
	users map[uint32]int // places held, by user ID
}

func newQuota(places int) *quota { return &quota{free: places, users: map[uint32]int{}} }

// take gives the user a place, or says that it has enough. leave gives the place back, once.
func (q *quota) take(uid uint32) (leave func(), ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.users[uid] >= q.free {
		return nil, false
	}
	q.users[uid]++
	q.free--
	return func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.free++
		if q.users[uid]--; q.users[uid] == 0 {
			delete(q.users, uid)
		}
	}, true
}

// turnstile lets a number of callers through at a time. Those who wait are served user by user in
// turn, so that a user with a hundred callers waiting costs another's first one a single turn.
type turnstile struct {
	mu      sync.Mutex // guards the rest
	free    int
	waiting map[uint32][]chan struct{} // per user, first come first served
	turns   []uint32                   // users with somebody waiting, the next one first
}

func newTurnstile(places int) *turnstile {
	return &turnstile{free: places, waiting: map[uint32][]chan struct{}{}}
}

// enter waits for a place. Without an error leave must be called.
func (t *turnstile) enter(ctx context.Context, uid uint32) error {
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return nil
	}
	ready := make(chan struct{})
	if len(t.waiting[uid]) == 0 {
		t.turns = append(t.turns, uid)
	}
	t.waiting[uid] = append(t.waiting[uid], ready)
	t.mu.Unlock()
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-ready: // the place came at the same time; pass it on
		t.next()
	default:
		t.abandon(uid, ready)
	}
	return ctx.Err()
}

// leave gives a place back.
func (t *turnstile) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next()
}

// next hands a place to whoever's turn it is. mu is held.
func (t *turnstile) next() {
	if len(t.turns) == 0 {
		t.free++
		return
	}
	uid := t.turns[0]
	t.turns = t.turns[1:]
	queue := t.waiting[uid]
	close(queue[0])
	if len(queue) > 1 {
		t.waiting[uid] = queue[1:]
		t.turns = append(t.turns, uid)
	} else {
		delete(t.waiting, uid)
	}
}

// abandon takes one who gave up out of the queue. mu is held.
func (t *turnstile) abandon(uid uint32, ready chan struct{}) {
	queue := t.waiting[uid]
	for i, c := range queue {
		if c == ready {
			queue = append(queue[:i:i], queue[i+1:]...)
			break
		}
	}
	if len(queue) > 0 {
		t.waiting[uid] = queue
		return
	}
	delete(t.waiting, uid)
	for i, u := range t.turns {
		if u == uid {
			t.turns = append(t.turns[:i:i], t.turns[i+1:]...)
			break
		}
	}
}
