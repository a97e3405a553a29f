package workloadapi

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/workloadapi/identity"
)

// denied is the end of a call whose caller has no identity. The reason is for the audit line; the
// caller learns only that it has none.
type denied string

// Reasons of denial.
const (
	noMatch   denied = "no entry matches"
	withdrawn denied = "no entry matches any more"
	dead      denied = "process has exited"
)

func (d denied) Error() string { return string(d) }

// invalid is the end of a call whose request is wrong; its text is for the caller.
type invalid string

func (i invalid) Error() string { return string(i) }

// errTooMany ends calls over their user's share.
var errTooMany = errors.New("too many streams are open for this user")

// toStatus turns an error into what the caller is told. go-spiffe's clients give up for good on
// Canceled and InvalidArgument and try again on everything else, so the first is only for calls that
// were canceled by their caller.
func (s *Server) toStatus(ctx context.Context, method string, err error) error {
	if err == nil {
		return nil
	}
	var deny denied
	var bad invalid
	switch {
	case errors.As(err, &deny), errors.Is(err, errDead):
		return status.Error(codes.PermissionDenied, "no identity issued")
	case errors.As(err, &bad):
		return status.Error(codes.InvalidArgument, string(bad))
	case errors.Is(err, errTooMany):
		return status.Error(codes.ResourceExhausted, errTooMany.Error())
	case errors.Is(err, errAttestation):
		return status.Error(codes.Unavailable, "workload attestation failed")
	case errors.Is(err, errStopping):
		return status.Error(codes.Unavailable, errStopping.Error())
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case errors.Is(err, identity.ErrUnsupported):
		return status.Error(codes.Unimplemented, identity.ErrUnsupported.Error())
	case errors.Is(err, identity.ErrUnavailable),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded): // the agent's own
		return status.Error(codes.Unavailable, identity.ErrUnavailable.Error())
	}
	if st, ok := status.FromError(err); ok { // gRPC's own, from sending
		return st.Err()
	}
	s.log.WithError(err).WithField("method", method).Error("call failed")
	return status.Error(codes.Internal, "internal error")
}

// outcome sums an error up for audit and metrics.
func outcome(err error) (outcome, reason string) {
	var deny denied
	var bad invalid
	switch {
	case err == nil:
		return "allow", ""
	case errors.As(err, &deny), errors.As(err, &bad), errors.Is(err, errDead):
		return "deny", err.Error()
	}
	return "error", err.Error()
}
