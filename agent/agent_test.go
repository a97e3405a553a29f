package agent_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/test/fake/fakeserver"
)

// token is a node attestor that shows a token.
type token string

func (k token) Evidence(context.Context) ([]byte, attestor.Ask, error) { return []byte(k), nil, nil }

// uid is a workload attestor.
type uid struct{}

func (uid) Attest(_ context.Context, p attestor.Process) ([]attestor.Selector, error) {
	return []attestor.Selector{{Type: "unix", Value: fmt.Sprint("uid:", p.UID)}}, nil
}

// mine is what uid says of this process.
var mine = fmt.Sprint("unix:uid:", os.Getuid())

// node is a machine with an agent on it.
type node struct {
	t      *testing.T
	cfg    agent.Config
	log    *logtest.Hook
	health *agent.Health
	stop   func() error
}

func newNode(t *testing.T, server *fakeserver.Server) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "a") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	bundle := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(bundle, server.BundlePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(server.Addr, ":")
	n := &node{t: t, cfg: agent.Defaults(), stop: func() error { return nil }}
	n.cfg.TrustDomain, n.cfg.ServerAddress = fakeserver.TrustDomain, host
	if _, err := fmt.Sscan(port, &n.cfg.ServerPort); err != nil {
		t.Fatal(err)
	}
	n.cfg.DataDir, n.cfg.SocketPath = filepath.Join(dir, "data"), filepath.Join(dir, "pub", "api.sock")
	n.cfg.TrustBundlePath = bundle
	n.cfg.NodeAttestor = agent.NodeAttestor{Type: "test", Node: token("x")}
	n.cfg.WorkloadAttestors = []agent.WorkloadAttestor{{Type: "unix", Workload: uid{}}}
	return n
}

// start runs the agent as a new process would, and returns when it listens.
func (n *node) start() *node {
	n.t.Helper()
	log, hook := logtest.NewNullLogger()
	log.SetLevel(logrus.DebugLevel)
	n.log, n.cfg.Log, n.cfg.Metrics = hook, log, prometheus.NewRegistry()
	n.health = new(agent.Health)
	n.cfg.Health = n.health
	ready := make(chan struct{})
	n.cfg.Ready = func() { close(ready) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx, n.cfg) }()
	n.stop = sync.OnceValue(func() error { cancel(); return <-done })
	n.t.Cleanup(func() { _ = n.stop() })
	select {
	case <-ready:
	case err := <-done:
		done <- err
		n.t.Fatalf("agent ended: %v", err)
	case <-time.After(time.Minute):
		n.t.Fatal("not ready within a minute")
	}
	return n
}

// process is one that calls the Workload API.
type process struct {
	t      *testing.T
	client workload.SpiffeWorkloadAPIClient
	ctx    context.Context
}

