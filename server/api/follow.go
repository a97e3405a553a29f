package api

import (
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/wire/downstreamv1"
)

// maxFollowers is how many streams of bundles one server may have: one that it uses, and those that it has
// lost without the server having noticed yet.
const maxFollowers = 8

// downstreamService is downstream.v1.
type downstreamService struct {
	downstreamv1.UnimplementedDownstreamServer
	api *API

	mu   sync.Mutex
	open map[string]int // streams by caller; mu guards it
}

func (s *downstreamService) enter(who string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[who] >= maxFollowers {
		return false
	}
	s.open[who]++
	return true
}

func (s *downstreamService) leave(who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[who]--; s.open[who] == 0 {
		delete(s.open, who)
	}
}

// FollowBundle sends the own bundle, and again whenever it has changed. That is nothing that GetBundle
// does not tell everybody, so a stream goes on whatever becomes of its caller's entry.
func (s *downstreamService) FollowBundle(_ *downstreamv1.FollowBundleRequest, stream grpc.ServerStreamingServer[downstreamv1.FollowBundleResponse]) error {
	ctx, who := stream.Context(), caller.FromContext(stream.Context()).ID.String()
	if !s.enter(who) {
		return refusal(codes.ResourceExhausted, "too many streams of the bundle are open")
	}
	defer s.leave(who)
	var sent uint64
	for {
		rev := s.api.View.Rev()
		b, ok := s.api.View.Bundle(s.api.cfg.TrustDomain)
		if ok && b.Sequence != sent {
			w, err := b.Wire()
			if err != nil {
				return fail("failed to convert bundle", err)
			}
			if err := stream.Send(&downstreamv1.FollowBundleResponse{Bundle: w}); err != nil {
				return err
			}
			sent = b.Sequence
		}
		if err := s.api.View.Wait(ctx, rev+1); err != nil {
			return err
		}
	}
}
