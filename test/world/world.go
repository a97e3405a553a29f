// Package world puts a real server, any number of real agents and workloads into one process, over
// real sockets and real files, for tests of what only shows when all of them work together.
package world

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/jointoken"
	jointokennode "github.com/assay-id/assay/attestor/jointoken/node"
	jointokenserver "github.com/assay-id/assay/attestor/jointoken/server"
	"github.com/assay-id/assay/attestor/unix"
	unixworkload "github.com/assay-id/assay/attestor/unix/workload"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/records"
)

// TrustDomain is the world's.
var TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// Mine is the selector that every workload of this process shows.
var Mine = &types.Selector{Type: unix.Type, Value: fmt.Sprint("uid:", os.Getuid())}

// World is a server and what talks to it. Use New.
type World struct {
	t    testing.TB
	cfg  server.Config
	stop func()
	// Local is a connection to the server's private socket.
	Local *grpc.ClientConn
	// Records are what the server stores.
	Records *records.Records
}

// New starts a server that stops with the test. Rates are not limited unless change limits them.
func New(t testing.TB, change ...func(*server.Config)) *World {
	t.Helper()
	dir := shortDir(t)
	w := &World{t: t, cfg: server.Defaults()}
	w.cfg.TrustDomain = TrustDomain
	w.cfg.BindAddress, w.cfg.BindPort = "127.0.0.1", 0
	w.cfg.SocketPath, w.cfg.DataDir = filepath.Join(dir, "private", "api.sock"), filepath.Join(dir, "data")
	w.cfg.Judges = []server.Judge{{Kind: jointokenserver.Kind()}}
	w.cfg.Limits.AttestPerSecond, w.cfg.Limits.SignPerSecond = -1, -1
	w.cfg.Log = silent()
	for _, f := range change {
		f(&w.cfg)
	}
	w.Start()
	t.Cleanup(w.Stop)
	conn, err := grpc.NewClient("unix:"+w.cfg.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	w.Local = conn
	return w
}

// Start runs the server, on the port it had before if it has run.
func (w *World) Start() {
	w.t.Helper()
	ready := make(chan server.Running, 1)
	cfg := w.cfg
	cfg.Metrics = prometheus.NewRegistry()
	cfg.Ready = func(r server.Running) { ready <- r }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx, cfg) }()
	select {
	case r := <-ready:
		w.cfg.BindPort = r.Address.(*net.TCPAddr).Port
		w.Records = r.Records
	case err := <-done:
		cancel()
		w.t.Fatalf("server did not start: %v", err)
	}
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("server ended with: %v", err)
		}
	})
}

// Stop stops the server; Start starts it again with what it has on disk.
func (w *World) Stop() { w.stop() }

// Context ends with the test, or after a minute.
func (w *World) Context() context.Context {
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	w.t.Cleanup(cancel)
	return ctx
}

