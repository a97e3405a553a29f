package api

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// bundleService is bundle.v1. What is not here answers Unimplemented.
type bundleService struct {
	bundlev1.UnimplementedBundleServer
	api *API
}

func (s *bundleService) CountBundles(context.Context, *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	return &bundlev1.CountBundlesResponse{Count: clampInt32(len(s.api.View.Bundles()))}, nil
}

func (s *bundleService) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	b, ok := s.api.View.Bundle(s.api.cfg.TrustDomain)
	if !ok {
		return nil, refusal(codes.NotFound, "bundle not found")
	}
	return maskBundle(b, req.GetOutputMask())
}

func (s *bundleService) AppendBundle(ctx context.Context, req *bundlev1.AppendBundleRequest) (*types.Bundle, error) {
	if len(req.GetWitAuthorities()) > 0 && !s.api.cfg.WIT {
		return nil, errNoWIT
	}
	if len(req.GetX509Authorities()) == 0 && len(req.GetJwtAuthorities()) == 0 && len(req.GetWitAuthorities()) == 0 {
		return nil, refusal(codes.InvalidArgument, "no authorities to append")
	}
	td := s.api.cfg.TrustDomain
	more, err := identity.BundleFromWire(&types.Bundle{
		TrustDomain: td.Name(), X509Authorities: req.GetX509Authorities(), JwtAuthorities: req.GetJwtAuthorities(), WitAuthorities: req.GetWitAuthorities(),
	})
	if err != nil {
		return nil, malformed("failed to convert authorities", err)
	}
	b, rev, err := s.append(ctx, more)
	if err != nil {
		return nil, fail("failed to append to bundle", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.SPIFFEID, l.Rev = td.IDString(), rev })
	s.api.settle(ctx, rev)
	return maskBundle(b, req.GetOutputMask())
}

// append adds authorities to the own bundle. What is there stays as it is.
func (s *bundleService) append(ctx context.Context, more *identity.Bundle) (*identity.Bundle, kv.Rev, error) {
	return s.api.Records.UpdateBundle(ctx, s.api.cfg.TrustDomain, func(b *identity.Bundle) error {
		for _, a := range more.X509 {
			if !b.HasX509(a.Certificate) {
				b.X509 = append(b.X509, a)
			}
		}
		var err error
		if b.JWT, err = appendKeys(b.JWT, more.JWT); err != nil {
			return err
		}
		if b.WIT, err = appendKeys(b.WIT, more.WIT); err != nil {
			return err
		}
		if max(len(b.X509), len(b.JWT), len(b.WIT)) > identity.MaxAuthorities {
			return refusal(codes.InvalidArgument, fmt.Sprintf("bundle would have more than %d authorities", identity.MaxAuthorities))
		}
		return nil
	})
}

func appendKeys(keys, more []identity.JWTAuthority) ([]identity.JWTAuthority, error) {
	for _, k := range more {
		switch at := slices.IndexFunc(keys, func(have identity.JWTAuthority) bool { return have.KeyID == k.KeyID }); {
		case at < 0:
			keys = append(keys, k)
		case !sameKey(keys[at].Key, k.Key):
			return nil, refusal(codes.AlreadyExists, fmt.Sprintf("key ID %q is that of another key", k.KeyID))
		}
	}
	return keys, nil
}

// PublishJWTAuthority adds the key that a downstream server signs tokens with to the own bundle, and
// returns all keys in it.
func (s *bundleService) PublishJWTAuthority(ctx context.Context, req *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	given := req.GetJwtAuthority()
	if given == nil {
		return nil, refusal(codes.InvalidArgument, "missing JWT authority")
	}
	w, err := s.publish(ctx, ca.KindJWT, &types.Bundle{JwtAuthorities: []*types.JWTKey{{
		// Whether it is tainted is not the downstream server's to say: nobody could take it back.
		PublicKey: given.GetPublicKey(), KeyId: given.GetKeyId(), ExpiresAt: given.GetExpiresAt(),
	}}})
	if err != nil {
		return nil, err
	}
	return &bundlev1.PublishJWTAuthorityResponse{JwtAuthorities: w.GetJwtAuthorities()}, nil
}

