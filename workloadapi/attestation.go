package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/attestor"
)

// Limits and defaults of attestation.
const (
	// DefaultAttestorTimeout is how long each attestor may take for one process.
	DefaultAttestorTimeout = 5 * time.Second
	// maxHung is how many calls of one attestor may be past their deadline without having
	// returned before it is not asked any more.
	maxHung = 64
	// maxSelectors is how many selectors of one attestor are believed for one process.
	maxSelectors = 10000
	// watchRetry is how long to wait before an attestor's Watch is called again that failed.
	watchRetry = 5 * time.Second
	// complainInterval is how often, at most, one attestor's errors are logged.
	complainInterval = 10 * time.Second
)

// Attestor is one configured workload attestor.
type Attestor struct {
	// Type is its name in the configuration, in logs and in explanations.
	Type string
	attestor.Workload
}

// AttestationConfig holds what an Attestation may be given; the zero value works.
type AttestationConfig struct {
	// Timeout is how long each attestor may take for one process; 0 means DefaultAttestorTimeout.
	Timeout time.Duration
	Log     logrus.FieldLogger
	Metrics prometheus.Registerer
	Now     func() time.Time
}

// Attestation asks all configured attestors about a process, in parallel, each with a deadline of
// its own, so that a slow or broken one costs a workload that one's selectors and nothing else.
// It is safe for concurrent use.
type Attestation struct {
	attestors []*asked
	timeout   time.Duration
	log       logrus.FieldLogger
	now       func() time.Time
	results   *prometheus.CounterVec
	seconds   *prometheus.HistogramVec

	mu   sync.Mutex // guards the map
	subs map[int]map[*subscription]struct{}
}

// asked is an attestor and how it behaves.
type asked struct {
	Attestor
	mu       sync.Mutex // guards the rest
	hung     int        // calls that are past their deadline and have not returned
	lastWarn time.Time
	unlogged int
}

// subscription is somebody who wants to know when attestors' answers about a process may change.
type subscription struct{ changed func() }

// NewAttestation returns an Attestation by these attestors. Their order is that of its findings.
func NewAttestation(attestors []Attestor, cfg AttestationConfig) *Attestation {
	a := &Attestation{timeout: cfg.Timeout, log: orDiscard(cfg.Log), now: cfg.Now, subs: map[int]map[*subscription]struct{}{}}
	if a.timeout <= 0 {
		a.timeout = DefaultAttestorTimeout
	}
	if a.now == nil {
		a.now = time.Now
	}
	for _, one := range attestors {
		a.attestors = append(a.attestors, &asked{Attestor: one})
	}
	a.results = register(cfg.Metrics, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_workload_attestations_total",
		Help: "Answers of workload attestors by result: ok, error or timeout.",
	}, []string{"attestor", "result"}))
	a.seconds = register(cfg.Metrics, prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "assay_workload_attestation_seconds",
		Help:    "How long workload attestors took.",
		Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5},
	}, []string{"attestor"}))
	return a
}

// Attest asks every attestor and returns one finding each, in the order they were configured. It
// returns when all have answered or are past their deadline, or ctx ends.
func (a *Attestation) Attest(ctx context.Context, p attestor.Process) []attestor.Finding {
	findings := make([]attestor.Finding, len(a.attestors))
	var wg sync.WaitGroup
	for i, one := range a.attestors {
		wg.Go(func() { findings[i] = a.ask(ctx, one, p) })
	}
	wg.Wait()
	return findings
}

// Abstains says why no process will show the selector as the attestors are configured, or "".
func (a *Attestation) Abstains(want attestor.Selector) string {
	for _, one := range a.attestors {
		if who, ok := one.Workload.(attestor.Abstainer); ok {
			if why := who.Abstains(want); why != "" {
				return why
			}
		}
	}
	return ""
}

// errHung says that an attestor is not asked because too many of its calls never came back.
var errHung = errors.New("too many calls are past their deadline and have not returned")

