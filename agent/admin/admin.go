// Package admin is the agent's private socket: Explain, which answers the first question of every
// operator ("why does this process not get its identity?"), and SPIRE's debug and logger services,
// which its command line knows.
//
// Who may open the socket may ask: it is made with mode 0600 in a directory with mode 0700. Nothing
// here hands out an identity; agent/delegate, which shares the socket, does, and asks more of its
// callers. Explain does show selectors, and those can hold secrets, such as a
// container's environment; that is why it is not on the public socket.
//
// Why it is so: an explanation is only worth something if it is made by what decides. So Explain runs
// the same attestation as the Workload API and compares with the same picture, and keeps no second
// account of either. The answer travels as facts plus advice, and Render turns it into a page, so
// that a script gets the same from -output json.
package admin

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/admin/wire"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/strict"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// Held is the agent's picture; *agent/view.View is one.
type Held interface {
	// Entries returns all entries the agent holds.
	Entries() []*identity.Entry
	// Rev returns the server's revision that they reflect.
	Rev() uint64
	// Picture returns all of it.
	Picture() *view.Picture
}

// Attestation asks all attestors about a process; *workloadapi.Attestation is one.
type Attestation interface {
	Attest(ctx context.Context, p attestor.Process) []attestor.Finding
	// Abstains says why no process will show a selector, or "".
	Abstains(want attestor.Selector) string
}

// Leveler is the agent's log level; *logrus.Logger is one.
type Leveler interface {
	GetLevel() logrus.Level
	SetLevel(level logrus.Level)
}

// Status is how the agent is. Zero fields are unknown.
type Status struct {
	// AgentID is the agent's own SPIFFE ID, also when its SVID is gone.
	AgentID spiffeid.ID
	// Version of the agent.
	Version string
	// Server is the server's address.
	Server string
	// Uplink says in a word how the agent is connected: "feed", "sync", "connecting", "disconnected".
	Uplink string
	// Connected says whether the picture is being kept up to date at the moment.
	Connected bool
	// Err is why it is not, and ErrAt since when.
	Err   error
	ErrAt time.Time
	// Heard is when the picture was last known to be the server's.
	Heard time.Time
	// PictureAt is when the server made the picture.
	PictureAt time.Time
	// ServerRev is the server's newest revision that the agent knows of.
	ServerRev uint64
	// Banned says that the server refuses this agent for good.
	Banned bool
	// Chain is the agent's own SVID, leaf first.
	Chain []*x509.Certificate
	// StartedAt is when the agent started.
	StartedAt time.Time
	// X509Held and JWTHeld are the numbers of SVIDs in memory.
	X509Held, JWTHeld int
}

// Config holds what a Server may be given. SocketPath is required, for the rest the zero value works.
type Config struct {
	SocketPath string
	// SocketMode is the socket's mode; 0 means 0600.
	SocketMode os.FileMode
	// Status says how the agent is; it is called for each question.
	Status func() Status
	// SVID says until when the X509-SVID is valid that is held for an entry, the zero time if there is none,
	// and why the last attempt to have one signed failed. Nil: nothing is known of SVIDs.
	SVID func(entryID string) (until time.Time, err error)
	// Level is changed by the logger service; nil turns the service off.
	Level Leveler
	Log   logrus.FieldLogger
	// Metrics is where the numbers of the socket's peers go; nil keeps them unseen.
	Metrics prometheus.Registerer
	Now     func() time.Time
	// Proc is where procfs is mounted; empty means /proc.
	Proc string
	// Ready, if set, is called once when the socket accepts callers.
	Ready func()
}

// RegisterService makes the socket serve a further gRPC service. It must be called before Run. It
// implements grpc.ServiceRegistrar.
func (s *Server) RegisterService(desc *grpc.ServiceDesc, impl any) {
	s.further = append(s.further, func(on grpc.ServiceRegistrar) { on.RegisterService(desc, impl) })
}

// Pin pins a process by its PID, for a further service's calls. Release must be called.
func (s *Server) Pin(pid int) (*peer.Peer, error) { return s.tracker.Pin(pid) }

// Server is the agent's private socket. Use New, then Run.
type Server struct {
	wire.UnimplementedAdminServer
	held    Held
	attest  Attestation
	cfg     Config
	log     logrus.FieldLogger
	now     func() time.Time
	started time.Time
	launch  logrus.Level
	tracker *peer.Tracker // made by Run, before anybody is served
	further []func(grpc.ServiceRegistrar)
}

