// Package join makes the agent known to its server and keeps it known: node attestation, the agent's
// own SVID and its rotation, and the trust in the server.
//
// Why it is so: the agent serves workloads for as long as their SVIDs are valid, so nothing that
// happens to its own SVID ends the process. A server that is away is waited for; an SVID that
// expired or that the server no longer wants is replaced by attesting again; a join token that is
// spent is asked for in the log. Only a ban empties the agent, and even then it stays, to say so and
// to come back when the ban is lifted.
package join

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/agent/dial"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/later"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Store keeps the agent's SVID and bundle over restarts; *keep.Keep is one.
type Store interface {
	Own() *keep.Own
	SaveOwn(*keep.Own) error
	DropOwn() error
	Bundle() *identity.Bundle
	SaveBundle(*identity.Bundle) error
	// NewKey makes a key for the agent itself.
	NewKey() (crypto.Signer, error)
}

// Config is what a Joiner needs besides its parts. TrustDomain, Target, Type, Node and Bootstrap are
// required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Target is the server's host and port.
	Target string
	// Type and Node are the node attestor.
	Type string
	Node attestor.Node
	// Bootstrap is the trust before there is a bundle.
	Bootstrap Bootstrap
	// OnBan is called when the server says that the agent is banned, before anything else happens:
	// when it returns, nothing is served any more. It is called again at each new ban only.
	OnBan func()
	// Log, Metrics and Now may be nil.
	Log     logrus.FieldLogger
	Metrics prometheus.Registerer
	Now     func() time.Time
}

// Joiner holds the agent's own SVID and its trust in the server. Use New, then Run.
type Joiner struct {
	cfg   Config
	store Store
	// warned says that the log has it that the bootstrap is insecure. Only Run touches it.
	warned bool
	trust  *trust
	log    logrus.FieldLogger
	now    func() time.Time

	attestations *prometheus.CounterVec
	expiry       prometheus.Gauge

	wake chan struct{} // something for Run to look at, capacity 1

	// mu guards what follows.
	mu      sync.Mutex
	own     *keep.Own     // nil: none
	id      spiffeid.ID   // of the last there was
	changed chan struct{} // closed when own is replaced
	// rotateAt is when own is to be replaced.
	rotateAt time.Time
	// refused says that the server no longer takes own, whatever its expiry says.
	refused bool
	banned  bool
	busy    bool  // Run is replacing own
	last    error // why there is no valid SVID, nil: there is, or nothing was tried yet
}

// New returns a Joiner that holds what the store kept from before.
func New(store Store, cfg Config) (*Joiner, error) {
	if cfg.Log == nil {
		cfg.Log = logrus.StandardLogger()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	if cfg.OnBan == nil {
		cfg.OnBan = func() {}
	}
	t, err := newTrust(cfg.TrustDomain, cfg.Bootstrap.Again, cfg.Now, cfg.Log)
	if err != nil {
		return nil, err
	}
	j := &Joiner{
		cfg: cfg, store: store, trust: t, log: cfg.Log, now: cfg.Now,
		attestations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_agent_attestations_total",
			Help: "Attempts to attest or renew the agent, by how (attest, renew) and result (ok, refused, banned, failed).",
		}, []string{"how", "result"}),
		expiry: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_agent_own_svid_expiry_seconds",
			Help: "When the agent's own SVID expires, in Unix seconds; 0 while there is none.",
		}),
		wake:    make(chan struct{}, 1),
		changed: make(chan struct{}),
	}
	// Alerts are about increases, and there is none from nothing to one.
	for _, how := range []string{"attest", "renew"} {
		for _, result := range []string{"ok", "refused", "banned", "failed"} {
			j.attestations.WithLabelValues(how, result)
		}
	}
	for _, c := range []prometheus.Collector{j.attestations, j.expiry} {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	t.keyGone, t.unknown = j.keyGone, j.poke
	if b := store.Bundle(); b != nil {
		if b.TrustDomain != cfg.TrustDomain {
			return nil, fmt.Errorf("data directory belongs to trust domain %q, not %q: name another data_dir, or set trust_domain back", b.TrustDomain, cfg.TrustDomain)
		}
		t.set(b)
	}
	if own := store.Own(); own != nil {
		id, err := own.ID()
		if err != nil {
			return nil, err
		}
		if id.TrustDomain() != cfg.TrustDomain {
			return nil, fmt.Errorf("data directory belongs to trust domain %q, not %q: name another data_dir, or set trust_domain back", id.TrustDomain(), cfg.TrustDomain)
		}
		j.take(own, rotationTime(own.Chain[0].NotBefore, own.Chain[0].NotAfter))
	}
	return j, nil
}

