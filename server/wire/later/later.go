// Package later is how a server that has too much to do says when to come back, and how an agent hears
// it: a google.rpc.RetryInfo in the details of a ResourceExhausted status, which is what the gRPC
// documentation names for it, so that other clients may hear it too.
//
// Why it is here: both sides must mean the same by it, and server/wire is what both may import.
package later

import (
	"errors"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Max is the latest that anybody is told, or lets himself be told, to come back: a server that is
// mistaken must not keep an agent away for good.
const Max = 10 * time.Minute

// Status says that there is too much to do, and when to come back.
func Status(message string, in time.Duration) *status.Status {
	st := status.New(codes.ResourceExhausted, message)
	if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(min(in, Max))}); err == nil {
		return with
	}
	return st
}

// Hint returns when the sender of an error said to come back, if he did.
func Hint(err error) (time.Duration, bool) {
	var said interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &said) {
		return 0, false
	}
	for _, detail := range said.GRPCStatus().Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok && info.GetRetryDelay().IsValid() {
			return max(0, min(info.GetRetryDelay().AsDuration(), Max)), true
		}
	}
	return 0, false
}
