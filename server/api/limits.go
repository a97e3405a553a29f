package api

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
)

const (
	// maxBatch is the largest batch of signing requests, and the burst that a source may sign.
	maxBatch = 500
	// maxWaiters is how many calls of one source may wait for its rate at the same time. Each waits
	// in memory, so beyond it callers are told to come back.
	maxWaiters = 256
	// maxSources bounds the memory of all rates of one kind. Sources that were quiet for a minute
	// are forgotten first.
	maxSources = 10_000
	quiet      = time.Minute
)

// rates holds a token bucket per source address. Callers over their rate wait, as with SPIRE, whose
// agents take a refusal for more than it is.
type rates struct {
	limit rate.Limit
	burst int

	mu      sync.Mutex         // guards sources
	sources map[string]*bucket // by address
}

type bucket struct {
	limiter *rate.Limiter
	waiters int       // guarded by rates.mu
	last    time.Time // guarded by rates.mu
}

// newRates returns rates of perSecond with a burst, or nil, which limits nothing, for none.
func newRates(perSecond float64, burst int) *rates {
	if perSecond <= 0 {
		return nil
	}
	return &rates{limit: rate.Limit(perSecond), burst: max(burst, 1), sources: map[string]*bucket{}}
}

// wait returns when the source may do n things. An empty source is a local caller and never waits.
func (r *rates) wait(ctx context.Context, source string, n int) error {
	if r == nil || source == "" || n == 0 {
		return nil
	}
	b, err := r.enter(source)
	if err != nil {
		return err
	}
	defer r.leave(b)
	if err := b.limiter.WaitN(ctx, min(n, r.burst)); err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return refusal(codes.Canceled, "call was canceled while it waited for its rate limit")
		}
		// The limiter sees beforehand that the call's deadline is too early.
		return refusal(codes.ResourceExhausted, "rate limit of this address leaves no time for this call")
	}
	return nil
}

func (r *rates) enter(source string) (*bucket, error) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	b, ok := r.sources[source]
	if !ok {
		if len(r.sources) >= maxSources {
			r.forget(now)
		}
		if len(r.sources) >= maxSources {
			return nil, refusal(codes.ResourceExhausted, "too many addresses are calling")
		}
		b = &bucket{limiter: rate.NewLimiter(r.limit, r.burst)}
		r.sources[source] = b
	}
	if b.waiters >= maxWaiters {
		return nil, refusal(codes.ResourceExhausted, "too many calls of this address are waiting for its rate limit")
	}
	b.waiters++
	b.last = now
	return b, nil
}

func (r *rates) leave(b *bucket) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	b.waiters--
	b.last = now
}

// forget drops sources whose bucket has filled up again. r.mu is held.
func (r *rates) forget(now time.Time) {
	for source, b := range r.sources {
		if b.waiters == 0 && (now.Sub(b.last) > quiet || b.limiter.TokensAt(now) >= float64(r.burst)) {
			delete(r.sources, source)
		}
	}
}
