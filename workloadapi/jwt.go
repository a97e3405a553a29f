package workloadapi

import (
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
)

// Limits on one request for a JWT-SVID: each set of audiences is a signature and a place in a cache.
const (
	maxAudiences    = 100
	maxAudienceSize = 4096 // bytes, all together
)

// registeredClaims are returned from tokens of any trust domain.
var registeredClaims = []string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti"}

// FetchJWTSVID returns a JWT-SVID for the audiences for each identity of the caller, or for the one
// it asks for.
func (s *Server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	audience, err := audiences(req.GetAudience())
	if err != nil {
		return nil, err
	}
	var id spiffeid.ID
	if text := req.GetSpiffeId(); text != "" {
		if len(text) > identity.MaxSPIFFEID {
			return nil, invalid("invalid requested SPIFFE ID: too long")
		}
		if id, err = spiffeid.FromString(text); err != nil {
			return nil, invalid("invalid requested SPIFFE ID: " + err.Error())
		}
	}
	p, _ := peer.FromContext(ctx)
	c := s.enter(p)
	defer c.leave()
	facts, svids, err := s.jwt(ctx, c, audience, id)
	a := &answer{}
	resp := &workload.JWTSVIDResponse{}
	for _, svid := range svids {
		a.ids = append(a.ids, svid.ID.String())
		a.entries = append(a.entries, svid.EntryID)
		resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: svid.ID.String(), Svid: svid.Token, Hint: svid.Hint})
	}
	if ctx.Err() == nil {
		s.audit(eventJWT, c, facts, a, audience, err)
	}
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// jwt gets the tokens; a caller that matches nothing is held for its entry.
func (s *Server) jwt(ctx context.Context, c *caller, audience []string, id spiffeid.ID) (*attested, []*identity.JWTSVID, error) {
	facts, err := c.attested(ctx)
	if err != nil {
		return nil, nil, err
	}
	h := newHold(s.cfg.Hold)
	defer h.end()
	for {
		svids, changed, err := s.src.JWT(ctx, facts.facts, audience, id)
		switch {
		case err != nil:
			return facts, nil, err
		case !c.peer.Alive():
			return facts, nil, dead
		case len(svids) > 0:
			return facts, svids, nil
		case h.over:
			return facts, nil, noMatch
		}
		if facts, err = s.wait(ctx, c, facts, changed, h); err != nil {
			return facts, nil, err
		}
	}
}

// audiences returns the audiences that are not empty.
func audiences(given []string) ([]string, error) {
	var kept []string
	size := 0
	for _, a := range given {
		if a != "" {
			kept = append(kept, a)
			size += len(a)
		}
	}
	switch {
	case len(kept) == 0:
		return nil, invalid("audience must be specified")
	case len(kept) > maxAudiences:
		return nil, invalid(fmt.Sprintf("%d audiences, the limit is %d", len(kept), maxAudiences))
	case size > maxAudienceSize:
		return nil, invalid(fmt.Sprintf("audiences are %d bytes long, the limit is %d", size, maxAudienceSize))
	}
	return kept, nil
}

// ValidateJWTSVID verifies a JWT-SVID for the audience against the bundles that concern the caller,
// and returns its claims. Of a token of another trust domain only the registered claims and those
// that the operator trusts are returned.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch {
	case req.GetAudience() == "":
		return nil, invalid("audience must be specified")
	case req.GetSvid() == "":
		return nil, invalid("svid must be specified")
	}
	p, _ := peer.FromContext(ctx)
	c := s.enter(p)
	defer c.leave()
	facts, a, resp, err := s.validate(ctx, c, req)
	if ctx.Err() == nil {
		s.audit(eventValidate, c, facts, a, []string{req.GetAudience()}, err)
	}
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) validate(ctx context.Context, c *caller, req *workload.ValidateJWTSVIDRequest) (*attested, *answer, *workload.ValidateJWTSVIDResponse, error) {
	facts, err := c.attested(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	h := newHold(s.cfg.Hold)
	defer h.end()
	for {
		a, bundles, err := s.bundles(facts.facts)
		switch {
		case err != nil:
			return facts, nil, nil, err
		case a.matched:
			resp, err := s.verify(req.GetSvid(), req.GetAudience(), bundles)
			return facts, a, resp, err
		case h.over:
			return facts, a, nil, noMatch
		}
		if facts, err = s.wait(ctx, c, facts, a.changed, h); err != nil {
			return facts, a, nil, err
		}
	}
}

// verify checks a token by the JWT-SVID standard: a signature by a listed key with an asymmetric
// algorithm (sections 2 and 3), sub, aud and exp present and right (section 3). bundles[0] is the own
// trust domain's.
func (s *Server) verify(token, audience string, bundles []*identity.Bundle) (*workload.ValidateJWTSVIDResponse, error) {
	svid, err := jwtsvid.ParseAndValidate(token, bundleList(bundles), []string{audience})
	if err != nil {
		return nil, invalid(err.Error())
	}
	if svid.ID.TrustDomain() != bundles[0].TrustDomain {
		for claim := range svid.Claims {
			if !s.foreign[claim] {
				delete(svid.Claims, claim)
			}
		}
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, invalid("claims cannot be represented: " + err.Error())
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}

// bundleList finds a trust domain's bundle for go-spiffe.
type bundleList []*identity.Bundle

// GetJWTBundleForTrustDomain implements jwtbundle.Source.
func (l bundleList) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	for _, b := range l {
		if b.TrustDomain == td {
			return b.JWTBundle(), nil
		}
	}
	return nil, errors.New("not a trust domain that concerns the caller")
}
