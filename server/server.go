// Package server is the wiring of the server: Run opens the store and builds the parts from it up to
// the listeners, holds them in one group, and takes them down in the reverse order.
//
// What a part does is in its own folder; what is here is which part gets which, the listeners and
// their TLS, and the limits on connections.
package server

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/admit"
	"github.com/assay-id/assay/server/api"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/backup"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/feed"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/turn"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/rules"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/strict"
	"github.com/assay-id/assay/server/wire/unread"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// Run serves until ctx ends, and then drains and closes everything and returns nil. It returns an
// error, one clear sentence, for a configuration or a world in which it cannot start, and for a part
// that failed while it ran.
func Run(ctx context.Context, config Config) (err error) {
	if err := config.Check(); err != nil {
		return fmt.Errorf("check configuration: %w", err)
	}
	cfg := config.filled()
	component := func(name string) logrus.FieldLogger { return cfg.Log.WithField("component", name) }

	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("make data directory: %w%s", err, mayNot(err))
	}
	// The store is first: whoever has it is alone with the rest, so that no two append to one audit log.
	store, snapshots, err := openStore(&cfg, component("snapshots"))
	if err != nil {
		return err
	}
	defer closing(store, &err)
	log, err := openAudit(&cfg, component("audit"))
	if err != nil {
		return err
	}
	defer closing(log, &err)
	rec, err := records.Open(ctx, store, cfg.TrustDomain, records.Config{
		Now: cfg.Now, Log: component("records"), Metrics: cfg.Metrics,
	})
	if err != nil {
		return backup.Explain(place(&cfg), err)
	}
	hosts, err := newHosts(&cfg)
	if err != nil {
		return err
	}
	signers, err := openKeys(ctx, &cfg, hosts, log, component("keys"))
	if err != nil {
		return err
	}
	if disk, ok := signers.(io.Closer); ok {
		defer closing(disk, &err)
	}
	above, err := openUpstream(&cfg, hosts, log, component("upstream"))
	if err != nil {
		return err
	}
	if part, ok := above.(io.Closer); ok {
		defer closing(part, &err)
	}
	var feeds *feed.Server // a successor waits for those who follow it
	authority, err := openCA(ctx, &cfg, signers, above, rec, func(rev kv.Rev) int {
		if feeds == nil {
			return 0
		}
		return feeds.Behind(rev)
	}, component("ca"))
	if err != nil {
		return backup.Explain(place(&cfg), err)
	}
	pictures := view.New(rec, cfg.TrustDomain, view.Config{Log: component("view"), Metrics: cfg.Metrics, Now: cfg.Now})
	hosts.settle(authority, pictures)
	judges, closeJudges, err := openJudges(&cfg, hosts, rec, log)
	if err != nil {
		return err
	}
	defer closeJudges()
	signing := turn.New(runtime.GOMAXPROCS(0), maxSigning)
	desk := admit.New(rec, urgent{authority, signing}, judges, admit.Config{
		TrustDomain: cfg.TrustDomain, Duration: cfg.Limits.AttestDuration,
		Log: component("admit"), Metrics: cfg.Metrics, Now: cfg.Now,
	})
	registrars := new(clusters)
	judge, err := openEvidence(ctx, &cfg, registrars.tell, rec, pictures, authority, log, component("verdict"))
	if err != nil {
		return err
	}
	feeds = feed.New(pictures, feed.Config{
		Caller: func(ctx context.Context) (spiffeid.ID, bool) {
			id := caller.FromContext(ctx).ID
			return id, !id.IsZero()
		},
		Authorize: caller.Reauthorize, Authority: signedBy,
		Log: component("feed"), Metrics: cfg.Metrics, Now: cfg.Now,
	})
	abroad, err := openAbroad(&cfg, rec, pictures, authority, log, component("trust"))
	if err != nil {
		return err
	}
	defer closing(abroad, &err)
	if judge != nil {
		defer closing(judge, &err)
	}
	services := api.New(api.Parts{
		Records: rec, View: pictures, CA: authority, Desk: desk, Audit: log, Signing: signing,
		Chain: ownChain(authority), Level: cfg.Level,
		Evidence: judging(judge), ScanPolicies: rules.ScanPolicies,
		Snapshots: snapshots, Authorities: authority, Feed: feeds,
		Federations: rec, Refresher: abroad.fetcher,
	}, api.Config{
		TrustDomain: cfg.TrustDomain, DisableJWT: cfg.CA.DisableJWT, WIT: cfg.CA.WIT, RequireSigned: cfg.RequireSigned,
		AttestPerSecond: cfg.Limits.AttestPerSecond, AttestBurst: cfg.Limits.AttestBurst,
		SignPerSecond: cfg.Limits.SignPerSecond, PostPerSecond: cfg.Limits.PostPerSecond,
		AttestDuration: cfg.Limits.AttestDuration,
		Log:            component("api"), Metrics: cfg.Metrics, Now: cfg.Now,
	})
	authorizer := caller.New(pictures, rec, log, caller.Config{
		TrustDomain: cfg.TrustDomain, AdminIDs: cfg.AdminIDs, Log: component("caller"), Now: cfg.Now,
		Roles: cfg.Roles, UID: uint32(os.Getuid()), //nolint:gosec // a user ID fits
	})
	stopping := make(chan struct{})
	around, err := newCalls(stopping, component("rpc"), cfg.Metrics)
	if err != nil {
		return err
	}
	intercept := []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(unread.Unary, around.Unary, authorizer.Unary, services.Ledgers().Unary, strict.Unary, around.RescueUnary),
		grpc.ChainStreamInterceptor(unread.Stream, around.Stream, authorizer.Stream, services.Ledgers().Stream, strict.Stream, around.RescueStream),
		grpc.ForceServerCodecV2(unread.Codec(strict.Codec())),
		grpc.MaxRecvMsgSize(cfg.Limits.MaxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
	}
	verifier := &caller.Verifier{TrustDomain: cfg.TrustDomain, Bundles: pictures, AdminIDs: cfg.AdminIDs, Now: cfg.Now}
	spent := newBudget(cfg.Limits)
	remote := grpc.NewServer(append(remoteOptions(cfg.Limits), append(intercept, grpc.InTapHandle(spent.tap),
		grpc.Creds(newGreeter(tlsConfig(authority.ServerCertificate(), verifier.Verify, cfg.RequirePQKEM))))...)...)
	services.Register(spent.registrar(remote))
	services.RegisterRemote(spent.registrar(remote))
	feeds.Register(spent.registrar(remote))
	local := grpc.NewServer(append(intercept, grpc.Creds(caller.UnixCredentials()))...)
	services.Register(local)
	services.RegisterLocal(local)
	err = registrars.open(&cfg, intercept, func(r grpc.ServiceRegistrar) {
		services.Register(r)
		services.RegisterLocal(r)
	}, pictures, judge, component("kubernetes"))
	if err != nil {
		return err
	}
	state := health.NewServer()
	grpc_health_v1.RegisterHealthServer(local, state)

	refusals, err := newRefusals(log, component("listener"), cfg.Metrics)
	if err != nil {
		return err
	}
	listeners, err := listen(&cfg, refusals)
	if err != nil {
		return err
	}
	defer listeners.close()
	crl, err := listenCRL(&cfg)
	if err != nil {
		return err
	}
	oidc, err := openDiscovery(&cfg, pictures, component("oidc"))
	if err != nil {
		return err
	}
	defer closing(oidc, &err)

	// The parts outlive ctx: calls that are being drained still need them.
	parts, stopParts := context.WithCancel(context.WithoutCancel(ctx))
	defer stopParts()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return rec.Run(parts) })
	group.Go(func() error { return oidc.run(parts, pictures.Ready()) })
	group.Go(func() error { return snapshots.Run(parts) })
	group.Go(func() error { return authority.Run(parts) })
	group.Go(func() error { return keep(parts, component("ca"), signers, above) })
	group.Go(func() error { return pictures.Run(parts) })
	group.Go(func() error {
		p := &pruner{
			expiredFor: cfg.PruneExpiredFor, once: cfg.PruneOnce, pictures: pictures, desk: desk, log: log, now: cfg.Now, diary: component("prune"),
		}
		return p.run(parts)
	})
	group.Go(func() error { return followNodes(parts, judges, cfg.TrustDomain, pictures, desk, log) })
	group.Go(func() error { return abroad.run(parts, pictures.Ready()) })
	group.Go(func() error { return registrars.run(parts, pictures.Ready()) })
	if judge != nil {
		group.Go(func() error { return judge.Run(parts) })
		if crl != nil {
			group.Go(func() error { return serveCRL(parts, crl, judge) })
		}
	}
	group.Go(func() error {
		select {
		case <-pictures.Ready():
		case <-ctx.Done():
			return nil
		}
		group.Go(func() error { return serve(remote, listeners.tcp) })
		if listeners.unix != nil {
			group.Go(func() error { return serve(local, listeners.unix) })
		}
		cfg.Log.WithFields(logrus.Fields{
			"address": listeners.tcp.Addr().String(), "socket": cfg.SocketPath, "attestors": desk.Types(), "store_id": rec.StoreID(),
		}).Info("server is ready")
		if cfg.Ready != nil {
			r := running(&cfg, listeners, store, rec, services, log)
			r.BundleEndpoint, r.OIDC = abroad.address(), oidc.address()
			if judge != nil {
				r.SetRules = func(ctx context.Context, rules verdict.Rules) error {
					defer registrars.policiesChanged()
					return judge.Replace(ctx, rules)
				}
			}
			if crl != nil {
				r.CRL = crl.Addr()
			}
			cfg.Ready(r)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		state.Shutdown()
		close(stopping)
		drain(cfg.Limits.Drain, remote, local)
		stopParts()
		return nil
	})
	if err := group.Wait(); err != nil {
		return backup.Explain(place(&cfg), err)
	}
	cfg.Log.Info("server stopped")
	return nil
}

