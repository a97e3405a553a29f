package workloadapi

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/tap"

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

// arrive is asked about each call when its headers have come, before there is a goroutine for it. It
// gives each user its share of calls, and cuts off those who announce a request and do not send it.
func (s *Server) arrive(ctx context.Context, call *tap.Info) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ctx, nil // guard says why not
	}
	leave, ok := s.streams.take(p.UID)
	if !ok {
		s.metrics.refused.Inc()
		return ctx, s.toStatus(ctx, call.FullMethodName, errTooMany)
	}
	come, ok := s.arrivals.take(p.UID)
	if !ok {
		leave()
		s.metrics.refused.Inc()
		return ctx, s.toStatus(ctx, call.FullMethodName, errTooMany)
	}
	inner, cut := context.WithCancel(ctx)
	slow := time.AfterFunc(arrivalTime, cut)
	a := &arrival{end: func() { slow.Stop(); come() }}
	// gRPC cancels the context it gave us when the call is over.
	context.AfterFunc(ctx, func() { a.done(); leave() })
	return context.WithValue(inner, arrivalKey{}, a), nil
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
