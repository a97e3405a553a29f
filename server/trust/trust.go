// Package trust exchanges bundles with other trust domains: it serves the own bundle at a bundle
// endpoint, and fetches those of the trust domains that are federated with.
//
// A bundle that is fetched goes into server/records and takes the road that every change takes, so
// agents and workloads have it within moments. What is fetched comes from a stranger: it is accepted over
// https only, from an endpoint that proved itself by the profile of its federation (SPIFFE Federation
// sections 5.2.1 and 5.2.2), without redirects, within a size and a time, and as a whole or not at all.
//
// Why it is so: a bundle decides who every workload here believes. A document that is older than one that
// was seen brings back authorities that were withdrawn, so its sequence number is kept beside the bundle,
// in the same record; an operator who sets or deletes the bundle by hand forgets the number, which is how
// to go on with a trust domain that has lost its own count.
package trust

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Store is where federations and bundles are kept; *records.Records is one.
type Store interface {
	Federation(ctx context.Context, td spiffeid.TrustDomain) (*records.Federation, error)
	Federations(ctx context.Context) ([]*records.Federation, kv.Rev, error)
	FollowFederations(ctx context.Context, after kv.Rev, fn func(kv.Rev) error) error
	Bundle(ctx context.Context, td spiffeid.TrustDomain) (*identity.Bundle, error)
	UpdateBundle(ctx context.Context, td spiffeid.TrustDomain, change func(*identity.Bundle) error) (*identity.Bundle, kv.Rev, error)
}

// Audit takes one line per decision; *audit.Log is one.
type Audit interface {
	Write(line audit.Line) error
}

// How often bundles are fetched.
const (
	// shortest is the least time between two fetches from one endpoint.
	shortest = time.Minute
	// longest bounds the wait, whatever an endpoint hints.
	longest = 24 * time.Hour
	// usual is what an endpoint without a hint is taken to mean.
	usual = 5 * time.Minute
	// firstRetry is the wait after the first failure; each further one doubles it.
	firstRetry = 5 * time.Second
	// atOnce is how many fetches may be under way.
	atOnce = 16
)

// Config is what a Fetcher can do without.
type Config struct {
	// Static are federations of the configuration file. They win over stored ones.
	Static []*records.Federation
	// Shortest is the least time between two fetches that nobody asked for. 0: one minute.
	Shortest time.Duration
	// Timeout is the time one fetch may take. 0: 30 seconds.
	Timeout time.Duration
	// Roots verify endpoints of the profile https_web. Nil: those of the system.
	Roots   *x509.CertPool
	Now     func() time.Time      // default: time.Now
	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: nothing is registered
}

// Fetcher keeps the bundles of federated trust domains. It is safe for concurrent use.
type Fetcher struct {
	store Store
	audit Audit
	cfg   Config

	fetches *prometheus.CounterVec
	fresh   *prometheus.GaugeVec
	slots   chan struct{}

	mu    sync.Mutex                      // guards peers
	peers map[spiffeid.TrustDomain]*state // of those that were ever fetched from
}

// state is what is remembered of one trust domain while the server runs.
type state struct {
	turn chan struct{} // one fetch at a time; who holds it owns the rest
	seen uint64        // the highest sequence number of its documents
	rev  kv.Rev        // of the commit that last changed its bundle; 0: none since the server started
	said string        // the failure that was told last; empty: it went well
}

// New returns a Fetcher; Run makes it work by itself.
func New(store Store, log Audit, cfg Config) *Fetcher {
	if cfg.Shortest <= 0 {
		cfg.Shortest = shortest
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 30 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		cfg.Log = silent
	}
	f := &Fetcher{
		store: store, audit: log, cfg: cfg, slots: make(chan struct{}, atOnce), peers: map[spiffeid.TrustDomain]*state{},
		fetches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_federation_fetches_total",
			Help: "Fetches of bundles of other trust domains, by outcome: changed, same, refused (what came is not to be trusted), failed (nothing came).",
		}, []string{"trust_domain", "outcome"}),
		fresh: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "assay_server_federation_last_success_timestamp_seconds",
			Help: "Unix time when the bundle of another trust domain was last fetched and found good.",
		}, []string{"trust_domain"}),
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(f.fetches, f.fresh)
	}
	return f
}

// Run fetches the bundles of all federations, stored ones and those of the configuration, until ctx ends.
func (f *Fetcher) Run(ctx context.Context) error {
	r := round{fetcher: f, running: map[spiffeid.TrustDomain]*worker{}}
	defer r.stop()
	for {
		all, rev, err := f.store.Federations(ctx)
		if err == nil {
			r.match(ctx, all)
			err = f.store.FollowFederations(ctx, rev, func(kv.Rev) error { return errChanged })
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errChanged), errors.Is(err, kv.ErrCompacted):
		case errors.Is(err, records.ErrDamaged):
			return fmt.Errorf("follow federations: %w", err)
		default:
			f.cfg.Log.WithError(err).Warn("Federations cannot be read")
			if !sleep(ctx, time.Second) {
				return nil
			}
		}
	}
}