// Own returns the agent's SVID, nil if there is none that is valid, and a channel that is closed when
// it is replaced or dropped.
func (j *Joiner) Own() (*keep.Own, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.own == nil || j.expired(j.own) {
		return nil, j.changed
	}
	return j.own, j.changed
}

// ID returns the agent's SPIFFE ID, also of an SVID that has expired or was dropped; zero if there never
// was one.
func (j *Joiner) ID() spiffeid.ID {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.id
}

// TLS returns the configuration to dial the server with as own; with nil, as nobody yet.
func (j *Joiner) TLS(own *keep.Own) *tls.Config { return j.trust.tls(own) }

// Bundle returns the bundle the server is verified with, or nil.
func (j *Joiner) Bundle() *identity.Bundle { return j.trust.bundle() }

// Banned reports whether the server has banned the agent.
func (j *Joiner) Banned() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.banned
}

// Err returns why there is no SVID, or nil.
func (j *Joiner) Err() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.last
}

// SetBundle replaces the bundle that the server is verified with. If an authority in it is tainted
// that signed the agent's SVID, or one has left it, the SVID is replaced at once.
func (j *Joiner) SetBundle(b *identity.Bundle) {
	was := j.trust.bundle()
	if b == nil || b.TrustDomain != j.cfg.TrustDomain || !j.trust.set(b) {
		return
	}
	if err := j.store.SaveBundle(b); err != nil {
		j.log.WithError(err).Warn("bundle cannot be kept on disk")
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.own == nil {
		return
	}
	switch {
	case tainted(j.own, b):
		j.log.Info("authority of the agent's SVID is tainted; replacing the SVID")
	case was != nil && signed(j.own, was) && !signed(j.own, b):
		j.log.Info("authority of the agent's SVID is revoked; replacing the SVID")
	default:
		return
	}
	j.rotateAt = j.now()
	j.poke()
}

// Denied tells the Joiner that the server refused a call made as own with err. What it does depends
// on the reason in err, which may be that no authority of the server's signed own: it attests again, or takes the
// ban. An answer to an SVID that has been replaced meanwhile means nothing.
func (j *Joiner) Denied(own *keep.Own, err error) {
	if own == nil {
		return
	}
	switch reason := reasonOf(err); {
	case reason == types.PermissionDeniedDetails_AGENT_BANNED:
		j.ban(own, err)
	case reason == types.PermissionDeniedDetails_AGENT_EXPIRED, reason == types.PermissionDeniedDetails_AGENT_NOT_ACTIVE,
		reason == types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, reason == types.PermissionDeniedDetails_AGENT_MUST_REATTEST,
		dial.CertificateRefused(err):
		j.mu.Lock()
		// A server forgets the old SVID when it signs the new one, before that has arrived here.
		expected := own != j.own || j.refused || j.busy
		j.refused = j.refused || own == j.own
		j.mu.Unlock()
		if !expected {
			j.log.WithError(err).WithField("reason", reason.String()).Warn("server no longer takes the agent's SVID; attesting again")
			j.poke()
		}
	}
}

// keyGone takes it that nobody can use own any more.
func (j *Joiner) keyGone(own *keep.Own, err error) {
	j.mu.Lock()
	known := own != j.own || j.refused
	j.refused = j.refused || own == j.own
	j.mu.Unlock()
	if !known {
		j.log.WithError(err).Error("the key of the agent's SVID is lost; attesting again")
		j.poke()
	}
}

// Accepted tells the Joiner that the server took a call made as own, which ends what Denied began: one
// of several servers may have been behind the others.
func (j *Joiner) Accepted(own *keep.Own) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if own == j.own {
		j.refused, j.last = false, nil
	}
}

// ban empties the agent, unless it was said of an SVID that is not in force any more. Nil is said of the agent.
func (j *Joiner) ban(of *keep.Own, err error) {
	j.mu.Lock()
	if of != nil && of != j.own {
		j.mu.Unlock()
		return
	}
	already := j.banned
	j.banned, j.own, j.refused, j.last = true, nil, false, err
	close(j.changed)
	j.changed = make(chan struct{})
	j.mu.Unlock()
	j.expiry.Set(0)
	if already {
		return
	}
	j.cfg.OnBan()
	if err := j.store.DropOwn(); err != nil {
		j.log.WithError(err).Error("the banned agent's SVID cannot be removed from disk")
	}
	j.log.WithError(err).Error("the server has BANNED this agent: all its SVIDs are dropped and no workload is served; " +
		"to let it back in, delete the agent on the server (assay-server agent evict) and give it fresh evidence")
	j.poke()
}

