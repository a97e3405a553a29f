// Package issue turns the entries that a workload matches into SVIDs: which are needed, when they are
// signed and renewed, and how many are held.
//
// A set of facts that somebody asked about is a subject. It knows the entries it matches, and has a
// channel that is closed when its answer may have changed. An entry that some subject matches has a
// slot for its X509-SVID. On a change of the picture each subject is matched again; where a present
// subject matches an entry anew, the SVID is signed at once and the channel closed when it is there,
// so that the stream that wakes finds it made.
//
// Nobody says when he stops following a subject, and nobody needs to: whoever follows asks again when
// the channel closes. A subject nobody asked about since its channel was last closed is not present,
// and nothing is signed or renewed for it until somebody asks.
//
// Why it is so:
//   - A thousand streams that wake together must cost a thousand lookups and no thousand matches, so
//     the answer hangs on the facts and is shared.
//   - Keys are made ahead, requests of a moment travel in one batch, and identical ones are one: what
//     a new workload waits for is one round trip.
//   - A server that is away must not take an identity from anybody whose SVID is still valid, and one
//     whose SVID has expired must not get it.
package issue

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Signer has SVIDs signed; *uplink.Uplink is one. Errors wrap identity.ErrUnavailable when the server
// cannot be asked at the moment, and identity.ErrUnknownEntry when it does not grant the entry.
type Signer interface {
	// SignX509 has one X509-SVID signed for each entry, with the CSR (DER) at the same place, and
	// returns a chain (DER, leaf first, without the root) or an error at that place.
	SignX509(ctx context.Context, asked []identity.Asked, csrs [][]byte) (chains [][][]byte, errs []error)
	// SignJWT has a JWT-SVID signed.
	SignJWT(ctx context.Context, asked identity.Asked, audience []string) (*identity.JWTSVID, error)
	// SignWIT has a WIT-SVID signed for a key (PKIX) that will prove with the algorithm. The error wraps
	// identity.ErrUnsupported if the server signs none.
	SignWIT(ctx context.Context, asked identity.Asked, key []byte, algorithm string) (*identity.JWTSVID, error)
}

// Store keeps SVIDs over restarts; *keep.Keep is one.
type Store interface {
	SVIDs() []keep.SVID
	SaveSVIDs(all func() []keep.SVID)
}

// Config is what an Issuer needs besides its parts. TrustDomain is required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// KeyType is the kind of key that workloads get, KeyEC256 if empty.
	KeyType KeyType
	// X509Size is how many X509-SVIDs are held; those of present subjects are held even beyond it.
	// JWTSize is how many JWT-SVIDs are held at most. 0 means 1000.
	X509Size, JWTSize int
	// Log, Metrics and Now may be nil.
	Log     logrus.FieldLogger
	Metrics prometheus.Registerer
	Now     func() time.Time
}

// Times and sizes that are not the operator's to choose.
const (
	// gather is how long a request waits for others to travel with. It is short against the round
	// trip that follows, and long enough for all streams that one change wakes.
	gather = 300 * time.Microsecond
	// maxBatch is how many requests travel together; the server takes no more.
	maxBatch = 500
	// maxBatches and maxJWT are how many calls are under way at a time.
	maxBatches = 4
	maxJWT     = 32
	// soft is how long somebody who could be given something waits for something better.
	soft = 2 * time.Second
	// scanEvery is how often everything is looked at although nothing is known to be due.
	scanEvery = time.Hour
	// keepOver is how long an SVID that has expired is kept: a clock that was set a day ahead may be set
	// back, and then nobody needs another.
	keepOver = 25 * time.Hour
	// maxWait is how long Run trusts its timer: the wall clock may jump, timers do not.
	maxWait = 30 * time.Second
	// firstRetry and maxRetry bound the wait after a failed request.
	firstRetry = 500 * time.Millisecond
	maxRetry   = 15 * time.Second
	// clockRetry is how often a server is asked whose answers are of no use because of a clock.
	clockRetry = time.Minute
	// minRenewal keeps a server that gives lifetimes of next to nothing from being asked all the time.
	minRenewal = 500 * time.Millisecond
	// afterWake is how soon those who follow a subject ask again after its channel was closed.
	afterWake = 10 * time.Second
	// forget is how long a subject that nobody follows is remembered.
	forget = time.Minute
	// maxSubjects bounds the sets of facts that are remembered.
	maxSubjects = 16384
)

