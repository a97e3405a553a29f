// Package view is the server's picture of who may have what: for each agent the entries it may hold
// and the bundles they need, kept in memory and in step with the records.
//
// A view is built from one Snapshot and then follows the commits. When the records can no longer
// tell what happened since (kv.ErrCompacted), a fresh Snapshot is compared with what is held and the
// difference goes through the same apply as any commit.
//
// An entry belongs to an agent if its parent is the agent's ID, or the SPIFFE ID of a node alias (an
// entry below spiffe://<trust domain>/spire/server) whose selectors are all among the node's, or the
// SPIFFE ID of another entry that belongs to the agent. Cycles are harmless. Expired entries belong
// to nobody, and neither does anything below them; a banned or unknown agent has no entries.
//
// Why it is so: SPIFFE IDs are the vertices of a graph and entries its edges, from parent to SPIFFE
// ID. A picture is what can be reached downwards from the agent and its aliases, and a change
// concerns the agents that are reached upwards from the changed entry, before it or after. So the
// cost of a change grows with the agents it may concern and with nothing else (BenchmarkChange).
// Pictures are computed when somebody asks and kept until a change concerns them; agents with the
// same aliases and no entries of their own, which is what a thousand equal nodes are, share one.
// Entries, IDs and selectors are those that server/records hands out, which share their strings.
package view

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Source is where a view comes from: *records.Records.
type Source interface {
	// StoreID identifies the store; revisions of different stores cannot be compared.
	StoreID() string
	// Snapshot returns everything at one revision.
	Snapshot(ctx context.Context) (*records.Snapshot, error)
	// Follow calls fn for every commit after the given revision, in order, once each. It returns
	// an error that is kv.ErrCompacted if it cannot tell what happened since.
	Follow(ctx context.Context, after kv.Rev, fn func(records.Change) error) error
}

// Config is what a View can do without.
type Config struct {
	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: a registry nobody reads
	Now     func() time.Time      // default time.Now
}

// View is safe for concurrent use. It answers from memory and never waits for the store.
type View struct {
	src Source
	cfg Config
	m   *metrics

	ready   chan struct{} // closed after the first snapshot
	renewed chan struct{} // holds one token when the earliest expiry may have changed

	progress progress

	// mu guards all of the graph. Only apply and tick take it for writing. Lock order: mu, then an
	// agent's mu, then the graph's groupMu.
	mu    sync.RWMutex
	graph graph
}

// progress is the revision the view has reached and those who wait for it.
type progress struct {
	mu   sync.Mutex
	rev  kv.Rev
	wake chan struct{} // nil while nobody waits
}

// New returns a view of the records of the trust domain, which must not be zero. It is empty until
// Run has taken the first snapshot.
func New(src Source, td spiffeid.TrustDomain, cfg Config) *View {
	if cfg.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		cfg.Log = silent
	}
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	v := &View{
		src:     src,
		cfg:     cfg,
		ready:   make(chan struct{}),
		renewed: make(chan struct{}, 1),
		graph:   newGraph(td),
	}
	v.m = newMetrics(cfg.Metrics, v)
	return v
}

// Run keeps the view in step with its source until ctx ends, and then returns nil. Any other return
// is an error of the source: what the view shows is then no longer kept up to date.
func (v *View) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return v.follow(ctx) })
	group.Go(func() error { return v.expire(ctx) })
	return group.Wait()
}

func (v *View) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		err := v.followOnce(ctx)
		switch {
		case errors.Is(err, kv.ErrCompacted):
			v.cfg.Log.WithField("rev", v.Rev()).Info("Fell behind the log of commits; taking a fresh snapshot")
		case ctx.Err() == nil:
			return err
		}
	}
	return nil
}

// followOnce takes a snapshot and follows from there. It returns never without an error.
func (v *View) followOnce(ctx context.Context) error {
	storeID, err := v.resync(ctx)
	if err != nil {
		return fmt.Errorf("take snapshot: %w", err)
	}
	err = v.src.Follow(ctx, v.Rev(), func(c records.Change) error {
		v.apply(storeID, c)
		return nil
	})
	if err == nil {
		err = errors.New("ended without an error")
	}
	return fmt.Errorf("follow records: %w", err)
}

