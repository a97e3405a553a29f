package identity

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/attestor"
)

// Limits of a SPIFFE ID in bytes: the whole (SPIFFE-ID section 2.3), and the name of its trust domain
// (section 2.1).
const (
	MaxSPIFFEID    = 2048
	MaxTrustDomain = 255
)

// ParseTrustDomain parses the name of a trust domain, or the SPIFFE ID of one, by the rules of the
// SPIFFE-ID standard, its length limit included.
func ParseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	if len(name) > MaxSPIFFEID { // else the error would echo it
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain name is %d bytes long, the limit is %d", len(name), MaxTrustDomain)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	if n := len(td.Name()); n > MaxTrustDomain {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain name is %d bytes long, the limit is %d", n, MaxTrustDomain)
	}
	return td, nil
}

// CheckID says whether a SPIFFE ID that was parsed elsewhere keeps to the limits of the standard.
func CheckID(id spiffeid.ID) error {
	if n := len(id.String()); n > MaxSPIFFEID {
		return fmt.Errorf("SPIFFE ID is %d bytes long, the limit is %d", n, MaxSPIFFEID)
	}
	if n := len(id.TrustDomain().Name()); n > MaxTrustDomain {
		return fmt.Errorf("trust domain name is %d bytes long, the limit is %d", n, MaxTrustDomain)
	}
	return nil
}

// IDFromWire parses a SPIFFE ID by the rules of the SPIFFE-ID standard, its length limit included.
// An ID without a path is the trust domain's own and is accepted; callers that need a workload's
// ID check for the path.
func IDFromWire(w *types.SPIFFEID) (spiffeid.ID, error) {
	if w == nil {
		return spiffeid.ID{}, errors.New("request must specify SPIFFE ID")
	}
	if w.GetTrustDomain() == "" {
		return spiffeid.ID{}, errors.New("trust domain is missing")
	}
	if size := len("spiffe://") + len(w.GetTrustDomain()) + len(w.GetPath()); size > MaxSPIFFEID {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID is %d bytes long, the limit is %d", size, MaxSPIFFEID)
	}
	td, err := ParseTrustDomain(w.GetTrustDomain())
	if err != nil {
		return spiffeid.ID{}, err
	}
	// SPIRE takes the trust domain's own ID for its name, and no other.
	if given := strings.TrimPrefix(w.GetTrustDomain(), "spiffe://"); td.Name() != given {
		return spiffeid.ID{}, errors.New("trust domain must be a name, not a SPIFFE ID")
	}
	return spiffeid.FromPath(td, w.GetPath())
}

// IDWire returns the public form of a SPIFFE ID.
func IDWire(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// SelectorsFromWire parses selectors; duplicates are dropped.
func SelectorsFromWire(ws []*types.Selector) (attestor.Set, error) {
	if len(ws) > MaxSelectors {
		return attestor.Set{}, fmt.Errorf("invalid selectors: %d of them, the limit is %d", len(ws), MaxSelectors)
	}
	list := make([]attestor.Selector, 0, len(ws))
	for _, w := range ws {
		s := attestor.Selector{Type: w.GetType(), Value: w.GetValue()}
		switch err := s.Check(); { // the first three in SPIRE's words
		case s.Type == "":
			return attestor.Set{}, errors.New("missing selector type")
		case s.Value == "":
			return attestor.Set{}, errors.New("missing selector value")
		case strings.Contains(s.Type, ":"):
			return attestor.Set{}, errors.New("selector type contains ':'")
		case err != nil:
			return attestor.Set{}, fmt.Errorf("invalid selectors: %w", err)
		}
		list = append(list, s)
	}
	return attestor.NewSet(list...), nil
}

// SelectorsWire returns the public form of a set of selectors.
func SelectorsWire(s attestor.Set) []*types.Selector {
	ws := make([]*types.Selector, 0, s.Len())
	for _, sel := range s.All() {
		ws = append(ws, &types.Selector{Type: sel.Type, Value: sel.Value})
	}
	return ws
}
