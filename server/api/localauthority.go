package api

import (
	"context"
	"errors"
	"fmt"
	"strings"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Authorities is what an operator can do with authorities; *ca.CA is one.
type Authorities interface {
	// Authorities returns the journal, in no order.
	Authorities() []records.Journal
	// Published returns the revision of the last bundle that the CA wrote, 0 if that was before this
	// server was started.
	Published() kv.Rev

	PrepareAuthority(ctx context.Context, kind string) (records.Journal, kv.Rev, error)
	ActivateAuthority(ctx context.Context, kind, id string) (records.Journal, error)
	TaintAuthority(ctx context.Context, kind, id string) (records.Journal, kv.Rev, error)
	RevokeAuthority(ctx context.Context, kind, id string) (records.Journal, kv.Rev, error)

	// Upstream reports whether there is an authority above, whose roots are tainted and revoked by their
	// subject key IDs.
	Upstream() bool
	TaintUpstream(ctx context.Context, subjectKeyID string) (kv.Rev, error)
	RevokeUpstream(ctx context.Context, subjectKeyID string) (kv.Rev, error)
	// PublishAbove makes the key of a server below this one, that verifies tokens of the kind, known above.
	PublishAbove(ctx context.Context, kind string, key identity.JWTAuthority) error
}

// authorityService is localauthority.v1. SPIRE has not built what is about WIT authorities either.
type authorityService struct {
	localauthorityv1.UnimplementedLocalAuthorityServer
	api *API
}

// names of the kinds, as messages spell them.
var kindNames = map[string]string{ca.KindX509: "X.509", ca.KindJWT: "JWT", ca.KindWIT: "WIT"}

var (
	errNoWIT      = refusal(codes.Unimplemented, "WIT-SVIDs are not enabled: set wit_svids in the server's configuration")
	errNoUpstream = refusal(codes.FailedPrecondition, "upstream authority is not configured")
	// Whoever hangs on an upstream authority verifies by its root, not by what is below.
	errTaintLocal  = refusal(codes.FailedPrecondition, "local authority can't be tainted if there is an upstream authority")
	errRevokeLocal = refusal(codes.FailedPrecondition, "local authority can't be revoked if there is an upstream authority")

	errStarting = refusal(codes.Unavailable, "server is initializing")
)

// open says whether authorities of the kind can be dealt with.
func (s *authorityService) open(kind string) error {
	switch {
	case s.api.Authorities == nil:
		return refusal(codes.Unimplemented, "this server's authorities are not its own")
	case kind == ca.KindJWT && s.api.cfg.DisableJWT:
		return refusal(codes.Unimplemented, "JWT functionality is disabled")
	case kind == ca.KindWIT && !s.api.cfg.WIT:
		return errNoWIT
	}
	return nil
}

// state returns the authorities that SPIRE has places for: the active one, the prepared one, and of
// those that signed before the last. Each may be nil.
func (s *authorityService) state(kind string) (active, prepared, old *records.Journal) {
	lines := s.api.Authorities.Authorities()
	for i := range lines {
		a := &lines[i]
		if a.Kind != kind {
			continue
		}
		switch a.State {
		case ca.StateActive:
			active = a
		case ca.StatePrepared:
			prepared = a
		case ca.StateAside, ca.StateOld, ca.StateTainted:
			if old == nil || laterActive(a, old) {
				old = a
			}
		}
	}
	return active, prepared, old
}

func laterActive(a, b *records.Journal) bool {
	if !a.ActivatedAt.Equal(b.ActivatedAt) {
		return a.ActivatedAt.After(b.ActivatedAt)
	}
	return a.CreatedAt.After(b.CreatedAt)
}

func authorityWire(line *records.Journal) *localauthorityv1.AuthorityState {
	if line == nil {
		return nil
	}
	return &localauthorityv1.AuthorityState{
		AuthorityId: line.AuthorityID, ExpiresAt: line.NotAfter.Unix(), UpstreamAuthoritySubjectKeyId: line.UpstreamID,
	}
}

// get returns the state of the kind.
func (s *authorityService) get(kind string) (active, prepared, old *localauthorityv1.AuthorityState, err error) {
	if err := s.open(kind); err != nil {
		return nil, nil, nil, err
	}
	a, p, o := s.state(kind)
	if a == nil {
		return nil, nil, nil, errStarting
	}
	return authorityWire(a), authorityWire(p), authorityWire(o), nil
}

// step takes one step of a forced rotation and notes it in the audit line.
func (s *authorityService) step(ctx context.Context, kind, id string, do func() (records.Journal, kv.Rev, error)) (*localauthorityv1.AuthorityState, error) {
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) {
		line.Authority, line.SPIFFEID = id, s.api.cfg.TrustDomain.IDString()
		if !validAuthorityID(id) {
			line.Authority = "" // what a caller made up has no place there
		}
	})
	if err := s.open(kind); err != nil {
		return nil, err
	}
	done, rev, err := do()
	if err != nil {
		return nil, err
	}
	l.note(func(line *audit.Line) {
		line.Authority, line.ExpiresAt, line.Rev = done.AuthorityID, done.NotAfter, rev
	})
	s.api.settle(ctx, rev)
	return authorityWire(&done), nil
}

