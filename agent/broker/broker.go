// Package broker serves SPIFFE's Broker API (spiffe.broker) at a socket of its own and, if the operator wishes, over
// TCP: infrastructure that the operator names by SPIFFE ID gets the identities of workloads that it refers to,
// and follows their changes. Everybody speaks mutual TLS with X509-SVIDs, whatever the socket.
//
// It differs from the delegated identity API in what is believed: a broker says which process it means, never what
// is true of it. The process is pinned and attested here, as if it had called itself.
//
// Why it is so:
//   - Who may call is decided in the TLS handshake, so that a stranger speaks to no gRPC code, and again before
//     everything that is sent: a broker whose SVID expires, is revoked or loses its root loses its streams.
//   - A process ID means something on this node only. Over TCP it is refused unless the operator says otherwise.
//   - Admin and downstream identities are left out below this package, as for delegates.
//   - Of the objects of Kubernetes only pods of this node are known, as the k8s attestor proves them; of others the
//     agent has no right to ask the API server. A pod has what is proved about pods and nothing of its containers, so an
//     entry that demands an image, or a verdict on one, is not for it.
package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/strict"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// Source turns facts into identities that may be handed to somebody else. agent/issue's Delegated is one.
type Source interface {
	X509(ctx context.Context, facts attestor.Set) (identity.X509Context, <-chan struct{}, error)
	JWT(ctx context.Context, facts attestor.Set, audience []string, id spiffeid.ID) ([]*identity.JWTSVID, <-chan struct{}, error)
}

// Grant is what a broker may refer to.
type Grant struct {
	ID spiffeid.ID
	// Types are the type URLs of references, each with whether it may be used over TCP. "*" is any.
	Types map[string]bool
}

// Type URLs of references: by process ID, and to an object of Kubernetes.
const (
	PIDReference    = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"
	ObjectReference = "type.googleapis.com/spiffe.broker.KubernetesObjectReference"
)

// Config is what the service stands on. One of SocketPath and Address is required, and all of the rest but Pods,
// Audit and Metrics.
type Config struct {
	// SocketPath is a Unix socket, made with mode 0777: the handshake says who may call. Empty: none.
	SocketPath string
	// Address is host:port. Empty: no TCP.
	Address string
	Grants  []Grant
	// Attest follows what is proved about processes.
	Attest *workloadapi.Server
	// Pods knows the pods of this node. Nil: nobody does, and no reference to an object is understood.
	Pods   attestor.Pods
	Source Source
	// Bundles returns all bundles the agent holds, and a channel that is closed when they may be others.
	Bundles func() ([]*identity.Bundle, <-chan struct{})
	// Own returns the agent's own SVID, or an error if there is none at the moment.
	Own   func() (*tls.Certificate, error)
	Audit workloadapi.Auditor
	Log   logrus.FieldLogger
	// Metrics registers the count of answers.
	Metrics prometheus.Registerer
	Now     func() time.Time
	// Ready is told the TCP listener's address once callers are accepted; nil is fine.
	Ready func(tcp net.Addr)
}

// Limits on callers.
const (
	maxConnections = 128 // of each listener
	maxStreams     = 200 // of a connection
	maxRequest     = 64 << 10
	maxHeaders     = 16 << 10
	handshake      = 10 * time.Second
)

// Server serves the API. Run does.
type Server struct {
	brokerapi.UnimplementedAPIServer
	cfg     Config
	grants  map[spiffeid.ID]Grant
	tracker *peer.Tracker // made by Run, before anybody is served
	answers *prometheus.CounterVec
	limit   *rate.Limiter // of audit lines about strangers
}

