// Package turn shares a scarce thing, such as the processors, between callers who do not know of each
// other.
//
// A Stile has a number of places. Who finds none waits, and three rules say who is next: a more urgent
// rank goes before a less urgent one; within a rank callers take turns by name, whoever has more
// waiting; and what one caller has waiting is served in order. So an agent with 500 signatures to
// come delays another's first one by a single signature.
//
// Why it is so: with no queue of our own the scheduler divides the processors among all that is under
// way, and when there is too much of it, everything finishes late and together, after the callers
// have given up: all work and no result. With a queue, work that was begun is finished, and what
// waits costs a few hundred bytes. The number that may wait is bounded too; beyond it a caller is
// told at once, which is the cheapest answer there is.
package turn

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// ErrFull says that too many are waiting already.
var ErrFull = errors.New("too many are waiting")

// Rank is how urgent something is; the lowest goes first.
type Rank int

// The ranks.
const (
	// Urgent is what somebody loses his identity without.
	Urgent Rank = iota
	// Usual is everything else.
	Usual
	// Bulk is what comes in hundreds and is waited for by nobody in particular.
	Bulk
	ranks = 3
)

// favour is how many times in a row the more urgent go before somebody less urgent who waits: nobody
// waits for ever.
const favour = 7

// Stile lets a number of callers through at a time. It is safe for concurrent use.
type Stile struct {
	limit  int  // of those who wait, in all
	modest bool // a caller may hold fewer places than are free

	mu      sync.Mutex // guards the rest
	free    int
	held    map[string]int // places by name, if modest
	waiting int
	passed  int // how often in a row the more urgent went before the less urgent
	queues  [ranks]queue
}

// queue is those who wait in one rank.
type queue struct {
	callers map[string][]chan struct{} // by name, first come first served
	turns   []string                   // names with somebody waiting, the next one first
}

// New returns a Stile with places, for which at most limit may wait. It is for places that are held as
// long as the work takes.
func New(places, limit int) *Stile {
	s := &Stile{free: places, limit: limit, held: map[string]int{}}
	for i := range s.queues {
		s.queues[i].callers = map[string][]chan struct{}{}
	}
	return s
}

// NewModest returns a Stile whose callers decide how long they hold a place: one that waits for what a
// caller sends. A caller may take one more only while it holds fewer than are free: one greedy caller
// gets half of all, two get a third each, and one that comes later finds room at once, even if the
// others never leave. (Dynamic thresholds, as switches share their packet memory: Choudhury and Hahne,
// 1998.)
func NewModest(places, limit int) *Stile {
	s := New(places, limit)
	s.modest = true
	return s
}

// may reports whether a caller may have a place now. mu is held.
func (s *Stile) may(name string) bool {
	return s.free > 0 && (!s.modest || s.held[name] < s.free)
}

// grant gives a caller a place. mu is held.
func (s *Stile) grant(name string) {
	s.free--
	if s.modest {
		s.held[name]++
	}
}

// Enter waits for a place. Without an error Leave must be called. It returns ErrFull, or the error of
// ctx.
func (s *Stile) Enter(ctx context.Context, rank Rank, name string) error {
	s.mu.Lock()
	if s.may(name) {
		s.grant(name)
		s.mu.Unlock()
		return nil
	}
	if s.waiting >= s.limit {
		s.mu.Unlock()
		return ErrFull
	}
	ready := make(chan struct{})
	s.waiting++
	s.queues[rank].add(name, ready)
	s.mu.Unlock()
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-ready: // the place came at the same time: pass it on
		s.leave(name)
	default:
		s.waiting--
		s.queues[rank].drop(name, ready)
	}
	return ctx.Err()
}

// Leave gives back a place that was had by that name.
func (s *Stile) Leave(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leave(name)
}

// leave is Leave with mu held.
func (s *Stile) leave(name string) {
	s.free++
	if s.modest {
		if s.held[name]--; s.held[name] == 0 {
			delete(s.held, name)
		}
	}
	for s.next() { // until there is nobody, or no place
	}
}

// Waiting returns how many wait.
func (s *Stile) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// next hands a place to whoever's turn it is, and reports whether it did. mu is held.
func (s *Stile) next() bool {
	first, last := -1, -1
	at := [ranks]int{}
	for i := range s.queues {
		if at[i] = slices.IndexFunc(s.queues[i].turns, s.may); at[i] < 0 {
			continue
		}
		if first < 0 {
			first = i
		}
		last = i
	}
	switch {
	case first < 0:
		return false
	case first == last:
		s.passed = 0
	case s.passed >= favour:
		first, s.passed = last, 0
	default:
		s.passed++
	}
	s.waiting--
	name, ready := s.queues[first].take(at[first])
	s.grant(name)
	close(ready)
	return true
}

// add puts somebody at the end of his line.
func (q *queue) add(name string, ready chan struct{}) {
	if len(q.callers[name]) == 0 {
		q.turns = append(q.turns, name)
	}
	q.callers[name] = append(q.callers[name], ready)
}

// take removes and returns the first of the line whose turn is at that place.
func (q *queue) take(at int) (name string, ready chan struct{}) {
	name = q.turns[at]
	if at == 0 {
		q.turns = q.turns[1:]
	} else {
		q.turns = slices.Delete(q.turns, at, at+1)
	}
	line := q.callers[name]
	if len(line) > 1 {
		q.callers[name] = line[1:]
		q.turns = append(q.turns, name)
	} else {
		delete(q.callers, name)
	}
	return name, line[0]
}

// drop removes one who gave up.
func (q *queue) drop(name string, ready chan struct{}) {
	line := q.callers[name]
	for i, c := range line {
		if c == ready {
			line = append(line[:i:i], line[i+1:]...)
			break
		}
	}
	if len(line) > 0 {
		q.callers[name] = line
		return
	}
	delete(q.callers, name)
	for i, n := range q.turns {
		if n == name {
			q.turns = append(q.turns[:i:i], q.turns[i+1:]...)
			break
		}
	}
}
