package api

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/admit"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/turn"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/wire/later"
)

// failure is a gRPC status together with the error behind it, which goes to the audit line and not
// to the caller.
type failure struct {
	st    *status.Status
	cause error
}

func (f *failure) Error() string {
	if f.cause == nil || strings.HasSuffix(f.st.Message(), f.cause.Error()) {
		return f.st.Message()
	}
	return f.st.Message() + " (" + f.cause.Error() + ")"
}

func (f *failure) Unwrap() error { return f.cause }

// GRPCStatus is what the caller gets.
func (f *failure) GRPCStatus() *status.Status { return f.st }

// refusal returns a failure whose message tells the caller all there is.
func refusal(c codes.Code, message string) error {
	return &failure{st: status.New(c, message)}
}

// comeBack returns a ResourceExhausted failure with a hint when to try again.
func comeBack(message string, in time.Duration) error {
	return &failure{st: later.Status(message, in)}
}

// malformed returns an InvalidArgument failure "message: err".
func malformed(message string, err error) error {
	return &failure{st: status.New(codes.InvalidArgument, message+": "+err.Error())}
}

// fail turns an error of a part into a failure "message: reason". The reason is told where knowing
// it helps the caller and harms nobody.
func fail(message string, err error) error {
	c, tell := code(err)
	if f := (*failure)(nil); errors.As(err, &f) {
		return f
	}
	if tell != "" {
		message += ": " + tell
	}
	st := status.New(c, message)
	switch {
	case errors.Is(err, admit.ErrBanned):
		st = caller.Denied(message, types.PermissionDeniedDetails_AGENT_BANNED)
	case errors.Is(err, admit.ErrMustReattest):
		st = caller.Denied(message, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	case errors.Is(err, admit.ErrNotActive):
		st = caller.Denied(message, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	}
	return &failure{st: st, cause: err}
}

// code is the one place where errors of the house become gRPC codes. The text is what the caller is
// told beside; an error that is not listed is Internal and told nothing.
func code(err error) (codes.Code, string) {
	var unknownType *admit.UnknownTypeError
	var bundle *records.MissingBundleError
	switch {
	case errors.As(err, &unknownType):
		return codes.FailedPrecondition, unknownType.Error()
	case errors.As(err, &bundle):
		// SPIRE says Internal, and none of its clients acts on that; it is the caller's to mend.
		return codes.FailedPrecondition, bundle.Error()
	case errors.Is(err, admit.ErrBanned):
		return codes.PermissionDenied, admit.ErrBanned.Error()
	case errors.Is(err, admit.ErrMustReattest):
		return codes.PermissionDenied, admit.ErrMustReattest.Error()
	case errors.Is(err, admit.ErrNotActive):
		return codes.PermissionDenied, admit.ErrNotActive.Error()
	case errors.Is(err, admit.ErrTooMuch):
		return codes.InvalidArgument, admit.ErrTooMuch.Error()
	case errors.Is(err, records.ErrTokenUnknown):
		return codes.InvalidArgument, records.ErrTokenUnknown.Error()
	case errors.Is(err, records.ErrTokenExpired):
		return codes.InvalidArgument, records.ErrTokenExpired.Error()
	case errors.Is(err, attestor.ErrUsed):
		return codes.PermissionDenied, "attestation data has already been used to attest an agent"
	case errors.Is(err, attestor.ErrEvidence):
		return codes.InvalidArgument, err.Error()
	case errors.Is(err, records.ErrNotFound):
		return codes.NotFound, ""
	case errors.Is(err, records.ErrExists):
		return codes.AlreadyExists, "similar entry already exists"
	case errors.Is(err, records.ErrConflict):
		return codes.Aborted, "it is being changed by others"
	case errors.Is(err, ca.ErrKey), errors.Is(err, ca.ErrCSR), errors.Is(err, ca.ErrDNSName),
		errors.Is(err, ca.ErrID), errors.Is(err, ca.ErrTTL), errors.Is(err, ca.ErrAudience):
		return codes.InvalidArgument, err.Error()
	case errors.Is(err, ca.ErrManyAuthorities):
		return codes.ResourceExhausted, ca.ErrManyAuthorities.Error()
	case errors.Is(err, ca.ErrNoAuthority):
		return codes.Unavailable, ca.ErrNoAuthority.Error()
	case errors.Is(err, verdict.ErrStale), errors.Is(err, verdict.ErrHeld):
		return codes.FailedPrecondition, err.Error()
	case errors.Is(err, verdict.ErrRules):
		return codes.Aborted, verdict.ErrRules.Error()
	case errors.Is(err, verdict.ErrMany):
		return codes.ResourceExhausted, err.Error()
	case errors.Is(err, verdict.ErrRefused):
		return codes.InvalidArgument, err.Error()
	case errors.Is(err, verdict.ErrNoImage), errors.Is(err, verdict.ErrNoPolicy), errors.Is(err, verdict.ErrNoException):
		return codes.NotFound, err.Error()
	case errors.Is(err, kv.ErrTooLarge):
		return codes.InvalidArgument, "too large to store"
	case errors.Is(err, kv.ErrFull):
		return codes.ResourceExhausted, "no space left in the store"
	case errors.Is(err, turn.ErrFull):
		return codes.ResourceExhausted, turn.ErrFull.Error()
	case errors.Is(err, kv.ErrClosed):
		return codes.Unavailable, "server is stopping"
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded, "it took too long"
	case errors.Is(err, context.Canceled):
		return codes.Canceled, ""
	}
	if st, ok := status.FromError(err); ok {
		return st.Code(), st.Message() // from the stream below us
	}
	return codes.Internal, ""
}

// itemOK is the status of an item of a batch that went well.
func itemOK() *types.Status { return &types.Status{Code: int32(codes.OK), Message: codes.OK.String()} }

// itemFailed is the status of an item of a batch that did not.
func itemFailed(err error) *types.Status {
	st := status.Convert(err)
	return &types.Status{Code: int32(st.Code()), Message: st.Message()} //nolint:gosec // codes are small
}
