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
	limit int // of those who wait, in all

	mu      sync.Mutex // guards the rest
	free    int
	waiting int
	passed  int // how often in a row the more urgent went before the less urgent
	queues  [ranks]queue
}

// queue is those who wait in one rank.
type queue struct {
	callers map[string][]chan struct{} // by name, first come first served
	turns   []string                   // names with somebody waiting, the next one first
}

// New returns a Stile with places, for which at most limit may wait.
func New(places, limit int) *Stile {
	s := &Stile{free: places, limit: limit}
	for i := range s.queues {
		s.queues[i].callers = map[string][]chan struct{}{}
	}
	return s
}

// Enter waits for a place. Without an error Leave must be called. It returns ErrFull, or the error of
// ctx.
func (s *Stile) Enter(ctx context.Context, rank Rank, name string) error {
	s.mu.Lock()
	if s.free > 0 {
		s.free--
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
		s.next()
	default:
		s.waiting--
		s.queues[rank].drop(name, ready)
	}
	return ctx.Err()
}

// Leave gives a place back.
func (s *Stile) Leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next()
}

// Waiting returns how many wait.
func (s *Stile) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// next hands a place to whoever's turn it is. mu is held.
func (s *Stile) next() {
	first, last := -1, -1
	for i := range s.queues {
		if len(s.queues[i].turns) == 0 {
			continue
		}
		if first < 0 {
			first = i
		}
		last = i
	}
	if first < 0 {
		s.free++
		return
	}
	switch {
	case first == last:
		s.passed = 0
	case s.passed >= favour:
		first, s.passed = last, 0
	default:
		s.passed++
	}
	s.waiting--
	close(s.queues[first].take())
}

// add puts somebody at the end of his line.
func (q *queue) add(name string, ready chan struct{}) {
	if len(q.callers[name]) == 0 {
		q.turns = append(q.turns, name)
	}
	q.callers[name] = append(q.callers[name], ready)
}

// take removes and returns the next one. There is one.
func (q *queue) take() chan struct{} {
	name := q.turns[0]
	q.turns = q.turns[1:]
	line := q.callers[name]
	if len(line) > 1 {
		q.callers[name] = line[1:]
		q.turns = append(q.turns, name)
	} else {
		delete(q.callers, name)
	}
	return line[0]
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
