package api

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// workloadIDFromWire parses the SPIFFE ID of a workload: of the own trust domain, with a path, and
// not in the part of it that is reserved for servers and agents.
func (a *API) workloadIDFromWire(w *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := identity.IDFromWire(w)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, a.checkWorkloadID(id)
}

func (a *API) checkWorkloadID(id spiffeid.ID) error {
	switch {
	case !id.MemberOf(a.cfg.TrustDomain):
		return fmt.Errorf("%q is not a member of trust domain %q", id, a.cfg.TrustDomain.Name())
	case id.Path() == "":
		return fmt.Errorf("%q is not a workload in trust domain %q; path is empty", id, a.cfg.TrustDomain.Name())
	case id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/"):
		return fmt.Errorf("%q is not a workload in trust domain %q; path is in the reserved namespace", id, a.cfg.TrustDomain.Name())
	}
	return nil
}

// entryFromWire parses an entry that somebody wants to have, and checks what this trust domain asks
// of one. Revision number and creation time are ours to say.
func (a *API) entryFromWire(w *types.Entry) (*identity.Entry, error) {
	if w == nil {
		return nil, errors.New("missing entry")
	}
	if w.GetParentId() == nil {
		return nil, errors.New("invalid parent ID: request must specify SPIFFE ID")
	}
	in := &types.Entry{
		Id: w.GetId(), SpiffeId: w.GetSpiffeId(), ParentId: w.GetParentId(), Selectors: w.GetSelectors(),
		X509SvidTtl: w.GetX509SvidTtl(), JwtSvidTtl: w.GetJwtSvidTtl(), FederatesWith: w.GetFederatesWith(),
		Admin: w.GetAdmin(), Downstream: w.GetDownstream(), ExpiresAt: w.GetExpiresAt(), DnsNames: w.GetDnsNames(),
		StoreSvid: w.GetStoreSvid(), Hint: w.GetHint(), AdditionalAttributes: w.GetAdditionalAttributes(),
	}
	e, err := identity.EntryFromWire(in)
	if err != nil {
		return nil, err
	}
	if err := a.checkWorkloadID(e.SPIFFEID); err != nil {
		return nil, fmt.Errorf("invalid spiffe ID: %w", err)
	}
	switch {
	case !e.ParentID.MemberOf(a.cfg.TrustDomain):
		return nil, fmt.Errorf("invalid parent ID: %q is not a member of trust domain %q", e.ParentID, a.cfg.TrustDomain.Name())
	case e.ParentID.Path() == "":
		return nil, fmt.Errorf("invalid parent ID: %q is not a member of trust domain %q; path is empty", e.ParentID, a.cfg.TrustDomain.Name())
	case e.Selectors.Len() == 0:
		return nil, errors.New("selector list is empty")
	case strings.ContainsFunc(e.ID, func(r rune) bool { return !isEntryIDRune(r) }):
		return nil, errors.New("invalid entry ID: it may have letters, digits, '.', '_' and '-'")
	case strings.ContainsFunc(e.Hint, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return nil, errors.New("invalid hint: control character")
	case slices.Contains(e.FederatesWith, a.cfg.TrustDomain):
		return nil, errors.New("invalid federated trust domain: it is the server's own")
	}
	for _, name := range e.DNSNames {
		if err := ca.ValidDNSName(name); err != nil {
			return nil, fmt.Errorf("invalid DNS name: %w", err)
		}
	}
	if e.StoreSVID {
		for _, s := range e.Selectors.All() {
			if s.Type != e.Selectors.All()[0].Type {
				return nil, errors.New("invalid selectors: all must be of one type if the SVID is to be stored")
			}
		}
		if e.NoPrefetch {
			return nil, errors.New("an SVID that is to be stored cannot be left unfetched")
		}
	}
	return e, a.lint(e)
}

func isEntryIDRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-'
}

// maskEntry clears the fields that the mask does not name; a nil mask names all. The ID stays.
func maskEntry(w *types.Entry, mask *types.EntryMask) *types.Entry {
	if mask == nil {
		return w
	}
	return mergeEntry(&types.Entry{Id: w.GetId()}, w, mask)
}

