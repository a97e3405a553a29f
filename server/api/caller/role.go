package caller

import (
	"context"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Role is some of what an administrator may do. It does not change.
type Role struct {
	Name string
	// Verbs are what it may do, as "entry:write"; "*" is all there are.
	Verbs []string
	// Paths are prefixes, of whole parts, of the paths of SPIFFE IDs that it may give away and see: "/shop"
	// is of /shop and /shop/till, and not of /shopping. None: of no ID; "/" is all.
	Paths []string
	// Parents are the same for the parents of entries. None: any.
	Parents []string
	// Selectors: an entry must have at least one of them. None: any will do.
	Selectors []attestor.Selector
	// DNSNames may be in entries and minted certificates: in full, or as *.example.org, which is one part
	// more. None: no name at all, for a name is an identity too.
	DNSNames []string
}

// Verb returns what a method is called in a role; empty: no role lets anybody call it.
func Verb(method string) string { return verbs[method] }

// Verbs returns all verbs, in order.
func Verbs() []string {
	var all []string
	for _, verb := range verbs {
		if !slices.Contains(all, verb) {
			all = append(all, verb)
		}
	}
	slices.Sort(all)
	return all
}

func (r *Role) may(verb string) bool {
	return verb != "" && (slices.Contains(r.Verbs, verb) || slices.Contains(r.Verbs, "*"))
}

// Entry reports whether an entry is within the role: what it gives, to whom, and to what selectors. Entries
// that make an administrator or a server of their holder are within none.
func (r *Role) Entry(e *identity.Entry) bool { return r.Beyond(e) == "" }

// What of an entry may be beyond a role.
const (
	BeyondAdmin      = "admin"
	BeyondDownstream = "downstream"
	BeyondPath       = "path"
	BeyondParent     = "parent"
	BeyondSelectors  = "selectors"
	BeyondNames      = "DNS names"
)

// Beyond returns what of an entry is beyond the role, the first thing; empty: it is within.
func (r *Role) Beyond(e *identity.Entry) string {
	switch {
	case e.Admin:
		return BeyondAdmin
	case e.Downstream:
		return BeyondDownstream
	case !r.ID(e.SPIFFEID):
		return BeyondPath
	case len(r.Parents) > 0 && !under(r.Parents, e.ParentID.Path()):
		return BeyondParent
	case len(r.Selectors) > 0 && !slices.ContainsFunc(r.Selectors, e.Selectors.Has):
		return BeyondSelectors
	case !r.Names(e.DNSNames):
		return BeyondNames
	}
	return ""
}

// ID reports whether the role may give an ID away.
func (r *Role) ID(id spiffeid.ID) bool { return under(r.Paths, id.Path()) }

// Names reports whether all of the DNS names are the role's to give.
func (r *Role) Names(names []string) bool {
	for _, name := range names {
		if !slices.ContainsFunc(r.DNSNames, func(pattern string) bool { return sameName(pattern, name) }) {
			return false
		}
	}
	return true
}

func sameName(pattern, name string) bool {
	if domain, ok := strings.CutPrefix(pattern, "*."); ok {
		first, rest, found := strings.Cut(name, ".")
		return found && first != "" && first != "*" && strings.EqualFold(rest, domain)
	}
	return strings.EqualFold(pattern, name)
}

func under(prefixes []string, path string) bool {
	return slices.ContainsFunc(prefixes, func(prefix string) bool {
		prefix = strings.TrimSuffix(prefix, "/")
		return path == prefix || strings.HasPrefix(path, prefix+"/")
	})
}

// Roles say who has which role.
type Roles interface {
	// SVID returns the roles of who holds an SVID of the ID.
	SVID(id spiffeid.ID) []*Role
	// Token returns who shows a token, and that one's roles. An error is a token that is no good.
	Token(ctx context.Context, token string) (who string, roles []*Role, err error)
	// Unix returns the roles of a user. If governed, what users of the Unix socket may do is said by roles,
	// and who has none may do nothing; but for root and the server's own user.
	Unix(uid, gid uint32) (roles []*Role, governed bool)
}

// Scope returns the roles that a caller was let in with, and whether it is limited to them. One who is not
// limited may do all that the method does.
func (c *Caller) Scope() (roles []*Role, limited bool) { return c.Roles, c.Kind&Scoped != 0 }

// scoped returns the roles that let the caller call a method.
func (a *Authorizer) scoped(ctx context.Context, who *Caller, method string) []*Role {
	if a.cfg.Roles == nil || Verb(method) == "" {
		return nil
	}
	var roles []*Role
	switch {
	case who.Kind&Local != 0:
		roles, _ = a.cfg.Roles.Unix(who.UID, who.GID)
	case !who.ID.IsZero():
		if !who.ID.MemberOf(a.cfg.TrustDomain) || a.cfg.Now().After(who.Cert.NotAfter) {
			return nil
		}
		roles = a.cfg.Roles.SVID(who.ID)
	default:
		_, roles, _ = a.bearer(ctx)
	}
	return slices.DeleteFunc(slices.Clone(roles), func(r *Role) bool { return !r.may(Verb(method)) })
}

// governed reports whether a caller of the Unix socket has only what its roles give.
func (a *Authorizer) governed(who *Caller) bool {
	if a.cfg.Roles == nil || !who.UnixPeer || who.UID == 0 || who.UID == a.cfg.UID {
		return false
	}
	_, governed := a.cfg.Roles.Unix(who.UID, who.GID)
	return governed
}

// bearer returns who the token of a call is of, and the roles of that one; nobody without a token, and an error for
// one that is no good.
func (a *Authorizer) bearer(ctx context.Context) (string, []*Role, error) {
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) != 1 {
		return "", nil, nil
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") {
		return "", nil, nil
	}
	who, roles, err := a.cfg.Roles.Token(ctx, token)
	if err != nil {
		a.cfg.Log.WithError(err).Debug("a caller's token was refused")
		return "", nil, err
	}
	return who, roles, nil
}

// maxTokenReason is how much an audit line says of what is wrong with a token, in bytes: some of it is the caller's.
const maxTokenReason = 300

// shown is a caller that is refused, with who its token is of and which roles that one has, or what is wrong with the
// token: the caller is not told, and whoever reads the audit log has to know.
func (a *Authorizer) shown(ctx context.Context, who *Caller) (*Caller, string) {
	if a.cfg.Roles == nil || who.local() || !who.ID.IsZero() {
		return who, ""
	}
	subject, roles, err := a.bearer(ctx)
	if err != nil {
		text := err.Error()
		return who, "its token is refused: " + strings.ToValidUTF8(text[:min(len(text), maxTokenReason)], "")
	}
	named := *who
	named.Subject, named.Roles = subject, roles
	return &named, ""
}
