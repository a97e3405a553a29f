package feed

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	other = spiffeid.RequireTrustDomainFromString("other.test")
)

func agentID(n int) spiffeid.ID { return spiffeid.RequireFromPathf(td, "/spire/agent/test/%d", n) }

func node(n int) *records.Node {
	return &records.Node{ID: agentID(n), Selectors: attestor.NewSet(attestor.Selector{Type: "site", Value: "one"})}
}

func entry(id string, parent spiffeid.ID, revision int64) *identity.Entry {
	return &identity.Entry{
		ID: id, ParentID: parent, SPIFFEID: spiffeid.RequireFromPath(td, "/workload/x"+id), Revision: revision,
		Selectors: attestor.NewSet(attestor.Selector{Type: "unix", Value: "uid:" + id}),
		CreatedAt: time.Unix(1000, 0),
	}
}

// house is a server with a view behind a real gRPC connection in memory.
type house struct {
	src    view.Source
	view   *view.View
	server *Server
	conn   *grpc.ClientConn

	mu     sync.Mutex
	denied map[spiffeid.ID]error // what Authorize says
	asked  int                   // how often
}

func open(t *testing.T, src view.Source, cfg Config) *house {
	t.Helper()
	h := &house{src: src, denied: map[spiffeid.ID]error{}}
	h.view = view.New(src, td, view.Config{})
	cfg.Caller = func(ctx context.Context) (spiffeid.ID, bool) {
		md, _ := metadata.FromIncomingContext(ctx)
		id, err := spiffeid.FromString(strings.Join(md.Get("agent"), ""))
		return id, err == nil
	}
	cfg.Authorize = func(ctx context.Context) error {
		id, _ := cfg.Caller(ctx)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.asked++
		if err := h.denied[id]; err != nil {
			return err
		}
		if n, found := h.view.Node(id); !found || n.Banned {
			return deny(types.PermissionDeniedDetails_AGENT_BANNED)
		}
		return nil
	}
	h.server = New(h.view, cfg)

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := h.view.Run(ctx); err != nil {
			t.Errorf("run view: %v", err)
		}
	})
	<-h.view.Ready()
	lis := bufconn.Listen(1 << 20)
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	h.server.Register(srv)
	running.Go(func() { srv.Serve(lis) })
	var err error
	h.conn, err = grpc.NewClient("passthrough:///feed",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.conn.Close()
		srv.Stop()
		cancel()
		running.Wait()
	})
	return h
}

func deny(reason types.PermissionDeniedDetails_Reason) error {
	st, _ := status.New(codes.PermissionDenied, "agent is banned").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	return st.Err()
}

// caughtUp waits until the view has what the source has.
func (h *house) caughtUp(t *testing.T) {
	t.Helper()
	snap, _ := h.src.Snapshot(t.Context())
	if err := h.view.Wait(t.Context(), snap.Rev); err != nil {
		t.Fatal(err)
	}
}

// agent is a small honest agent: it holds what it was told and checks what it is told.
type agent struct {
	t       *testing.T
	stream  grpc.BidiStreamingClient[feedv1.FollowRequest, feedv1.FollowResponse]
	cancel  context.CancelFunc
	storeID string
	rev     uint64
	entries map[string]*identity.Entry
	bundles map[string]*identity.Bundle
	parts   int // of the last picture
	full    bool
	got     []string // IDs of the entries of the last picture
	// speaks says that it understands verdicts.
	speaks   bool
	running  []string
	verdicts map[string]*identity.Verdict
	// capabilities are those the server has said.
	capabilities []string
}

func newAgent() *agent {
	return &agent{entries: map[string]*identity.Entry{}, bundles: map[string]*identity.Bundle{}, verdicts: map[string]*identity.Verdict{}}
}

func (a *agent) dial(t *testing.T, h *house, n int) {
	t.Helper()
	a.t = t
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(), "agent", agentID(n).String()))
	a.cancel = cancel
	t.Cleanup(cancel)
	var err error
	if a.stream, err = feedv1.NewFeedClient(h.conn).Follow(ctx); err != nil {
		t.Fatal(err)
	}
}

