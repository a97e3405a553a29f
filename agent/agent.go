// Package agent wires an agent together: join makes it known to the server, uplink follows the
// server's picture, issue turns entries into SVIDs, keep holds what must survive a restart, and
// workloadapi hands the SVIDs to the processes beside it.
//
// What is kept from before is served before the server is looked for, and the absence of the server
// ends nothing: the parts wait for it on their own, and the agent ends when it is told to or when its
// own socket or data directory cannot be had.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/agent/admin"
	"github.com/assay-id/assay/agent/broker"
	"github.com/assay-id/assay/agent/issue"
	"github.com/assay-id/assay/agent/join"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/uplink"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/sds"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// Run runs an agent until ctx ends. It returns an error if the agent cannot start or cannot go on
// serving; a server that is away, refuses the agent or bans it is no such reason.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.Check(); err != nil {
		return fmt.Errorf("check agent configuration: %w", err)
	}
	cfg = cfg.filled()
	defer cfg.closeAttestors()
	attest := newAttestation(cfg)
	watchCtx, stopWatching := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stopWatching()
	// From here on, so that an agent that stands by knows its node when its turn comes.
	watching.Go(func() { _ = attest.Run(watchCtx) }) // always nil

	turn, socket, err := take(ctx, cfg)
	if err != nil {
		if ctx.Err() != nil {
			return nil // told to end while standing by
		}
		return err
	}
	defer turn.End()
	cfg.warnOfOthers()
	keys, err := openKeys(cfg)
	if err == nil {
		defer func() {
			if err := keys.Close(); err != nil {
				cfg.Log.WithError(err).Warn("agent key store cannot be closed")
			}
		}()
	}
	var a *agent
	if err == nil {
		a, err = open(cfg, attest, keys, socket)
	}
	if err != nil {
		if socket != nil {
			socket.Withdraw()
		}
		return err
	}
	return a.run(ctx)
}

// closeAttestors ends what attestors run by themselves.
func (c Config) closeAttestors() {
	parts := []any{c.NodeAttestor.Node}
	for _, w := range c.WorkloadAttestors {
		parts = append(parts, w.Workload)
	}
	for _, part := range parts {
		if closer, ok := part.(io.Closer); ok {
			if err := closer.Close(); err != nil {
				c.Log.WithError(err).Warn("attestor cannot be closed")
			}
		}
	}
}

// agent is the parts of a running agent, bottom up.
type agent struct {
	cfg     Config
	log     logrus.FieldLogger
	keep    *keep.Keep
	view    *view.View
	join    *join.Joiner
	sink    *sink
	uplink  *uplink.Uplink
	issue   *issue.Issuer
	attest  *workloadapi.Attestation
	serve   *workloadapi.Server
	admin   *admin.Server  // nil: no private socket
	broker  *broker.Server // nil: no broker may call
	lease   *lease
	started time.Time
	listens chan struct{} // closed when the Workload API accepts callers
	serves  chan struct{} // closed when there has been a picture to serve
	running atomic.Bool
}