// mayNot says what to do about a directory that this user may not make.
func mayNot(err error) string {
	if !errors.Is(err, fs.ErrPermission) {
		return ""
	}
	return "; run the server as a user who may make it, or name another as data_dir"
}

// closing closes a part and keeps its error if there is no other.
func closing(part io.Closer, err *error) {
	if closed := part.Close(); closed != nil && *err == nil {
		*err = closed
	}
}

// place is where backup finds the server's state.
func place(cfg *Config) backup.Place {
	return backup.Place{DataDir: cfg.DataDir, KeysPath: cfg.KeysPath, KeysSeal: cfg.KeysSeal, KeysInMemory: cfg.Keys == nil && cfg.KeyManager == KeysMemory, KeysElsewhere: cfg.Keys != nil}
}

// openStore opens the store, and never makes a new one where there must have been one.
func openStore(cfg *Config, log logrus.FieldLogger) (*boltkv.Store, *backup.Snapshots, error) {
	at := place(cfg)
	err := backup.Missing(at)
	var store *boltkv.Store
	if err == nil {
		store, err = boltkv.Open(filepath.Join(cfg.DataDir, backup.StoreFile), boltkv.Config{Metrics: cfg.Metrics})
	}
	if err != nil {
		return nil, nil, backup.Explain(at, fmt.Errorf("open store: %w", err))
	}
	snapshots, err := backup.New(store, filepath.Join(cfg.DataDir, backup.SnapshotsDir), backup.Config{
		Interval: cfg.SnapshotInterval, Keep: cfg.SnapshotKeep, Now: cfg.Now, Log: log, Metrics: cfg.Metrics,
	})
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	return store, snapshots, nil
}

