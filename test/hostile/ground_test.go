package hostile

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/agent/broker"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/jointoken"
	jointokennode "github.com/assay-id/assay/attestor/jointoken/node"
	jointokenserver "github.com/assay-id/assay/attestor/jointoken/server"
	"github.com/assay-id/assay/attestor/unix"
	unixworkload "github.com/assay-id/assay/attestor/unix/workload"
	"github.com/assay-id/assay/server"
)

var trustDomain = spiffeid.RequireTrustDomainFromString("example.org")

const (
	adminPath      = "/admin"
	downstreamPath = "/downstream"
)

// honest is a judge that believes every node: the payload is its name. It asks one challenge.
type honest struct{}

func (honest) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	answer, err := ask(ctx, []byte("why?"))
	if err != nil {
		return attestor.Proof{}, err
	}
	if string(answer) != "because" {
		return attestor.Proof{}, attestor.Refusef("wrong answer")
	}
	return attestor.Proof{
		Path:      "honest/" + string(payload),
		Selectors: []attestor.Selector{{Type: "honest", Value: "node"}},
	}, nil
}

func honestKind() attestor.JudgeKind {
	return attestor.JudgeKind{
		Type: "honest", Config: func() any { return &struct{}{} },
		Open: func(any, attestor.Needs) (attestor.Judge, error) { return honest{}, nil },
	}
}

// serverConfig is that of a server in a folder, without rates.
func serverConfig(dir string) server.Config {
	cfg := server.Defaults()
	cfg.TrustDomain = trustDomain
	cfg.BindAddress, cfg.BindPort = "127.0.0.1", 0
	cfg.SocketPath, cfg.DataDir = filepath.Join(dir, "private", "api.sock"), filepath.Join(dir, "data")
	cfg.Judges = []server.Judge{{Kind: jointokenserver.Kind()}, {Kind: honestKind()}}
	cfg.AdminIDs = []spiffeid.ID{spiffeid.RequireFromPath(trustDomain, adminPath)}
	cfg.CA.WIT = true
	cfg.Limits.AttestPerSecond, cfg.Limits.SignPerSecond, cfg.Limits.PostPerSecond = -1, -1, -1
	return cfg
}

// ground is a server, and perhaps an agent, with a connection for each kind of caller.
type ground struct {
	t       *testing.T
	cfg     server.Config
	running server.Running
	log     *judgeLog
	// as are connections by who calls: local, anyone, agent, big (an agent with many entries), admin,
	// downstream over TCP; workload and operator to the agent's sockets.
	as map[string]*grpc.ClientConn
	// certs are what callers over TCP show.
	certs map[string]*tls.Certificate
	// agents are the SPIFFE ID paths of agent and big.
	agents map[string]string
	// entry is the ID of the entry that agent may have.
	entry string
	next  atomic.Int64 // makes names
}

// judgeLog is a log hook that keeps what must not be said while strangers send nonsense.
type judgeLog struct {
	mu    sync.Mutex
	lines []string
}

func (*judgeLog) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

func (l *judgeLog) Fire(e *logrus.Entry) error {
	text, err := e.String()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, text)
	return err
}

// take returns the errors logged since it was last asked.
func (l *judgeLog) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := l.lines
	l.lines = nil
	return lines
}

// shortDir is t.TempDir with a name short enough for a socket below it.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "h") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// newGround starts a server that stops with the test.
func newGround(t *testing.T, change ...func(*server.Config)) *ground {
	t.Helper()
	g := &ground{
		t: t, cfg: serverConfig(shortDir(t)), log: &judgeLog{},
		as: map[string]*grpc.ClientConn{}, certs: map[string]*tls.Certificate{}, agents: map[string]string{},
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	log.AddHook(g.log)
	g.cfg.Log, g.cfg.Metrics = log, prometheus.NewRegistry()
	for _, f := range change {
		f(&g.cfg)
	}
	ready := make(chan server.Running, 1)
	g.cfg.Ready = func(r server.Running) { ready <- r }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx, g.cfg) }()
	select {
	case g.running = <-ready:
	case err := <-done:
		cancel()
		t.Fatalf("server did not start: %v", err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("server ended with: %v", err)
		}
	})
	g.as["local"] = unixConn(t, g.cfg.SocketPath)
	g.as["anyone"] = g.dial(nil)
	return g
}

// unixConn connects to a Unix socket.
func unixConn(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// clientTLS shows a certificate, if there is one. Who the server is, is not what is tested here.
func clientTLS(cert *tls.Certificate) *tls.Config {
	config := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}, InsecureSkipVerify: true}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	return config
}

