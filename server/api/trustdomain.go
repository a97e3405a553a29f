package api

import (
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Federations keeps who is federated with; *records.Records is one.
type Federations interface {
	Federation(ctx context.Context, td spiffeid.TrustDomain) (*records.Federation, error)
	Federations(ctx context.Context) ([]*records.Federation, kv.Rev, error)
	CreateFederation(ctx context.Context, f *records.Federation) (kv.Rev, error)
	UpdateFederation(ctx context.Context, td spiffeid.TrustDomain, change func(*records.Federation) error) (*records.Federation, kv.Rev, error)
	DeleteFederation(ctx context.Context, td spiffeid.TrustDomain) (kv.Rev, error)
}

// Refresher fetches a federated bundle now; *trust.Fetcher is one. An error that has a method
// Endpoint() string says there what the caller may be told.
type Refresher interface {
	Refresh(ctx context.Context, td spiffeid.TrustDomain) (rev kv.Rev, known bool, err error)
}

// trustDomainService is trustdomain.v1. As with SPIRE it knows the federations that were made through it,
// not those of the configuration file: a controller deletes what it finds and did not make.
type trustDomainService struct {
	trustdomainv1.UnimplementedTrustDomainServer
	api *API
}

func (s *trustDomainService) ListFederationRelationships(ctx context.Context, req *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	page, err := pageFromWire(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, err
	}
	all, _, err := s.api.Federations.Federations(ctx)
	if err != nil {
		return nil, fail("failed to list federation relationships", err)
	}
	resp := &trustdomainv1.ListFederationRelationshipsResponse{}
	last := ""
	for _, f := range all {
		name := f.TrustDomain.Name()
		if name <= page.after {
			continue
		}
		if page.size > 0 && len(resp.FederationRelationships) == page.size {
			resp.NextPageToken = pageToken(last)
			break
		}
		w, err := s.wire(f, nil, req.GetOutputMask())
		if err != nil {
			return nil, err
		}
		resp.FederationRelationships = append(resp.FederationRelationships, w)
		last = name
	}
	return resp, nil
}

func (s *trustDomainService) GetFederationRelationship(ctx context.Context, req *trustdomainv1.GetFederationRelationshipRequest) (*types.FederationRelationship, error) {
	td, err := identity.ParseTrustDomain(req.GetTrustDomain())
	if err != nil {
		return nil, malformed("failed to parse trust domain", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.SPIFFEID = td.IDString() })
	f, err := s.api.Federations.Federation(ctx, td)
	switch {
	case errors.Is(err, records.ErrNotFound):
		return nil, refusal(codes.NotFound, "federation relationship does not exist")
	case err != nil:
		return nil, fail("failed to fetch federation relationship", err)
	}
	return s.wire(f, nil, req.GetOutputMask())
}

func (s *trustDomainService) BatchCreateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	resp := &trustdomainv1.BatchCreateFederationRelationshipResponse{}
	var last kv.Rev
	for _, w := range req.GetFederationRelationships() {
		made, rev, err := s.create(ctx, w, req.GetOutputMask())
		ledgerOf(ctx).item(audit.Line{SPIFFEID: "spiffe://" + w.GetTrustDomain(), Rev: rev.line()}, err)
		r := &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: itemOK(), FederationRelationship: made}
		if err != nil {
			r.Status = itemFailed(err)
		}
		resp.Results = append(resp.Results, r)
		last = max(last, rev.bundle)
	}
	s.api.settle(ctx, last)
	return resp, nil
}

func (s *trustDomainService) BatchUpdateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchUpdateFederationRelationshipRequest) (*trustdomainv1.BatchUpdateFederationRelationshipResponse, error) {
	resp := &trustdomainv1.BatchUpdateFederationRelationshipResponse{}
	var last kv.Rev
	for _, w := range req.GetFederationRelationships() {
		made, rev, err := s.update(ctx, w, req.GetInputMask(), req.GetOutputMask())
		ledgerOf(ctx).item(audit.Line{SPIFFEID: "spiffe://" + w.GetTrustDomain(), Rev: rev.line()}, err)
		r := &trustdomainv1.BatchUpdateFederationRelationshipResponse_Result{Status: itemOK(), FederationRelationship: made}
		if err != nil {
			r.Status = itemFailed(err)
		}
		resp.Results = append(resp.Results, r)
		last = max(last, rev.bundle)
	}
	s.api.settle(ctx, last)
	return resp, nil
}

