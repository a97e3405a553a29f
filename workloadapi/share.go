package workloadapi

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
)

// frame is a serialized response, shared between all streams that send it.
type frame struct{ bytes []byte }

// same reports whether both say the same.
func (f *frame) same(o *frame) bool {
	return f == o || f != nil && o != nil && bytes.Equal(f.bytes, o.bytes)
}

// newFrame serializes a response so that equal responses have equal bytes.
func newFrame(m proto.Message) (*frame, error) {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("serialize response: %w", err)
	}
	return &frame{bytes: raw}, nil
}

// codec is that of package strict, except that a *frame is sent as it is.
type codec struct{ encoding.CodecV2 }

// Marshal returns a frame's bytes without copying them, anything else as protobuf.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		return mem.BufferSlice{mem.SliceBuffer(f.bytes)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// answer is what a stream has to say to whoever shows certain facts. It is immutable.
type answer struct {
	frame   *frame   // what streams of the Workload API send
	value   any      // what a Feed of another service made
	matched bool     // false: the caller has no identity
	ids     []string // SPIFFE IDs handed out
	entries []string // their entries
	rev     uint64
	// by, forPID and forFacts say, in the audit line, to whom it was handed out for another, and for whom.
	by       string
	forPID   int
	forFacts string
	changed  <-chan struct{} // closed when there may be another answer
	// until is when the first of what is in it expires; zero: nothing does. Who made it says so by changed,
	// too, but no timer goes off while the machine sleeps, or when its clock is set.
	until time.Time
}

// stale reports whether there may be another answer by now.
func (a *answer) stale(now time.Time) bool {
	select {
	case <-a.changed:
		return true
	default:
		return !a.until.IsZero() && !now.Before(a.until)
	}
}

// expires notes when something in the answer expires.
func (a *answer) expires(at time.Time) {
	if a.until.IsZero() || at.Before(a.until) {
		a.until = at
	}
}

// hub holds the answers of one kind of stream, one for each set of facts that is in use.
type hub struct {
	make func(context.Context, attestor.Set) (*answer, error)
	now  func() time.Time

	mu     sync.Mutex // guards the map and the topics' users
	topics map[string]*topic
}

// topic is a set of facts and the answer to it.
type topic struct {
	hub   *hub
	key   string
	facts attestor.Set
	users int
	now   atomic.Pointer[answer]
	turn  chan struct{} // holds a token while nobody makes the answer
}

func newHub(now func() time.Time, maker func(context.Context, attestor.Set) (*answer, error)) *hub {
	return &hub{make: maker, now: now, topics: map[string]*topic{}}
}

// join returns the topic of the facts; leave must be called.
func (h *hub) join(a *attested) *topic {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.topics[a.key]
	if t == nil {
		t = &topic{hub: h, key: a.key, facts: a.facts, turn: make(chan struct{}, 1)}
		t.turn <- struct{}{}
		h.topics[a.key] = t
	}
	t.users++
	return t
}

func (t *topic) leave() {
	t.hub.mu.Lock()
	defer t.hub.mu.Unlock()
	if t.users--; t.users == 0 {
		delete(t.hub.topics, t.key)
	}
}

// answer returns the present answer. The first stream that finds it stale makes the new one; the
// others wait for it.
func (t *topic) answer(ctx context.Context) (*answer, error) {
	if a := t.now.Load(); a != nil && !a.stale(t.hub.now()) {
		return a, nil
	}
	select {
	case <-t.turn:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { t.turn <- struct{}{} }()
	old := t.now.Load()
	if old != nil && !old.stale(t.hub.now()) {
		return old, nil
	}
	a, err := t.hub.make(ctx, t.facts)
	if err != nil {
		return nil, err
	}
	if old != nil && a.frame.same(old.frame) {
		a.frame = old.frame // streams compare pointers first, and one copy is enough
	}
	t.now.Store(a)
	return a, nil
}
