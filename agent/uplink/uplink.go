// Package uplink is the agent's one connection to its server: the picture comes down it, requests to
// sign go up.
//
// The picture comes by our own feed (server/wire/feedv1), pushed, and resumed by revision after any
// break. A server that does not know the feed is a SPIRE server: it is asked every few seconds, by
// SyncAuthorizedEntries or, if it is older, GetAuthorizedEntries. Both roads end in the same Sink.
//
// The connection shows the agent's own SVID. When join replaces that SVID, the connection is replaced
// too, and calls under way are let finish first: the server forgets the old SVID at the first use of
// the new one.
//
// Why it is so: one connection costs the server one handshake and one place per agent, and an agent
// knows at every moment whether its server is there.
package uplink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/dial"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/server/wire/later"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Held is what the agent holds, which it tells the server to get the difference only. Lists are in any order.
type Held struct {
	StoreID  string // the store that Rev belongs to; empty: a full picture is asked for
	Rev      uint64
	Entries  []*identity.Entry
	Bundles  []*identity.Bundle
	Verdicts []*identity.Verdict
}

// Sink takes the picture; the wiring puts it before the view and the disk.
type Sink interface {
	// Held returns what is held; Entries is empty before the first Apply.
	Held() Held
	// Apply makes the update part of the picture or returns an error and leaves the picture as it was:
	// the uplink then asks for a full one.
	Apply(u view.Update) error
}

// Self is who the agent is to the server; *join.Joiner is one.
type Self interface {
	// Own returns the agent's SVID, nil if there is none, and a channel closed when that changes.
	Own() (*keep.Own, <-chan struct{})
	// TLS returns how to dial the server as own.
	TLS(own *keep.Own) *tls.Config
	// Denied and Accepted are told what the server says to calls made as own.
	Denied(own *keep.Own, err error)
	Accepted(own *keep.Own)
}

// Config is what an Uplink needs besides its parts. TrustDomain and Target are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Target is the server's host and port.
	Target string
	// Version is told to the server.
	Version string
	// SyncInterval is how often a SPIRE server is asked; 0 means 5 s.
	SyncInterval time.Duration
	// Running returns the config digests of the images that run here, in order, and a channel that is
	// closed when they have changed. Nil: none ever run, and the server is told that verdicts on images
	// are nothing to this agent.
	Running func() ([]string, <-chan struct{})
	// Holding returns by whom what is held here was signed, and a channel that is closed when that may be
	// different. Nil: the server is not told.
	Holding func() (Holding, <-chan struct{})
	// OnConnect is called whenever the picture was brought up to date after a break; nil is fine.
	OnConnect func()
	// Log, Metrics and Now may be nil.
	Log     logrus.FieldLogger
	Metrics prometheus.Registerer
	Now     func() time.Time
}

// Uplink is the connection. Use New, then Run. Its methods are safe for concurrent use.
type Uplink struct {
	cfg  Config
	self Self
	sink Sink
	log  logrus.FieldLogger
	now  func() time.Time

	lag       prometheus.Histogram
	revision  prometheus.Gauge
	connected prometheus.Gauge
	breaks    *prometheus.CounterVec

	batch batchLimit

	// said and saidAt are what Run last complained of; "": nothing since the server was last there.
	// Only Run's goroutine touches them.
	said   string
	saidAt time.Time

	// calls is held for reading during each call, and for writing while the connection is replaced.
	calls sync.RWMutex
	conn  *grpc.ClientConn // nil: none
	own   *keep.Own        // conn shows this one
	// replaced is closed when the two above are replaced.
	replaced chan struct{}

	// mu guards status.
	mu     sync.Mutex
	status Status
}

