package workloadapi

import (
	"context"
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

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
	maxAudience     = 1024 // bytes; a server refuses longer ones
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
		if len(a) > maxAudience {
			return nil, invalid(fmt.Sprintf("audience is %d bytes long, the limit is %d", len(a), maxAudience))
		}
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

// ValidateJWTSVID verifies a JWT-SVID for the audience against the bundles that concern the caller, which for
// one without an identity is the own trust domain's, and returns its claims: as with SPIRE, whoever is attested
// may ask, and no bundle is handed out. Of a token of another trust domain only the registered claims and those
// that the operator trusts are returned.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch {
	case req.GetAudience() == "":
		return nil, invalid("audience must be specified")
	case len(req.GetAudience()) > maxAudience:
		return nil, invalid(fmt.Sprintf("audience is %d bytes long, the limit is %d", len(req.GetAudience()), maxAudience))
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
		set, changed := s.src.Bundles(facts.facts)
		a := &answer{rev: set.Rev, changed: changed, matched: true}
		if set.Own == nil {
			return facts, nil, nil, errNoBundle
		}
		bundles := []*identity.Bundle{set.Own}
		if set.Matched > 0 {
			bundles = append(bundles, set.Federated...)
		}
		resp, err := s.verify(req.GetSvid(), req.GetAudience(), bundles)
		if err == nil || set.Matched > 0 || h.over || !abroad(req, set.Own.TrustDomain) {
			return facts, a, resp, err
		}
		if facts, err = s.wait(ctx, c, facts, a.changed, h); err != nil {
			return facts, a, nil, err
		}
	}
}

// abroad reports whether a token says that it is of another trust domain than ours: an entry that brings that
// one's bundle may be on its way.
func abroad(req *workload.ValidateJWTSVIDRequest, own spiffeid.TrustDomain) bool {
	svid, err := jwtsvid.ParseInsecure(req.GetSvid(), []string{req.GetAudience()})
	return err == nil && svid.ID.TrustDomain() != own
}

// verify checks a token by the letter of the JWT-SVID standard: no header but those it names (section
// 2), a signature by a listed key with the algorithm that is that key's (sections 2.1 and 4), sub, aud
// and exp present and right (section 3). bundles[0] is the own trust domain's.
func (s *Server) verify(token, audience string, bundles []*identity.Bundle) (*workload.ValidateJWTSVIDResponse, error) {
	head, err := jwtHeader(token)
	if err != nil {
		return nil, invalid(err.Error())
	}
	svid, err := jwtsvid.ParseAndValidate(token, bundleList(bundles), []string{audience})
	if err != nil {
		return nil, invalid(strings.TrimPrefix(err.Error(), "jwtsvid: ")) // the caller knows what it asked about
	}
	if err := identity.CheckID(svid.ID); err != nil {
		return nil, invalid("token has an invalid subject claim: " + err.Error())
	}
	if err := head.fits(bundles, svid.ID.TrustDomain()); err != nil {
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

// joseHeader is what a token says of its signature.
type joseHeader struct {
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid"`
}

// headers are those that the header of a JWT-SVID may have (JWT-SVID section 2). Any other is refused:
// those that name keys (jku, jwk, x5c, x5u) and those that change what is signed (b64, crit) have
// fooled verifiers before.
var headers = []string{"alg", "kid", "typ"}

// jwtHeader reads the header of a token in compact serialization (RFC 7515 section 3.1). Whether it is
// told the truth is for the signature to show.
func jwtHeader(token string) (joseHeader, error) {
	var head joseHeader
	if strings.ContainsAny(token, "\r\n") { // which base64 decoders skip
		return head, errors.New("unable to parse JWT token")
	}
	first, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(first)
	if err != nil {
		return head, errors.New("unable to parse JWT token")
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		return head, errors.New("unable to parse JWT token")
	}
	for name := range all {
		if !slices.Contains(headers, name) {
			return head, errors.New("token has a header that a JWT-SVID must not have")
		}
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return head, errors.New("unable to parse JWT token")
	}
	return head, nil
}

// fits says whether the algorithm is the key's: each ECDSA algorithm belongs to one curve (RFC 7518
// section 3.4).
func (h joseHeader) fits(bundles []*identity.Bundle, td spiffeid.TrustDomain) error {
	for _, b := range bundles {
		if b.TrustDomain != td {
			continue
		}
		for _, a := range b.JWT {
			if a.KeyID != h.KeyID {
				continue
			}
			key, ok := a.Key.(*ecdsa.PublicKey)
			if want := map[string]int{"ES256": 256, "ES384": 384, "ES512": 521}[h.Algorithm]; ok && want != key.Curve.Params().BitSize {
				return errors.New("token's algorithm is not its key's")
			}
			return identity.CheckKey(a.Key)
		}
	}
	return errors.New("token's key is not known") // it was a moment ago
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
