package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime/debug"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/workloadapi/peer"
)

// securityHeader must stand in every request exactly once with the value "true" (SPIFFE Workload
// Endpoint section 6.1), so that no browser and no server that is made to fetch a URL can be used to
// reach the socket.
const securityHeader = "workload.spiffe.io"

// errNoHeader is what a request without it is told.
const errNoHeader = invalid("security header missing from request")

// guard is asked before each call. The service's own methods need the security header; health and
// reflection do not, as in SPIRE.
func (s *Server) guard(ctx context.Context, method string) error {
	if strings.HasPrefix(method, "/"+workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName+"/") {
		if got := metadata.ValueFromIncomingContext(ctx, securityHeader); len(got) != 1 || got[0] != "true" {
			if p, ok := peer.FromContext(ctx); ok {
				s.audit(events[path.Base(method)], &caller{peer: p}, nil, nil, nil, errNoHeader)
			}
			return errNoHeader
		}
	}
	if _, ok := peer.FromContext(ctx); !ok {
		return errors.New("identify caller: not a pinned connection")
	}
	select {
	case <-s.stopping:
		return errStopping
	default:
		return nil
	}
}

func (s *Server) guardUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	arrivalOf(ctx).done()
	defer s.rescue(info.FullMethod, &err)
	if err := s.guard(ctx, info.FullMethod); err != nil {
		return nil, s.toStatus(ctx, info.FullMethod, err)
	}
	resp, err = handle(ctx, req)
	if err != nil {
		return nil, s.toStatus(ctx, info.FullMethod, err)
	}
	return resp, nil
}

func (s *Server) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer s.rescue(info.FullMethod, &err)
	ctx := stream.Context()
	if err := s.guard(ctx, info.FullMethod); err != nil {
		return s.toStatus(ctx, info.FullMethod, err)
	}
	if info.IsClientStream {
		p, _ := peer.FromContext(ctx)
		leave, ok := s.dialogues.take(p.UID)
		if !ok {
			s.metrics.refused.Inc()
			return s.toStatus(ctx, info.FullMethod, errTooMany)
		}
		defer leave()
	}
	return s.toStatus(ctx, info.FullMethod, handle(srv, arriving{stream, arrivalOf(ctx)}))
}

// rescue keeps a panic in one call from taking the agent, and the identities of all workloads, with
// it.
func (s *Server) rescue(method string, err *error) {
	if p := recover(); p != nil {
		s.metrics.panics.Inc()
		s.log.WithFields(logrus.Fields{"method": method, "panic": fmt.Sprint(p), "stack": string(debug.Stack())}).Error("call panicked")
		*err = status.Error(codes.Internal, "internal error")
	}
}

// hold is how long a call without an identity may still wait for one.
type hold struct {
	timer *time.Timer
	over  bool
}

func newHold(d time.Duration) *hold {
	if d <= 0 {
		return &hold{over: true}
	}
	return &hold{timer: time.NewTimer(d)}
}

// end is for a call that got what it came for.
func (h *hold) end() {
	h.over = true
	if h.timer != nil {
		h.timer.Stop()
		h.timer = nil
	}
}

func (h *hold) c() <-chan time.Time {
	if h.timer == nil {
		return nil
	}
	return h.timer.C
}

// wait sleeps until the answer or the facts may be different, or the hold is over. It returns the
// facts in force.
func (s *Server) wait(ctx context.Context, c *caller, facts *attested, changed <-chan struct{}, h *hold) (*attested, error) {
	select {
	case <-changed:
		return facts, nil
	case <-facts.replaced:
		return c.known()
	case <-h.c():
		h.end()
		return facts, nil
	case <-c.peer.Done():
		return nil, dead
	case <-s.stopping:
		return nil, errStopping
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// follow serves one stream: it sends the answer to the caller's facts, and again whenever it says
// something else, until the caller leaves or has no identity any more.
func (s *Server) follow(stream grpc.ServerStream, of *Feed) error {
	ctx := stream.Context()
	v, err := of.Open(ctx)
	if err != nil {
		return err
	}
	err = v.pump(ctx, stream)
	v.End(ctx, err)
	return err
}

// pump is follow's loop.
func (v *Visit) pump(ctx context.Context, stream grpc.ServerStream) error {
	var sent *frame
	for {
		a, err := v.next(ctx)
		if err != nil {
			return err
		}
		if !a.frame.same(sent) {
			if err := v.tell(a, func() error { return stream.SendMsg(a.frame) }); err != nil {
				return err
			}
			sent = a.frame
		}
		if _, err := v.Wait(ctx, nil); err != nil {
			return err
		}
	}
}
