// Package workloadapi serves the SPIFFE Workload API to the processes of this node over a Unix
// socket: X.509-SVIDs, JWT-SVIDs, their bundles, and validation of JWT-SVIDs.
//
// A call goes this way. workloadapi/peer pins the process that connected. Attestation asks every
// attestor about it, in parallel; the union of what they prove are its facts, and they count only if
// the pinned process is still alive afterwards. A Source turns facts into identities. The stream then
// stays open, and three things wake it: the Source (an entry, a bundle or an SVID changed), the
// facts (the process was attested again and is not what it was), the end of the process.
//
// Why it is so:
//   - Facts belong to a connection, and all its streams share them. They are renewed on an
//     attestor's word, after each change that reached the workload, and on a slow timer; a change is
//     not held up for it, because facts that are a few minutes old are what a stream lives on anyway.
//   - An attestor that fails at a renewal keeps what it last said of the very same process for a
//     while: an engine that restarts must not take identities from all its containers.
//   - Streams with equal facts share one answer, serialized once. A change costs a stream a wake and
//     a write.
//   - A caller that matches nothing is held for a moment. Its entry is often on its way, and the
//     usual client waits a second and more after a refusal.
//   - A caller is told no more than the standard demands: "no identity issued" is the answer to
//     whoever has none, is dead, or has lost his. The audit line says why.
package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/strict"
	"github.com/assay-id/assay/server/wire/unread"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// Source turns facts into identities. agent/issue has it.
type Source interface {
	// X509 returns the SVIDs of the entries whose selectors are all in facts, oldest entry first, one
	// per hint, with the bundles they need, and a channel that is closed when any of it may have
	// changed. It may wait for signing until ctx ends. Without a match there are no SVIDs and no
	// error. An error wrapping identity.ErrUnavailable says that there is a match and nothing valid
	// to give.
	X509(ctx context.Context, facts attestor.Set) (identity.X509Context, <-chan struct{}, error)
	// Bundles returns the own bundle and those that matching entries federate with, and a channel
	// that is closed when any of it may have changed.
	Bundles(facts attestor.Set) (identity.BundleSet, <-chan struct{})
	// JWT returns a JWT-SVID for each matching entry, or only for those with the ID if it is not
	// zero, and a channel that is closed when a different set of entries may match. Errors are as
	// X509's.
	JWT(ctx context.Context, facts attestor.Set, audience []string, id spiffeid.ID) ([]*identity.JWTSVID, <-chan struct{}, error)
	// WIT returns a WIT-SVID as JWT does, and its channel is closed too when one of them is replaced. The
	// error wraps identity.ErrUnsupported if the server signs none.
	WIT(ctx context.Context, facts attestor.Set, id spiffeid.ID) ([]*identity.WITSVID, <-chan struct{}, error)
}

// Defaults of Config.
const (
	// DefaultHold is how long a caller that matches nothing waits for its entry.
	DefaultHold = 3 * time.Second
	// DefaultReattest is how old the facts of an open stream may get.
	DefaultReattest = 5 * time.Minute
	// DefaultKeepFacts is how long a failing attestor's last word on a process counts.
	DefaultKeepFacts = time.Hour
)

