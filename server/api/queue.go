package api

import (
	"context"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/turn"
)

// small is the largest batch that is no bulk: what an agent renews for the workloads of its node at one
// time.
const small = 50

// inTurn does one signature when it is the caller's turn: agents take turns whoever asks for more, and
// small batches go before large ones. (Before both go agents' own SVIDs, which the desk has signed.) So
// an agent that renews is not held up by those that start, and one agent's 500 signatures do not hold
// up another's one: a call gives its place back between any two of its signatures.
func (a *API) inTurn(ctx context.Context, rank turn.Rank, who *caller.Caller, sign func() error) error {
	if a.Signing == nil {
		return sign()
	}
	name := who.Share()
	if err := a.Signing.Enter(ctx, rank, name); err != nil {
		return fail("failed to wait for a turn", err)
	}
	defer a.Signing.Leave(name)
	return sign()
}