// New returns an Uplink that is not connected.
func New(self Self, sink Sink, cfg Config) (*Uplink, error) {
	if cfg.Log == nil {
		cfg.Log = logrus.StandardLogger()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	if cfg.SyncInterval == 0 {
		cfg.SyncInterval = 5 * time.Second
	}
	if cfg.OnConnect == nil {
		cfg.OnConnect = func() {}
	}
	u := &Uplink{
		cfg: cfg, self: self, sink: sink, log: cfg.Log, now: cfg.Now, replaced: make(chan struct{}),
		lag: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "assay_agent_picture_latency_seconds",
			Help:    "From the moment the server made a picture until it is in force here, by both clocks.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30},
		}),
		revision: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_agent_revision", Help: "Revision of the picture in force.",
		}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_agent_connected", Help: "1 while the picture is kept up to date by the server, 0 while it is not.",
		}),
		breaks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_agent_uplink_breaks_total",
			Help: "Ends of the feed or failed polls, by cause (age, drift, denied, unverified, unavailable, other).",
		}, []string{"cause"}),
	}
	u.status = Status{State: StateNoSVID, Since: cfg.Now()}
	for _, c := range []prometheus.Collector{u.lag, u.revision, u.connected, u.breaks} {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return u, nil
}

// States of an Uplink.
const (
	StateNoSVID     = "waiting for the agent's own SVID"
	StateConnecting = "connecting"
	StateFeed       = "following the feed"
	StatePolling    = "polling a SPIRE server"
)

// Status is how the connection is, for people.
type Status struct {
	State string
	// Since is when it came to be in State.
	Since time.Time
	// Rev and StoreID are of the last picture that came from the server since the start.
	StoreID string
	Rev     uint64
	// Synced is when the picture was last known to be the server's; zero: not since the start.
	Synced time.Time
	// MadeAt is when the server made that picture; zero: unknown.
	MadeAt time.Time
	// Err is why it is not connected, nil while it is.
	Err error
}

// Status returns how the connection is.
func (u *Uplink) Status() Status {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := u.status
	if s.State == StateFeed {
		s.Synced = u.now() // the feed pushes: while it stands, nothing is missing
	}
	return s
}

func (u *Uplink) state(state string, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.now()
	if u.status.State == StateFeed && state != StateFeed {
		u.status.Synced = now
	}
	if u.status.State != state {
		u.status.Since = now
	}
	u.status.State, u.status.Err = state, err
	up := 0.0
	if state == StateFeed || state == StatePolling {
		up = 1
	}
	u.connected.Set(up)
}

// synced records that the picture is the server's.
func (u *Uplink) synced(up view.Update) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.status.StoreID, u.status.Rev, u.status.Synced, u.status.MadeAt = up.StoreID, up.Rev, u.now(), up.MadeAt
	u.revision.Set(float64(up.Rev))
}

// How long is waited between attempts to bring the picture up to date.
const (
	steadyAfter = 10 * time.Second // a connection that held this long is no failure
	remindEvery = 10 * time.Minute
	lookAgain   = 2 * time.Second // for an SVID to call the server with
	// probeFeed is how long a server that knows no feed is taken to stay like that; it may be upgraded.
	probeFeed = 10 * time.Minute
)

