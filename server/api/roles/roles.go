// Package roles reads role blocks from the server's file and says who has which role: by an X.509-SVID, by
// a token of an OIDC issuer, or by the user at the other end of the Unix socket.
//
// Why it is so: whoever may make any entry can make one for himself, so there is nothing between an
// administrator and nobody unless what he may do is said thing by thing. Who a role is given to is said as
// for evidence sources, with the same care for tokens that anybody can have.
package roles

import (
	"context"
	"fmt"
	"math"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/verdict/trust"
)

// BlockType is the type of block.
const BlockType = "role"

// Block is role "name" { … } as it stands in the file.
type Block struct {
	Verbs     []string          `hcl:"verbs,optional"`
	Paths     []string          `hcl:"paths,optional"`
	Parents   []string          `hcl:"parents,optional"`
	Selectors []string          `hcl:"selectors,optional"`
	DNSNames  []string          `hcl:"dns_names,optional"`
	SVID      []trust.SVIDBlock `hcl:"svid,block"`
	OIDC      []trust.OIDCBlock `hcl:"oidc,block"`
	Unix      []UnixBlock       `hcl:"unix,block"`
}

// UnixBlock is unix { … }: users of the private socket, by number or name.
type UnixBlock struct {
	UIDs   []int    `hcl:"uids,optional"`
	GIDs   []int    `hcl:"gids,optional"`
	Users  []string `hcl:"users,optional"`
	Groups []string `hcl:"groups,optional"`
}

// Holder is a role and who has it. It does not change.
type Holder struct {
	role       *caller.Role
	source     *trust.Source // nil: nobody over the network
	uids, gids []uint32
}

// Kind decodes the blocks, for conf.
func Kind() conf.NamedKind {
	return conf.NamedKind{Block: BlockType, Decode: func(name string, body hcl.Body) (any, []conf.KeyProblem, hcl.Diagnostics) {
		var b Block
		diags := gohcl.DecodeBody(body, nil, &b)
		if diags.HasErrors() {
			return nil, nil, diags
		}
		h, problems := New(name, b)
		return h, problems, diags
	}}
}

// New checks a block and returns the role, or every problem found.
func New(name string, b Block) (*Holder, []conf.KeyProblem) {
	var problems []conf.KeyProblem
	say := func(field, format string, args ...any) {
		problems = append(problems, conf.KeyProblem{Field: field, Text: fmt.Sprintf(format, args...)})
	}
	h := &Holder{role: &caller.Role{Name: name, Verbs: b.Verbs, Paths: b.Paths, Parents: b.Parents, DNSNames: b.DNSNames}}
	if len(b.Verbs) == 0 {
		say("verbs", "say what it may do: %s; or \"*\".", strings.Join(caller.Verbs(), ", "))
	}
	for _, verb := range b.Verbs {
		if verb != "*" && !slices.Contains(caller.Verbs(), verb) {
			say("verbs", "%q is unknown; there are %s; and \"*\".", verb, strings.Join(caller.Verbs(), ", "))
		}
	}
	for field, paths := range map[string][]string{"paths": b.Paths, "parents": b.Parents} {
		for _, path := range paths {
			if path != "/" && spiffeid.ValidatePath(strings.TrimSuffix(path, "/")) != nil {
				say(field, "%q is no prefix of a path: write \"/shop\", which is /shop and what is below it, or \"/\" for all.", path)
			}
		}
	}
	for _, text := range b.Selectors {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			say("selectors", "%q: %s.", text, err)
			continue
		}
		h.role.Selectors = append(h.role.Selectors, s)
	}
	for _, name := range b.DNSNames {
		if plain := strings.TrimPrefix(name, "*."); plain == "" || strings.ContainsAny(plain, "*/ ") {
			say("dns_names", "%q is no DNS name: write it in full, or \"*.example.org\".", name)
		}
	}
	if len(b.SVID)+len(b.OIDC)+len(b.Unix) == 0 {
		say("svid", "say who has it: svid { ids = … }, oidc { issuer = …, audience = …, claims = … } or unix { users = … }.")
	}
	if len(b.SVID)+len(b.OIDC) > 0 {
		source, wrong := trust.NewSource(trust.SourceBlock{Name: name, Repositories: []string{"**"}, SVID: b.SVID, OIDC: b.OIDC})
		for _, p := range wrong {
			problems = append(problems, conf.KeyProblem{Field: p.Field, Nth: p.Nth, Text: p.Text})
		}
		h.source = source
	}
	for i, u := range b.Unix {
		h.unix(u, func(format string, args ...any) {
			problems = append(problems, conf.KeyProblem{Field: "unix", Nth: i + 1, Text: fmt.Sprintf(format, args...)})
		})
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return h, nil
}