// Config holds what a Server may be given. SocketPath is required, for the rest the zero value works.
type Config struct {
	// SocketPath is where the public socket goes, mode 0777.
	SocketPath string
	// Socket, if set, was prepared for SocketPath and listens already.
	Socket *unixsocket.Socket
	// Disabled leaves the Workload API out of the socket; services that were added to it are served.
	Disabled bool
	// Hold is how long a caller that matches nothing waits for its entry; 0 means DefaultHold,
	// negative means not at all.
	Hold time.Duration
	// Reattest is how old the facts of an open stream may get, a tenth more or less; 0 means
	// DefaultReattest.
	Reattest time.Duration
	// KeepFacts is how long a failing attestor's last word on a process counts while a stream is
	// open; 0 means DefaultKeepFacts, negative means not at all.
	KeepFacts time.Duration
	// AllowUnauthenticatedVerifiers gives the own trust domain's bundles to callers without an identity.
	// Validation against them is for everybody.
	AllowUnauthenticatedVerifiers bool
	// AllowedForeignJWTClaims names the claims, besides the registered ones, that ValidateJWTSVID
	// returns from tokens of other trust domains.
	AllowedForeignJWTClaims []string
	// LogSelectors names the selector types whose values may stand in audit lines. Values can be
	// secrets (a container's environment), so others appear by type and as a digest.
	LogSelectors []string
	// Limits bound what callers may use.
	Limits Limits
	// Audit gets a line for each answer; nil means nobody does.
	Audit Auditor
	// Ready, if set, is called once when the socket accepts callers.
	Ready func()
	// Serving is closed when there is something to serve: from then on, and whatever happens, the health
	// service says SERVING. Nil: it does from the start.
	Serving <-chan struct{}
	Log     logrus.FieldLogger
	// Metrics is where the numbers go; nil keeps them unseen.
	Metrics prometheus.Registerer
	Now     func() time.Time
	// Proc is where procfs is mounted; empty means /proc.
	Proc string
}

// Limits bound what callers may use. Connections and streams are shared fairly by user ID: no user
// gets more than there is left for all others.
type Limits struct {
	// Connections at a time; 0 means 16384, or what the limit of open files allows if that is less.
	Connections int
	// Streams and calls at a time, over all connections; 0 means 65536.
	Streams int
	// Attestations of processes at a time; 0 means 64. Others wait, user by user in turn.
	Attestations int
}

// maxRequest is the largest request, in bytes. A JWT to validate is far smaller; an Envoy that asks for
// secrets names each of its extensions (61 KB as of 1.40), and Istio's adds its pod's metadata.
const maxRequest = 256 << 10

// Server is the Workload API of one agent. Use New, then Run.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	src     Source
	attest  *Attestation
	cfg     Config
	log     logrus.FieldLogger
	now     func() time.Time
	metrics *metrics
	foreign map[string]bool // claims of foreign tokens that may be returned
	logged  map[string]bool // selector types that may be logged

	connections *quota
	streams     *quota
	arrivals    *arrivals
	dialogues   *quota
	shelf       shelf
	first       *turnstile // attestations somebody waits for
	again       *turnstile // renewals

	x509        *Feed
	x509Bundles *Feed
	jwtBundles  *Feed
	wits        *Feed
	witBundles  *Feed
	further     []further // added before Run

	stopping chan struct{} // closed when Run is asked to end

	mu      sync.Mutex // guards the rest
	callers map[*peer.Peer]*caller
	closed  bool           // no more attestations may begin
	work    sync.WaitGroup // attestations under way
	// lifetime begins and ends with Run. Attestations live in it and not in the context of the call that began
	// them, because others may wait for the same one.
	lifetime context.Context
}