func openAudit(cfg *Config, log logrus.FieldLogger) (*audit.Log, error) {
	c := audit.Config{Now: cfg.Now, Log: log, Metrics: cfg.Metrics}
	if cfg.AuditPath == "-" {
		return audit.New(os.Stderr, c)
	}
	return audit.Open(cfg.AuditPath, c)
}

func openKeys(ctx context.Context, cfg *Config, hosts *hosts, to *audit.Log, log logrus.FieldLogger) (keys.Manager, error) {
	if cfg.Keys != nil {
		km, err := cfg.Keys(ctx, cfg.needs(hosts, to, log))
		if err != nil {
			return nil, fmt.Errorf("open key manager %q: %w", cfg.KeyManager, err)
		}
		return km, nil
	}
	if cfg.KeyManager == KeysMemory {
		return keys.Memory(), nil
	}
	secret, err := keys.ReadSecret(cfg.KeysSeal)
	if err != nil {
		return nil, fmt.Errorf("open keys: %w", err)
	}
	disk, err := keys.OpenSealed(cfg.KeysPath, secret, log)
	if err != nil {
		return nil, fmt.Errorf("open keys: %w", err)
	}
	return disk, nil
}

func (c *Config) needs(hosts *hosts, to *audit.Log, log logrus.FieldLogger) Needs {
	return Needs{
		TrustDomain: c.TrustDomain, Log: log, Now: c.Now, DataDir: c.DataDir, Audit: tellAudit(to),
		Identity: hosts.identity, Measure: hosts.measures.Take,
	}
}

