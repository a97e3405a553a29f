package awsapi

import (
	"context"
	"math/rand/v2"
	"time"
)

// Rest waits for pause, give or take a tenth so that several servers do not ask together, and reports false when ctx
// has ended.
func Rest(ctx context.Context, pause time.Duration) bool {
	wait := time.NewTimer(pause*9/10 + rand.N(pause/5+1)) //nolint:gosec // jitter is no secret
	defer wait.Stop()
	select {
	case <-wait.C:
		return true
	case <-ctx.Done():
		return false
	}
}
