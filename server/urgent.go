package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/turn"
)

// maxSigning is how many signatures may wait for their turn, a few hundred bytes each. As many are made
// at a time as there are processors.
const maxSigning = 1 << 16

// urgent signs agents' own SVIDs before anything else that waits for a signature: an agent that loses
// its SVID loses those of all its workloads.
type urgent struct {
	*ca.CA
	signing *turn.Stile
}

// SignAgent signs when it is the agent's turn.
func (u urgent) SignAgent(ctx context.Context, pub crypto.PublicKey, id spiffeid.ID) ([]*x509.Certificate, error) {
	if err := u.signing.Enter(ctx, turn.Urgent, id.String()); err != nil {
		return nil, fmt.Errorf("wait for a turn: %w", err)
	}
	defer u.signing.Leave(id.String())
	return u.CA.SignAgent(ctx, pub, id)
}
