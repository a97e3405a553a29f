// Package unread tells how long an answer is in memory.
//
// For gRPC a call is over as soon as its answer waits to be sent, and whoever calls decides whether that is ever read: a
// client that opens no window leaves one answer after another in the memory of a server that believes to have no call
// open. With this package a call holds its place, whatever its server counts by it, until no answer of it is left.
//
// Why it is here: server and agent both serve strangers, and server/wire is what both may import.
package unread

import (
	"context"
	"runtime"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// Place is what one call holds. It has one holder for the call and one for each answer in memory.
type Place struct {
	holders  atomic.Int32
	giveBack func()
}

type placeKey struct{}

// Take returns the place of a call whose headers have come, with the context that gRPC gave for it. giveBack is called
// once, when that has ended, as gRPC sees to when the call is over, and no answer is left in memory. It must not block.
func Take(call context.Context, giveBack func()) *Place {
	p := &Place{giveBack: giveBack}
	p.holders.Store(1)
	context.AfterFunc(call, p.let)
	return p
}

// In returns a context of the call, for its handler, by which Unary and Stream know the place.
func (p *Place) In(ctx context.Context) context.Context { return context.WithValue(ctx, placeKey{}, p) }

// keep adds a holder, unless the place has been given back.
func (p *Place) keep() bool {
	for {
		n := p.holders.Load()
		if n == 0 {
			return false
		}
		if p.holders.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// let takes one holder away, and gives the place back after the last.
func (p *Place) let() {
	if p.holders.Add(-1) == 0 {
		p.giveBack()
	}
}

// answered is an answer on its way to the codec, with its call's place.
type answered struct {
	message any
	place   *Place
}

// Codec returns a codec by which the answers that Unary and Stream let through hold their calls' places. It must be used
// together with them.
func Codec(inner encoding.CodecV2) encoding.CodecV2 { return codec{inner} }

type codec struct{ encoding.CodecV2 }

// Marshal serializes an answer.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	a, ok := v.(*answered)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	data, err := c.CodecV2.Marshal(a.message)
	if err != nil || !a.place.keep() {
		return data, err
	}
	return mem.BufferSlice{a.place.held(data)}, nil
}

// leastCounted is the least capacity of a buffer of which gRPC says when it needs it no more.
const leastCounted = 1<<10 + 1

// held returns the same bytes in a buffer that holds the place until it is freed. gRPC forgets what a connection has not
// sent when it ends, without freeing it; then the place is held until the buffer is collected.
func (p *Place) held(data mem.BufferSlice) mem.Buffer {
	whole := data.MaterializeToBuffer(mem.DefaultBufferPool())
	data.Free() // whole has it
	bytes := whole.ReadOnlyData()
	if cap(bytes) < leastCounted {
		bytes = append(make([]byte, 0, leastCounted), bytes...)
	}
	h := &hold{place: p}
	t := &taken{whole, h}
	runtime.AddCleanup(t, (*hold).end, h)
	return mem.NewBuffer(&bytes, t)
}

// hold is that of one answer. It ends once, whoever says so.
type hold struct {
	place *Place
	ended atomic.Bool
}

func (h *hold) end() {
	if h.ended.CompareAndSwap(false, true) {
		h.place.let()
	}
}

// taken is the pool to which gRPC returns the buffer of an answer.
type taken struct {
	whole mem.Buffer // that the bytes are from
	hold  *hold
}

// Get returns a buffer of the usual pool.
func (*taken) Get(length int) *[]byte { return mem.DefaultBufferPool().Get(length) }

// Put ends the hold.
func (t *taken) Put(*[]byte) {
	t.whole.Free()
	t.hold.end()
}

// collectEvery is how often Collect does, at most.
const collectEvery = time.Second

var (
	begun     = time.Now()
	collected atomic.Int64 // when, in nanoseconds since begun
)

// Collect sees to it that answers whose connections ended give their places back at once, not when memory is next
// collected. Who refuses a call because too many places are taken calls it, and returns without waiting for it.
func Collect() {
	now, last := int64(time.Since(begun)), collected.Load()
	if (last == 0 || now-last >= int64(collectEvery)) && collected.CompareAndSwap(last, now) {
		go runtime.GC()
	}
}

// Unary is the interceptor for calls with one request and one response. It belongs before all others: they see answers
// as they are.
func Unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	answer, err := handle(ctx, req)
	if p, ok := ctx.Value(placeKey{}).(*Place); ok && err == nil {
		answer = &answered{answer, p}
	}
	return answer, err
}

// Stream is the interceptor for all other calls. It, too, belongs before the others.
func Stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if p, ok := ss.Context().Value(placeKey{}).(*Place); ok {
		ss = stream{ss, p}
	}
	return handle(srv, ss)
}

type stream struct {
	grpc.ServerStream
	place *Place
}

// SendMsg sends an answer. One that is no message of protobuf is of a kind that the server's own codec sends as it is: it
// is in memory once for all who are sent it, read or not.
func (s stream) SendMsg(m any) error {
	if _, ok := m.(proto.Message); !ok {
		return s.ServerStream.SendMsg(m)
	}
	return s.ServerStream.SendMsg(&answered{m, s.place})
}