// PublishWITAuthority is PublishJWTAuthority for WIT-SVIDs. SPIRE has not built it.
func (s *bundleService) PublishWITAuthority(ctx context.Context, req *bundlev1.PublishWITAuthorityRequest) (*bundlev1.PublishWITAuthorityResponse, error) {
	if !s.api.cfg.WIT {
		return nil, errNoWIT
	}
	given := req.GetWitAuthority()
	if given == nil {
		return nil, refusal(codes.InvalidArgument, "missing WIT authority")
	}
	w, err := s.publish(ctx, ca.KindWIT, &types.Bundle{WitAuthorities: []*types.WITKey{{
		PublicKey: given.GetPublicKey(), KeyId: given.GetKeyId(), ExpiresAt: given.GetExpiresAt(),
	}}})
	if err != nil {
		return nil, err
	}
	return &bundlev1.PublishWITAuthorityResponse{WitAuthorities: w.GetWitAuthorities()}, nil
}

// publish adds the one key in w, which is of the kind, to the own bundle, and returns that.
func (s *bundleService) publish(ctx context.Context, kind string, w *types.Bundle) (*types.Bundle, error) {
	who := caller.FromContext(ctx)
	if err := s.api.sign.wait(ctx, who.Share(), 1); err != nil {
		return nil, err
	}
	td := s.api.cfg.TrustDomain
	w.TrustDomain = td.Name()
	more, err := identity.BundleFromWire(w)
	if err != nil {
		return nil, refusal(codes.InvalidArgument, err.Error())
	}
	key := append(more.JWT, more.WIT...)[0]
	failed := "failed to publish " + kindNames[kind] + " key"
	if a := s.api.Authorities; a != nil {
		// Whoever verifies elsewhere in the trust domain learns of it from above.
		if err := a.PublishAbove(ctx, kind, key); err != nil {
			return nil, fail(failed, err)
		}
	}
	b, rev, err := s.append(ctx, more)
	if err != nil {
		return nil, fail(failed, err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) {
		l.SPIFFEID, l.Rev, l.Authority, l.ExpiresAt = td.IDString(), rev, key.KeyID, key.ExpiresAt
		if len(who.Entries) > 0 {
			l.EntryID = who.Entries[0].ID
		}
	})
	s.api.settle(ctx, rev)
	if w, err = b.Wire(); err != nil {
		return nil, fail("failed to convert bundle", err)
	}
	return w, nil
}

// sameKey reports whether two public keys are one. A key ID stands for one key: a verifier that finds
// two tries either, or neither.
func sameKey(a, b crypto.PublicKey) bool {
	known, ok := a.(interface{ Equal(x crypto.PublicKey) bool })
	return ok && known.Equal(b)
}