func (n *node) process() *process {
	n.t.Helper()
	conn, err := grpc.NewClient("unix://"+n.cfg.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(n.t.Context(), 2*time.Minute)
	n.t.Cleanup(cancel)
	return &process{
		t: n.t, client: workload.NewSpiffeWorkloadAPIClient(conn),
		ctx: metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"),
	}
}

// serving is what "assay-agent healthcheck" goes by; both names that may be asked for say the same.
func (n *node) serving() grpc_health_v1.HealthCheckResponse_ServingStatus {
	n.t.Helper()
	conn, err := grpc.NewClient("unix://"+n.cfg.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	var said []grpc_health_v1.HealthCheckResponse_ServingStatus
	for _, service := range []string{workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName, ""} { // in the order they are set
		resp, err := grpc_health_v1.NewHealthClient(conn).Check(n.t.Context(), &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil {
			n.t.Fatal(err)
		}
		said = append(said, resp.GetStatus())
	}
	if said[0] == grpc_health_v1.HealthCheckResponse_SERVING && said[1] != said[0] {
		n.t.Errorf("the health service says %v", said)
	}
	return said[0]
}

type x509Stream struct {
	t      *testing.T
	stream workload.SpiffeWorkloadAPI_FetchX509SVIDClient
}

func (p *process) follow() *x509Stream {
	p.t.Helper()
	stream, err := p.client.FetchX509SVID(p.ctx, &workload.X509SVIDRequest{})
	if err != nil {
		p.t.Fatal(err)
	}
	return &x509Stream{t: p.t, stream: stream}
}

// next returns the next response, or the code the stream ends with.
func (s *x509Stream) next() (*workload.X509SVIDResponse, codes.Code) {
	resp, err := s.stream.Recv()
	return resp, status.Code(err)
}

// until reads on until the IDs are as wanted.
func (s *x509Stream) until(paths ...string) *workload.X509SVIDResponse {
	s.t.Helper()
	var want []string
	for _, p := range paths {
		want = append(want, "spiffe://example.org"+p)
	}
	for {
		resp, err := s.stream.Recv()
		if err != nil {
			s.t.Fatalf("waiting for %v: %v", want, err)
		}
		var got []string
		for _, svid := range resp.GetSvids() {
			got = append(got, svid.GetSpiffeId())
		}
		if slices.Equal(got, want) {
			return resp
		}
	}
}

func edited(e *types.Entry, change func(*types.Entry)) *types.Entry {
	e = proto.CloneOf(e)
	e.RevisionNumber++
	change(e)
	return e
}

func leaf(t *testing.T, svid *workload.X509SVID) *x509.Certificate {
	t.Helper()
	certs, err := x509.ParseCertificates(svid.GetX509Svid())
	if err != nil {
		t.Fatal(err)
	}
	return certs[0]
}

func (n *node) wait(what string, ok func() bool) {
	n.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			n.t.Fatalf("%s: not within a minute", what)
		}
	}
}

func TestARunningAgent(t *testing.T) {
	for name, knows := range map[string]int{"an Assay server": fakeserver.Feed, "a SPIRE server": fakeserver.Sync} {
		t.Run("serves and pushes what "+name+" says", func(t *testing.T) {
			server := fakeserver.New(t, fakeserver.Config{Knows: knows})
			e := fakeserver.Entry("e", "/shop", mine)
			server.Put(e)
			n := newNode(t, server)
			n.cfg.SyncInterval = 20 * time.Millisecond
			n.start()
			p := n.process()
			s := p.follow()
			first := s.until("/shop")
			if err := leaf(t, first.GetSvids()[0]).CheckSignatureFrom(server.Authorities()[0]); err != nil {
				t.Error(err)
			}
			server.Put(edited(e, func(e *types.Entry) { e.DnsNames = []string{"shop.example.org"} }))
			second := s.until("/shop")
			if names := leaf(t, second.GetSvids()[0]).DNSNames; !slices.Equal(names, []string{"shop.example.org"}) {
				t.Errorf("DNS names %v", names)
			}
			younger := fakeserver.Entry("f", "/second", mine)
			younger.CreatedAt++
			server.Put(younger)
			s.until("/shop", "/second")
			jwt, err := p.client.FetchJWTSVID(p.ctx, &workload.JWTSVIDRequest{Audience: []string{"x"}})
			if err != nil || len(jwt.GetSvids()) != 2 {
				t.Fatalf("got %v %v", jwt, err)
			}
			server.Delete("e", "f")
			if resp, code := s.next(); code != codes.PermissionDenied {
				t.Errorf("after the deletion: %v %v", resp, code)
			}
			if err := n.stop(); err != nil {
				t.Errorf("ended with %v", err)
			}
		})
	}
	t.Run("is alive and ready, and measures", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		n := newNode(t, server)
		if n.cfg.Health = new(agent.Health); n.cfg.Health.Live() == nil || n.cfg.Health.Ready() == nil {
			t.Error("before it has started")
		}
		n.start()
		n.wait("readiness", func() bool { return n.health.Ready() == nil })
		if err := n.health.Live(); err != nil {
			t.Error(err)
		}
		families, err := n.cfg.Metrics.(*prometheus.Registry).Gather()
		if err != nil {
			t.Fatal(err)
		}
		measured := map[string]bool{}
		for _, f := range families {
			measured[f.GetName()] = true
		}
		for _, name := range []string{
			"assay_agent_revision", "assay_agent_connected", "assay_agent_attestations_total", "assay_agent_svids_held",
			"assay_agent_picture_latency_seconds",
		} {
			if !measured[name] {
				t.Errorf("%s is not measured", name)
			}
		}
		if err := n.stop(); err != nil || n.health.Live() == nil {
			t.Errorf("stopped: %v", err)
		}
	})
}

