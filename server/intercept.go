package server

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// callTime is how long a call with one request and one response may take. The longest honest one is
// a batch of signatures that waits for its rate.
const callTime = time.Minute

// calls are the outermost interceptors: they count, limit time, and keep a panic in one call from
// taking the server with it.
type calls struct {
	log      logrus.FieldLogger
	stopping <-chan struct{} // closed when the server begins to stop

	count   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
	panics  prometheus.Counter
}

func newCalls(stopping <-chan struct{}, log logrus.FieldLogger, reg prometheus.Registerer) (*calls, error) {
	c := &calls{
		log: log, stopping: stopping,
		count: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_rpcs_total",
			Help: "RPCs that ended, by method and gRPC code.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "assay_server_rpc_seconds",
			Help:    "Time RPCs took, by method and gRPC code; streams that agents keep open are left out.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 3, 11),
		}, []string{"method", "code"}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_server_panics_total",
			Help: "RPCs that panicked. Each is a bug.",
		}),
	}
	for _, m := range []prometheus.Collector{c.count, c.seconds, c.panics} {
		if err := reg.Register(m); err != nil {
			return nil, fmt.Errorf("register metrics of calls: %w", err)
		}
	}
	return c, nil
}

// Unary is the interceptor for calls with one request and one response.
func (c *calls) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	makeRoom()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	defer c.done(info.FullMethod, time.Now(), true, &err)
	defer c.rescue(info.FullMethod, &err)
	return handle(ctx, req)
}

// room is about the stack that a signature needs.
const room = 20 << 10

// makeRoom grows the goroutine's stack to what most calls come to need. gRPC begins each call on a new
// goroutine with a stack of 2 KiB, which Go doubles when it is full, and to move a stack it looks at
// every frame on it. Done once here, where there are few, it is a tenth less CPU for a call than done
// three times down to the middle of a signature. The stack goes with the call.
//
//go:noinline
func makeRoom() {
	var frame [room]byte
	occupy(&frame)
}

//go:noinline
func occupy(frame *[room]byte) { frame[0] = 1 }

// endless are the streams that a caller keeps open. They end when the server begins to stop, so that
// what is left to wait for are calls that get done.
var endless = map[string]bool{
	"/assay.feed.v1.Feed/Follow":                   true,
	"/assay.downstream.v1.Downstream/FollowBundle": true,
	"/grpc.health.v1.Health/Watch":                 true,
}

// errStopping is what ends them.
var errStopping = status.Error(codes.Unavailable, "server is stopping")

// Stream is the interceptor for all other calls.
func (c *calls) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer c.done(info.FullMethod, time.Now(), !endless[info.FullMethod], &err)
	defer c.rescue(info.FullMethod, &err)
	if !endless[info.FullMethod] {
		makeRoom()
		return handle(srv, ss)
	}
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	ended := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-c.stopping:
			cancel(errStopping)
		case <-ended:
		}
	}()
	defer func() { <-watched }()
	defer close(ended)
	err = handle(srv, &endlessStream{ServerStream: ss, ctx: ctx})
	if cause := context.Cause(ctx); cause == errStopping { //nolint:errorlint // the very one
		return errStopping
	}
	return err
}

type endlessStream struct {
	grpc.ServerStream
	ctx context.Context // what grpc.ServerStream is about
}

func (s *endlessStream) Context() context.Context { return s.ctx }

// RescueUnary is the innermost interceptor: a call that panicked ends as Internal for all interceptors
// around it, so that it is counted and has its audit line.
func (c *calls) RescueUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	defer c.rescue(info.FullMethod, &err)
	return handle(ctx, req)
}

// RescueStream is RescueUnary for all other calls.
func (c *calls) RescueStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer c.rescue(info.FullMethod, &err)
	return handle(srv, ss)
}

func (c *calls) done(method string, began time.Time, timed bool, err *error) {
	code := status.Code(*err).String()
	c.count.WithLabelValues(method, code).Inc()
	if timed {
		c.seconds.WithLabelValues(method, code).Observe(time.Since(began).Seconds())
	}
}

func (c *calls) rescue(method string, err *error) {
	if p := recover(); p != nil {
		c.panics.Inc()
		c.log.WithFields(logrus.Fields{"method": method, "panic": fmt.Sprint(p), "stack": string(debug.Stack())}).Error("call panicked")
		*err = status.Error(codes.Internal, "internal error")
	}
}
