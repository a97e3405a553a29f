package workloadapi

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Events in audit lines and metrics.
const (
	eventX509        = "x509_svid"
	eventX509Bundles = "x509_bundles"
	eventJWT         = "jwt_svid"
	eventJWTBundles  = "jwt_bundles"
	eventValidate    = "jwt_validate"
	eventOther       = "other"
	eventWIT         = "wit_svid"
	eventWITBundles  = "wit_bundles"
)

// events are those of the service's methods.
var events = map[string]string{
	"FetchX509SVID": eventX509, "FetchX509Bundles": eventX509Bundles,
	"FetchJWTSVID": eventJWT, "FetchJWTBundles": eventJWTBundles, "ValidateJWTSVID": eventValidate,
	"FetchWITSVID": eventWIT, "FetchWITBundles": eventWITBundles,
}

// FetchX509SVID streams the caller's X509-SVIDs with their keys and bundles, and again whenever any
// of them changes.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return s.follow(stream, s.x509)
}

// FetchX509Bundles streams the X.509 bundles of the own trust domain and of those the caller's
// entries federate with.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return s.follow(stream, s.x509Bundles)
}

// FetchJWTBundles streams the JWT bundles of the same trust domains.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return s.follow(stream, s.jwtBundles)
}

// errNoBundle is for a match without anything to verify others with.
var errNoBundle = fmt.Errorf("no bundle of the own trust domain: %w", identity.ErrUnavailable)

// makeX509 makes the answer of X509-SVID streams.
func (s *Server) makeX509(ctx context.Context, facts attestor.Set) (*answer, error) {
	x, changed, err := s.src.X509(ctx, facts)
	if err != nil {
		return nil, err
	}
	a := &answer{rev: x.Rev, changed: changed}
	if len(x.SVIDs) == 0 {
		return a, nil
	}
	if x.Bundle == nil {
		return nil, errNoBundle
	}
	resp, err := X509Response(x)
	if err != nil {
		return nil, err
	}
	for _, svid := range x.SVIDs {
		a.ids = append(a.ids, svid.ID.String())
		a.entries = append(a.entries, svid.EntryID)
		a.expires(svid.NotAfter)
	}
	a.matched = true
	a.frame, err = newFrame(resp)
	return a, err
}

// X509Response is the answer to X509-SVID streams; x has at least one SVID, and the own bundle.
func X509Response(x identity.X509Context) (*workload.X509SVIDResponse, error) {
	resp := &workload.X509SVIDResponse{FederatedBundles: make(map[string][]byte, len(x.Federated))}
	own := certificates(x.Bundle)
	for _, svid := range x.SVIDs {
		key := svid.KeyDER
		if len(key) == 0 {
			var err error
			if key, err = x509.MarshalPKCS8PrivateKey(svid.Key); err != nil {
				return nil, fmt.Errorf("encode key of %s: %w", svid.ID, err)
			}
		}
		resp.Svids = append(resp.Svids, &workload.X509SVID{
			SpiffeId:    svid.ID.String(),
			X509Svid:    slices.Concat(svid.Chain...),
			X509SvidKey: key,
			Bundle:      own,
			Hint:        svid.Hint,
		})
	}
	// The CRL field of the SPIFFE Workload API, section 5.2.1: of all trust domains in the message.
	resp.Crl = lists(append([]*identity.Bundle{x.Bundle}, x.Federated...))
	for _, b := range x.Federated {
		resp.FederatedBundles[b.TrustDomain.IDString()] = certificates(b)
	}
	return resp, nil
}

// makeX509Bundles makes the answer of X.509 bundle streams.
func (s *Server) makeX509Bundles(_ context.Context, facts attestor.Set) (*answer, error) {
	a, bundles, err := s.bundles(facts)
	if err != nil || !a.matched {
		return a, err
	}
	resp := &workload.X509BundlesResponse{Bundles: make(map[string][]byte, len(bundles)), Crl: lists(bundles)}
	for _, b := range bundles {
		resp.Bundles[b.TrustDomain.IDString()] = certificates(b)
	}
	a.frame, err = newFrame(resp)
	return a, err
}

// makeJWTBundles makes the answer of JWT bundle streams.
func (s *Server) makeJWTBundles(_ context.Context, facts attestor.Set) (*answer, error) {
	a, bundles, err := s.bundles(facts)
	if err != nil || !a.matched {
		return a, err
	}
	resp := &workload.JWTBundlesResponse{Bundles: make(map[string][]byte, len(bundles))}
	for _, b := range bundles {
		if resp.Bundles[b.TrustDomain.IDString()], err = keySet(b); err != nil {
			return nil, err
		}
	}
	a.frame, err = newFrame(resp)
	return a, err
}

// bundles returns the bundles that a caller may have: all that concern it, the own one if it has no
// identity and verifiers need none, or none.
func (s *Server) bundles(facts attestor.Set) (*answer, []*identity.Bundle, error) {
	set, changed := s.src.Bundles(facts)
	a := &answer{rev: set.Rev, changed: changed}
	if set.Matched == 0 && !s.cfg.AllowUnauthenticatedVerifiers {
		return a, nil, nil
	}
	if set.Own == nil {
		return nil, nil, errNoBundle
	}
	a.matched = true
	if set.Matched == 0 {
		return a, []*identity.Bundle{set.Own}, nil
	}
	return a, append([]*identity.Bundle{set.Own}, set.Federated...), nil
}

// certificates returns a bundle's certificates as concatenated DER.
func certificates(b *identity.Bundle) []byte {
	var der []byte
	for _, a := range b.X509 {
		der = append(der, a.Certificate.Raw...)
	}
	return der
}

// keySet returns a bundle's JWT keys as a plain JWK set in a fixed order. The "use" of SPIFFE bundle
// documents is left out: the Workload API hands out standard JWK sets.
func keySet(b *identity.Bundle) ([]byte, error) { return jwks(b.TrustDomain, b.JWT) }

func jwks(td spiffeid.TrustDomain, list []identity.JWTAuthority) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, 0, len(list))}
	for _, a := range list {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: a.Key, KeyID: a.KeyID})
	}
	slices.SortFunc(set.Keys, func(x, y jose.JSONWebKey) int { return strings.Compare(x.KeyID, y.KeyID) })
	text, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("encode keys of %s: %w", td, err)
	}
	return text, nil
}

// lists returns the lists of revoked certificates of the bundles.
func lists(bundles []*identity.Bundle) [][]byte {
	var all [][]byte
	for _, b := range bundles {
		all = append(all, b.CRLs...)
	}
	return all
}