// validAuthorityID says whether it could be one: the hexadecimal of a digest, or 32 letters and digits.
func validAuthorityID(id string) bool {
	return len(id) <= 64 && strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyz") == ""
}

func (s *authorityService) prepare(ctx context.Context, kind string) (*localauthorityv1.AuthorityState, error) {
	return s.step(ctx, kind, "", func() (records.Journal, kv.Rev, error) {
		if active, _, _ := s.state(kind); active == nil {
			return records.Journal{}, 0, errStarting
		}
		done, rev, err := s.api.Authorities.PrepareAuthority(ctx, kind)
		if err != nil {
			err = fail("failed to prepare "+kindNames[kind]+" authority", err)
		}
		return done, rev, err
	})
}

func (s *authorityService) activate(ctx context.Context, kind, id string) (*localauthorityv1.AuthorityState, error) {
	return s.step(ctx, kind, id, func() (records.Journal, kv.Rev, error) {
		if id == "" {
			return records.Journal{}, 0, refusal(codes.InvalidArgument, "no authority ID provided")
		}
		done, err := s.api.Authorities.ActivateAuthority(ctx, kind, id)
		switch {
		case err == nil:
			return done, 0, nil
		case errors.Is(err, ca.ErrUnknownAuthority):
			err = refusal(codes.InvalidArgument, "unexpected authority ID")
		case errors.Is(err, ca.ErrNotPrepared):
			// What SPIRE answers. It is not the server's fault; clients look at the message.
			err = refusal(codes.Internal, "only Prepared authorities can be activated: unsupported local authority status: OLD")
			if active, _, _ := s.state(kind); active != nil && active.AuthorityID == id {
				err = refusal(codes.InvalidArgument, "unexpected authority ID")
			}
		default:
			err = fail("failed to activate "+kindNames[kind]+" authority", err)
		}
		return records.Journal{}, 0, err
	})
}

func (s *authorityService) taint(ctx context.Context, kind, id string) (*localauthorityv1.AuthorityState, error) {
	return s.step(ctx, kind, id, func() (records.Journal, kv.Rev, error) {
		if kind == ca.KindX509 && s.api.Authorities.Upstream() {
			return records.Journal{}, 0, errTaintLocal
		}
		if id == "" {
			return records.Journal{}, 0, refusal(codes.InvalidArgument, "no authority ID provided")
		}
		what := "root CA"
		if kind != ca.KindX509 {
			what = "key"
		}
		done, rev, err := s.api.Authorities.TaintAuthority(ctx, kind, id)
		switch {
		case err == nil:
		case errors.Is(err, ca.ErrActive):
			err = refusal(codes.InvalidArgument, "unable to taint current local authority")
		case errors.Is(err, ca.ErrUnknownAuthority):
			err = refusal(codes.InvalidArgument, "unexpected authority ID")
		case errors.Is(err, ca.ErrNotOld):
			err = refusal(codes.InvalidArgument, "only Old local authorities can be tainted: unsupported local authority status: PREPARED")
		case errors.Is(err, ca.ErrTainted):
			err = refusal(codes.Internal, fmt.Sprintf("failed to taint %s authority: %s is already tainted", kindNames[kind], what))
		default:
			err = fail("failed to taint "+kindNames[kind]+" authority", err)
		}
		return done, rev, err
	})
}

func (s *authorityService) revoke(ctx context.Context, kind, id string) (*localauthorityv1.AuthorityState, error) {
	return s.step(ctx, kind, id, func() (records.Journal, kv.Rev, error) {
		if kind == ca.KindX509 && s.api.Authorities.Upstream() {
			return records.Journal{}, 0, errRevokeLocal
		}
		if id == "" {
			return records.Journal{}, 0, refusal(codes.InvalidArgument, "invalid authority ID: no authority ID provided")
		}
		done, rev, err := s.api.Authorities.RevokeAuthority(ctx, kind, id)
		if err != nil {
			err = refusedRevoke(kind, err)
		}
		return done, rev, err
	})
}