// Issuer holds the SVIDs of this node's workloads. Use New, then Run. Its methods are safe for
// concurrent use; those that sign wait until Run runs.
type Issuer struct {
	cfg     Config
	view    *view.View
	signer  Signer
	store   Store
	log     logrus.FieldLogger
	now     func() time.Time
	pool    *pool
	metrics *metrics

	kick chan struct{} // something for Run to look at, capacity 1
	// clockPhase spreads the agents that have errClock over the minute.
	clockPhase time.Duration

	// mu guards what follows, and all that hangs on it.
	mu       sync.Mutex
	picture  *view.Picture // what subjects and slots reflect
	subjects map[string]*subject
	order    *list.List // of all subjects, the last asked about in front
	images   images
	slots    map[string]*slot // by entry ID
	queue    []*slot          // with a call that is not under way yet
	// gathering says that a batch waits for company; batches and signing count calls under way.
	gathering        bool
	batches, signing int
	jwts             jwtCache
	jwtQueue         []*jwtSlot
	nextScan         time.Time
	stopped          bool
	// revoked are authorities that left the bundle, latest those that signed last, one of each kind;
	// holds is closed, and replaced, when what is held may be signed by others.
	revoked revoked
	latest  [2]string
	holds   chan struct{}
}

// New returns an Issuer that holds what the store kept for entries of the picture in force.
func New(v *view.View, signer Signer, store Store, cfg Config) (*Issuer, error) {
	if cfg.Log == nil {
		cfg.Log = logrus.StandardLogger()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	if cfg.KeyType == "" {
		cfg.KeyType = KeyEC256
	}
	if cfg.X509Size == 0 {
		cfg.X509Size = 1000
	}
	if cfg.JWTSize == 0 {
		cfg.JWTSize = 1000
	}
	p, err := newPool(cfg.KeyType)
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	i := &Issuer{
		cfg: cfg, view: v, signer: signer, store: store, log: cfg.Log, now: cfg.Now, pool: p, metrics: m,
		kick: make(chan struct{}, 1), picture: v.Picture(), clockPhase: rand.N(clockRetry), //nolint:gosec // spreads load, hides nothing
		subjects: map[string]*subject{}, order: list.New(), images: newImages(), slots: map[string]*slot{}, jwts: newJWTCache(cfg.JWTSize),
		nextScan: cfg.Now(), holds: make(chan struct{}),
	}
	i.restore()
	return i, nil
}

// restore takes over the SVIDs of a former run that are still worth something.
func (i *Issuer) restore() {
	now := i.now()
	i.expectImages(now)
	count := 0
	for _, k := range i.store.SVIDs() {
		e, ok := i.picture.Entry(k.SVID.EntryID)
		if !ok || e.SPIFFEID != k.SVID.ID || !now.Before(k.SVID.NotAfter) {
			continue
		}
		sl := &slot{entry: e, users: map[*subject]struct{}{}, used: now}
		sl.put(k.SVID, renewalTime(k.SVID.NotBefore, k.SVID.NotAfter), k.EntryRevision, k.EntryCreatedAt)
		if sl.tainted(i.own()) {
			sl.forced, sl.renewAt = true, now
		}
		i.slots[e.ID] = sl
		count++
	}
	if count > 0 {
		i.log.WithField("svids", count).Info("serving X509-SVIDs from before the restart")
	}
}

// own returns the own trust domain's bundle, or nil.
func (i *Issuer) own() *identity.Bundle { return i.picture.Bundles[i.cfg.TrustDomain] }

// Run signs and renews until ctx ends, and returns nil when all calls have ended. An Issuer runs once.
func (i *Issuer) Run(ctx context.Context) error {
	var work sync.WaitGroup
	work.Go(func() { i.pool.run(ctx) })
	defer work.Wait()
	defer i.stop()
	var clock drift
	for {
		picture, replaced := i.view.Follow()
		i.mu.Lock()
		now := i.now()
		i.refresh(picture, now)
		if clock.moved(now) || !now.Before(i.nextScan) {
			i.scan(now)
		}
		if len(i.queue) > 0 && !i.gathering && i.batches < maxBatches {
			i.gathering = true
			i.batches++
			work.Go(func() { i.batch(ctx) })
		}
		for len(i.jwtQueue) > 0 && i.signing < maxJWT {
			sl := i.jwtQueue[0]
			i.jwtQueue = i.jwtQueue[1:]
			i.signing++
			work.Go(func() { i.signJWT(ctx, sl) })
		}
		wait := max(0, min(i.nextScan.Sub(now), maxWait))
		i.mu.Unlock()

		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-replaced:
		case <-i.kick:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// stop fails what waits, now and from now on.
func (i *Issuer) stop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.stopped = true
	for _, sl := range i.queue {
		sl.err = errStopped
		sl.finish()
	}
	for _, sl := range i.jwtQueue {
		sl.err = errStopped
		sl.finish()
	}
	i.queue, i.jwtQueue = nil, nil
}

var errStopped = fmt.Errorf("agent is stopping: %w", identity.ErrUnavailable)

// Retry makes everything that waits after a failure be tried at once; the wiring calls it when the
// server is back.
func (i *Issuer) Retry() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, sl := range i.slots {
		sl.retryAt, sl.failures = time.Time{}, 0
	}
	for _, sl := range i.jwts.slots {
		sl.retryAt, sl.failures = time.Time{}, 0
	}
	i.due(i.now())
}

// Counts returns how many X509-SVIDs and JWT-SVIDs are held.
func (i *Issuer) Counts() (x509, jwt int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.now()
	for _, sl := range i.slots {
		if sl.svid != nil && now.Before(sl.svid.NotAfter) {
			x509++
		}
	}
	return x509, len(i.jwts.slots)
}

// State says until when the X509-SVID is valid that is held for an entry, the zero time if there is none,
// and why the last attempt to have one signed failed, for people.
func (i *Issuer) State(entryID string) (until time.Time, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	sl := i.slots[entryID]
	if sl == nil {
		return time.Time{}, nil
	}
	if sl.svid != nil && sl.svid.ID == sl.entry.SPIFFEID {
		until = sl.svid.NotAfter
	}
	return until, sl.err
}

// due makes Run look at everything no later than t. mu is held.
func (i *Issuer) due(t time.Time) {
	if t.Before(i.nextScan) {
		i.nextScan = t
		i.poke()
	}
}

func (i *Issuer) poke() {
	select {
	case i.kick <- struct{}{}:
	default:
	}
}

// call is a request for a signature that anybody may wait for.
type call struct{ done chan struct{} }

// await waits for all calls, until ctx ends, or until late fires; nil never does.
func await(ctx context.Context, calls []*call, late <-chan time.Time) (inTime bool, err error) {
	for _, c := range calls {
		select {
		case <-c.done:
		case <-late:
			return false, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	return true, nil
}

// unavailable is what is said of a match that nothing valid can be given for.
func unavailable(err error) error {
	switch {
	case err == nil:
		return identity.ErrUnavailable
	case errors.Is(err, identity.ErrUnavailable):
		return err
	}
	return fmt.Errorf("%w: %w", identity.ErrUnavailable, err)
}