// New returns a Server; it touches nothing until Run.
func New(src Source, attest *Attestation, cfg Config) *Server {
	if cfg.Hold == 0 {
		cfg.Hold = DefaultHold
	}
	if cfg.Reattest <= 0 {
		cfg.Reattest = DefaultReattest
	}
	if cfg.KeepFacts == 0 {
		cfg.KeepFacts = DefaultKeepFacts
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Limits = cfg.Limits.filled()
	s := &Server{
		src: src, attest: attest, cfg: cfg, log: orDiscard(cfg.Log), now: cfg.Now,
		metrics: newMetrics(cfg.Metrics), foreign: map[string]bool{}, logged: map[string]bool{},
		connections: newQuota(cfg.Limits.Connections),
		streams:     newQuota(cfg.Limits.Streams),
		arrivals:    newArrivals(),
		dialogues:   newQuota(maxDialogues),
		first:       newTurnstile(cfg.Limits.Attestations),
		again:       newTurnstile(max(1, cfg.Limits.Attestations/4)),
		stopping:    make(chan struct{}),
		callers:     map[*peer.Peer]*caller{},
	}
	for _, c := range append(slices.Clone(registeredClaims), cfg.AllowedForeignJWTClaims...) {
		s.foreign[c] = true
	}
	for _, kind := range cfg.LogSelectors {
		s.logged[kind] = true
	}
	s.x509 = &Feed{server: s, event: eventX509, hub: newHub(s.now, s.makeX509)}
	s.x509Bundles = &Feed{server: s, event: eventX509Bundles, hub: newHub(s.now, s.makeX509Bundles)}
	s.jwtBundles = &Feed{server: s, event: eventJWTBundles, hub: newHub(s.now, s.makeJWTBundles)}
	s.wits = &Feed{server: s, event: eventWIT, hub: newHub(s.now, s.makeWIT)}
	s.witBundles = &Feed{server: s, event: eventWITBundles, hub: newHub(s.now, s.makeWITBundles)}
	return s
}

func (l Limits) filled() Limits {
	if l.Connections <= 0 {
		l.Connections = 16384
		var files unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
			// A connection needs two descriptors, and the agent and its attestors need some too.
			l.Connections = min(l.Connections, max(16, int(min(files.Cur, 1<<20))/3))
		}
	}
	if l.Streams <= 0 {
		l.Streams = 65536
	}
	if l.Attestations <= 0 {
		l.Attestations = 64
	}
	return l
}

// Run serves until ctx ends, then lets callers know and returns. A Server runs once. It does not run
// the Attestation, which may have other users.
func (s *Server) Run(ctx context.Context) error {
	tracker, err := peer.Open(peer.Config{Proc: s.cfg.Proc, Log: s.log, Metrics: s.cfg.Metrics, Now: s.now})
	if err != nil {
		return fmt.Errorf("open peer tracker: %w", err)
	}
	defer tracker.Close()
	socket, err := s.listen()
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()

	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWork()
	s.mu.Lock()
	s.lifetime = work
	s.mu.Unlock()
	srv, healthy := s.grpcServer()
	trackCtx, stopTracking := context.WithCancel(context.WithoutCancel(ctx))
	var g errgroup.Group
	g.Go(func() error { return tracker.Run(trackCtx) })
	g.Go(func() error { s.announce(ctx, healthy); return nil })
	serving := make(chan error, 1)
	serve := func(socket *unixsocket.Socket) {
		g.Go(func() error {
			err := srv.Serve(tracker.Listener(socket.UnixListener, s.admit))
			select {
			case serving <- err:
			default: // one is enough to know that it is over
			}
			return nil
		})
	}
	serve(socket)
	if s.cfg.Ready != nil {
		s.cfg.Ready()
	}
	s.log.WithField("socket", socket.Path()).Info("workload API is served")
	err = s.supervise(ctx, socket, serving, serve)
	if handed, err := unixsocket.HandOver(s.cfg.SocketPath); err != nil {
		s.log.WithError(err).Warn("the next agent has to put its socket in place by itself")
	} else if handed {
		s.log.Info("the socket is the next agent's")
	}
	healthy.Shutdown()
	close(s.stopping)
	stopServer(srv)
	stopWork()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.work.Wait()
	stopTracking()
	return errors.Join(err, g.Wait())
}

// listen returns the socket that callers come to.
func (s *Server) listen() (*unixsocket.Socket, error) {
	if prepared := s.cfg.Socket; prepared != nil {
		err := prepared.Install()
		if err == nil {
			return prepared, nil
		}
		s.log.WithError(err).Warn("the prepared socket is of no use; making another")
		prepared.Withdraw()
	}
	return unixsocket.Listen(s.cfg.SocketPath, 0o777, 0o755)
}

// lookEvery is how soon a socket that somebody removed is put back.
const lookEvery = 2 * time.Second

