// Package ca is the server's certificate authority: it signs X.509-SVIDs and JWT-SVIDs, and sees to
// it that there always is an authority to sign with, that every verifier knows it before it signs,
// and that it goes before it expires.
//
// # The life of an authority
//
// There are two kinds, X.509 and JWT, and each has one active authority, at most one prepared one,
// and old ones. An authority is made in this order, and a crash between any two steps is picked up
// by the next start:
//
//	key in server/ca/keys → journal says prepared → public half in the bundle → journal says active → it signs
//
// So nothing was ever signed that the bundle does not verify, and no key signs that the journal
// does not name. The successor is prepared at NotAfter − min(lifetime/2, 30 days) and takes over at
// NotAfter − min(lifetime/6, 7 days), which is also the longest that an SVID can live without being
// cut short by its authority. An authority that is no longer active keeps its line in the journal and its
// place in the bundle until 24 hours after it expired; its private key is deleted at once where its
// successor took over on schedule, or, where there are lists of revoked certificates, when it is revoked or
// pruned: until then it signs those lists and nothing else.
//
// # What can go wrong
//
// A store that cannot be read stops Open: an empty answer is never made of an error, because a new
// authority made over an existing one breaks every agent that was away. A store that cannot be
// written delays the next step, and the active authority goes on. A journal whose active authority
// has no key any more stops Open too if the keys were meant to last, unless its prepared successor
// has one or the operator consents to another (Config.NewAuthorityOnLostKey). With keys in memory it
// is the normal course of a restart.
//
// A clock that is set ahead makes authorities expire before their time, and one that is set back again
// leaves an active authority that nobody accepts yet. Either way there is another within seconds, what
// was signed before stays verifiable, and nothing is ever signed that is not valid yet. Agents that were
// away know only the authorities from before, so one that made way because of the clock keeps its key
// until a day after it expired, and takes over again when the clock is right.
//
// # What leaves
//
// Certificates follow one profile each (profile.go). What was signed is parsed from its DER and
// checked against every rule of the profile (lint.go) before anyone gets to see it, and what is
// returned is what was checked.
package ca

