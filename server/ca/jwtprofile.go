package ca

import (
	"encoding/json"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// JWTProfile gives JWT-SVIDs for certain audiences the claims that those demand. The usual one is an OAuth
// authorization server that follows RFC 7523 to the letter, to which a JWT-SVID is a client's assertion of
// who it is: iss and sub are both the client's ID, jti is there and new each time (section 3).
type JWTProfile struct {
	// Name is for complaints.
	Name string
	// Audiences are those that the profile is for. A token gets it if all of its audiences are among them:
	// one that is good elsewhere too must not say something else there than its issuer says.
	Audiences []string
	// IDs are SPIFFE IDs, or all below a path if they end in "/*"; none: all.
	IDs []string
	// SubjectIssues puts the subject into iss; or Issuer is what goes in; or neither: as without a profile.
	SubjectIssues bool
	Issuer        string
	// JTI puts a unique jti claim in.
	JTI bool
	// AudienceAsText writes a single audience as a text in place of a list of one (RFC 7519 section 4.1.3).
	AudienceAsText bool
}

// fits reports whether the profile is for a token.
func (p *JWTProfile) fits(id spiffeid.ID, audience []string) bool {
	for _, a := range audience {
		if !slices.Contains(p.Audiences, a) {
			return false
		}
	}
	return len(p.IDs) == 0 || slices.ContainsFunc(p.IDs, func(pattern string) bool {
		below, wild := strings.CutSuffix(pattern, "*")
		return pattern == id.String() || wild && strings.HasPrefix(id.String(), below)
	})
}

// jwtProfile returns the profile of a token, or one that changes nothing.
func (c *CA) jwtProfile(id spiffeid.ID, audience []string) *JWTProfile {
	for n := range c.cfg.JWTProfiles {
		if p := &c.cfg.JWTProfiles[n]; p.fits(id, audience) {
			return p
		}
	}
	return &JWTProfile{}
}

// audienceClaim is a list, or a text if it is to be one.
type audienceClaim struct {
	list []string
	text bool
}

// MarshalJSON implements json.Marshaler.
func (a audienceClaim) MarshalJSON() ([]byte, error) {
	if a.text && len(a.list) == 1 {
		return json.Marshal(a.list[0])
	}
	return json.Marshal(a.list)
}