func openUpstream(cfg *Config, hosts *hosts, to *audit.Log, log logrus.FieldLogger) (upstream.Authority, error) {
	if cfg.Upstream == nil {
		return nil, nil
	}
	above, err := cfg.Upstream(cfg.needs(hosts, to, log))
	if err != nil {
		return nil, fmt.Errorf("open upstream authority: %w", err)
	}
	return above, nil
}

func openCA(ctx context.Context, cfg *Config, km keys.Manager, above upstream.Authority, store ca.Store, behind func(kv.Rev) int, log logrus.FieldLogger) (*ca.CA, error) {
	kind, err := keys.ParseKind(cfg.CA.KeyType)
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	jwtKind, err := keys.ParseKind(cfg.CA.JWTKeyType)
	if err != nil {
		return nil, fmt.Errorf("open CA: JWT %w", err)
	}
	return ca.Open(ctx, km, store, cfg.TrustDomain, ca.Config{
		CATTL: cfg.CA.TTL, KeyType: kind, JWTKeyType: jwtKind,
		X509SVIDTTL: cfg.CA.X509SVIDTTL, JWTSVIDTTL: cfg.CA.JWTSVIDTTL, AgentTTL: cfg.CA.AgentTTL,
		Subject: cfg.CA.Subject, JWTIssuer: cfg.CA.JWTIssuer, JWTProfiles: cfg.CA.JWTProfiles, WIT: cfg.CA.WIT, WITIssuer: cfg.CA.WITIssuer, NewAuthorityOnLostKey: cfg.CA.NewAuthorityOnLostKey,
		RevocationLists: cfg.Evidence != nil,
		Upstream:        above, Behind: behind, Now: cfg.Now, Log: log, Metrics: cfg.Metrics,
	})
}

// openJudges opens the node attestors, and returns how those are closed that can be.
func openJudges(cfg *Config, hosts *hosts, rec *records.Records, log *audit.Log) (judges map[string]attestor.Judge, shut func(), err error) {
	judges = map[string]attestor.Judge{}
	shut = func() {
		for _, judge := range judges {
			if part, ok := judge.(io.Closer); ok {
				_ = part.Close() // what it keeps is not ours
			}
		}
	}
	for _, j := range cfg.Judges {
		config := j.Config
		if config == nil && j.Kind.Config != nil {
			config = j.Kind.Config()
		}
		kind := attestor.TypeOf(j.Kind.Type, config)
		judge, err := j.Kind.Open(config, attestor.Needs{
			TrustDomain: cfg.TrustDomain,
			Log:         cfg.Log.WithField("component", "attestor").WithField("attestor", kind),
			Now:         cfg.Now,
			Tokens:      rec, Agents: known{rec}, Audit: tellAudit(log), Identity: hosts.identity, Measure: hosts.measures.Take,
		})
		if err != nil {
			shut()
			return nil, nil, fmt.Errorf("open node attestor %q: %w", kind, err)
		}
		judges[kind] = judge
	}
	return judges, shut, nil
}