func TestWithoutTheServer(t *testing.T) {
	t.Run("a first start waits for it, alive and not ready", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/shop", mine))
		server.Stop()
		n := newNode(t, server).start()
		if n.health.Live() != nil || n.health.Ready() == nil {
			t.Errorf("live %v, ready %v", n.health.Live(), n.health.Ready())
		}
		if got := n.serving(); got != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
			t.Errorf("the health service says %v", got)
		}
		s := n.process().follow()
		server.Start()
		s.until("/shop")
		n.wait("health", func() bool { return n.serving() == grpc_health_v1.HealthCheckResponse_SERVING })
		server.Stop()
		if got := n.serving(); got != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("without its server, the health service says %v", got)
		}
	})
	t.Run("a restart serves what was kept, and nothing is signed for it", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Token("t")
		server.Put(fakeserver.Entry("e", "/shop", mine))
		n := newNode(t, server)
		n.cfg.NodeAttestor = agent.NodeAttestor{Type: "join_token", Node: token("t")}
		n.start()
		before := n.process().follow().until("/shop")
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		server.Stop()
		n.start()
		if err := n.health.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
		n.wait("health", func() bool { return n.serving() == grpc_health_v1.HealthCheckResponse_SERVING })
		s := n.process().follow()
		if after := s.until("/shop"); !proto.Equal(before.GetSvids()[0], after.GetSvids()[0]) {
			t.Error("another SVID is served")
		}
		server.Start()
		rev := server.Put(fakeserver.Entry("f", "/second", mine))
		s.until("/shop", "/second")
		hello, _ := server.Hello()
		if hello.GetStoreId() != "store-1" || hello.GetRevision() == 0 || hello.GetRevision() > rev {
			t.Errorf("did not resume: %v", hello)
		}
		if server.Calls("x509:e") != 1 || server.Calls("AttestAgent") != 1 {
			t.Errorf("signed %d times, attested %d times", server.Calls("x509:e"), server.Calls("AttestAgent"))
		}
	})
	t.Run("a damaged data directory is named and made anew", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/shop", mine))
		n := newNode(t, server).start()
		n.process().follow().until("/shop")
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"own.sealed", "bundle.sealed", "picture.sealed", "svids.sealed"} {
			if err := os.Truncate(filepath.Join(n.cfg.DataDir, f), 30); err != nil {
				t.Fatal(err)
			}
		}
		n.start()
		n.process().follow().until("/shop")
		named := 0
		for _, e := range n.log.AllEntries() {
			if e.Level == logrus.ErrorLevel && strings.Contains(fmt.Sprint(e.Data["file"]), ".sealed") {
				named++
			}
		}
		if named != 4 {
			t.Errorf("%d files were named", named)
		}
	})
	t.Run("a lost bundle is had again from the bootstrap source", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/shop", mine))
		n := newNode(t, server).start()
		n.process().follow().until("/shop")
		if err := errors.Join(n.stop(), os.Remove(filepath.Join(n.cfg.DataDir, "bundle.sealed"))); err != nil {
			t.Fatal(err)
		}
		second := fakeserver.Entry("f", "/second", mine)
		second.CreatedAt++
		server.Put(second)
		n.start()
		n.process().follow().until("/shop", "/second")
		if server.Calls("AttestAgent") != 1 {
			t.Error("attested for it")
		}
	})
	t.Run("keys in memory leave nothing behind", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/shop", mine))
		n := newNode(t, server)
		n.cfg.KeyManager = agent.KeysMemory
		n.start()
		n.process().follow().until("/shop")
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		if files, err := os.ReadDir(n.cfg.DataDir); err != nil || len(files) != 0 {
			t.Errorf("files %v %v", files, err)
		}
	})
	t.Run("an expired own SVID ends nothing", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{AgentTTL: time.Second})
		server.Put(fakeserver.Entry("e", "/shop", mine))
		n := newNode(t, server).start()
		p := n.process()
		s := p.follow()
		s.until("/shop")
		server.Stop()
		n.wait("expiry", func() bool {
			for _, e := range n.log.AllEntries() {
				if strings.HasPrefix(e.Message, "waiting for the server to attest") {
					return true
				}
			}
			return false
		})
		p.follow().until("/shop")
		server.Start()
		second := fakeserver.Entry("f", "/second", mine)
		second.CreatedAt++
		server.Put(second)
		s.until("/shop", "/second")
	})
}