// take makes own the SVID in force, to be replaced at the given time.
func (j *Joiner) take(own *keep.Own, rotateAt time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.own, j.refused, j.banned, j.last = own, false, false, nil
	if id, err := own.ID(); err == nil {
		j.id = id
	}
	j.rotateAt = rotateAt
	if b := j.trust.bundle(); b != nil && tainted(own, b) {
		// It was under way when the authority was tainted, or the agent ended before it was replaced. The
		// server may be behind its own bundle, so it is not asked all the time.
		if soon := j.now().Add(jitter(firstRetry)); soon.Before(rotateAt) {
			j.rotateAt = soon
		}
	}
	close(j.changed)
	j.changed = make(chan struct{})
	j.expiry.Set(float64(own.Chain[0].NotAfter.Unix()))
}

func (j *Joiner) setBusy(busy bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.busy = busy
}

func (j *Joiner) expired(own *keep.Own) bool { return !j.now().Before(own.Chain[0].NotAfter) }

func (j *Joiner) poke() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// rotationTime is half of the lifetime that begins at from, give or take a tenth of that half, so that
// agents that were started together do not renew together.
func rotationTime(from, to time.Time) time.Time {
	half := max(to.Sub(from)/2, minRotation)
	jitter := time.Duration((rand.Float64()*2 - 1) * 0.1 * float64(half)) //nolint:gosec // spreads load, hides nothing
	return from.Add(half + jitter)
}

// minRotation keeps a server that gives lifetimes of next to nothing from being asked all the time.
const minRotation = 500 * time.Millisecond

// How long Run waits. A refusal is not going to change by itself soon, and a server that is away is
// asked often enough to be back within half a minute of it.
const (
	look        = 30 * time.Second // between looks at the wall clock, which may jump while timers do not
	firstRetry  = time.Second
	maxRetry    = 30 * time.Second
	maxRefused  = 2 * time.Minute
	bannedRetry = 5 * time.Minute
	remindEvery = 10 * time.Minute
)

// Run keeps the agent known until ctx ends; it never returns before, and always returns nil.
func (j *Joiner) Run(ctx context.Context) error {
	var failures, unknown int
	var said notice
	for ctx.Err() == nil {
		how, wait := j.next()
		if how == nothing {
			if need, _ := j.trust.need(); need { // what the source says may be older than the server, or not be there
				wait = min(wait, jitter(min(firstRetry<<min(unknown, 10), maxRetry)))
				unknown++
			} else {
				unknown = 0
			}
			// The connection of others hangs on this too: a bundle that was lost or has missed a
			// rotation must not wait for the SVID's turn.
			if err := j.bootstrap(ctx); err != nil && said.due(how, err, j.now()) {
				j.log.WithError(err).Error("server cannot be verified: the bundle that is held is of no use, and there is no other")
			}
			sleep(ctx, wait, j.wake)
			continue
		}
		if j.try(ctx, how, failures, &said) {
			failures = 0
		} else {
			failures++
		}
	}
	return nil
}

// try attests or renews once. If that fails, it says so where it is due, waits, and returns false.
func (j *Joiner) try(ctx context.Context, how action, failures int, said *notice) bool {
	j.setBusy(true)
	var err error
	if how == renewing {
		err = j.renew(ctx)
	} else {
		err = j.attest(ctx)
	}
	j.setBusy(false)
	if ctx.Err() != nil {
		return false
	}
	j.count(how, err)
	if err == nil {
		if failures > 0 {
			j.log.WithField("attempts", failures+1).Info("agent is known to the server again")
		}
		*said = notice{}
		return true
	}
	wait := j.failed(how, err, failures+1)
	j.mu.Lock()
	if j.own == nil || j.expired(j.own) || j.refused {
		j.last = err
		if how == attesting && j.needsToken(err) {
			j.last = fmt.Errorf("%w; %s", err, tokenAdvice)
		}
	}
	j.mu.Unlock()
	if !j.Banned() && said.due(how, err, j.now()) {
		j.complain(how, err, wait)
	}
	sleep(ctx, wait, nil)
	return false
}

// What Run does next.
type action int

const (
	nothing action = iota
	attesting
	renewing
)