// open builds the parts and takes over what is kept from before.
func open(cfg Config, attest *workloadapi.Attestation, keys *keep.Keys, socket *unixsocket.Socket) (*agent, error) {
	a := &agent{
		cfg: cfg, attest: attest, log: cfg.Log.WithField("component", "agent"), view: view.New(cfg.Now),
		started: cfg.Now(), listens: make(chan struct{}), serves: make(chan struct{}),
	}
	var err error
	if a.keep, err = keep.Open(cfg.DataDir, keys, cfg.Log.WithField("component", "keep")); err != nil {
		return nil, fmt.Errorf("open data directory: %w%s", err, mayNot(err))
	}
	a.lease = &lease{
		length: cfg.VerdictLease, view: a.view, now: cfg.Now, log: a.log,
		synced: func() time.Time { return a.uplink.Status().Synced }, keep: func() { a.sink.keepHeard() },
	}
	if p := a.keep.Picture(); p != nil {
		a.lease.heard = p.HeardAt
		err := a.view.Apply(view.Update{StoreID: p.StoreID, Rev: p.Rev, Full: true, Entries: p.Entries, Bundles: p.Bundles, Verdicts: p.Verdicts})
		if err != nil {
			return nil, fmt.Errorf("take over kept picture: %w", err)
		}
		a.log.WithFields(logrus.Fields{"rev": p.Rev, "entries": len(p.Entries)}).Info("serving the picture from before the restart")
	}
	a.join, err = join.New(a.keep, join.Config{
		TrustDomain: cfg.TrustDomain,
		Target:      cfg.serverTarget(),
		Type:        cfg.NodeAttestor.Type,
		Node:        cfg.NodeAttestor.Node,
		Bootstrap: join.Bootstrap{
			Authorities: cfg.TrustBundle,
			Path:        cfg.TrustBundlePath,
			URL:         cfg.TrustBundleURL,
			ConfigMap:   cfg.TrustBundleConfigMap,
			SPIFFE:      cfg.TrustBundleFormat == BundleSPIFFE,
			Insecure:    cfg.InsecureBootstrap,
			Again:       cfg.Rebootstrap,
		},
		OnBan:   func() { a.sink.wipe() },
		Log:     cfg.Log.WithField("component", "join"),
		Metrics: cfg.Metrics,
		Now:     cfg.Now,
	})
	if err != nil {
		return nil, fmt.Errorf("open join: %w", err)
	}
	a.sink = &sink{view: a.view, keep: a.keep, join: a.join, lease: a.lease, cfg: cfg, log: a.log}
	a.uplink, err = uplink.New(a.join, a.sink, uplink.Config{
		TrustDomain:  cfg.TrustDomain,
		Target:       cfg.serverTarget(),
		Version:      cfg.Version,
		SyncInterval: cfg.SyncInterval,
		Running:      func() ([]string, <-chan struct{}) { return a.issue.Running() },
		Holding:      a.holding,
		OnConnect:    func() { a.issue.Retry() },
		Log:          cfg.Log.WithField("component", "uplink"),
		Metrics:      cfg.Metrics,
		Now:          cfg.Now,
	})
	if err != nil {
		return nil, fmt.Errorf("open uplink: %w", err)
	}
	a.issue, err = issue.New(a.view, a.uplink, a.keep, issue.Config{
		TrustDomain: cfg.TrustDomain,
		KeyType:     issue.KeyType(cfg.WorkloadKeyType),
		X509Size:    cfg.X509CacheSize,
		JWTSize:     cfg.JWTCacheSize,
		Log:         cfg.Log.WithField("component", "issue"),
		Metrics:     cfg.Metrics,
		Now:         cfg.Now,
	})
	if err != nil {
		return nil, fmt.Errorf("open issue: %w", err)
	}
	a.lease.look() // before anybody is served from what is kept
	a.openWorkloadAPI(socket)
	a.openAdmin()
	a.openBroker()
	return a, nil
}

// holding says in uplink's words what issue holds.
func (a *agent) holding() (uplink.Holding, <-chan struct{}) {
	h, changed := a.issue.Holding()
	out := uplink.Holding{By: make([]uplink.HeldBy, len(h.By)), Latest: h.Latest[:]}
	for n, by := range h.By {
		out.By[n] = uplink.HeldBy{Authority: by.Authority, X509: by.X509, JWT: by.JWT}
	}
	return out, changed
}

// openKeys opens the agent's key store.
func openKeys(cfg Config) (*keep.Keys, error) {
	keys := keep.MemoryKeys()
	var err error
	switch cfg.KeyManager {
	case KeysDisk:
		keys, err = keep.DiskKeys(cfg.KeyDir)
	case KeysTPM:
		keys, err = keep.TPMKeys(cfg.KeyDir, cfg.TPM)
	case KeysExternal:
		var elsewhere keep.Elsewhere
		if elsewhere, err = cfg.Elsewhere(); err == nil {
			keys, err = keep.ElsewhereKeys(cfg.KeyDir, elsewhere)
		}
	default:
		cfg.Log.WithField("component", "agent").Warn("agent keys are held in memory only: nothing survives a restart, and a spent join token will have to be replaced")
	}
	if err != nil {
		return nil, fmt.Errorf("open agent key store: %w%s", err, mayNot(err))
	}
	return keys, nil
}