func TestBan(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	server.Put(fakeserver.Entry("e", "/shop", mine))
	n := newNode(t, server)
	n.cfg.WorkloadHold = -1
	n.start()
	n.wait("readiness", func() bool { return n.health.Ready() == nil })
	s := n.process().follow()
	s.until("/shop")
	server.Ban()
	if _, code := s.next(); code != codes.PermissionDenied {
		t.Errorf("the open stream ends with %v", code)
	}
	if _, code := n.process().follow().next(); code != codes.PermissionDenied {
		t.Errorf("a new stream ends with %v", code)
	}
	if n.health.Live() != nil || n.health.Ready() == nil {
		t.Errorf("live %v, ready %v", n.health.Live(), n.health.Ready())
	}
	if got := n.serving(); got != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("of a banned agent, the health service says %v: a probe would restart it again and again", got)
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	n.start()
	if _, code := n.process().follow().next(); code != codes.PermissionDenied {
		t.Errorf("after a restart a stream ends with %v", code)
	}
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	server.Unban()
	n.start()
	n.wait("readiness", func() bool { return n.health.Ready() == nil })
	n.process().follow().until("/shop")
}

func TestCheck(t *testing.T) {
	good := func() agent.Config { return newNode(t, fakeserver.New(t, fakeserver.Config{})).cfg }
	for want, spoil := range map[string]func(*agent.Config){
		"trust domain is missing":          func(c *agent.Config) { *c = agent.Config{} },
		"server address is missing":        func(c *agent.Config) { c.ServerAddress = "" },
		"server port 70000 is none":        func(c *agent.Config) { c.ServerPort = 70000 },
		"data directory is missing":        func(c *agent.Config) { c.DataDir = "" },
		`key manager "hsm" is unknown`:     func(c *agent.Config) { c.KeyManager = "hsm" },
		"2 are set":                        func(c *agent.Config) { c.InsecureBootstrap = true },
		"0 are set":                        func(c *agent.Config) { c.TrustBundlePath = "" },
		`key type "dsa" is unknown`:        func(c *agent.Config) { c.WorkloadKeyType = "dsa" },
		`bundle format "der" is unknown`:   func(c *agent.Config) { c.TrustBundleFormat = "der" },
		"node attestor is missing":         func(c *agent.Config) { c.NodeAttestor.Node = nil },
		"cache sizes and sync interval":    func(c *agent.Config) { c.JWTCacheSize = -1 },
		"check agent configuration: trust": func(c *agent.Config) { *c = agent.Config{DataDir: "/x"} },
	} {
		t.Run(want, func(t *testing.T) {
			c := good()
			spoil(&c)
			if err := agent.Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("a data directory that cannot be made ends the start", func(t *testing.T) {
		c := good()
		c.DataDir = filepath.Join(c.TrustBundlePath, "below-a-file")
		if err := agent.Run(t.Context(), c); err == nil || errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a socket that cannot be made ends the start", func(t *testing.T) {
		c := good()
		c.SocketPath = filepath.Join(c.TrustBundlePath, "below-a-file", "api.sock")
		if err := agent.Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "socket_path: listen on") {
			t.Errorf("got %v", err)
		}
	})
}
