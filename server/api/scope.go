package api

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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

// maxScopeReason is how much an audit line says of what is outside of roles, in bytes: most of it is the caller's.
const maxScopeReason = 1000

// outside returns errScope if the caller may not touch an entry. What of it is outside of which role the caller is
// not told, but whoever reads the audit log.
func outside(ctx context.Context, e *identity.Entry) error {
	return beyond(ctx, func(r *caller.Role) (string, string) {
		switch what := r.Beyond(e); what {
		case caller.BeyondPath:
			return what, e.SPIFFEID.Path()
		case caller.BeyondParent:
			return what, e.ParentID.Path()
		case caller.BeyondSelectors:
			return what, strings.Join(e.Selectors.Strings(), ", ")
		case caller.BeyondNames:
			return what, foreign(r, e.DNSNames)
		default:
			return what, ""
		}
	})
}

// outsideID returns errScope if the caller may not give an ID away, with DNS names.
func outsideID(ctx context.Context, id spiffeid.ID, names []string) error {
	return beyond(ctx, func(r *caller.Role) (string, string) {
		switch {
		case !r.ID(id):
			return caller.BeyondPath, id.Path()
		case !r.Names(names):
			return caller.BeyondNames, foreign(r, names)
		}
		return "", ""
	})
}

// foreign returns those of the DNS names that are not the role's to give.
func foreign(r *caller.Role, names []string) string {
	return strings.Join(slices.DeleteFunc(slices.Clone(names), func(name string) bool { return r.Names([]string{name}) }), ", ")
}

// beyond returns nil if the caller is not limited, or one of its roles covers a thing. look returns what of the thing
// a role does not cover, empty if it does, and the value of that.
func beyond(ctx context.Context, look func(*caller.Role) (what, value string)) error {
	roles, limited := caller.FromContext(ctx).Scope()
	if !limited {
		return nil
	}
	var why []string
	for _, r := range roles {
		what, value := look(r)
		if what == "" {
			return nil
		}
		why = append(why, strings.TrimSpace("not in role "+r.Name+": its "+what+" "+clipped(value, maxScopeReason/4)))
	}
	return &failure{st: status.Convert(errScope), cause: errors.New(clipped(strings.Join(why, "; "), maxScopeReason))}
}

// clipped returns a text of at most n bytes and a mark.
func clipped(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n], "") + "…"
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