import (
	"cmp"
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Errors that callers tell apart. Those up to ErrAudience are the requester's fault.
var (
	// ErrCSR says that a certificate request is malformed or not signed by its key.
	ErrCSR = errors.New("invalid CSR")
	// ErrKey says that no certificate is made for such a public key.
	ErrKey = errors.New("invalid public key")
	// ErrID says that the SPIFFE ID must not be signed for this purpose.
	ErrID = errors.New("invalid SPIFFE ID")
	// ErrTTL says that the lifetime is negative or below a second.
	ErrTTL = errors.New("invalid TTL")
	// ErrDNSName says that a DNS name must not go into a certificate.
	ErrDNSName = errors.New("invalid DNS name")
	// ErrAudience says that a JWT-SVID was asked for without a usable audience.
	ErrAudience = errors.New("invalid audience")

	// ErrNoAuthority says that there is no authority that is valid now. Run keeps trying to make
	// one.
	ErrNoAuthority = errors.New("no valid authority to sign with")
	// ErrLint says that a certificate broke a rule of its profile after it was signed. It was
	// thrown away.
	ErrLint = errors.New("certificate breaks its profile")
	// ErrLostKey says that the journal names an active authority whose private key is gone.
	ErrLostKey = errors.New("private key of the active authority is lost")
	// ErrJournal says that a line of the journal makes no sense.
	ErrJournal = errors.New("invalid journal")
)

// Store is what a CA needs of server/records.
type Store interface {
	// Journal returns every line. An error is never the same as no lines.
	Journal(ctx context.Context) ([]records.Journal, error)
	// PutJournal writes lines by authority ID and deletes others, all or nothing.
	PutJournal(ctx context.Context, upserts []records.Journal, deletes []string) error
	// Bundle returns an error wrapping records.ErrNotFound if there is none yet.
	Bundle(ctx context.Context, td spiffeid.TrustDomain) (*identity.Bundle, error)
	// UpdateBundle applies change, perhaps several times, and stores what came of it.
	UpdateBundle(ctx context.Context, td spiffeid.TrustDomain, change func(*identity.Bundle) error) (*identity.Bundle, kv.Rev, error)
}

// Config is what a CA has defaults for.
type Config struct {
	CATTL       time.Duration // lifetime of an authority; default 24 h
	KeyType     keys.Kind     // of X.509 authorities; default keys.EC256
	JWTKeyType  keys.Kind     // of JWT authorities; default KeyType
	X509SVIDTTL time.Duration // default 1 h
	JWTSVIDTTL  time.Duration // default 5 min
	AgentTTL    time.Duration // of agents' SVIDs; default X509SVIDTTL
	Subject     pkix.Name     // of X.509 authorities; default C=US, O=SPIFFE
	JWTIssuer   string        // the iss claim; empty: none
	WIT         bool          // WIT-SVIDs are signed, and their authorities published
	WITIssuer   string        // the iss claim of WIT-SVIDs; empty: none
	JWTProfiles []JWTProfile  // other claims for certain audiences; the first that fits counts
	Backdate    time.Duration // how far NotBefore lies in the past; default 10 s

	// NewAuthorityOnLostKey is the operator's consent to a new authority where the private key of
	// the active one is gone from keys that were meant to last. SVIDs of the lost one stay valid.
	NewAuthorityOnLostKey bool

	// RevocationLists says that there will be lists of revoked certificates: the key of an X.509 authority
	// is kept until the authority is revoked or pruned, for the lists of what it signed.
	RevocationLists bool

	// Behind counts the connected agents that do not have the bundle of the revision yet. A successor
	// whose time has come waits a while for them. Nil: nobody is waited for.
	Behind func(bundle kv.Rev) int

	// Upstream signs the X.509 authorities; see above.go. Nil: each is its own root.
	Upstream upstream.Authority

	Now     func() time.Time      // default time.Now
	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: nothing is registered
}

// CA signs. It is safe for concurrent use.
type CA struct {
	keys    keys.Manager
	store   Store
	td      spiffeid.TrustDomain
	cfg     Config
	log     logrus.FieldLogger
	metrics *metrics

	// The authorities that sign. Written with mu held, read by every signature.
	x509, jwt, wit atomic.Pointer[authority]
	// Those that sign lists of revoked certificates, likewise.
	listers atomic.Pointer[listers]
	nested  atomic.Bool // the bundle says that there are servers below

	mu sync.Mutex // held during Open and while Run turns the wheel, but not while an authority is made
	// lines is the journal as it is stored, and pending an authority per kind that has a key and
	// could not be journaled yet. Both are guarded by mu.
	lines   map[string]*authority
	pending map[string]*made
	// bundleRev is the revision of the last bundle that this CA wrote, 0 if it wrote none. mu guards it.
	bundleRev kv.Rev
	// roots and keysAbove are what was heard from above, there their lines' IDs, absorbed the news that they
	// are from, and told the keys of tokens that are known there. mu guards them.
	roots     []identity.X509Authority
	keysAbove map[string][]identity.JWTAuthority
	there     map[string]bool
	absorbed  *upstream.Bundle
	told      map[string]bool

	news atomic.Pointer[upstream.Bundle] // the latest from above; it is not changed any more
	wake chan struct{}                   // holds one token when Run is to look at once

	server serverSVID
}

// checkEvery is how often Run looks at the clock, soon how often while the active authority is to go.
const (
	checkEvery = 10 * time.Second
	soon       = time.Second
)

// Open reads the journal and carries on where it ends, makes the first authorities of a new trust
// domain, and returns once both active ones are in the bundle. It fails rather than guess: with an
// error wrapping ErrLostKey or ErrJournal, or the store's.
func Open(ctx context.Context, km keys.Manager, store Store, td spiffeid.TrustDomain, cfg Config) (*CA, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	c := &CA{
		keys: km, store: store, td: td, cfg: cfg, log: cfg.Log, metrics: m,
		lines: map[string]*authority{}, pending: map[string]*made{},
		told: map[string]bool{}, wake: make(chan struct{}, 1),
	}
	c.warnTTLs()
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *CA) start(ctx context.Context) error {
	c.mu.Lock()
	err := c.load(ctx)
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("open CA: %w", err)
	}
	early := c.ahead(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := errors.Join(early, c.turn(ctx)); err != nil {
		// A successor that cannot be made now is no reason not to start: a disk that is full does
		// not take the identities of a whole trust domain with it.
		if slices.ContainsFunc(c.kinds(), func(kind string) bool { return c.current(kind) == nil }) {
			// A server that is started over and over does not fill the key file.
			c.dropPending(context.WithoutCancel(ctx), kinds...)
			return fmt.Errorf("open CA: %w", err)
		}
		c.metrics.failures.Inc()
		c.log.WithError(err).Error("Authorities could not be kept up; trying again")
	}
	c.sweepKeys(ctx)
	if _, err := c.server.get(c); err != nil {
		return fmt.Errorf("open CA: %w", err)
	}
	return nil
}

// Run prepares, activates and prunes until ctx ends, and then returns nil. What fails is logged and
// tried again ten seconds later; meanwhile the active authorities sign.
func (c *CA) Run(ctx context.Context) error {
	var followers sync.WaitGroup
	defer followers.Wait()
	if c.cfg.Upstream != nil {
		followers.Go(func() { c.followAbove(ctx) })
	}
	timer := time.NewTimer(checkEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-c.wake:
		}
		err := c.ahead(ctx)
		c.mu.Lock()
		err = errors.Join(err, c.turn(ctx))
		next := checkEvery
		if c.unsuited(c.find(KindX509, StateActive)) {
			next = soon // what it signs is not to be relied on
		}
		c.mu.Unlock()
		timer.Reset(next)
		if err != nil && ctx.Err() == nil {
			c.metrics.failures.Inc()
			c.log.WithError(err).Error("Authorities could not be kept up; trying again")
		}
		if _, err := c.server.get(c); err != nil {
			c.log.WithError(err).Error("The server's own SVID could not be renewed; trying again")
		}
	}
}