// supervise waits for the end, and meanwhile sees to it that there is a socket where clients look:
// cleaners of temporary directories remove what looks old. It is put back; one that somebody put in its
// place is left alone.
func (s *Server) supervise(ctx context.Context, socket *unixsocket.Socket, serving <-chan error, serve func(*unixsocket.Socket)) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	replaced := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-serving:
			if errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, net.ErrClosed) {
				err = nil
			}
			return fmt.Errorf("serve workload API: stopped: %w", err)
		case <-tick.C:
		}
		if socket.InPlace() {
			replaced = false
			continue
		}
		log := s.log.WithField("socket", socket.Path())
		if _, err := os.Lstat(socket.Path()); errors.Is(err, fs.ErrNotExist) {
			// Calls on the old one go on; it ends with the server.
			again, err := unixsocket.Listen(s.cfg.SocketPath, 0o777, 0o755)
			if err == nil {
				socket = again
				serve(socket)
				log.Error("socket was removed by somebody else and put back")
				continue
			}
			log = log.WithError(err)
		}
		if !replaced {
			replaced = true
			log.Error("socket was replaced by somebody else, or cannot be put back; restart the agent")
		}
	}
}

// stopServer ends what is open: streams are told by Server.stopping, and what has not ended after a
// moment is cut.
func stopServer(srv *grpc.Server) {
	done := make(chan struct{})
	cut := time.AfterFunc(2*time.Second, srv.Stop)
	go func() { srv.GracefulStop(); close(done) }()
	<-done
	cut.Stop()
}

// grpcServer builds the server. Buffers are small: thousands of mostly silent connections share one
// agent, and a response is rarely more than a few KiB.
func (s *Server) grpcServer() (*grpc.Server, *health.Server) {
	srv := grpc.NewServer(
		grpc.Creds(peer.Credentials()),
		grpc.ForceServerCodecV2(unread.Codec(codec{strict.Codec()})),
		grpc.ReadBufferSize(0),
		grpc.WriteBufferSize(4<<10),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(uint32(min(s.cfg.Limits.Streams, 1<<16))), //nolint:gosec // bounded
		grpc.ConnectionTimeout(10*time.Second),
		grpc.InTapHandle(s.arrive),
		grpc.ChainUnaryInterceptor(unread.Unary, s.guardUnary, strict.Unary),
		grpc.ChainStreamInterceptor(unread.Stream, s.guardStream, strict.Stream),
	)
	if !s.cfg.Disabled {
		workload.RegisterSpiffeWorkloadAPIServer(srv, s)
	}
	for _, f := range s.further {
		srv.RegisterService(f.desc, f.impl)
	}
	healthy := health.NewServer()
	state := grpc_health_v1.HealthCheckResponse_SERVING
	if s.cfg.Serving != nil {
		state = grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	setHealth(healthy, state)
	grpc_health_v1.RegisterHealthServer(srv, healthy)
	reflection.Register(srv)
	return srv, healthy
}

func setHealth(healthy *health.Server, state grpc_health_v1.HealthCheckResponse_ServingStatus) {
	for _, service := range []string{"", workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName} {
		healthy.SetServingStatus(service, state)
	}
}

// announce has the health service say when there is something to serve. After its Shutdown nothing changes it.
func (s *Server) announce(ctx context.Context, healthy *health.Server) {
	if s.cfg.Serving == nil {
		return
	}
	select {
	case <-s.cfg.Serving:
		setHealth(healthy, grpc_health_v1.HealthCheckResponse_SERVING)
	case <-ctx.Done():
	}
}

// admit gives each user its share of connections.
func (s *Server) admit(p attestor.Process) (func(), error) {
	leave, ok := s.connections.take(p.UID)
	if !ok {
		return nil, fmt.Errorf("user %d has as many connections as its share of %d allows", p.UID, s.cfg.Limits.Connections)
	}
	s.metrics.connections.Inc()
	return func() { leave(); s.metrics.connections.Dec() }, nil
}