// mergeEntry copies the fields that the mask names from one entry onto another, which it returns; a
// nil mask names all.
func mergeEntry(to, from *types.Entry, mask *types.EntryMask) *types.Entry {
	all := mask == nil
	if all || mask.GetSpiffeId() {
		to.SpiffeId = from.GetSpiffeId()
	}
	if all || mask.GetParentId() {
		to.ParentId = from.GetParentId()
	}
	if all || mask.GetSelectors() {
		to.Selectors = from.GetSelectors()
	}
	if all || mask.GetX509SvidTtl() {
		to.X509SvidTtl = from.GetX509SvidTtl()
	}
	if all || mask.GetJwtSvidTtl() {
		to.JwtSvidTtl = from.GetJwtSvidTtl()
	}
	if all || mask.GetFederatesWith() {
		to.FederatesWith = from.GetFederatesWith()
	}
	if all || mask.GetAdmin() {
		to.Admin = from.GetAdmin()
	}
	if all || mask.GetDownstream() {
		to.Downstream = from.GetDownstream()
	}
	if all || mask.GetExpiresAt() {
		to.ExpiresAt = from.GetExpiresAt()
	}
	if all || mask.GetDnsNames() {
		to.DnsNames = from.GetDnsNames()
	}
	if all || mask.GetRevisionNumber() {
		to.RevisionNumber = from.GetRevisionNumber()
	}
	if all || mask.GetStoreSvid() {
		to.StoreSvid = from.GetStoreSvid()
	}
	if all || mask.GetHint() {
		to.Hint = from.GetHint()
	}
	if all || mask.GetCreatedAt() {
		to.CreatedAt = from.GetCreatedAt()
	}
	if all || mask.GetAdditionalAttributes() {
		to.AdditionalAttributes = from.GetAdditionalAttributes()
	}
	return to
}

// wireEntryFilter is what the filters of CountEntries and ListEntries have in common, which is all.
type wireEntryFilter interface {
	GetBySpiffeId() *types.SPIFFEID
	GetByParentId() *types.SPIFFEID
	GetBySelectors() *types.SelectorMatch
	GetByFederatesWith() *types.FederatesWithMatch
	GetByHint() *wrapperspb.StringValue
	GetByDownstream() *wrapperspb.BoolValue
}

// entryFilter parses a filter.
func (a *API) entryFilter(w wireEntryFilter) (view.EntryFilter, error) {
	var f view.EntryFilter
	if w.GetBySpiffeId() != nil {
		id, err := a.workloadIDFromWire(w.GetBySpiffeId())
		if err != nil {
			return f, malformed("malformed SPIFFE ID filter", err)
		}
		f.SPIFFEID = &id
	}
	if w.GetByParentId() != nil {
		id, err := a.memberFromWire(w.GetByParentId())
		if err == nil && id.Path() == "" {
			err = fmt.Errorf("%q is not a member of trust domain %q; path is empty", id, a.cfg.TrustDomain.Name())
		}
		if err != nil {
			return f, malformed("malformed parent ID filter", err)
		}
		f.ParentID = &id
	}
	if m := w.GetBySelectors(); m != nil {
		set, err := selectorMatch(m)
		if err != nil {
			return f, err
		}
		f.Selectors, f.Match = set, m.GetMatch()
	}
	if m := w.GetByFederatesWith(); m != nil {
		if _, ok := types.FederatesWithMatch_MatchBehavior_name[int32(m.GetMatch())]; !ok {
			return f, refusal(codes.InvalidArgument, "malformed federates with filter: match behavior is unknown")
		}
		if len(m.GetTrustDomains()) == 0 {
			return f, malformed("malformed federates with filter", errors.New("empty trust domain set"))
		}
		if len(m.GetTrustDomains()) > identity.MaxFederates {
			return f, malformed("malformed federates with filter", fmt.Errorf("more than %d trust domains", identity.MaxFederates))
		}
		for _, name := range m.GetTrustDomains() {
			td, err := identity.ParseTrustDomain(name)
			if err != nil {
				return f, malformed("malformed federates with filter", err)
			}
			f.FederatesWith = append(f.FederatesWith, td)
		}
		f.FederatesMatch = m.GetMatch()
	}
	// As with SPIRE, an empty hint and a false are no filter.
	if hint := w.GetByHint().GetValue(); hint != "" {
		if len(hint) > identity.MaxHint {
			return f, malformed("malformed hint filter", fmt.Errorf("%d bytes long, the limit is %d", len(hint), identity.MaxHint))
		}
		f.Hint = &hint
	}
	if downstream := w.GetByDownstream().GetValue(); downstream {
		f.Downstream = &downstream
	}
	return f, nil
}

func (a *API) memberFromWire(w *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := identity.IDFromWire(w)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if !id.MemberOf(a.cfg.TrustDomain) {
		return spiffeid.ID{}, fmt.Errorf("%q is not a member of trust domain %q", id, a.cfg.TrustDomain.Name())
	}
	return id, nil
}