func refusedRevoke(kind string, err error) error {
	unknown, prepared, what := "only Old local authority can be revoked", "only Old local authority can be revoked", "root CA"
	if kind != ca.KindX509 {
		unknown, prepared, what = "no "+kindNames[kind]+" authority found with provided authority ID", "unable to use a prepared key", "key"
	}
	switch {
	case errors.Is(err, ca.ErrActive):
		return refusal(codes.InvalidArgument, "invalid authority ID: unable to use current authority")
	case errors.Is(err, ca.ErrUnknownAuthority):
		return refusal(codes.InvalidArgument, "invalid authority ID: "+unknown)
	case errors.Is(err, ca.ErrNotOld):
		return refusal(codes.InvalidArgument, "invalid authority ID: "+prepared)
	case errors.Is(err, ca.ErrNotTainted):
		return refusal(codes.Internal, fmt.Sprintf("failed to revoke %s authority: it is not possible to revoke an untainted %s", kindNames[kind], what))
	}
	return fail("failed to revoke "+kindNames[kind]+" authority", err)
}

func (s *authorityService) GetX509AuthorityState(context.Context, *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	active, prepared, old, err := s.get(ca.KindX509)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.GetX509AuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

func (s *authorityService) GetJWTAuthorityState(context.Context, *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	active, prepared, old, err := s.get(ca.KindJWT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.GetJWTAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

func (s *authorityService) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	done, err := s.prepare(ctx, ca.KindX509)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: done}, nil
}

func (s *authorityService) PrepareJWTAuthority(ctx context.Context, _ *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	done, err := s.prepare(ctx, ca.KindJWT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareJWTAuthorityResponse{PreparedAuthority: done}, nil
}

func (s *authorityService) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	done, err := s.activate(ctx, ca.KindX509, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: done}, nil
}

func (s *authorityService) ActivateJWTAuthority(ctx context.Context, req *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	done, err := s.activate(ctx, ca.KindJWT, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: done}, nil
}

func (s *authorityService) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	done, err := s.taint(ctx, ca.KindX509, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: done}, nil
}

func (s *authorityService) TaintJWTAuthority(ctx context.Context, req *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	done, err := s.taint(ctx, ca.KindJWT, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: done}, nil
}

func (s *authorityService) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	done, err := s.revoke(ctx, ca.KindX509, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: done}, nil
}

func (s *authorityService) RevokeJWTAuthority(ctx context.Context, req *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	done, err := s.revoke(ctx, ca.KindJWT, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: done}, nil
}

func (s *authorityService) GetWITAuthorityState(context.Context, *localauthorityv1.GetWITAuthorityStateRequest) (*localauthorityv1.GetWITAuthorityStateResponse, error) {
	active, prepared, old, err := s.get(ca.KindWIT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.GetWITAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, nil
}

func (s *authorityService) PrepareWITAuthority(ctx context.Context, _ *localauthorityv1.PrepareWITAuthorityRequest) (*localauthorityv1.PrepareWITAuthorityResponse, error) {
	done, err := s.prepare(ctx, ca.KindWIT)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareWITAuthorityResponse{PreparedAuthority: done}, nil
}

func (s *authorityService) ActivateWITAuthority(ctx context.Context, req *localauthorityv1.ActivateWITAuthorityRequest) (*localauthorityv1.ActivateWITAuthorityResponse, error) {
	done, err := s.activate(ctx, ca.KindWIT, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateWITAuthorityResponse{ActivatedAuthority: done}, nil
}

func (s *authorityService) TaintWITAuthority(ctx context.Context, req *localauthorityv1.TaintWITAuthorityRequest) (*localauthorityv1.TaintWITAuthorityResponse, error) {
	done, err := s.taint(ctx, ca.KindWIT, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintWITAuthorityResponse{TaintedAuthority: done}, nil
}

func (s *authorityService) RevokeWITAuthority(ctx context.Context, req *localauthorityv1.RevokeWITAuthorityRequest) (*localauthorityv1.RevokeWITAuthorityResponse, error) {
	done, err := s.revoke(ctx, ca.KindWIT, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeWITAuthorityResponse{RevokedAuthority: done}, nil
}