func (g *ground) dial(cert *tls.Certificate) *grpc.ClientConn {
	g.t.Helper()
	return dialTCP(g.t, g.running.Address.String(), cert)
}

func dialTCP(t testing.TB, address string, cert *tls.Certificate, more ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, append(more, grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(cert))))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// name returns one that was not used before.
func (g *ground) name() string { return fmt.Sprint("n", g.next.Add(1)) }

func (g *ground) context() context.Context {
	ctx, cancel := context.WithTimeout(g.t.Context(), patience)
	g.t.Cleanup(cancel)
	return ctx
}

// enroll attests a node and returns the path of its SPIFFE ID and its certificate.
func (g *ground) enroll(name string) (string, *tls.Certificate) {
	g.t.Helper()
	path, cert, err := enroll(g.context(), g.as["anyone"], name)
	if err != nil {
		g.t.Fatalf("attest %s: %v", name, err)
	}
	return path, cert
}

func enroll(ctx context.Context, conn *grpc.ClientConn, name string) (string, *tls.Certificate, error) {
	key := newKey()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return "", nil, err
	}
	if err := stream.Send(attestParams(name, newCSR(key))); err != nil && !errors.Is(err, io.EOF) {
		return "", nil, err
	}
	if _, err := stream.Recv(); err != nil {
		return "", nil, err
	}
	if err := stream.Send(because()); err != nil && !errors.Is(err, io.EOF) {
		return "", nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return "", nil, err
	}
	svid := resp.GetResult().GetSvid()
	return svid.GetId().GetPath(), &tls.Certificate{Certificate: svid.GetCertChain(), PrivateKey: key}, stream.CloseSend()
}

func attestParams(name string, csr []byte) *agentv1.AttestAgentRequest {
	return &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "honest", Payload: []byte(name)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}
}

func because() *agentv1.AttestAgentRequest {
	return &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte("because")}}
}

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

// newCSR makes a certificate request for URIs.
func newCSR(key any, uris ...string) []byte {
	template := &x509.CertificateRequest{Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}}
	for _, text := range uris {
		uri, err := url.Parse(text)
		if err != nil {
			panic(err)
		}
		template.URIs = append(template.URIs, uri)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		panic(err)
	}
	return der
}

// mint returns a certificate for a workload's path.
func (g *ground) mint(path string) *tls.Certificate {
	g.t.Helper()
	key := newKey()
	resp, err := svidv1.NewSVIDClient(g.as["local"]).MintX509SVID(g.context(), &svidv1.MintX509SVIDRequest{Csr: newCSR(key, "spiffe://example.org"+path)})
	if err != nil {
		g.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: resp.GetSvid().GetCertChain(), PrivateKey: key}
}

func wireID(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: trustDomain.Name(), Path: path}
}

// create makes entries and returns their IDs.
func (g *ground) create(entries ...*types.Entry) []string {
	g.t.Helper()
	resp, err := entryv1.NewEntryClient(g.as["local"]).BatchCreateEntry(g.context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
	if err != nil {
		g.t.Fatal(err)
	}
	var ids []string
	for _, r := range resp.GetResults() {
		if r.GetStatus().GetCode() != 0 {
			g.t.Fatalf("create entry: %v", r.GetStatus())
		}
		ids = append(ids, r.GetEntry().GetId())
	}
	return ids
}

// populate makes all callers over TCP.
func (g *ground) populate() {
	g.t.Helper()
	for _, who := range []string{"agent", "big"} {
		g.agents[who], g.certs[who] = g.enroll(who)
	}
	g.certs["admin"] = g.mint(adminPath)
	g.certs["downstream"] = g.mint(downstreamPath)
	for _, who := range []string{"agent", "big", "admin", "downstream"} {
		g.as[who] = g.dial(g.certs[who])
	}
	g.create(&types.Entry{
		SpiffeId: wireID(downstreamPath), ParentId: wireID("/spire/server"), Downstream: true,
		Selectors: []*types.Selector{{Type: "never", Value: "shown"}},
	})
	g.entry = g.create(&types.Entry{
		SpiffeId: wireID("/w"), ParentId: wireID(g.agents["agent"]), Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
	})[0]
	var lot []*types.Entry
	for i := range 501 { // one more than SyncAuthorizedEntries sends at once
		lot = append(lot, &types.Entry{
			SpiffeId: wireID(fmt.Sprint("/lot/", i)), ParentId: wireID(g.agents["big"]),
			Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", i)}},
		})
	}
	g.create(lot...)
}

// startAgent runs a whole agent of the ground's server, with an entry for the processes of this test.
func (g *ground) startAgent() {
	g.t.Helper()
	dir := shortDir(g.t)
	token, err := agentv1.NewAgentClient(g.as["local"]).CreateJoinToken(g.context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: wireID("/node")})
	if err != nil {
		g.t.Fatal(err)
	}
	g.create(&types.Entry{
		SpiffeId: wireID("/mine"), ParentId: wireID("/node"),
		Selectors: []*types.Selector{{Type: unix.Type, Value: fmt.Sprint("uid:", os.Getuid())}},
	})
	cfg, err := agentConfig(dir, g.port(), token.GetValue())
	if err != nil {
		g.t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	log.AddHook(g.log)
	cfg.Log, cfg.Metrics = log, prometheus.NewRegistry()
	cfg.AdminSocketPath = filepath.Join(dir, "admin.sock")
	cfg.AuthorizedDelegates = []spiffeid.ID{spiffeid.RequireFromPath(trustDomain, "/mine")}
	cfg.Broker = agent.Broker{SocketPath: filepath.Join(dir, "b", "broker.sock"), Grants: []broker.Grant{
		{ID: spiffeid.RequireFromPath(trustDomain, "/mine"), Types: map[string]bool{broker.PIDReference: false}},
	}}
	ready := make(chan struct{})
	cfg.Ready = func() { close(ready) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx, cfg) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		g.t.Fatalf("agent did not start: %v", err)
	}
	g.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			g.t.Errorf("agent ended with: %v", err)
		}
	})
	g.as["workload"] = unixConn(g.t, cfg.SocketPath)
	g.as["operator"] = unixConn(g.t, cfg.AdminSocketPath)
	g.as["broker"] = brokerConn(g.t, cfg)
}