// Run keeps the picture up to date until ctx ends; it never returns before, and always returns nil.
func (u *Uplink) Run(ctx context.Context) error {
	defer u.replace(nil, nil)
	failures := 0
	for ctx.Err() == nil {
		own, changed := u.self.Own()
		if own == nil {
			u.replace(nil, nil)
			u.state(StateNoSVID, nil)
			// An SVID that had expired is valid again when the clock is set back, and nobody replaced it.
			timer := time.NewTimer(lookAgain)
			select {
			case <-ctx.Done():
			case <-changed:
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		began := u.now()
		err := u.session(ctx, own, changed)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, errReplaced) {
			continue
		}
		if u.now().Sub(began) >= steadyAfter {
			failures = 0
		}
		failures++
		u.state(StateConnecting, err)
		cause := causeOf(err)
		u.breaks.WithLabelValues(cause).Inc()
		wait := jitter(min(dial.FirstRetry<<min(failures-1, 10), dial.MaxRetry))
		if hint, ok := later.Hint(err); ok {
			wait = max(wait, tenth(hint))
		}
		// The server ends connections by age as a matter of course, and a break is worth a word only
		// when the first attempt to mend it has failed too.
		if failures > 1 && (u.said != cause || u.now().Sub(u.saidAt) >= remindEvery) {
			u.said, u.saidAt = cause, u.now()
			what := "waiting for the server; workloads are served from what is held meanwhile"
			switch cause {
			case causeDenied: // what comes of that, join says
				what = "the server refuses this agent's SVID; the agent asks why, and attests again if it may"
			case causeUnverified:
				what = "whoever answers is not the server that this agent's bundle vouches for; a new source of trust is read as rebootstrap_mode says, and workloads are served from what is held meanwhile"
			}
			u.log.WithError(err).WithFields(logrus.Fields{"server": u.cfg.Target, "rev": u.sink.Held().Rev}).Warn(what)
		}
		if cause == causeDenied {
			u.self.Denied(own, err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-changed:
		}
		timer.Stop()
	}
	return nil
}

var (
	// errReplaced says that the own SVID was replaced, and with it the connection has to be.
	errReplaced = errors.New("own SVID was replaced")
	// errNoFeed says that the server does not know the feed.
	errNoFeed = errors.New("server knows no feed")
)

// session brings the picture up to date as own and keeps it so until something breaks, or own is
// replaced.
func (u *Uplink) session(ctx context.Context, own *keep.Own, changed <-chan struct{}) error {
	u.state(StateConnecting, nil)
	conn, err := u.connect(own)
	if err != nil {
		return err
	}
	u.replace(conn, own)
	var work sync.WaitGroup
	defer work.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work.Go(func() {
		select {
		case <-changed:
			cancel(errReplaced)
		case <-ctx.Done():
		}
	})
	work.Go(func() { u.postStatus(ctx, conn) })
	for {
		err := u.follow(ctx, conn, own)
		if errors.Is(err, errNoFeed) {
			err = u.poll(ctx, conn, own)
		}
		if errors.Is(context.Cause(ctx), errReplaced) {
			return errReplaced
		}
		if err != nil {
			return err
		}
	}
}

// current is called when the picture has been brought up to date after a break.
func (u *Uplink) current(state string, own *keep.Own, rev uint64) {
	u.state(state, nil)
	u.self.Accepted(own)
	u.cfg.OnConnect()
	log := u.log.WithFields(logrus.Fields{"server": u.cfg.Target, "rev": rev})
	if u.said != "" {
		u.said = ""
		log.Info("server is back: " + state)
	} else {
		log.Debug(state)
	}
}

// connect makes a connection that shows own. It does not wait for it.
func (u *Uplink) connect(own *keep.Own) (*grpc.ClientConn, error) {
	return dial.Server(u.cfg.Target, u.self.TLS(own),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 6 * time.Minute, Timeout: 20 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
}

// maxMessage is what one message from the server may take. Pages of entries are far smaller; a page
// of a SPIRE server with long selectors may exceed gRPC's own limit of 4 MiB.
const maxMessage = 16 << 20

// replace makes conn the connection for calls, when those under way have finished, and closes the one
// before.
func (u *Uplink) replace(conn *grpc.ClientConn, own *keep.Own) {
	u.calls.Lock()
	old := u.conn
	u.conn, u.own = conn, own
	close(u.replaced)
	u.replaced = make(chan struct{})
	u.calls.Unlock()
	if old != nil {
		_ = old.Close()
	}
}

// postStatus tells the server who is there. Old servers do not know the call, and none needs it.
func (u *Uplink) postStatus(ctx context.Context, conn *grpc.ClientConn) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := agentv1.NewAgentClient(conn).PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: u.cfg.Version})
	if err != nil {
		u.log.WithError(err).Debug("server did not take the agent's status")
	}
}

// Causes of a break.
const (
	causeDenied     = "denied"
	causeUnverified = "unverified"
)

func causeOf(err error) string {
	if errors.Is(err, errDrift) {
		return "drift"
	}
	if dial.CertificateRefused(err) {
		return causeDenied
	}
	switch codeOf(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return causeDenied
	case codes.Unavailable, codes.DeadlineExceeded:
		if strings.Contains(err.Error(), "verify server: ") { // join's word, through gRPC
			return causeUnverified
		}
		return "unavailable"
	}
	if errors.Is(err, errEnded) {
		return "age"
	}
	return "other"
}

// codeOf returns the gRPC code in err's chain, codes.Unknown if there is none.
func codeOf(err error) codes.Code {
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return st.GRPCStatus().Code()
	}
	return codes.Unknown
}

// jitter spreads a wait over all of it, so that a thousand agents that lost their server together do
// not come back together.
func jitter(d time.Duration) time.Duration {
	return d/4 + time.Duration(rand.Int64N(int64(d-d/4)+1)) //nolint:gosec // spreads load, hides nothing
}