// mayNot says what to do about a directory that this user may not use.
func mayNot(err error) string {
	if !errors.Is(err, fs.ErrPermission) {
		return ""
	}
	return "; run the agent as a user who may use it, or name another as data_dir"
}

// newAttestation joins the workload attestors.
func newAttestation(cfg Config) *workloadapi.Attestation {
	var attestors []workloadapi.Attestor
	for _, w := range cfg.WorkloadAttestors {
		attestors = append(attestors, workloadapi.Attestor{Type: w.Type, Workload: w.Workload})
	}
	return workloadapi.NewAttestation(attestors, workloadapi.AttestationConfig{
		Log: cfg.Log.WithField("component", "workloadapi"), Metrics: cfg.Metrics, Now: cfg.Now,
	})
}

// openWorkloadAPI makes the server of the public socket, which may have been prepared.
func (a *agent) openWorkloadAPI(socket *unixsocket.Socket) {
	log := a.cfg.Log.WithField("component", "workloadapi")
	a.serve = workloadapi.New(a.issue, a.attest, workloadapi.Config{
		SocketPath:                    a.cfg.SocketPath,
		Socket:                        socket,
		Disabled:                      a.cfg.DisableWorkloadAPI,
		Hold:                          a.cfg.WorkloadHold,
		AllowUnauthenticatedVerifiers: a.cfg.AllowUnauthenticatedVerifiers,
		AllowedForeignJWTClaims:       a.cfg.AllowedForeignJWTClaims,
		LogSelectors:                  a.cfg.LogSelectors,
		Audit:                         a.cfg.Audit,
		Ready:                         sync.OnceFunc(func() { close(a.listens) }),
		Serving:                       a.serves,
		Log:                           log,
		Metrics:                       a.cfg.Metrics,
		Now:                           a.cfg.Now,
	})
	secrets := a.cfg.SDS
	secrets.Log = a.cfg.Log.WithField("component", "sds")
	if !a.cfg.DisableSDSAPI {
		sds.Register(a.serve, secrets)
	}
}

// run runs the parts until one fails or ctx ends.
func (a *agent) run(ctx context.Context) error {
	a.running.Store(true)
	defer a.running.Store(false)
	a.cfg.Health.set(a.health)
	// What is kept is written once more after everybody who has something to keep has ended.
	keepCtx, stopKeep := context.WithCancel(context.WithoutCancel(ctx))
	var kept sync.WaitGroup
	kept.Go(func() { _ = a.keep.Run(keepCtx) }) // always nil
	defer kept.Wait()
	defer stopKeep()

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.view.Run(ctx) })
	g.Go(func() error { return a.join.Run(ctx) })
	g.Go(func() error { return a.uplink.Run(ctx) })
	g.Go(func() error { return a.issue.Run(ctx) })
	g.Go(func() error {
		if err := a.serve.Run(ctx); err != nil {
			return fmt.Errorf("serve workload API: %w", err)
		}
		return nil
	})
	if a.admin != nil {
		g.Go(func() error {
			if err := a.admin.Run(ctx); err != nil {
				return fmt.Errorf("serve admin socket: %w", err)
			}
			return nil
		})
	}
	if a.broker != nil {
		g.Go(func() error {
			if err := a.broker.Run(ctx); err != nil {
				return fmt.Errorf("serve broker API: %w", err)
			}
			return nil
		})
	}
	for _, f := range a.cfg.Files {
		g.Go(func() error { a.keepFiles(ctx, f); return nil })
	}
	g.Go(func() error { a.lease.run(ctx); return nil })
	g.Go(func() error {
		if a.view.Wait(ctx) == nil {
			close(a.serves)
		}
		return nil
	})
	g.Go(func() error { a.announce(ctx); return nil })
	return g.Wait()
}

