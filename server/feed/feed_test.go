package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
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
	"github.com/assay-id/assay/server/view/viewtest"
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
		ID: id, ParentID: parent, SPIFFEID: spiffeid.RequireFromPath(td, "/workload/"+id), Revision: revision,
		Selectors: attestor.NewSet(attestor.Selector{Type: "unix", Value: "uid:" + id}),
		CreatedAt: time.Unix(1000, 0),
	}
}

// house is a server with a view behind a real gRPC connection in memory.
type house struct {
	src    *viewtest.Source
	view   *view.View
	server *Server
	conn   *grpc.ClientConn

	mu     sync.Mutex
	denied map[spiffeid.ID]error // what Authorize says
	asked  int                   // how often
}

func open(t *testing.T, src *viewtest.Source, cfg Config) *house {
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
}

func newAgent() *agent {
	return &agent{entries: map[string]*identity.Entry{}, bundles: map[string]*identity.Bundle{}}
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
		if string(sum) != string(part.GetChecksum()) {
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

func TestFollow(t *testing.T) {
	t.Run("an agent that holds nothing gets everything, then what changes", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1), node(2))
		src.PutBundles(&identity.Bundle{TrustDomain: td, Sequence: 1})
		src.PutEntries(entry("a", agentID(1), 0), entry("b", agentID(1), 0), entry("x", agentID(2), 0))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if !a.full {
			t.Error("the first picture is no full one")
		}
		a.holds(t, h, 1)

		rev := src.PutEntries(entry("b", agentID(1), 1))
		a.next(t)
		if a.full || a.rev != uint64(rev) || len(a.got) != 1 {
			t.Errorf("an update came as full=%v at revision %d with %v, want b alone at %d", a.full, a.rev, a.got, rev)
		}
		a.holds(t, h, 1)
		src.DeleteEntries("a")
		a.next(t)
		a.holds(t, h, 1)

		e := entry("c", agentID(1), 0)
		e.FederatesWith = []spiffeid.TrustDomain{other}
		src.PutEntries(e)
		a.next(t)
		src.PutBundles(&identity.Bundle{TrustDomain: other, Sequence: 7})
		a.next(t)
		a.holds(t, h, 1)
		if len(a.bundles) != 2 {
			t.Errorf("holds %d bundles, want the own and the federated one", len(a.bundles))
		}
		src.DeleteEntries("c")
		a.next(t)
		a.holds(t, h, 1)
	})

	t.Run("what does not concern an agent is not sent to it", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1), node(2))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		for i := range 20 {
			src.PutEntries(entry("x", agentID(2), int64(i)))
		}
		mine := src.PutEntries(entry("a", agentID(1), 0))
		a.next(t)
		if a.rev != uint64(mine) {
			t.Errorf("the next picture is of revision %d, want %d", a.rev, mine)
		}
	})

	t.Run("an agent that reconnects gets the difference to what it holds", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		src.PutBundles(&identity.Bundle{TrustDomain: td, Sequence: 1})
		src.PutEntries(entry("a", agentID(1), 0), entry("b", agentID(1), 0), entry("c", agentID(1), 0))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		a.cancel()

		src.DeleteEntries("a")
		src.PutEntries(entry("b", agentID(1), 1))
		made := entry("c", agentID(1), 0) // deleted and made again
		made.CreatedAt = time.Unix(2000, 0)
		src.PutEntries(made, entry("d", agentID(1), 0))
		src.PutBundles(&identity.Bundle{TrustDomain: td, Sequence: 2})
		h.caughtUp(t)
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if a.full {
			t.Error("got a full picture")
		}
		if diff := cmp.Diff([]string{"b", "c", "d"}, a.got); diff != "" {
			t.Errorf("got entries (-want +got):\n%s", diff)
		}
		a.holds(t, h, 1)

		t.Run("and only a word if nothing differs", func(t *testing.T) {
			rev := a.rev
			a.dial(t, h, 1)
			a.hello(t)
			a.next(t)
			if a.full || len(a.got) > 0 || a.rev != rev {
				t.Errorf("got full=%v %v at revision %d, want nothing at %d", a.full, a.got, a.rev, rev)
			}
		})
	})

	t.Run("an agent never goes back to an earlier revision of its store", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		src.PutEntries(entry("a", agentID(1), 0))
		h := open(t, src, Config{})
		for i := range 10 {
			src.PutEntries(entry("unrelated", agentID(2), int64(i)))
		}
		h.caughtUp(t)
		a := newAgent()
		a.storeID, a.rev = "store", 12 // another server, restarted at 12, counts its picture from there
		a.entries["a"] = entry("a", agentID(1), 0)
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if a.rev != 12 || a.full || len(a.got) > 0 {
			t.Errorf("got full=%v %v at revision %d, want nothing at 12", a.full, a.got, a.rev)
		}
	})

	t.Run("an agent of another store gets everything", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		src.PutEntries(entry("a", agentID(1), 0))
		h := open(t, src, Config{})
		a := newAgent()
		a.storeID, a.rev = "another", 1
		a.entries["a"], a.entries["z"] = entry("a", agentID(1), 0), entry("z", agentID(1), 0)
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if !a.full {
			t.Error("got no full picture")
		}
		a.holds(t, h, 1)
	})

	t.Run("when the store is replaced under a stream, the agent gets everything", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		src.PutEntries(entry("a", agentID(1), 0))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		src.Restore("restored", 1)
		a.next(t)
		if !a.full || a.storeID != "restored" || a.rev != 1 {
			t.Errorf("got full=%v of store %q at revision %d", a.full, a.storeID, a.rev)
		}
		a.holds(t, h, 1)
	})

	t.Run("an agent that has drifted finds out and starts afresh", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		src.PutEntries(entry("a", agentID(1), 0), entry("b", agentID(1), 0))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		delete(a.entries, "a") // a bug of the agent's
		src.PutEntries(entry("b", agentID(1), 1))
		if err := a.receive(t); !errors.Is(err, errDrift) {
			t.Fatalf("receive: %v, want drift", err)
		}
		a.cancel()
		a = newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		a.holds(t, h, 1)
	})

	t.Run("an agent that forgot an entry but says so is given it again", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		src.PutEntries(entry("a", agentID(1), 0), entry("b", agentID(1), 0))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		a.cancel()
		delete(a.entries, "a")
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if a.full || !slices.Equal(a.got, []string{"a"}) {
			t.Errorf("got full=%v %v, want a alone", a.full, a.got)
		}
	})

	t.Run("an agent that is slow to acknowledge skips pictures", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		if err := a.receive(t); err != nil {
			t.Fatal(err)
		}
		var last uint64
		for i := range 500 {
			last = uint64(src.PutEntries(entry(fmt.Sprintf("e%03d", i), agentID(1), 0)))
		}
		h.caughtUp(t)
		a.ack(t)
		a.next(t)
		if a.rev != last || len(a.got) != 500 {
			t.Errorf("got %d entries at revision %d, want all 500 at once at %d", len(a.got), a.rev, last)
		}
		if st := h.server.Status(); st[0].Pictures != 2 {
			t.Errorf("%d pictures were sent, want 2", st[0].Pictures)
		}
	})

	t.Run("a large picture comes in parts below a MiB", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		var many []*identity.Entry
		for i := range 20_000 {
			e := entry(fmt.Sprintf("e%05d", i), agentID(1), 0)
			e.Hint = strings.Repeat("h", i%1000)
			many = append(many, e)
		}
		src.PutEntries(many...)
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if a.parts < 10 {
			t.Errorf("it came in %d parts", a.parts)
		}
		a.holds(t, h, 1)
		var ids []string
		for _, e := range many {
			ids = append(ids, e.ID)
		}
		src.DeleteEntries(ids...)
		a.next(t)
		a.holds(t, h, 1)
	})

	t.Run("an agent that says it is done ends its stream without an error", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		if err := a.stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if err := a.ends(t); !errors.Is(err, io.EOF) {
			t.Errorf("ended with %v", err)
		}
	})
}