// New returns a Server; it touches nothing until Run.
func New(held Held, attest Attestation, cfg Config) *Server {
	if cfg.SocketMode == 0 {
		cfg.SocketMode = 0o600
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Status == nil {
		cfg.Status = func() Status { return Status{} }
	}
	if cfg.Proc == "" {
		cfg.Proc = "/proc"
	}
	if cfg.Log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		cfg.Log = quiet
	}
	s := &Server{held: held, attest: attest, cfg: cfg, log: cfg.Log, now: cfg.Now, started: cfg.Now()}
	if cfg.Level != nil {
		s.launch = cfg.Level.GetLevel()
	}
	return s
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	tracker, err := peer.Open(peer.Config{Proc: s.cfg.Proc, Log: s.log, Metrics: s.cfg.Metrics, Now: s.now})
	if err != nil {
		return fmt.Errorf("open peer tracker: %w", err)
	}
	defer tracker.Close()
	s.tracker = tracker
	socket, err := unixsocket.Listen(s.cfg.SocketPath, s.cfg.SocketMode, 0o700)
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	srv := grpc.NewServer(
		grpc.Creds(peer.Credentials()),
		grpc.MaxRecvMsgSize(64<<10),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(4096), // who acts for the workloads of a node has one for each
		grpc.ConnectionTimeout(10*time.Second),
		grpc.ForceServerCodecV2(strict.Codec()),
		grpc.ChainUnaryInterceptor(s.rescueUnary, strict.Unary),
		grpc.ChainStreamInterceptor(s.rescueStream, strict.Stream),
	)
	wire.RegisterAdminServer(srv, s)
	debugv1.RegisterDebugServer(srv, debugService{Server: s})
	loggerv1.RegisterLoggerServer(srv, loggerService{Server: s})
	for _, register := range s.further {
		register(srv)
	}
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	reflection.Register(srv)
	if s.cfg.Ready != nil {
		s.cfg.Ready()
	}
	trackCtx, stopTracking := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTracking()
	var g errgroup.Group
	g.Go(func() error { return tracker.Run(trackCtx) })
	g.Go(func() error {
		if err := srv.Serve(tracker.Listener(socket.UnixListener, nil)); err != nil && ctx.Err() == nil {
			return fmt.Errorf("serve admin socket: %w", err)
		}
		return nil
	})
	stop := context.AfterFunc(ctx, func() {
		srv.Stop() // questions are cheap to ask again
		stopTracking()
	})
	defer stop()
	return g.Wait()
}

// rescueUnary keeps a panic in one call from taking the agent with it.
func (s *Server) rescueUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	defer s.rescue(info.FullMethod, &err)
	return handle(ctx, req)
}

// rescueStream is rescueUnary for all other calls.
func (s *Server) rescueStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer s.rescue(info.FullMethod, &err)
	return handle(srv, ss)
}

func (s *Server) rescue(method string, err *error) {
	if p := recover(); p != nil {
		s.log.WithFields(logrus.Fields{"method": method, "panic": fmt.Sprint(p), "stack": string(debug.Stack())}).Error("call panicked")
		*err = status.Error(codes.Internal, "internal error")
	}
}

// Errors of a question.
var (
	errNoTarget    = errors.New("give a PID or a container ID")
	errNoProcess   = errors.New("there is no such process")
	errContainerID = errors.New("a container ID has 12 to 64 hexadecimal digits; names are the engine's: docker inspect -f '{{.Id}}' NAME prints the ID of one")
	errNoContainer = errors.New("no running process that this agent can see belongs to that container; \"docker ps -a\" shows whether it runs")
	errLevelUnset  = errors.New("newLevel value cannot be LogLevel_UNSPECIFIED") // in SPIRE's words, as the next
	errLevel       = errors.New("unsupported log level")
	errNoLevel     = errors.New("the log level of this agent cannot be changed")
)

// toStatus is the one place where errors become gRPC codes. The socket is for operators, so they are
// told everything.
func toStatus(err error) error {
	code := codes.Internal
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errNoTarget), errors.Is(err, errContainerID), errors.Is(err, errLevelUnset), errors.Is(err, errLevel):
		code = codes.InvalidArgument
	case errors.Is(err, errNoProcess), errors.Is(err, errNoContainer), errors.Is(err, peer.ErrDead):
		code = codes.NotFound
	case errors.Is(err, errNoLevel):
		code = codes.Unimplemented
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	return status.Error(code, err.Error())
}
