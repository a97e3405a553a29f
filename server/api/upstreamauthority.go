package api

import (
	"context"
	"errors"
	"strings"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/store/kv"
)

// upstream takes a step about the root above that the last of the old authorities hangs on, and returns its
// subject key ID. The messages are SPIRE's, with what is wrong written for people.
func (s *authorityService) upstream(ctx context.Context, id, invalid, failed string, do func(context.Context, string) (kv.Rev, error)) (string, error) {
	id = strings.ToLower(id)
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) {
		line.SPIFFEID = s.api.cfg.TrustDomain.IDString()
		if validAuthorityID(id) { // what a caller made up has no place there
			line.Authority = id
		}
	})
	if err := s.open(ca.KindX509); err != nil {
		return "", err
	}
	if !s.api.Authorities.Upstream() {
		return "", errNoUpstream
	}
	active, prepared, old := s.state(ca.KindX509)
	refused := ""
	switch {
	case id == "":
		refused = "no subject key ID provided"
	case active != nil && id == active.UpstreamID:
		refused = "unable to use upstream authority singing current authority"
	case prepared != nil && id == prepared.UpstreamID:
		refused = "only upstream authorities signing an old authority can be used"
	case old == nil || id != old.UpstreamID:
		refused = "upstream authority didn't sign the old local authority"
	}
	if refused != "" {
		return "", refusal(codes.InvalidArgument, invalid+": "+refused)
	}
	rev, err := do(ctx, id)
	switch {
	case err == nil:
	case errors.Is(err, ca.ErrActive):
		return "", refusal(codes.InvalidArgument, invalid+": unable to use upstream authority singing current authority")
	case errors.Is(err, ca.ErrNotAbove):
		return "", refusal(codes.Internal, failed+": no ca found with provided subject key ID")
	case errors.Is(err, ca.ErrTainted):
		return "", refusal(codes.Internal, failed+": root CA is already tainted")
	case errors.Is(err, ca.ErrNotTainted):
		return "", refusal(codes.Internal, failed+": it is not possible to revoke an untainted root CA")
	default:
		return "", fail(failed, err)
	}
	l.note(func(line *audit.Line) { line.Rev = rev })
	s.api.settle(ctx, rev)
	return id, nil
}

func (s *authorityService) TaintX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	id, err := s.upstream(ctx, req.GetSubjectKeyId(), "provided subject key id is not valid", "failed to taint upstream authority",
		func(ctx context.Context, id string) (kv.Rev, error) { return s.api.Authorities.TaintUpstream(ctx, id) })
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, nil
}

func (s *authorityService) RevokeX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.RevokeX509UpstreamAuthorityRequest) (*localauthorityv1.RevokeX509UpstreamAuthorityResponse, error) {
	id, err := s.upstream(ctx, req.GetSubjectKeyId(), "invalid subject key ID", "failed to revoke X.509 upstream authority",
		func(ctx context.Context, id string) (kv.Rev, error) { return s.api.Authorities.RevokeUpstream(ctx, id) })
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: id}, nil
}