// Authorities returns the journal: what is prepared, active, old and tainted, in no order.
func (c *CA) Authorities() []records.Journal {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := make([]records.Journal, 0, len(c.lines))
	for _, a := range c.lines {
		lines = append(lines, a.line)
	}
	return lines
}

func (cfg Config) withDefaults() (Config, error) {
	cfg.CATTL = cmp.Or(cfg.CATTL, 24*time.Hour)
	cfg.X509SVIDTTL = cmp.Or(cfg.X509SVIDTTL, time.Hour)
	cfg.JWTSVIDTTL = cmp.Or(cfg.JWTSVIDTTL, 5*time.Minute)
	cfg.AgentTTL = cmp.Or(cfg.AgentTTL, cfg.X509SVIDTTL)
	cfg.Backdate = cmp.Or(cfg.Backdate, 10*time.Second)
	for _, least := range []time.Duration{cfg.CATTL, cfg.X509SVIDTTL, cfg.JWTSVIDTTL, cfg.AgentTTL, cfg.Backdate} {
		if least < time.Second {
			return cfg, fmt.Errorf("%w: %s, want at least a second", ErrTTL, least)
		}
	}
	cfg.KeyType = cmp.Or(cfg.KeyType, keys.EC256)
	cfg.JWTKeyType = cmp.Or(cfg.JWTKeyType, cfg.KeyType)
	for _, kind := range []keys.Kind{cfg.KeyType, cfg.JWTKeyType} {
		if _, err := keys.ParseKind(string(kind)); err != nil {
			return cfg, err
		}
	}
	if len(cfg.Subject.ToRDNSequence()) == 0 {
		cfg.Subject = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		cfg.Log = silent
	}
	return cfg, nil
}

// warnTTLs says which SVIDs will be cut short by their authority.
func (c *CA) warnTTLs() {
	longest := activation(c.cfg.CATTL)
	for name, ttl := range map[string]time.Duration{
		"x509_svid_ttl": c.cfg.X509SVIDTTL, "jwt_svid_ttl": c.cfg.JWTSVIDTTL, "agent_ttl": c.cfg.AgentTTL,
	} {
		if ttl > longest {
			c.log.WithFields(logrus.Fields{"setting": name, "ttl": ttl, "ca_ttl": c.cfg.CATTL, "longest": longest}).
				Warn("SVIDs will be shorter-lived than configured near the end of their authority: lengthen the CA TTL")
		}
	}
}