// Entry creates an entry for the path below the parent, for workloads with the selectors, Mine if
// there are none.
func (w *World) Entry(parent, path string, selectors ...*types.Selector) *types.Entry {
	w.t.Helper()
	if len(selectors) == 0 {
		selectors = []*types.Selector{Mine}
	}
	resp, err := entryv1.NewEntryClient(w.Local).BatchCreateEntry(w.Context(), &entryv1.BatchCreateEntryRequest{
		Entries: []*types.Entry{{SpiffeId: ID(path), ParentId: ID(parent), Selectors: selectors}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	result := resp.GetResults()[0]
	if codes.Code(result.GetStatus().GetCode()) != codes.OK {
		w.t.Fatalf("create entry %s: %v", path, result.GetStatus())
	}
	return result.GetEntry()
}

// Update writes the entry as it is given.
func (w *World) Update(e *types.Entry) {
	w.t.Helper()
	resp, err := entryv1.NewEntryClient(w.Local).BatchUpdateEntry(w.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		w.t.Fatal(err)
	}
	if st := resp.GetResults()[0].GetStatus(); st.GetCode() != 0 {
		w.t.Fatalf("update entry: %v", st)
	}
}

// Delete deletes the entries.
func (w *World) Delete(ids ...string) {
	w.t.Helper()
	resp, err := entryv1.NewEntryClient(w.Local).BatchDeleteEntry(w.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range resp.GetResults() {
		if r.GetStatus().GetCode() != 0 {
			w.t.Fatalf("delete entry: %v", r.GetStatus())
		}
	}
}

// Bundle returns the server's CA certificates, DER.
func (w *World) Bundle() [][]byte {
	w.t.Helper()
	b, err := bundlev1.NewBundleClient(w.Local).GetBundle(w.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	var certs [][]byte
	for _, a := range b.GetX509Authorities() {
		certs = append(certs, a.GetAsn1())
	}
	return certs
}

// Agents returns the client for agent.v1.
func (w *World) Agents() agentv1.AgentClient { return agentv1.NewAgentClient(w.Local) }

// ID is the public form of a path in the trust domain.
func ID(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: TrustDomain.Name(), Path: path}
}

// Agent is an agent on a node of its own. Use World.Agent, then Start.
type Agent struct {
	w    *World
	cfg  agent.Config
	stop func()
	// ID is what the agent's node is known by to entries.
	ID string
	// Health is that of the last start.
	Health *agent.Health
}

// Agent makes an agent that has a join token, known to entries as /node/<name>.
func (w *World) Agent(name string, change ...func(*agent.Config)) *Agent {
	w.t.Helper()
	dir := shortDir(w.t)
	a := &Agent{w: w, cfg: agent.Defaults(), ID: "/node/" + name}
	a.NewToken()
	kind := unixworkload.Kind()
	workloads, err := kind.Open(kind.Config(), attestor.Needs{TrustDomain: TrustDomain, Log: silent(), Now: time.Now})
	if err != nil {
		w.t.Fatal(err)
	}
	a.cfg.TrustDomain, a.cfg.ServerAddress, a.cfg.ServerPort = TrustDomain, "127.0.0.1", w.cfg.BindPort
	a.cfg.DataDir, a.cfg.SocketPath = filepath.Join(dir, "data"), filepath.Join(dir, "api.sock")
	a.cfg.InsecureBootstrap = true
	a.cfg.WorkloadAttestors = []agent.WorkloadAttestor{{Type: unix.Type, Workload: workloads}}
	a.cfg.Log = silent()
	for _, f := range change {
		f(&a.cfg)
	}
	return a
}

// NewToken gives the agent a new join token, for its next start.
func (a *Agent) NewToken() {
	a.w.t.Helper()
	token, err := a.w.Agents().CreateJoinToken(a.w.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: ID(a.ID)})
	if err != nil {
		a.w.t.Fatal(err)
	}
	kind := jointokennode.Kind()
	opened, err := kind.Open(kind.Config(), attestor.Needs{TrustDomain: TrustDomain, Log: silent(), Now: time.Now, JoinToken: token.GetValue()})
	if err != nil {
		a.w.t.Fatal(err)
	}
	a.cfg.NodeAttestor = agent.NodeAttestor{Type: jointoken.Type, Node: opened}
}

// Start runs the agent and returns when its socket accepts callers.
func (a *Agent) Start() *Agent {
	a.w.t.Helper()
	ready := make(chan struct{})
	cfg := a.cfg
	a.Health = new(agent.Health)
	cfg.Health, cfg.Metrics, cfg.Ready = a.Health, prometheus.NewRegistry(), func() { close(ready) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx, cfg) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		a.w.t.Fatalf("agent did not start: %v", err)
	}
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			a.w.t.Errorf("agent ended with: %v", err)
		}
	})
	a.w.t.Cleanup(a.Stop)
	return a
}

// Stop stops the agent; Start starts it again with what it has on disk.
func (a *Agent) Stop() { a.stop() }

// Socket is where the agent serves workloads.
func (a *Agent) Socket() string { return a.cfg.SocketPath }

// Workload connects to the agent as a workload does.
func (a *Agent) Workload() (context.Context, workload.SpiffeWorkloadAPIClient) {
	a.w.t.Helper()
	conn, err := grpc.NewClient("unix:"+a.cfg.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		a.w.t.Fatal(err)
	}
	a.w.t.Cleanup(func() { _ = conn.Close() })
	return metadata.AppendToOutgoingContext(a.w.Context(), "workload.spiffe.io", "true"), workload.NewSpiffeWorkloadAPIClient(conn)
}

// shortDir is t.TempDir with a name short enough for a socket below it.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "w") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func silent() logrus.FieldLogger {
	log := logrus.New()
	if testing.Verbose() {
		log.SetOutput(os.Stderr)
	} else {
		log.SetOutput(io.Discard)
	}
	return log
}