// ask gets one attestor's finding. The attestor runs in a goroutine of its own: one that ignores its
// context must not hold up the workload. Such calls are counted, and bounded by maxHung.
func (a *Attestation) ask(ctx context.Context, one *asked, p attestor.Process) attestor.Finding {
	f := attestor.Finding{Attestor: one.Type}
	one.mu.Lock()
	hung := one.hung >= maxHung
	one.mu.Unlock()
	if hung {
		f.Err = errHung
		a.note(one, p, f)
		return f
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	type answer struct {
		selectors []attestor.Selector
		err       error
	}
	answers := make(chan answer, 1)
	begun := time.Now()
	go func() { // the context is the attestor's
		var got answer
		defer func() {
			if r := recover(); r != nil { // foreign bytes below /proc must not end the agent
				got = answer{err: fmt.Errorf("attestor panicked: %v", r)}
				a.log.WithFields(logrus.Fields{"attestor": one.Type, "stack": string(debug.Stack())}).Error("attestor panicked")
			}
			answers <- got
		}()
		got.selectors, got.err = one.Attest(ctx, p)
	}()
	select {
	case got := <-answers:
		f.Selectors, f.Err = sound(got.selectors, got.err)
	case <-ctx.Done():
		select {
		case got := <-answers: // both at once: the answer counts
			f.Selectors, f.Err = sound(got.selectors, got.err)
		default:
			f.Err = fmt.Errorf("no answer: %w", context.Cause(ctx))
			one.mu.Lock()
			one.hung++
			one.mu.Unlock()
			go func() { <-answers; one.mu.Lock(); one.hung--; one.mu.Unlock() }()
		}
	}
	f.Took = time.Since(begun)
	a.note(one, p, f)
	return f
}

// sound turns an attestor's answer into a set. An answer with an error counts for nothing, even if it
// has selectors: half the truth may be worse than none.
func sound(selectors []attestor.Selector, err error) (attestor.Set, error) {
	if err != nil {
		return attestor.Set{}, err
	}
	if len(selectors) > maxSelectors {
		return attestor.Set{}, fmt.Errorf("%d selectors, the limit is %d", len(selectors), maxSelectors)
	}
	// A label may hold anything. What is no selector can be in no entry and is left out.
	kept := slices.DeleteFunc(slices.Clone(selectors), func(s attestor.Selector) bool { return s.Check() != nil })
	return attestor.NewSet(kept...), nil
}

// note counts a finding and complains about errors now and then.
func (a *Attestation) note(one *asked, p attestor.Process, f attestor.Finding) {
	result := "ok"
	switch {
	case errors.Is(f.Err, context.Canceled):
		return // the caller left
	case errors.Is(f.Err, context.DeadlineExceeded), errors.Is(f.Err, errHung):
		result = "timeout"
	case f.Err != nil:
		result = "error"
	}
	a.results.WithLabelValues(one.Type, result).Inc()
	a.seconds.WithLabelValues(one.Type).Observe(f.Took.Seconds())
	if f.Err == nil {
		return
	}
	now := a.now()
	one.mu.Lock()
	due := now.Sub(one.lastWarn) >= complainInterval
	unlogged := one.unlogged
	if due {
		one.lastWarn, one.unlogged = now, 0
	} else {
		one.unlogged++
	}
	one.mu.Unlock()
	if due {
		a.log.WithError(f.Err).WithFields(logrus.Fields{"attestor": one.Type, "pid": p.PID, "unlogged": unlogged}).
			Warn("attestor failed; its selectors are missing")
	}
}

// Run listens to the attestors that know by themselves when their answers change, until ctx ends.
func (a *Attestation) Run(ctx context.Context) error {
	var g errgroup.Group
	for _, one := range a.attestors {
		if w, ok := one.Workload.(attestor.Watcher); ok {
			g.Go(func() error { a.watch(ctx, one.Type, w); return nil })
		}
	}
	return g.Wait()
}

// watch keeps one attestor's Watch going.
func (a *Attestation) watch(ctx context.Context, kind string, w attestor.Watcher) {
	for ctx.Err() == nil {
		err := w.Watch(ctx, a.changed)
		if ctx.Err() != nil {
			return
		}
		a.log.WithError(err).WithField("attestor", kind).Warn("attestor stopped watching; it is asked to again")
		select {
		case <-ctx.Done():
		case <-time.After(jitter(watchRetry)):
			a.changed() // what happened meanwhile is not known
		}
	}
}

// changed tells those who asked about the processes, or everybody.
func (a *Attestation) changed(pids ...int) {
	a.mu.Lock()
	var tell []*subscription
	if len(pids) == 0 {
		for _, subs := range a.subs {
			for s := range subs {
				tell = append(tell, s)
			}
		}
	}
	for _, pid := range pids {
		for s := range a.subs[pid] {
			tell = append(tell, s)
		}
	}
	a.mu.Unlock()
	for _, s := range tell {
		s.changed()
	}
}

// subscribe calls changed, which must not block, whenever what attestors say about the process may
// have changed, until cancel is called.
func (a *Attestation) subscribe(pid int, changed func()) (cancel func()) {
	s := &subscription{changed: changed}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.subs[pid] == nil {
		a.subs[pid] = map[*subscription]struct{}{}
	}
	a.subs[pid][s] = struct{}{}
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.subs[pid], s)
		if len(a.subs[pid]) == 0 {
			delete(a.subs, pid)
		}
	}
}