// signedBy names the authority that signed the certificate of the caller, as the journal names it.
func signedBy(ctx context.Context) string {
	cert := caller.FromContext(ctx).Cert
	if cert == nil {
		return ""
	}
	return hex.EncodeToString(cert.AuthorityKeyId)
}

// ownChain returns the server's own SVID as it is at the moment.
func ownChain(authority *ca.CA) func() []*x509.Certificate {
	get := authority.ServerCertificate()
	return func() []*x509.Certificate {
		held, err := get(nil)
		if err != nil {
			return nil
		}
		var chain []*x509.Certificate
		for _, der := range held.Certificate {
			if cert, err := x509.ParseCertificate(der); err == nil {
				chain = append(chain, cert)
			}
		}
		return chain
	}
}

// maxHeaders is how large the headers of a call may be, in bytes.
const maxHeaders = 16 << 10

// remoteOptions are the limits on what comes over TCP.
func remoteOptions(l Limits) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxConcurrentStreams(l.MaxStreams),
		grpc.ConnectionTimeout(l.Handshake),
		// TLS reads whole records into a buffer of its own, and what is written is flushed at once:
		// an agent that only listens holds neither.
		grpc.ReadBufferSize(0),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: l.ConnectionIdle,
			MaxConnectionAge:  l.ConnectionAge,
			// Answers that nobody reads end with their connection.
			MaxConnectionAgeGrace: 5 * l.ConnectionAge,
			// A peer that vanished without a word, which TCP notices late.
			Time:    30 * time.Second,
			Timeout: 20 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// open are the sockets that callers connect to.
type open struct {
	tcp  net.Listener
	unix net.Listener // nil if there is none
}

func (o *open) close() {
	_ = o.tcp.Close() // closed already if the server ran
	if o.unix != nil {
		_ = o.unix.Close()
	}
}

func listen(cfg *Config, refusals *refusals) (*open, error) {
	address := net.JoinHostPort(cfg.BindAddress, strconv.Itoa(cfg.BindPort))
	tcp, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen at bind_address and bind_port, %s: %w", address, err)
	}
	o := &open{tcp: newGate(tcp, cfg.Limits, refusals)}
	if cfg.SocketPath != "" {
		socket, err := listenUnix("socket_path", cfg.SocketPath, 0o770, 0o750) // its group administers the server
		if err != nil {
			o.close()
			return nil, err
		}
		o.unix = hearing{socket, refusals}
		if who := unixsocket.Exposed(cfg.SocketPath); who != "" {
			refusals.log.WithField("socket", cfg.SocketPath).Warn("somebody else could put another socket in this one's place: " + who)
		}
	}
	return o, nil
}

// serve returns nil when the server is stopped.
func serve(s *grpc.Server, l net.Listener) error {
	if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// drain lets open calls end, for a while.
func drain(patience time.Duration, servers ...*grpc.Server) {
	var group errgroup.Group
	for _, s := range servers {
		group.Go(func() error {
			timer := time.AfterFunc(patience, s.Stop)
			defer timer.Stop()
			s.GracefulStop()
			return nil
		})
	}
	_ = group.Wait() // no errors
}

// lookTime is how long a health check may take.
const lookTime = 2 * time.Second

func running(cfg *Config, listeners *open, store *boltkv.Store, rec *records.Records, services *api.API, log *audit.Log) Running {
	live := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), lookTime)
		defer cancel()
		if _, err := store.Rev(ctx); err != nil {
			return fmt.Errorf("look at store: %w", err)
		}
		return nil
	}
	return Running{
		Address:    listeners.tcp.Addr(),
		SocketPath: cfg.SocketPath,
		Live:       live,
		Ready:      func() error { return errors.Join(live(), store.Room(), services.Ledgers().Err()) },
		Records:    rec,
		Reopen:     log.Reopen,
	}
}