func (s *trustDomainService) BatchDeleteFederationRelationship(ctx context.Context, req *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	resp := &trustdomainv1.BatchDeleteFederationRelationshipResponse{}
	for _, name := range req.GetTrustDomains() {
		r := &trustdomainv1.BatchDeleteFederationRelationshipResponse_Result{Status: itemOK(), TrustDomain: name}
		if td, err := identity.ParseTrustDomain(name); err == nil {
			r.TrustDomain = td.Name() // which may have been given as an ID
		}
		rev, err := s.remove(ctx, name)
		ledgerOf(ctx).item(audit.Line{SPIFFEID: "spiffe://" + name, Rev: rev}, err)
		if err != nil {
			r.Status = itemFailed(err)
		}
		resp.Results = append(resp.Results, r)
	}
	return resp, nil
}

// RefreshBundle fetches a bundle now and answers when it is stored.
func (s *trustDomainService) RefreshBundle(ctx context.Context, req *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	td, err := identity.ParseTrustDomain(req.GetTrustDomain())
	if err != nil {
		return nil, malformed("failed to parse trust domain", err)
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.SPIFFEID = td.IDString() })
	rev, known, err := s.api.Refresher.Refresh(ctx, td)
	var told interface {
		error
		Endpoint() string
	}
	switch {
	case errors.As(err, &told):
		return nil, refusal(codes.Internal, "failed to refresh bundle: "+told.Endpoint())
	case err != nil:
		return nil, fail("failed to refresh bundle", err)
	case !known:
		return nil, refusal(codes.NotFound, fmt.Sprintf("no relationship with trust domain %q", td.Name()))
	}
	ledgerOf(ctx).note(func(l *audit.Line) { l.Rev = rev })
	s.api.settle(ctx, rev)
	return &emptypb.Empty{}, nil
}

// federationFromWire parses what of a relationship the mask names; a nil mask names all.
func (s *trustDomainService) federationFromWire(w *types.FederationRelationship, mask *types.FederationRelationshipMask) (*records.Federation, *identity.Bundle, error) {
	const what = "failed to convert federation relationship"
	if w == nil {
		return nil, nil, malformed(what, errors.New("missing federation relationship"))
	}
	td, err := identity.ParseTrustDomain(w.GetTrustDomain())
	if err != nil {
		return nil, nil, malformed(what, fmt.Errorf("failed to parse trust domain: %w", err))
	}
	f := &records.Federation{TrustDomain: td, URL: w.GetBundleEndpointUrl()}
	if mask != nil && !mask.GetBundleEndpointUrl() {
		f.URL = "https://unchanged.invalid" // Check wants one; nobody takes it
	}
	if mask == nil || mask.GetBundleEndpointProfile() {
		switch profile := w.GetBundleEndpointProfile().(type) {
		case *types.FederationRelationship_HttpsWeb:
		case *types.FederationRelationship_HttpsSpiffe:
			if f.EndpointID, err = spiffeid.FromString(profile.HttpsSpiffe.GetEndpointSpiffeId()); err != nil {
				return nil, nil, malformed(what, fmt.Errorf("failed to parse endpoint SPIFFE ID: %w", err))
			}
			if err := identity.CheckID(f.EndpointID); err != nil {
				return nil, nil, malformed(what, fmt.Errorf("failed to parse endpoint SPIFFE ID: %w", err))
			}
		default:
			return nil, nil, malformed(what, fmt.Errorf("unsupported bundle endpoint profile type: %T", profile))
		}
	}
	if err := f.Check(); err != nil {
		return nil, nil, malformed(what, err)
	}
	if w.GetTrustDomainBundle() == nil || mask != nil && !mask.GetTrustDomainBundle() {
		return f, nil, nil
	}
	b, err := identity.BundleFromWire(w.GetTrustDomainBundle())
	switch {
	case err != nil:
		return nil, nil, malformed(what, fmt.Errorf("failed to parse bundle: %w", err))
	case b.TrustDomain != td:
		return nil, nil, malformed(what, fmt.Errorf("trust domain bundle (%q) must match the trust domain of the federation relationship (%q)", b.TrustDomain.Name(), td.Name()))
	}
	return f, b, nil
}

// commits are what one item of a batch wrote; 0: nothing of it.
type commits struct{ bundle, federation kv.Rev }

// line is the one that the audit line names.
func (c commits) line() kv.Rev { return max(c.bundle, c.federation) }