var errChanged = errors.New("federations have changed")

// round is which federations are being looked after. Only Run touches it.
type round struct {
	fetcher *Fetcher
	running map[spiffeid.TrustDomain]*worker
	group   sync.WaitGroup
}

// worker looks after one federation.
type worker struct {
	federation records.Federation
	cancel     context.CancelFunc
	done       chan struct{}
}

// match starts and stops workers until there is one for each federation as it is now.
func (r *round) match(ctx context.Context, stored []*records.Federation) {
	want := map[spiffeid.TrustDomain]records.Federation{}
	for _, f := range append(slices.Clone(stored), r.fetcher.cfg.Static...) { // the last wins
		want[f.TrustDomain] = *f
	}
	for td, w := range r.running {
		now, wanted := want[td]
		if wanted && now == w.federation {
			delete(want, td)
			continue
		}
		w.cancel()
		<-w.done
		delete(r.running, td)
		if !wanted {
			r.fetcher.forget(td)
		}
	}
	for td, federation := range want {
		ctx, cancel := context.WithCancel(ctx)
		w := &worker{federation: federation, cancel: cancel, done: make(chan struct{})}
		r.running[td] = w
		r.group.Go(func() {
			defer close(w.done)
			r.fetcher.keep(ctx, &w.federation)
		})
	}
}

func (r *round) stop() {
	for _, w := range r.running {
		w.cancel()
	}
	r.group.Wait()
}

// keep fetches one bundle again and again until ctx ends.
func (f *Fetcher) keep(ctx context.Context, federation *records.Federation) {
	f.cfg.Log.WithFields(logrus.Fields{"trust_domain": federation.TrustDomain.Name(), "url": federation.URL}).Info("federation begins")
	failures := 0
	for {
		held, _, err := f.fetch(ctx, federation)
		var wait time.Duration
		if err != nil {
			wait = f.retry(failures)
			failures++
		} else {
			failures = 0
			wait = f.wait(held)
		}
		if !sleep(ctx, jitter(wait)) {
			return
		}
	}
}

// wait returns the time to the next fetch. The hint is how soon a change must be noticed (SPIFFE Trust
// Domain and Bundle section 4.1.2), so there are two fetches in it, that one of them may fail.
func (f *Fetcher) wait(b *identity.Bundle) time.Duration {
	hint := b.RefreshHint
	if hint <= 0 {
		hint = usual
	}
	return min(max(hint/2, f.cfg.Shortest), longest)
}

func (f *Fetcher) retry(failures int) time.Duration {
	return min(min(firstRetry, f.cfg.Shortest)<<min(failures, 16), max(usual, f.cfg.Shortest))
}

// jitter spreads waits by a tenth, that servers which started together do not stay together.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1) //nolint:gosec // spreads load, hides nothing
}

// sleep reports whether the time passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Refresh fetches the bundle of a trust domain now. It reports whether there is a federation with it, and the
// revision of the commit that the bundle is from, 0 if the server did not fetch it since it started.
func (f *Fetcher) Refresh(ctx context.Context, td spiffeid.TrustDomain) (rev kv.Rev, known bool, err error) {
	var federation *records.Federation
	for _, static := range f.cfg.Static {
		if static.TrustDomain == td {
			federation = static
		}
	}
	if federation == nil {
		federation, err = f.store.Federation(ctx, td)
		switch {
		case errors.Is(err, records.ErrNotFound):
			return 0, false, nil
		case err != nil:
			return 0, false, err
		}
	}
	_, rev, err = f.fetch(ctx, federation)
	return rev, true, err
}

// of returns what is remembered of a trust domain.
func (f *Fetcher) of(td spiffeid.TrustDomain) *state {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, ok := f.peers[td]
	if !ok {
		s = &state{turn: make(chan struct{}, 1)}
		f.peers[td] = s
		for _, outcome := range []string{"changed", "same", "refused", "failed"} {
			f.fetches.WithLabelValues(td.Name(), outcome) // alerts are about increases, and there is none from nothing to one
		}
	}
	return s
}

// forget drops what is remembered of a trust domain that is federated with no more.
func (f *Fetcher) forget(td spiffeid.TrustDomain) {
	f.mu.Lock()
	delete(f.peers, td)
	f.mu.Unlock()
	f.fetches.DeletePartialMatch(prometheus.Labels{"trust_domain": td.Name()})
	f.fresh.DeleteLabelValues(td.Name())
	f.cfg.Log.WithField("trust_domain", td.Name()).Info("federation ends")
}