func (a action) String() string {
	return [...]string{"wait", "attest", "renew"}[a]
}

func (j *Joiner) next() (action, time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case j.own == nil, j.expired(j.own), j.refused:
		return attesting, 0
	case !j.now().Before(j.rotateAt):
		if j.own.Reattestable {
			return attesting, 0
		}
		return renewing, 0
	}
	return nothing, min(j.rotateAt.Sub(j.now()), look)
}

// failed acts on why an attempt failed and says how long to wait before the next.
func (j *Joiner) failed(how action, err error, failures int) time.Duration {
	reason := reasonOf(err)
	switch {
	case reason == types.PermissionDeniedDetails_AGENT_BANNED:
		j.ban(nil, err)
	case how == renewing && (reason != types.PermissionDeniedDetails_UNKNOWN || dial.CertificateRefused(err)):
		j.mu.Lock()
		j.refused = true // next attests
		j.mu.Unlock()
		return jitter(firstRetry)
	}
	if j.Banned() {
		return jitter(bannedRetry)
	}
	if errors.Is(err, errAwaited) {
		return jitter(firstRetry) // the attempt was a wait
	}
	limit := maxRetry
	if isRefusal(err) {
		limit = maxRefused
	}
	wait := jitter(min(firstRetry<<min(failures-1, 10), limit))
	if hint, ok := later.Hint(err); ok {
		// The server spreads those it sends away; a little is added for the clocks.
		wait = max(wait, hint+jitter(max(hint/10, time.Second)))
	}
	return wait
}

// tokenAdvice is what to do about a join token that is spent.
const tokenAdvice = "make a new one with `assay-server token generate`, give it to this agent as join_token and restart it" //nolint:gosec // advice, no token

// needsToken reports whether an attestation failed in a way that only a new join token can mend.
func (j *Joiner) needsToken(err error) bool { return j.cfg.Type == "join_token" && isRefusal(err) }

// complain says what is being waited for.
func (j *Joiner) complain(how action, err error, wait time.Duration) {
	log := j.log.WithError(err).WithFields(logrus.Fields{"server": j.cfg.Target, "next_try": wait.Round(time.Millisecond).String()})
	j.mu.Lock()
	own := j.own
	j.mu.Unlock()
	switch {
	case how == attesting && j.needsToken(err):
		lost := "has no SVID"
		if own != nil {
			lost = fmt.Sprintf("can no longer use its SVID (expiry %s)", own.Chain[0].NotAfter.UTC().Format(time.RFC3339))
		}
		log.Error("the agent " + lost + " and the server refuses the join token it was given, because a token works once and only for a time: " +
			tokenAdvice + "; workloads are served from what is held meanwhile")
	case isRefusal(err):
		log.Error("server refuses the agent; workloads are served from what is held meanwhile")
	case errors.Is(err, errAwaited):
		log.Warn("waiting for the server's bundle, by which the agent knows it; workloads are served from what is held meanwhile")
	case summary(err) != "":
		log.Warn("waiting for the server to " + how.String() + " the agent; workloads are served from what is held meanwhile")
	default:
		log.Error("agent cannot " + how.String() + " and tries again; workloads are served from what is held meanwhile")
	}
}

// notice remembers what was said, so that a wait is announced once, again when its cause changes,
// and then at a slow pace.
type notice struct {
	text string
	at   time.Time
}

func (n *notice) due(how action, err error, now time.Time) bool {
	text := err.Error()
	if s := summary(err); s != "" {
		text = s
	}
	text = how.String() + ": " + text
	if text == n.text && now.Sub(n.at) < remindEvery {
		return false
	}
	n.text, n.at = text, now
	return true
}

func (j *Joiner) count(how action, err error) {
	result := "ok"
	switch {
	case err == nil:
	case reasonOf(err) == types.PermissionDeniedDetails_AGENT_BANNED:
		result = "banned"
	case isRefusal(err):
		result = "refused"
	default:
		result = "failed"
	}
	j.attestations.WithLabelValues(how.String(), result).Inc()
}

// sleep waits, until ctx ends or, unless it is nil, wake says so.
func sleep(ctx context.Context, wait time.Duration, wake <-chan struct{}) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-wake:
	}
}

// jitter spreads a wait over its upper half.
func jitter(d time.Duration) time.Duration {
	return d/2 + time.Duration(rand.Int64N(int64(d/2)+1)) //nolint:gosec // spreads load, hides nothing
}

// errChain marks an SVID from the server that the agent does not take.
var errChain = errors.New("server sent an unusable SVID")