func (s *trustDomainService) create(ctx context.Context, w *types.FederationRelationship, out *types.FederationRelationshipMask) (*types.FederationRelationship, commits, error) {
	f, b, err := s.federationFromWire(w, nil)
	if err != nil {
		return nil, commits{}, err
	}
	if f.TrustDomain == s.api.cfg.TrustDomain {
		return nil, commits{}, refusal(codes.InvalidArgument, "unable to create federation relationship for server trust domain")
	}
	present := refusal(codes.AlreadyExists, "federation relationship already exists")
	// The bundle goes first, for the first fetch is verified with it.
	switch _, err := s.api.Federations.Federation(ctx, f.TrustDomain); {
	case err == nil:
		return nil, commits{}, present
	case !errors.Is(err, records.ErrNotFound):
		return nil, commits{}, fail("failed to create federation relationship", err)
	}
	held, at, err := s.put(ctx, b)
	if err != nil {
		return nil, commits{}, err
	}
	rev := commits{bundle: at}
	rev.federation, err = s.api.Federations.CreateFederation(ctx, f)
	switch {
	case errors.Is(err, records.ErrExists):
		return nil, rev, present
	case err != nil:
		return nil, rev, fail("failed to create federation relationship", err)
	}
	made, err := s.wire(f, held, out)
	return made, rev, err
}

func (s *trustDomainService) update(ctx context.Context, w *types.FederationRelationship, in, out *types.FederationRelationshipMask) (*types.FederationRelationship, commits, error) {
	f, b, err := s.federationFromWire(w, in)
	if err != nil {
		return nil, commits{}, err
	}
	absent := refusal(codes.NotFound, "federation relationship does not exist")
	switch _, err := s.api.Federations.Federation(ctx, f.TrustDomain); {
	case errors.Is(err, records.ErrNotFound):
		return nil, commits{}, absent
	case err != nil:
		return nil, commits{}, fail("failed to update federation relationship", err)
	}
	held, at, err := s.put(ctx, b)
	if err != nil {
		return nil, commits{}, err
	}
	rev := commits{bundle: at}
	now, at, err := s.api.Federations.UpdateFederation(ctx, f.TrustDomain, func(now *records.Federation) error {
		if in == nil || in.GetBundleEndpointUrl() {
			now.URL = f.URL
		}
		if in == nil || in.GetBundleEndpointProfile() {
			now.EndpointID = f.EndpointID
		}
		return nil
	})
	switch {
	case errors.Is(err, records.ErrNotFound):
		return nil, rev, absent
	case err != nil:
		return nil, rev, fail("failed to update federation relationship", err)
	}
	rev.federation = at
	made, err := s.wire(now, held, out)
	return made, rev, err
}

// put stores the bundle that came with a relationship, if one did. It is an operator's word, so what
// number the other trust domain's documents had is forgotten.
func (s *trustDomainService) put(ctx context.Context, given *identity.Bundle) (*identity.Bundle, kv.Rev, error) {
	if given == nil {
		return nil, 0, nil
	}
	b, rev, err := s.api.Records.UpdateBundle(ctx, given.TrustDomain, func(b *identity.Bundle) error {
		b.X509, b.JWT, b.WIT, b.RefreshHint, b.Origin = given.X509, given.JWT, given.WIT, given.RefreshHint, 0
		return nil
	})
	if err != nil {
		return nil, 0, fail("failed to write bundle of federation relationship", err)
	}
	return b, rev, nil
}

func (s *trustDomainService) remove(ctx context.Context, name string) (kv.Rev, error) {
	if name == "" {
		return 0, refusal(codes.InvalidArgument, "missing trust domain")
	}
	td, err := identity.ParseTrustDomain(name)
	if err != nil {
		return 0, malformed("failed to parse trust domain", err)
	}
	rev, err := s.api.Federations.DeleteFederation(ctx, td)
	switch {
	case errors.Is(err, records.ErrNotFound):
		return 0, refusal(codes.NotFound, "federation relationship not found")
	case err != nil:
		return 0, fail("failed to delete federation relationship", err)
	}
	return rev, nil
}

// wire returns what of a relationship the mask names; a nil mask names all. held is the bundle if it is
// newer than the view's.
func (s *trustDomainService) wire(f *records.Federation, held *identity.Bundle, mask *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	w := &types.FederationRelationship{TrustDomain: f.TrustDomain.Name()}
	if mask == nil || mask.GetBundleEndpointUrl() {
		w.BundleEndpointUrl = f.URL
	}
	if mask == nil || mask.GetBundleEndpointProfile() {
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
		if !f.EndpointID.IsZero() {
			w.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{
				HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: f.EndpointID.String()},
			}
		}
	}
	if mask == nil || mask.GetTrustDomainBundle() {
		if held == nil {
			held, _ = s.api.View.Bundle(f.TrustDomain)
		}
		if held != nil {
			var err error
			if w.TrustDomainBundle, err = held.Wire(); err != nil {
				return nil, fail("failed to convert bundle", err)
			}
		}
	}
	return w, nil
}