// announce calls Ready, and says what is waited for and when it has come.
func (a *agent) announce(ctx context.Context) {
	select {
	case <-a.listens:
	case <-ctx.Done():
		return
	}
	if a.cfg.Ready != nil {
		a.cfg.Ready()
	}
	if a.view.Picture().Held() {
		return
	}
	a.log.WithField("server", a.cfg.serverTarget()).Info("waiting for the server's first picture; workloads get no identity until then")
	if a.view.Wait(ctx) == nil {
		a.log.WithField("rev", a.view.Rev()).Info("the server's first picture is in force")
	}
}

func (a *agent) health() (live, ready error) {
	if !a.running.Load() {
		err := errors.New("agent has stopped")
		return err, err
	}
	select {
	case <-a.listens:
	default:
		return nil, errors.New("workload API does not listen yet")
	}
	if a.join.Banned() {
		return nil, errors.New("agent is banned")
	}
	var what error
	own, _ := a.join.Own()
	switch {
	case !a.view.Picture().Held():
		what = errors.New("no picture from the server yet")
	case own == nil:
		what = errors.New("the agent has no valid SVID of its own")
	default:
		return nil, nil
	}
	why := a.join.Err()
	if why == nil && own != nil {
		why = a.uplink.Status().Err
	}
	if why != nil {
		what = fmt.Errorf("%w: %w", what, why)
	}
	if lost := a.keep.Lost(); lost != nil {
		what = fmt.Errorf("%w; what was kept from before could not be used: %w", what, lost)
	}
	return nil, what
}

// errBanned keeps pictures out of a banned agent.
var errBanned = errors.New("agent is banned")

// sink is where the picture goes: into the view, to disk, and its own bundle into join.
type sink struct {
	cfg  Config
	log  logrus.FieldLogger
	view *view.View
	keep *keep.Keep
	join *join.Joiner
	// lease is told that the server is there.
	lease *lease
	// mu keeps a picture that was under way from arriving after a ban has emptied the view.
	mu sync.Mutex
}

// Held returns what the view holds.
func (s *sink) Held() uplink.Held {
	p := s.view.Picture()
	h := uplink.Held{StoreID: p.StoreID, Rev: p.Rev, Entries: p.Entries(), Verdicts: p.VerdictList()}
	if p.Held() {
		h.Bundles = p.BundleList()
	}
	return h
}

// Apply takes the next picture.
func (s *sink) Apply(u view.Update) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.join.Banned() {
		return errBanned
	}
	before := s.view.Picture()
	if err := s.view.Apply(u); err != nil {
		return err
	}
	s.lease.contact()
	p := s.view.Picture()
	s.join.SetBundle(p.Bundles[s.cfg.TrustDomain])
	if p.Serial() != before.Serial() || !before.Held() {
		s.save(p)
		s.log.WithFields(logrus.Fields{"rev": p.Rev, "entries": len(p.Entries())}).Debug("picture is in force")
	}
	return nil
}

func (s *sink) save(p *view.Picture) {
	s.keep.SavePicture(&keep.Picture{
		StoreID: p.StoreID, Rev: p.Rev, Entries: p.Entries(), Bundles: p.BundleList(), Verdicts: p.VerdictList(), HeardAt: s.cfg.Now(),
	})
}

// keepHeard keeps that the picture is the server's by now.
func (s *sink) keepHeard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.view.Picture(); p.Held() && !s.join.Banned() {
		s.save(p)
	}
}

// wipe leaves nothing to serve, in memory or on disk.
func (s *sink) wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view.Picture().Held() {
		if err := s.view.Apply(view.Update{Full: true}); err != nil {
			s.log.WithError(err).Error("picture of the banned agent cannot be emptied")
		}
	}
	if err := s.keep.Wipe(); err != nil {
		s.log.WithError(err).Error("kept state of the banned agent cannot be removed from disk")
	}
}

var (
	_ uplink.Sink        = (*sink)(nil)
	_ uplink.Self        = (*join.Joiner)(nil)
	_ issue.Signer       = (*uplink.Uplink)(nil)
	_ issue.Store        = (*keep.Keep)(nil)
	_ join.Store         = (*keep.Keep)(nil)
	_ workloadapi.Source = (*issue.Issuer)(nil)
)