func (s *bundleService) ListFederatedBundles(_ context.Context, req *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	page, err := pageFromWire(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	all := slices.Clone(s.api.View.Bundles())
	slices.SortFunc(all, func(a, b *identity.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
	resp := &bundlev1.ListFederatedBundlesResponse{}
	last := ""
	for _, b := range all {
		name := b.TrustDomain.Name()
		if b.TrustDomain == s.api.cfg.TrustDomain || name <= page.after {
			continue
		}
		if page.size > 0 && len(resp.Bundles) == page.size {
			resp.NextPageToken = pageToken(last)
			break
		}
		w, err := maskBundle(b, req.GetOutputMask())
		if err != nil {
			return nil, err
		}
		resp.Bundles = append(resp.Bundles, w)
		last = name
	}
	return resp, nil
}

func (s *bundleService) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := s.federated(req.GetTrustDomain(), "getting a federated bundle for the server's own trust domain is not allowed")
	if err != nil {
		return nil, err
	}
	b, ok := s.api.View.Bundle(td)
	if !ok {
		return nil, refusal(codes.NotFound, "bundle not found")
	}
	return maskBundle(b, req.GetOutputMask())
}

// federated parses the name of a trust domain; own refuses our own.
func (s *bundleService) federated(name, own string) (spiffeid.TrustDomain, error) {
	td, err := identity.ParseTrustDomain(name)
	if err != nil {
		return td, malformed("trust domain argument is not valid", err)
	}
	if td == s.api.cfg.TrustDomain {
		return td, refusal(codes.InvalidArgument, own)
	}
	return td, nil
}

// write says when a bundle may be written.
type write int

const (
	create write = iota // if there is none
	update              // if there is one
	set                 // in any case
)

func (w write) String() string {
	return [...]string{create: "creating", update: "updating", set: "setting"}[w]
}

// errAbsent and errPresent say that the condition of a write does not hold.
var (
	errAbsent  = refusal(codes.NotFound, "bundle not found")
	errPresent = refusal(codes.AlreadyExists, "bundle already exists")
)

// put writes one federated bundle and its audit line.
func (s *bundleService) put(ctx context.Context, w *types.Bundle, when write, in, out *types.BundleMask) (*types.Status, *types.Bundle, kv.Rev) {
	line := audit.Line{SPIFFEID: "spiffe://" + w.GetTrustDomain()}
	b, rev, err := s.write(ctx, w, when, in)
	var reply *types.Bundle
	if err == nil {
		line.Rev = rev
		reply, err = maskBundle(b, out)
	}
	ledgerOf(ctx).item(line, err)
	if err != nil {
		return itemFailed(err), nil, rev
	}
	return itemOK(), reply, rev
}

func (s *bundleService) write(ctx context.Context, w *types.Bundle, when write, in *types.BundleMask) (*identity.Bundle, kv.Rev, error) {
	if _, err := s.federated(w.GetTrustDomain(), when.String()+" a federated bundle for the server's own trust domain is not allowed"); err != nil {
		return nil, 0, err
	}
	given, err := identity.BundleFromWire(w)
	if err != nil {
		return nil, 0, malformed("failed to convert bundle", err)
	}
	b, rev, err := s.api.Records.UpdateBundle(ctx, given.TrustDomain, func(b *identity.Bundle) error {
		exists := !b.TrustDomain.IsZero() // else it is an empty one
		switch {
		case when == create && exists:
			return errPresent
		case when == update && !exists:
			return errAbsent
		}
		if in == nil || in.GetX509Authorities() {
			b.X509 = given.X509
		}
		if in == nil || in.GetJwtAuthorities() {
			b.JWT = given.JWT
		}
		if in == nil || in.GetWitAuthorities() {
			b.WIT = given.WIT
		}
		if in == nil || in.GetRefreshHint() {
			b.RefreshHint = given.RefreshHint
		}
		b.Origin = 0 // an operator's word: what number the other trust domain's documents had is forgotten
		return nil
	})
	if err != nil {
		return nil, 0, fail("failed to write bundle", err)
	}
	return b, rev, nil
}

func (s *bundleService) BatchCreateFederatedBundle(ctx context.Context, req *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	resp := &bundlev1.BatchCreateFederatedBundleResponse{}
	var last kv.Rev
	for _, w := range req.GetBundle() {
		status, b, rev := s.put(ctx, w, create, nil, req.GetOutputMask())
		resp.Results = append(resp.Results, &bundlev1.BatchCreateFederatedBundleResponse_Result{Status: status, Bundle: b})
		last = max(last, rev)
	}
	s.api.settle(ctx, last)
	return resp, nil
}

func (s *bundleService) BatchUpdateFederatedBundle(ctx context.Context, req *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	resp := &bundlev1.BatchUpdateFederatedBundleResponse{}
	var last kv.Rev
	for _, w := range req.GetBundle() {
		status, b, rev := s.put(ctx, w, update, req.GetInputMask(), req.GetOutputMask())
		resp.Results = append(resp.Results, &bundlev1.BatchUpdateFederatedBundleResponse_Result{Status: status, Bundle: b})
		last = max(last, rev)
	}
	s.api.settle(ctx, last)
	return resp, nil
}

func (s *bundleService) BatchSetFederatedBundle(ctx context.Context, req *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	resp := &bundlev1.BatchSetFederatedBundleResponse{}
	var last kv.Rev
	for _, w := range req.GetBundle() {
		status, b, rev := s.put(ctx, w, set, nil, req.GetOutputMask())
		resp.Results = append(resp.Results, &bundlev1.BatchSetFederatedBundleResponse_Result{Status: status, Bundle: b})
		last = max(last, rev)
	}
	s.api.settle(ctx, last)
	return resp, nil
}

func (s *bundleService) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	resp := &bundlev1.BatchDeleteFederatedBundleResponse{}
	if _, ok := bundlev1.BatchDeleteFederatedBundleRequest_Mode_name[int32(req.GetMode())]; !ok {
		return nil, refusal(codes.InvalidArgument, fmt.Sprintf("failed to parse deletion mode: unhandled delete mode %q", fmt.Sprint(int32(req.GetMode()))))
	}
	if err := mayDelete(ctx, req.GetMode()); err != nil {
		return nil, err
	}
	var last kv.Rev
	for _, name := range req.GetTrustDomains() {
		rev, err := s.remove(ctx, name, req.GetMode())
		ledgerOf(ctx).item(audit.Line{SPIFFEID: "spiffe://" + strings.TrimPrefix(name, "spiffe://"), Rev: rev}, err)
		r := &bundlev1.BatchDeleteFederatedBundleResponse_Result{Status: itemOK(), TrustDomain: name}
		if err != nil {
			r.Status = itemFailed(err)
		}
		resp.Results = append(resp.Results, r)
		last = max(last, rev)
	}
	s.api.settle(ctx, last)
	return resp, nil
}

// remove deletes a federated bundle; what becomes of entries that federate with its trust domain is
// the mode's to say.
func (s *bundleService) remove(ctx context.Context, name string, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) (kv.Rev, error) {
	td, err := s.federated(name, "removing the bundle for the server trust domain is not allowed")
	if err != nil {
		return 0, err
	}
	if _, ok := s.api.View.Bundle(td); !ok {
		return 0, refusal(codes.NotFound, "bundle not found")
	}
	entries, _ := s.api.View.ListEntries(view.EntryFilter{
		FederatesWith: []spiffeid.TrustDomain{td}, FederatesMatch: types.FederatesWithMatch_MATCH_ANY,
	}, "", 0)
	switch {
	case len(entries) == 0:
	case mode == bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT:
		return 0, refusal(codes.FailedPrecondition, fmt.Sprintf("cannot delete bundle; federated with %d registration entries", len(entries)))
	case mode == bundlev1.BatchDeleteFederatedBundleRequest_DELETE:
		ids := make([]string, len(entries))
		for i, e := range entries {
			ids[i] = e.ID
		}
		errs, rev, err := s.api.Records.DeleteEntriesIf(ctx, ids, func(e *identity.Entry) bool { return slices.Contains(e.FederatesWith, td) })
		for i, e := range errs {
			if e == nil {
				ledgerOf(ctx).item(audit.Line{EntryID: ids[i], SPIFFEID: entries[i].SPIFFEID.String(), Rev: rev}, nil)
			} else if err == nil && !errors.Is(e, records.ErrNotFound) {
				err = e
			}
		}
		if err != nil {
			return 0, fail("failed to delete entries of federated bundle", err)
		}
	default: // dissociate
		for _, e := range entries {
			_, rev, err := s.api.Records.UpdateEntry(ctx, e.ID, func(e *identity.Entry) error {
				e.FederatesWith = slices.DeleteFunc(slices.Clone(e.FederatesWith), func(with spiffeid.TrustDomain) bool { return with == td })
				return nil
			})
			if err != nil && !errors.Is(err, records.ErrNotFound) {
				return 0, fail("failed to dissociate entries from federated bundle", err)
			}
			if err == nil {
				ledgerOf(ctx).item(audit.Line{EntryID: e.ID, SPIFFEID: e.SPIFFEID.String(), Rev: rev}, nil)
			}
		}
	}
	rev, err := s.api.Records.DeleteBundle(ctx, td)
	switch {
	case errors.Is(err, records.ErrNotFound):
		return 0, refusal(codes.NotFound, "bundle not found")
	case err != nil:
		return 0, fail("failed to delete federated bundle", err)
	}
	return rev, nil
}

// maskBundle returns the fields of a bundle that the mask names; a nil mask names all.
func maskBundle(b *identity.Bundle, mask *types.BundleMask) (*types.Bundle, error) {
	w, err := b.Wire()
	if err != nil {
		return nil, fail("failed to convert bundle", err)
	}
	if mask == nil {
		return w, nil
	}
	if !mask.GetX509Authorities() {
		w.X509Authorities = nil
	}
	if !mask.GetWitAuthorities() {
		w.WitAuthorities = nil
	}
	if !mask.GetJwtAuthorities() {
		w.JwtAuthorities = nil
	}
	if !mask.GetRefreshHint() {
		w.RefreshHint = 0
	}
	if !mask.GetSequenceNumber() {
		w.SequenceNumber = 0
	}
	return w, nil
}