func TestMetrics(t *testing.T) {
	t.Run("lag, streams and pictures can be seen", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1), node(2))
		reg := prometheus.NewPedanticRegistry()
		h := open(t, src, Config{Metrics: reg})
		a, b := newAgent(), newAgent()
		a.dial(t, h, 1)
		b.dial(t, h, 2)
		for i, agent := range []*agent{a, b} {
			agent.hello(t)
			agent.next(t)
			src.PutEntries(entry(fmt.Sprint("e", i), agentID(i+1), 0))
			if err := agent.receive(t); err != nil { // and says nothing
				t.Fatal(err)
			}
		}
		h.caughtUp(t)
		st := h.server.Status()
		if len(st) != 2 || st[0].Agent != agentID(1) || st[0].Version != "1.2.3" || st[0].Lag() == 0 {
			t.Errorf("status is %+v", st)
		}
		if got := value(t, reg, "assay_server_feed_streams"); got != 2 {
			t.Errorf("%v streams, want 2", got)
		}
		if got := value(t, reg, "assay_server_feed_lagging_streams"); got != 2 {
			t.Errorf("%v lagging streams, want 2", got)
		}
		if got := value(t, reg, "assay_server_feed_bytes_total"); got == 0 {
			t.Error("no bytes were counted")
		}
		a.ack(t)
		src.PutEntries(entry("e0", agentID(1), 1))
		a.next(t) // comes only after the acknowledgement was taken
		src.PutEntries(entry("e0", agentID(1), 2))
		a.next(t)
		if got := value(t, reg, "assay_server_feed_lag_revisions_max"); got == 0 {
			t.Error("nobody lags")
		}
	})
}

func value(t *testing.T, reg prometheus.Gatherer, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			m := f.GetMetric()[0]
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}
