package workloadapi

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/tap"

	"github.com/assay-id/assay/server/wire/unread"
	"github.com/assay-id/assay/workloadapi/peer"
)

const (
	// maxArrivals is how many calls may be under way whose request has not come, over all users. Each
	// may take maxRequest of memory.
	maxArrivals = 1024
	// maxDialogues is how many calls may be open in which the caller goes on sending, over all users. Each
	// may take maxRequest of memory at any time.
	maxDialogues = 1024
	// arrivalTime is how long a request may take to come after its headers.
	arrivalTime = 10 * time.Second
)

// arrival is a call whose request has not come.
type arrival struct {
	call context.Context // gRPC cancels it when the call is over
	over sync.Once
	end  func()
}

type arrivalKey struct{}

// arrivalOf returns the arrival of the call that ctx belongs to.
func arrivalOf(ctx context.Context) *arrival {
	a, _ := ctx.Value(arrivalKey{}).(*arrival)
	return a
}

// done says that the request has come, or that it never will.
func (a *arrival) done() {
	if a != nil {
		a.over.Do(a.end)
	}
}

// arrivals are the calls whose request has not come, of all users. Each user has its share of them.
type arrivals struct {
	places *quota
	mu     sync.Mutex                       // guards open
	open   map[uint32]map[*arrival]struct{} // by user ID
}

func newArrivals() *arrivals {
	return &arrivals{places: newQuota(maxArrivals), open: map[uint32]map[*arrival]struct{}{}}
}

// begin counts a call, or says that its user has enough of them. The arrival is over when its done was
// called; it calls slow if that takes too long.
func (as *arrivals) begin(call context.Context, uid uint32, slow func()) (*arrival, bool) {
	leave, ok := as.places.take(uid)
	if !ok {
		as.sweep(uid)
		if leave, ok = as.places.take(uid); !ok {
			return nil, false
		}
	}
	late := time.AfterFunc(arrivalTime, slow)
	a := &arrival{call: call}
	a.end = func() {
		late.Stop()
		as.mu.Lock()
		defer as.mu.Unlock()
		if delete(as.open[uid], a); len(as.open[uid]) == 0 {
			delete(as.open, uid)
		}
		leave()
	}
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.open[uid] == nil {
		as.open[uid] = map[*arrival]struct{}{}
	}
	as.open[uid][a] = struct{}{}
	return a, true
}

// sweep ends the user's arrivals whose calls were canceled. Each ends by itself, in a goroutine, which may
// have to wait for its turn; whoever opens and cancels calls faster than that would otherwise have a
// share full of calls that are none any more, and his user's honest processes would be refused.
func (as *arrivals) sweep(uid uint32) {
	as.mu.Lock()
	var canceled []*arrival
	for a := range as.open[uid] {
		if a.call.Err() != nil {
			canceled = append(canceled, a)
		}
	}
	as.mu.Unlock()
	for _, a := range canceled {
		a.done()
	}
}

// arrive is asked about each call when its headers have come, before there is a goroutine for it. It
// gives each user its share of calls, and cuts off those who announce a request and do not send it.
func (s *Server) arrive(ctx context.Context, call *tap.Info) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ctx, nil // guard says why not
	}
	leave, ok := s.streams.take(p.UID)
	if !ok {
		unread.Collect()
		s.metrics.refused.Inc()
		return ctx, s.toStatus(ctx, call.FullMethodName, errTooMany)
	}
	inner, cut := context.WithCancel(ctx)
	a, ok := s.arrivals.begin(ctx, p.UID, cut)
	if !ok {
		cut()
		leave()
		s.metrics.refused.Inc()
		return ctx, s.toStatus(ctx, call.FullMethodName, errTooMany)
	}
	// gRPC cancels the context it gave us when the call is over.
	context.AfterFunc(ctx, a.done)
	return context.WithValue(unread.Take(ctx, leave).In(inner), arrivalKey{}, a), nil
}

// arriving is a stream that says when its first message has come.
type arriving struct {
	grpc.ServerStream
	arrival *arrival
}

// RecvMsg receives a message.
func (s arriving) RecvMsg(m any) error {
	defer s.arrival.done()
	return s.ServerStream.RecvMsg(m)
}
