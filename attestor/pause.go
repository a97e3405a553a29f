package attestor

import (
	"context"
	"math/rand/v2"
	"time"
)

// Pause waits for half to one and a half of the time, so that agents that lost something together do not ask for it
// together, or until ctx ends.
func Pause(ctx context.Context, about time.Duration) {
	wait := time.NewTimer(about/2 + rand.N(about)) //nolint:gosec // jitter is no secret
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-ctx.Done():
	}
}
