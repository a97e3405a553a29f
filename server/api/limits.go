package api

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/wire/later"
)

const (
	// maxBatch is the largest batch of signing requests, and the burst that a source may sign.
	maxBatch = 500
	// maxWaiters is how many calls of one source may wait for its rate at the same time. Each waits
	// in memory, so beyond it callers are told to come back.
	maxWaiters = 256
	// maxSources bounds the memory of all rates of one kind. Sources that were quiet for a minute
	// are forgotten first.
	maxSources = 50_000
	quiet      = time.Minute
)

// rates holds a token bucket per source: an address, or a SPIFFE ID where the caller has proved one.
// Callers over their rate wait, as with SPIRE, whose agents take a refusal for more than it is.
//
// Those who cannot wait, for there are too many or their time is too short, are told when to come back:
// each at a moment of its own, as if there were a queue for them too. A thousand nodes behind one address
// that start together come back at the rate that they are admitted at, and not all at once.
type rates struct {
	limit rate.Limit
	burst int

	mu      sync.Mutex         // guards sources
	sources map[string]*bucket // by address
}

type bucket struct {
	limiter *rate.Limiter
	// rates.mu guards the rest.
	waiters int
	last    time.Time
	// promised is until when those who were sent away have been promised turns.
	promised time.Time
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
	waiting := ctx
	if deadline, ok := ctx.Deadline(); ok {
		// Who waits to the end of his time has none left for what he came for.
		var end context.CancelFunc
		waiting, end = context.WithTimeout(ctx, time.Until(deadline)*3/4)
		defer end()
	}
	if err := b.limiter.WaitN(waiting, min(n, r.burst)); err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return refusal(codes.Canceled, "call was canceled while it waited for its rate limit")
		}
		// The limiter sees beforehand that the call's deadline is too early.
		r.mu.Lock()
		defer r.mu.Unlock()
		return comeBack("rate limit of this address leaves no time for this call", r.promise(b, n))
	}
	return nil
}

// promise returns when one who is sent away is to come back. r.mu is held.
func (r *rates) promise(b *bucket, n int) time.Duration {
	now := time.Now()
	each := time.Duration(float64(min(n, r.burst)) / float64(r.limit) * float64(time.Second))
	if queued := now.Add(time.Duration(b.waiters) * each); b.promised.Before(queued) {
		b.promised = queued
	}
	b.promised = b.promised.Add(each)
	in := b.promised.Sub(now)
	if in > later.Max {
		b.promised = now.Add(later.Max)
		in = later.Max/2 + rand.N(later.Max/2) //nolint:gosec // spreads load, hides nothing
	}
	return max(in, time.Second)
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
			return nil, comeBack("too many addresses are calling", quiet)
		}
		b = &bucket{limiter: rate.NewLimiter(r.limit, r.burst)}
		r.sources[source] = b
	}
	if b.waiters >= maxWaiters {
		b.last = now
		return nil, comeBack("too many calls of this address are waiting for its rate limit", r.promise(b, 1))
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
		if b.waiters == 0 && b.promised.Before(now) && (now.Sub(b.last) > quiet || b.limiter.TokensAt(now) >= float64(r.burst)) {
			delete(r.sources, source)
		}
	}
}