// brokerConn connects as the broker that this process is.
func brokerConn(t *testing.T, cfg agent.Config) *grpc.ClientConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+cfg.SocketPath)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = source.Close() })
	conn, err := grpc.NewClient("unix:"+cfg.Broker.SocketPath, grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeMemberOf(trustDomain)))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (g *ground) port() int {
	_, port, _ := strings.Cut(g.running.Address.String(), ":")
	var n int
	if _, err := fmt.Sscan(port, &n); err != nil {
		g.t.Fatal(err)
	}
	return n
}

// agentConfig is that of an agent in a folder.
func agentConfig(dir string, port int, token string) (agent.Config, error) {
	cfg := agent.Defaults()
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	needs := attestor.Needs{TrustDomain: trustDomain, Log: silent, Now: time.Now, JoinToken: token}
	node := jointokennode.Kind()
	opened, err := node.Open(node.Config(), needs)
	if err != nil {
		return cfg, err
	}
	kind := unixworkload.Kind()
	workloads, err := kind.Open(kind.Config(), needs)
	if err != nil {
		return cfg, err
	}
	cfg.TrustDomain, cfg.ServerAddress, cfg.ServerPort = trustDomain, "127.0.0.1", port
	cfg.DataDir, cfg.SocketPath = filepath.Join(dir, "data"), filepath.Join(dir, "api.sock")
	cfg.InsecureBootstrap = true
	cfg.WorkloadHold = time.Second
	cfg.NodeAttestor = agent.NodeAttestor{Type: jointoken.Type, Node: opened}
	cfg.WorkloadAttestors = []agent.WorkloadAttestor{{Type: unix.Type, Workload: workloads}}
	return cfg, nil
}

// auditSince returns what was appended to the audit log after an offset, and the new end.
func (g *ground) auditSince(offset int64) ([]byte, int64) {
	g.t.Helper()
	file, err := os.Open(filepath.Join(g.cfg.DataDir, "audit.log"))
	if err != nil {
		g.t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Seek(offset, io.SeekStart); err != nil {
		g.t.Fatal(err)
	}
	var b bytes.Buffer
	n, err := b.ReadFrom(file)
	if err != nil {
		g.t.Fatal(err)
	}
	return b.Bytes(), offset + n
}

// unharmed checks that the server still does its work and believes so, that nothing panicked, and
// that it did not blame itself for what others did.
func (g *ground) unharmed(t *testing.T) {
	t.Helper()
	if _, err := entryv1.NewEntryClient(g.as["local"]).CountEntries(g.context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Errorf("the server is harmed: %v", err)
	}
	if err := g.running.Ready(); err != nil {
		t.Errorf("the server is not ready: %v", err)
	}
	for _, line := range g.log.take() {
		t.Errorf("logged as an error: %.600s", line)
	}
}