// resync takes a snapshot, applies what differs from it, and returns the ID of its store.
func (v *View) resync(ctx context.Context) (storeID string, err error) {
	storeID = v.src.StoreID()
	snap, err := v.src.Snapshot(ctx)
	if err != nil {
		return "", err
	}
	v.m.snapshots.Inc()
	v.mu.RLock()
	change := v.graph.difference(snap)
	v.mu.RUnlock()
	v.apply(storeID, change)

	select {
	case <-v.ready:
	default:
		v.cfg.Log.WithFields(logrus.Fields{
			"rev": snap.Rev, "entries": len(snap.Entries), "nodes": len(snap.Nodes), "bundles": len(snap.Bundles), "verdicts": len(snap.Verdicts),
		}).Info("View is ready")
		close(v.ready)
	}
	return storeID, nil
}

// apply is the one way in for everything that changes.
func (v *View) apply(storeID string, c records.Change) {
	start := time.Now()
	v.mu.Lock()
	before, _ := v.graph.nextExpiry()
	touched := v.graph.advance(v.cfg.Now())
	touched += v.graph.apply(c)
	if v.graph.storeID != storeID {
		// Nothing of another store's pictures holds, not even one that reads the same.
		v.graph.storeID = storeID
		touched += v.graph.touchAll(c.Rev)
	}
	after, _ := v.graph.nextExpiry()
	v.mu.Unlock()

	v.progress.reach(c.Rev)
	if !before.Equal(after) {
		select {
		case v.renewed <- struct{}{}:
		default:
		}
	}
	v.m.touched.Add(float64(touched))
	v.m.apply.Observe(time.Since(start).Seconds())
}

// nap is the longest that expire sleeps. A timer does not notice that the wall clock was set or the
// machine slept; this bounds how long an expired entry can stay because of it.
const nap = time.Minute

// expire takes entries out of the pictures at the moment they expire, with one timer on the earliest.
func (v *View) expire(ctx context.Context) error {
	timer := time.NewTimer(nap)
	defer timer.Stop()
	for {
		v.mu.RLock()
		next, found := v.graph.nextExpiry()
		v.mu.RUnlock()
		wait := nap
		if found {
			wait = min(nap, max(next.Sub(v.cfg.Now()), time.Millisecond))
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-v.renewed:
			continue
		case <-timer.C:
		}
		v.tick()
	}
}

// tick takes out of the pictures what has expired by now.
func (v *View) tick() {
	v.mu.Lock()
	touched := v.graph.advance(v.cfg.Now())
	v.mu.Unlock()
	v.m.touched.Add(float64(touched))
}

// Ready returns a channel that is closed once the view has its first snapshot.
func (v *View) Ready() <-chan struct{} { return v.ready }

// Rev returns the revision of the last commit that the view has taken in.
func (v *View) Rev() kv.Rev {
	v.progress.mu.Lock()
	defer v.progress.mu.Unlock()
	return v.progress.rev
}

// Wait returns when the view has reached the revision, so that whoever wrote it can read it here, or
// with the error of ctx. The revision must be that of a commit to entries, nodes, bundles or verdicts: the
// view does not see others.
func (v *View) Wait(ctx context.Context, rev kv.Rev) error {
	for {
		wake := v.progress.behind(rev)
		if wake == nil {
			return nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return fmt.Errorf("wait for revision %d: %w", rev, ctx.Err())
		}
	}
}

func (p *progress) reach(rev kv.Rev) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rev = rev
	if p.wake != nil {
		close(p.wake)
		p.wake = nil
	}
}

// behind returns nil if the revision is reached, or a channel that is closed when there is news.
func (p *progress) behind(rev kv.Rev) <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rev >= rev {
		return nil
	}
	if p.wake == nil {
		p.wake = make(chan struct{})
	}
	return p.wake
}

// Bundle returns the bundle of a trust domain.
func (v *View) Bundle(td spiffeid.TrustDomain) (*identity.Bundle, bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	b, found := v.graph.bundles[td]
	return b, found
}
