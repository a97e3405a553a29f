package api

import (
	"context"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/workloadapi/identity"
)

// What a caller that has only roles may touch. Which methods it may call the interceptors have decided; here
// is decided about what. One role must cover the whole of a thing: half of it by one and half by another
// would be what nobody meant to give.

// errScope is what callers are told about things that they may not touch. What they may not see they are
// told does not exist.
var errScope = refusal(codes.PermissionDenied, "it is outside of the caller's roles")

// reaches reports whether the caller may touch an entry.
func reaches(ctx context.Context, e *identity.Entry) bool {
	roles, limited := caller.FromContext(ctx).Scope()
	return !limited || slices.ContainsFunc(roles, func(r *caller.Role) bool { return r.Entry(e) })
}

// reachesID reports whether the caller may give an ID away, with DNS names.
func reachesID(ctx context.Context, id spiffeid.ID, names []string) bool {
	roles, limited := caller.FromContext(ctx).Scope()
	return !limited || slices.ContainsFunc(roles, func(r *caller.Role) bool { return r.ID(id) && r.Names(names) })
}

// reached is a filter of lists: nil if the caller is not limited.
func reached(ctx context.Context) func(*identity.Entry) bool {
	if _, limited := caller.FromContext(ctx).Scope(); !limited {
		return nil
	}
	return func(e *identity.Entry) bool { return reaches(ctx, e) }
}

// mayDelete refuses to a limited caller the ways to delete a bundle that change entries, which may be
// anybody's.
func mayDelete(ctx context.Context, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	if _, limited := caller.FromContext(ctx).Scope(); limited && mode != bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT {
		return refusal(codes.PermissionDenied, "within a role, a bundle can be deleted with mode restrict only")
	}
	return nil
}
