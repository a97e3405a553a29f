package issue

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// delegatedKey keeps subjects that somebody acts for apart from others: no key of facts begins with it.
const delegatedKey = "\x00"

// Delegated is the Issuer for those who act for others. Entries that give power over the server (admin,
// downstream) are nobody's to have through it: not as X509-SVIDs, not as JWT-SVIDs, and nothing is
// signed for them.
type Delegated struct{ issuer *Issuer }

// Delegated returns the Issuer for those who act for others.
func (i *Issuer) Delegated() Delegated { return Delegated{i} }

// X509 is Issuer's.
func (d Delegated) X509(ctx context.Context, facts attestor.Set) (identity.X509Context, <-chan struct{}, error) {
	return d.issuer.x509(ctx, facts, true)
}

// JWT is Issuer's.
func (d Delegated) JWT(ctx context.Context, facts attestor.Set, audience []string, id spiffeid.ID) ([]*identity.JWTSVID, <-chan struct{}, error) {
	return d.issuer.jwt(ctx, facts, true, audience, id)
}

// Entitled returns the SPIFFE IDs of the entries that facts match, oldest first, and a channel that is
// closed when they may be others. Nothing is signed for it.
func (i *Issuer) Entitled(facts attestor.Set) ([]spiffeid.ID, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := i.ask(facts, false, i.now())
	ids := make([]spiffeid.ID, len(s.entries))
	for n, e := range s.entries {
		ids[n] = e.SPIFFEID
	}
	return ids, s.changed
}