func (h *Holder) unix(b UnixBlock, say func(format string, args ...any)) {
	add := func(to *[]uint32, n int) {
		if n < 0 || n >= math.MaxUint32 { // the last is nobody's
			say("%d is no number of a user or group.", n)
			return
		}
		*to = append(*to, uint32(n))
	}
	for _, n := range b.UIDs {
		add(&h.uids, n)
	}
	for _, n := range b.GIDs {
		add(&h.gids, n)
	}
	for _, name := range b.Users {
		if u, err := user.Lookup(name); err != nil {
			say("there is no user %q here.", name)
		} else if n, err := strconv.Atoi(u.Uid); err == nil {
			add(&h.uids, n)
		}
	}
	for _, name := range b.Groups {
		if g, err := user.LookupGroup(name); err != nil {
			say("there is no group %q here.", name)
		} else if n, err := strconv.Atoi(g.Gid); err == nil {
			add(&h.gids, n)
		}
	}
	if len(b.UIDs)+len(b.GIDs)+len(b.Users)+len(b.Groups) == 0 {
		say("it names nobody: write uids, gids, users or groups.")
	}
}

// Set is the roles in force. It is safe for concurrent use.
type Set struct {
	holders atomic.Pointer[[]*Holder]
	callers *trust.Callers
}

// NewSet returns a Set. now and log may be nil.
func NewSet(holders []*Holder, now func() time.Time, log logrus.FieldLogger) (*Set, error) {
	callers, err := trust.NewCallers(nil, trust.CallersConfig{Now: now, Log: log, Block: "role"})
	if err != nil {
		return nil, err
	}
	s := &Set{callers: callers}
	s.Replace(holders)
	return s, nil
}

// Replace puts other roles in force.
func (s *Set) Replace(holders []*Holder) {
	var sources []*trust.Source
	for _, h := range holders {
		if h.source != nil {
			sources = append(sources, h.source)
		}
	}
	s.holders.Store(&holders)
	s.callers.Replace(sources)
}

// SVID implements caller.Roles.
func (s *Set) SVID(id spiffeid.ID) []*caller.Role {
	push, err := s.callers.SVID(id)
	if err != nil {
		return nil
	}
	return s.named(push)
}

// Token implements caller.Roles.
func (s *Set) Token(ctx context.Context, token string) (string, []*caller.Role, error) {
	push, err := s.callers.Token(ctx, token)
	if err != nil {
		return "", nil, err
	}
	return push.Issuer + " " + push.Subject, s.named(push), nil
}

// named returns the roles whose sources let somebody in.
func (s *Set) named(push *trust.Push) []*caller.Role {
	var roles []*caller.Role
	for _, h := range *s.holders.Load() {
		if slices.Contains(push.Sources, h.source) {
			roles = append(roles, h.role)
		}
	}
	return roles
}

// Unix implements caller.Roles.
func (s *Set) Unix(uid, gid uint32) (roles []*caller.Role, governed bool) {
	var gids []uint32
	for _, h := range *s.holders.Load() {
		if len(h.uids)+len(h.gids) == 0 {
			continue
		}
		governed = true
		if gids == nil && len(h.gids) > 0 {
			gids = groups(uid, gid)
		}
		if slices.Contains(h.uids, uid) || slices.ContainsFunc(h.gids, func(g uint32) bool { return slices.Contains(gids, g) }) {
			roles = append(roles, h.role)
		}
	}
	return roles, governed
}

// groups returns the groups of a user: the one of the process, and those that the system knows of.
func groups(uid, gid uint32) []uint32 {
	all := []uint32{gid}
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return all
	}
	list, err := u.GroupIds()
	if err != nil {
		return all
	}
	for _, text := range list {
		if n, err := strconv.ParseUint(text, 10, 32); err == nil {
			all = append(all, uint32(n))
		}
	}
	return all
}