// New returns a Server.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, grants: map[spiffeid.ID]Grant{}, limit: rate.NewLimiter(refusalRate, refusalBurst), answers: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_agent_broker_answers_total",
		Help: "Answers of the broker API by event and outcome.",
	}, []string{"event", "outcome"})}
	for _, g := range cfg.Grants {
		s.grants[g.ID] = g
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(s.answers)
	}
	return s
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	tracker, err := peer.Open(peer.Config{Log: s.cfg.Log, Now: s.cfg.Now})
	if err != nil {
		return fmt.Errorf("open peer tracker: %w", err)
	}
	defer tracker.Close()
	s.tracker = tracker
	var listeners []net.Listener
	var tcp net.Addr
	if s.cfg.SocketPath != "" {
		socket, err := unixsocket.Listen(s.cfg.SocketPath, 0o777, 0o755)
		if err != nil {
			return err
		}
		defer func() { _ = socket.Close() }()
		listeners = append(listeners, locals{socket.UnixListener})
	}
	if s.cfg.Address != "" {
		l, err := net.Listen("tcp", s.cfg.Address)
		if err != nil {
			return fmt.Errorf("listen for brokers at %s: %w", s.cfg.Address, err)
		}
		defer func() { _ = l.Close() }()
		listeners, tcp = append(listeners, l), l.Addr()
	}
	srv := grpc.NewServer(
		grpc.Creds(greeter{credentials.NewTLS(s.tls()), s}),
		grpc.ConnectionTimeout(handshake),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second, MaxConnectionIdle: 10 * time.Minute}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.ForceServerCodecV2(strict.Codec()),
		grpc.ChainUnaryInterceptor(s.unary, strict.Unary), grpc.ChainStreamInterceptor(s.stream, strict.Stream),
	)
	brokerapi.RegisterAPIServer(srv, s)
	track, stopTrack := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTrack()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return tracker.Run(track) })
	var serving errgroup.Group
	for _, l := range listeners {
		serving.Go(func() error {
			if err := srv.Serve(netutil.LimitListener(l, maxConnections)); err != nil && ctx.Err() == nil {
				return fmt.Errorf("serve brokers at %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	s.cfg.Log.WithFields(logrus.Fields{"socket": s.cfg.SocketPath, "address": s.cfg.Address}).Info("broker API is served")
	if s.cfg.Ready != nil {
		s.cfg.Ready(tcp)
	}
	g.Go(serving.Wait)
	g.Go(func() error {
		<-ctx.Done()
		srv.Stop() // streams do not end by themselves
		_ = serving.Wait()
		stopTrack()
		return nil
	})
	return g.Wait()
}

// tls demands an SVID of a broker that the operator named.
func (s *Server) tls() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAnyClientCert, // verified below, by SPIFFE's rules
		NextProtos: []string{"h2"},
		// A session that is resumed would not be verified again.
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			own, err := s.cfg.Own()
			if err != nil {
				err = fmt.Errorf("%w: %w", errOwn, err)
			}
			return own, err
		},
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			var certs []*x509.Certificate
			for _, der := range raw {
				cert, err := x509.ParseCertificate(der)
				if err != nil {
					return err
				}
				certs = append(certs, cert)
			}
			_, err := s.verify(certs)
			return err
		},
	}
}

// greeter writes down whoever does not get through the handshake: also who shows no certificate, which TLS refuses
// before anybody is asked, or speaks no TLS at all.
type greeter struct {
	credentials.TransportCredentials
	server *Server
}

// ServerHandshake implements credentials.TransportCredentials.
func (g greeter) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	through, info, err := g.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		g.server.refused(conn, err)
	}
	return through, info, err
}

// Clone implements credentials.TransportCredentials.
func (g greeter) Clone() credentials.TransportCredentials {
	return greeter{g.TransportCredentials.Clone(), g.server}
}

// errOwn is in the error of a handshake that failed on our side.
var errOwn = errors.New("the agent has no SVID of its own to show")

// Refusals are written down at this rate; a stranger who calls again and again must not fill the disk. All are counted.
const (
	refusalRate  = 5 // a second
	refusalBurst = 50
)

// refused writes down who was not let in.
func (s *Server) refused(conn net.Conn, err error) {
	outcome := "deny"
	if errors.Is(err, errOwn) {
		outcome = "error"
	}
	s.answers.WithLabelValues(eventConnect, outcome).Inc()
	if s.cfg.Audit == nil || !s.limit.Allow() {
		return
	}
	l := workloadapi.Line{Time: s.cfg.Now().UTC(), Event: eventConnect, Outcome: outcome, Reason: clip(err.Error())}
	switch from := conn.RemoteAddr().(type) {
	case *local:
		l.PID, l.UID, l.GID = int(from.cred.Pid), from.cred.Uid, from.cred.Gid
	default:
		l.Remote = from.String()
	}
	s.cfg.Audit.Audit(l)
}

// maxChain is how many certificates a broker may show. Verifying costs.
const maxChain = 8

// verify returns the broker whose chain it is.
func (s *Server) verify(certs []*x509.Certificate) (spiffeid.ID, error) {
	if len(certs) == 0 || len(certs) > maxChain {
		return spiffeid.ID{}, fmt.Errorf("chain of %d certificates", len(certs))
	}
	named, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	if _, ok := s.grants[named]; !ok { // before any signature is looked at
		return spiffeid.ID{}, fmt.Errorf("%s is no broker here", named)
	}
	bundles, _ := s.cfg.Bundles()
	set := x509bundle.NewSet()
	var own *identity.Bundle
	for _, b := range bundles {
		set.Add(b.X509Bundle())
		if b.TrustDomain == named.TrustDomain() {
			own = b
		}
	}
	id, _, err := x509svid.Verify(certs, set, x509svid.WithTime(s.cfg.Now()))
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case id != named:
		return spiffeid.ID{}, errors.New("the certificate names two identities")
	case revoked(certs[0], own):
		return spiffeid.ID{}, fmt.Errorf("the certificate of %s is revoked", id)
	}
	return id, nil
}

// revoked reports whether a certificate that was verified is on the list of whoever signed it.
func revoked(cert *x509.Certificate, b *identity.Bundle) bool {
	for _, der := range b.CRLs {
		list, err := x509.ParseRevocationList(der)
		if err != nil || string(list.AuthorityKeyId) != string(cert.AuthorityKeyId) {
			continue
		}
		for _, entry := range list.RevokedCertificateEntries {
			if entry.SerialNumber.Cmp(cert.SerialNumber) == 0 {
				return true
			}
		}
	}
	return false
}