func (a *agent) hello(t *testing.T) {
	t.Helper()
	hello := &feedv1.Hello{StoreId: a.storeID, Revision: a.rev, AgentVersion: "1.2.3"}
	for _, e := range a.entries {
		hello.Entries = append(hello.Entries, &feedv1.HeldEntry{Id: e.ID, RevisionNumber: e.Revision, CreatedAt: e.CreatedAt.Unix()})
	}
	for _, b := range a.bundles {
		hello.Bundles = append(hello.Bundles, &feedv1.HeldBundle{TrustDomain: b.TrustDomain.Name(), SequenceNumber: b.Sequence})
	}
	if a.speaks {
		hello.Capabilities, hello.Running = []string{"verdicts"}, a.running
		for _, v := range a.verdicts {
			hello.Verdicts = append(hello.Verdicts, &feedv1.HeldVerdict{Digest: v.Digest, SequenceNumber: v.Seq})
		}
	}
	a.send(t, &feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: hello}})
}

func (a *agent) ack(t *testing.T) {
	t.Helper()
	a.send(t, ackOf(a.rev))
}

func ackOf(rev uint64) *feedv1.FollowRequest {
	return &feedv1.FollowRequest{Message: &feedv1.FollowRequest_Ack{Ack: &feedv1.Ack{Revision: rev}}}
}

func (a *agent) send(t *testing.T, msg *feedv1.FollowRequest) {
	t.Helper()
	if err := a.stream.Send(msg); err != nil {
		t.Fatal(err)
	}
}

// receive takes one whole picture. It does not acknowledge it.
func (a *agent) receive(t *testing.T) error {
	t.Helper()
	a.parts, a.got = 0, nil
	for {
		part, err := a.stream.Recv()
		if err != nil {
			return err
		}
		a.parts++
		if size := proto.Size(part); size >= 1<<20 {
			t.Errorf("a part has %d bytes", size)
		}
		if a.parts == 1 && part.GetFull() {
			clear(a.entries)
			clear(a.bundles)
			clear(a.verdicts)
		}
		a.capabilities = append(a.capabilities, part.GetCapabilities()...)
		for _, digest := range part.GetRemovedDigests() {
			delete(a.verdicts, digest)
		}
		for _, w := range part.GetVerdicts() {
			v, err := identity.VerdictFromWire(w)
			if err != nil {
				t.Fatal(err)
			}
			a.verdicts[v.Digest] = v
		}
		for _, id := range part.GetRemovedEntryIds() {
			delete(a.entries, id)
		}
		for _, name := range part.GetRemovedTrustDomains() {
			delete(a.bundles, name)
		}
		for _, w := range part.GetEntries() {
			e, err := identity.EntryFromWire(w)
			if err != nil {
				t.Fatal(err)
			}
			a.entries[e.ID] = e
			a.got = append(a.got, e.ID)
		}
		for _, w := range part.GetBundles() {
			b, err := identity.BundleFromWire(w)
			if err != nil {
				t.Fatal(err)
			}
			a.bundles[b.TrustDomain.Name()] = b
		}
		if part.GetMore() {
			continue
		}
		a.storeID, a.rev, a.full = part.GetStoreId(), part.GetRevision(), part.GetFull()
		sum := identity.Checksum(slices.Collect(maps.Values(a.entries)), slices.Collect(maps.Values(a.bundles)))
		var held []identity.HeldVerdict
		for _, digest := range slices.Sorted(maps.Keys(a.verdicts)) {
			held = append(held, identity.HeldVerdict{Digest: digest, Seq: a.verdicts[digest].Seq})
		}
		if sum = identity.ChecksumVerdicts(sum, held); string(sum) != string(part.GetChecksum()) {
			return errDrift
		}
		return nil
	}
}

var errDrift = errors.New("checksum differs")

// next takes a picture, which must come, and acknowledges it.
func (a *agent) next(t *testing.T) {
	t.Helper()
	if err := a.receive(t); err != nil {
		t.Fatalf("receive picture: %v", err)
	}
	a.ack(t)
}

// holds compares what the agent holds with its picture in the view.
func (a *agent) holds(t *testing.T, h *house, n int) {
	t.Helper()
	p := h.view.Agent(agentID(n))
	var want []string
	for _, e := range p.Entries {
		want = append(want, fmt.Sprint(e.ID, " ", e.Revision))
	}
	var got []string
	for _, e := range a.entries {
		got = append(got, fmt.Sprint(e.ID, " ", e.Revision))
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("agent holds (-want +got):\n%s", diff)
	}
	if len(p.Bundles) != len(a.bundles) {
		t.Fatalf("agent holds %d bundles, want %d", len(a.bundles), len(p.Bundles))
	}
}

// ends returns the error that the stream ends with.
func (a *agent) ends(t *testing.T) error {
	t.Helper()
	for {
		if _, err := a.stream.Recv(); err != nil {
			return err
		}
	}
}
