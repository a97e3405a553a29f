package uplink_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/agent/join"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/uplink"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/test/fake/fakeserver"
	"github.com/assay-id/assay/workloadapi/identity"
)

// evidence is a node attestor that always says the same.
type evidence struct{}

func (evidence) Evidence(context.Context) ([]byte, attestor.Ask, error) { return []byte("x"), nil, nil }

// sink is a picture with the real view in it, and notes each change.
type sink struct {
	view *view.View
	mu   sync.Mutex
	got  []view.Update
}

func (s *sink) Held() uplink.Held {
	p := s.view.Picture()
	h := uplink.Held{StoreID: p.StoreID, Rev: p.Rev, Entries: p.Entries()}
	if p.Held() {
		h.Bundles = p.BundleList()
	}
	return h
}

func (s *sink) Apply(u view.Update) error {
	if err := s.view.Apply(u); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = append(s.got, u)
	return nil
}

func (s *sink) updates() []view.Update {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.got)
}

type node struct {
	t      *testing.T
	server *fakeserver.Server
	join   *join.Joiner
	sink   *sink
	link   *uplink.Uplink
	stop   func()
}

func start(t *testing.T, server *fakeserver.Server, change ...func(*uplink.Config)) *node {
	t.Helper()
	return startKnowing(t, server, join.Bootstrap{Authorities: server.Authorities()}, change...)
}

// startKnowing starts a node that knows its server by bootstrap.
func startKnowing(t *testing.T, server *fakeserver.Server, bootstrap join.Bootstrap, change ...func(*uplink.Config)) *node {
	t.Helper()
	n := &node{t: t, server: server, sink: &sink{view: view.New(nil)}}
	log := logrus.New()
	log.SetOutput(io.Discard)
	k, err := keep.Open(t.TempDir(), keep.MemoryKeys(), log)
	if err != nil {
		t.Fatal(err)
	}
	n.join, err = join.New(k, join.Config{
		TrustDomain: fakeserver.TrustDomain, Target: server.Addr, Type: "test", Node: evidence{}, Log: log,
		Bootstrap: bootstrap,
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg := uplink.Config{
		TrustDomain: fakeserver.TrustDomain, Target: server.Addr, Version: "test", SyncInterval: 20 * time.Millisecond, Log: log,
	}
	for _, f := range change {
		f(&cfg)
	}
	n.link, err = uplink.New(n.join, n.sink, cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { _ = n.join.Run(ctx) })
	work.Go(func() { _ = n.link.Run(ctx) })
	n.stop = func() { cancel(); work.Wait() }
	t.Cleanup(n.stop)
	return n
}

// until waits until the picture is as wanted.
func (n *node) until(what string, ok func(p *view.Picture) bool) *view.Picture {
	n.t.Helper()
	timeout := time.After(time.Minute)
	for {
		p, next := n.sink.view.Follow()
		if p.Held() && ok(p) {
			return p
		}
		select {
		case <-next:
		case <-timeout:
			n.t.Fatalf("%s: not within a minute; held revision %d, %d entries; status %+v", what, p.Rev, len(p.Entries()), n.link.Status())
		}
	}
}

func has(ids ...string) func(*view.Picture) bool {
	return func(p *view.Picture) bool {
		var got []string
		for _, e := range p.Entries() {
			got = append(got, e.ID)
		}
		return slices.Equal(got, ids)
	}
}

// wait polls for what has no channel.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

func edited(e *types.Entry, change func(*types.Entry)) *types.Entry {
	e = proto.CloneOf(e)
	e.RevisionNumber++
	change(e)
	return e
}

func csr(t *testing.T, path string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		URIs: []*url.URL{spiffeid.RequireFromPath(fakeserver.TrustDomain, path).URL()},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func federated(name string, sequence uint64) *types.Bundle {
	return &types.Bundle{TrustDomain: name, SequenceNumber: sequence}
}

func TestFollow(t *testing.T) {
	for name, knows := range map[string]int{
		"the feed": fakeserver.Feed, "SyncAuthorizedEntries": fakeserver.Sync, "GetAuthorizedEntries": fakeserver.Get,
	} {
		t.Run("entries and bundles come and go by "+name, func(t *testing.T) {
			server := fakeserver.New(t, fakeserver.Config{Knows: knows})
			one := fakeserver.Entry("one", "/one", "a:1")
			one.FederatesWith = []string{"other.org", "missing.org"}
			server.PutBundle(federated("other.org", 3))
			server.Put(one)
			n := start(t, server)
			p := n.until("first picture", has("one"))
			if len(p.Bundles) != 2 || p.Bundles[spiffeid.RequireTrustDomainFromString("other.org")].Sequence != 3 {
				t.Errorf("bundles %v", p.BundleList())
			}
			server.Put(fakeserver.Entry("two", "/two", "a:2"))
			n.until("an entry added", has("one", "two"))
			server.Put(edited(one, func(e *types.Entry) { e.Hint = "h"; e.FederatesWith = nil }))
			n.until("an entry changed", func(p *view.Picture) bool {
				e, _ := p.Entry("one")
				return e.Hint == "h" && len(p.Bundles) == 1
			})
			server.Delete("one")
			n.until("an entry deleted", has("two"))
			server.Rotate(true)
			n.until("a bundle changed", func(p *view.Picture) bool {
				b := p.Bundles[fakeserver.TrustDomain]
				return b.Sequence == 2 && len(b.X509) == 2 && b.X509[1].Tainted
			})
			want := map[int]string{fakeserver.Feed: uplink.StateFeed}[knows]
			if want == "" {
				want = uplink.StatePolling
			}
			if s := n.link.Status(); s.State != want || s.Err != nil || s.Synced.IsZero() {
				t.Errorf("status %+v", s)
			}
		})
	}
	t.Run("pictures are acknowledged, and the hello says what is held", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("one", "/one", "a:1"))
		n := start(t, server)
		n.until("first picture", has("one"))
		rev := server.Put(fakeserver.Entry("two", "/two", "a:1"))
		wait(t, "acknowledgement", func() bool { _, acked := server.Hello(); return acked == rev })
		hello, _ := server.Hello()
		if hello.GetStoreId() != "" || len(hello.GetEntries()) != 0 || hello.GetAgentVersion() != "test" {
			t.Errorf("first hello %v", hello)
		}
		server.Stop()
		server.Delete("one")
		server.Start()
		n.until("what was missed", has("two"))
		hello, _ = server.Hello()
		if hello.GetStoreId() != "store-1" || hello.GetRevision() != rev || len(hello.GetEntries()) != 2 || len(hello.GetBundles()) != 1 {
			t.Errorf("hello on resumption %v", hello)
		}
		if updates := n.sink.updates(); updates[len(updates)-1].Full {
			t.Error("was sent in full")
		}
	})
	t.Run("a restored backup is taken in full", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("one", "/one", "a:1"))
		n := start(t, server)
		n.until("first picture", has("one"))
		server.Stop()
		server.Restore("store-2", 1)
		server.Delete("one")
		server.Put(fakeserver.Entry("two", "/two", "a:1"))
		server.Start()
		p := n.until("the backup's picture", has("two"))
		if p.StoreID != "store-2" || p.Rev != 3 {
			t.Errorf("got %s %d", p.StoreID, p.Rev)
		}
	})
	t.Run("a drifted picture is asked for in full", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("one", "/one", "a:1"))
		n := start(t, server)
		n.until("first picture", has("one"))
		server.Drift(1)
		server.Put(fakeserver.Entry("two", "/two", "a:1"))
		n.until("the full picture", has("one", "two"))
		hello, _ := server.Hello()
		if hello.GetStoreId() != "" {
			t.Errorf("asked for less: %v", hello)
		}
	})
	t.Run("a server that always drifts is not stormed, and the picture stays", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("one", "/one", "a:1"))
		n := start(t, server)
		n.until("first picture", has("one"))
		server.Drift(7)
		server.Put(fakeserver.Entry("two", "/two", "a:1"))
		n.until("the end of it", has("one", "two"))
		if calls := server.Calls("Follow"); calls > 12 {
			t.Errorf("asked %d times", calls)
		}
	})
	t.Run("an entry that cannot be read does not cost the others", func(t *testing.T) {
		for _, knows := range []int{fakeserver.Feed, fakeserver.Sync} {
			server := fakeserver.New(t, fakeserver.Config{Knows: knows})
			bad := fakeserver.Entry("bad", "/b", "a:1")
			bad.SpiffeId.Path = "/not//well/formed"
			server.Put(bad, fakeserver.Entry("good", "/good", "a:1"))
			n := start(t, server)
			n.until("the good one", has("good"))
		}
	})
	t.Run("connections that end by age are resumed with nothing lost", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{MaxConnectionAge: 100 * time.Millisecond})
		n := start(t, server)
		n.until("first picture", has())
		for i := range 12 {
			id := fmt.Sprintf("e%02d", i)
			server.Put(fakeserver.Entry(id, "/"+id, "a:1"))
			n.until(id, func(p *view.Picture) bool { _, ok := p.Entry(id); return ok })
			if _, errs := n.link.SignX509(t.Context(), asked(id), [][]byte{csr(t, "/"+id)}); errs[0] != nil {
				t.Errorf("%s: %v", id, errs[0])
			}
		}
		for i, u := range n.sink.updates() {
			if i > 0 && u.Full {
				t.Error("was sent in full")
			}
		}
	})
}

func TestSyncOfManyEntries(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{Knows: fakeserver.Sync, SyncPage: 50})
	var all []*types.Entry
	for i := range 333 {
		id := fmt.Sprintf("e%03d", i)
		all = append(all, fakeserver.Entry(id, "/"+id, "a:1"))
	}
	server.Put(all...)
	n := start(t, server)
	p := n.until("all pages", func(p *view.Picture) bool { return len(p.Entries()) == 333 })
	kept, _ := p.Entry("e100")
	server.Put(edited(all[7], func(e *types.Entry) { e.Hint = "h" }))
	again := proto.CloneOf(all[8])
	again.CreatedAt++
	server.Put(again)
	server.Delete("e009")
	p = n.until("the changes", func(p *view.Picture) bool {
		changed, _ := p.Entry("e007")
		remade, _ := p.Entry("e008")
		return changed.Hint == "h" && remade.CreatedAt.Unix() == again.CreatedAt && len(p.Entries()) == 332
	})
	if now, _ := p.Entry("e100"); now != kept {
		t.Error("an entry that did not change was taken anew")
	}
	n.stop()
	count := len(n.sink.updates())
	if count > 4 {
		t.Errorf("%d pictures for three changes", count)
	}
}

func TestSign(t *testing.T) {
	t.Run("batches are halved until they fit", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{MaxBatch: 10})
		n := start(t, server)
		var ids []string
		var csrs [][]byte
		for i := range 60 {
			id := fmt.Sprintf("e%02d", i)
			server.Put(fakeserver.Entry(id, "/"+id, "a:1"))
			ids, csrs = append(ids, id), append(csrs, csr(t, "/"+id))
		}
		ids, csrs = append(ids, "unknown"), append(csrs, csr(t, "/x"))
		ids, csrs = append(ids, "e00"), append(csrs, []byte("no CSR"))
		n.until("picture", func(p *view.Picture) bool { return len(p.Entries()) == 60 })
		chains, errs := n.link.SignX509(t.Context(), asked(ids...), csrs)
		for i := range 60 {
			if errs[i] != nil || len(chains[i]) != 1 {
				t.Fatalf("%d: %v", i, errs[i])
			}
			cert, err := x509.ParseCertificate(chains[i][0])
			if err != nil || cert.URIs[0].Path != "/"+ids[i] {
				t.Errorf("%d: order was lost: %v %v", i, cert.URIs, err)
			}
		}
		if !errors.Is(errs[60], identity.ErrUnknownEntry) {
			t.Errorf("unknown entry: %v", errs[60])
		}
		if errs[61] == nil || errors.Is(errs[61], identity.ErrUnavailable) {
			t.Errorf("bad CSR: %v", errs[61])
		}
	})
	t.Run("a server that has too much to do is asked again when it says, with the same batch", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/e", "a:1"), fakeserver.Entry("f", "/f", "a:1"))
		n := start(t, server)
		n.until("picture", has("e", "f"))
		server.Busy("BatchNewX509SVID", 10*time.Millisecond, 10*time.Millisecond)
		_, errs := n.link.SignX509(t.Context(), asked("e", "f"), [][]byte{csr(t, "/e"), csr(t, "/f")})
		if errs[0] != nil || errs[1] != nil || server.Calls("BatchNewX509SVID") != 3 {
			t.Errorf("got %v in %d calls", errs, server.Calls("BatchNewX509SVID"))
		}
		server.Busy("NewJWTSVID", 10*time.Millisecond)
		if _, err := n.link.SignJWT(t.Context(), identity.Asked{EntryID: "e"}, []string{"x"}); err != nil {
			t.Error(err)
		}
		server.Busy("NewJWTSVID", time.Hour)
		if _, err := n.link.SignJWT(t.Context(), identity.Asked{EntryID: "e"}, []string{"x"}); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("one that says to come back later than the call may take: %v", err)
		}
	})
	t.Run("JWT-SVIDs", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/e", "a:1"))
		n := start(t, server)
		n.until("picture", has("e"))
		svid, err := n.link.SignJWT(t.Context(), identity.Asked{EntryID: "e"}, []string{"x"})
		if err != nil || svid.ID.Path() != "/e" || svid.EntryID != "e" || time.Until(svid.ExpiresAt) < time.Minute {
			t.Fatalf("got %+v %v", svid, err)
		}
		if _, err := n.link.SignJWT(t.Context(), identity.Asked{EntryID: "x"}, []string{"x"}); !errors.Is(err, identity.ErrUnknownEntry) {
			t.Errorf("unknown entry: %v", err)
		}
	})
	t.Run("a server that is away is said to be unavailable", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/e", "a:1"))
		n := start(t, server)
		n.until("picture", has("e"))
		server.Stop()
		wait(t, "the break", func() bool { return n.link.Status().State != uplink.StateFeed })
		_, errs := n.link.SignX509(t.Context(), asked("e"), [][]byte{csr(t, "/e")})
		if !errors.Is(errs[0], identity.ErrUnavailable) {
			t.Errorf("got %v", errs[0])
		}
		if _, err := n.link.SignJWT(t.Context(), identity.Asked{EntryID: "e"}, []string{"x"}); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
		server.Start()
		wait(t, "the return", func() bool { return n.link.Status().State == uplink.StateFeed })
		if _, errs := n.link.SignX509(t.Context(), asked("e"), [][]byte{csr(t, "/e")}); errs[0] != nil {
			t.Errorf("got %v", errs[0])
		}
	})
	t.Run("before the agent has an SVID it is unavailable too", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Stop()
		n := start(t, server)
		_, errs := n.link.SignX509(t.Context(), asked("e"), [][]byte{csr(t, "/e")})
		if !errors.Is(errs[0], identity.ErrUnavailable) {
			t.Errorf("got %v", errs[0])
		}
		if s := n.link.Status(); s.State != uplink.StateNoSVID {
			t.Errorf("status %+v", s)
		}
	})
}

func TestOwnRotation(t *testing.T) {
	for name, reattestable := range map[string]bool{"renewed": false, "attested again": true} {
		// turns says which call failed while the agent's SVID changed twice.
		turns := func(t *testing.T) (failed error) {
			t.Helper()
			server := fakeserver.New(t, fakeserver.Config{AgentTTL: 2 * time.Second, Reattestable: reattestable})
			server.Put(fakeserver.Entry("e", "/e", "a:1"))
			n := start(t, server)
			n.until("picture", has("e"))
			method := "RenewAgent"
			if reattestable {
				method = "AttestAgent"
			}
			began := server.Calls(method)
			// Signing all the while, so that calls are under way when the SVID changes.
			wait(t, "two rotations", func() bool {
				if _, errs := n.link.SignX509(t.Context(), asked("e"), [][]byte{csr(t, "/e")}); errs[0] != nil {
					failed = errs[0]
				}
				return failed != nil || server.Calls(method) >= began+2
			})
			if failed != nil {
				return failed
			}
			rev := server.Put(fakeserver.Entry("f", "/f", "a:1"))
			n.until("a picture as the new one", func(p *view.Picture) bool { return p.Rev == rev })
			return nil
		}
		t.Run("calls go on while the agent's SVID is "+name, func(t *testing.T) {
			var err error
			for range 5 { // what is wrong fails each time, a loaded machine has no SVID for a while now and then
				if err = turns(t); err == nil {
					return
				}
			}
			t.Error(err)
		})
	}
}

// flickering is a Joiner whose SVID is not valid while the clock is wrong.
type flickering struct {
	*join.Joiner
	wrong atomic.Bool
}

func (f *flickering) Own() (*keep.Own, <-chan struct{}) {
	own, changed := f.Joiner.Own()
	if f.wrong.Load() {
		own = nil
	}
	return own, changed
}

func TestClock(t *testing.T) {
	t.Run("an SVID that a clock took for expired is used again when the clock is right, though nothing replaced it", func(t *testing.T) {
		server := fakeserver.New(t, fakeserver.Config{})
		server.Put(fakeserver.Entry("e", "/e", "a:1"))
		n := start(t, server)
		n.until("picture", has("e"))
		self := &flickering{Joiner: n.join}
		self.wrong.Store(true)
		sink := &sink{view: view.New(nil)}
		link, err := uplink.New(self, sink, uplink.Config{TrustDomain: fakeserver.TrustDomain, Target: server.Addr})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = link.Run(ctx) }()
		defer func() { cancel(); <-done }()
		wait(t, "no SVID", func() bool { return link.Status().State == uplink.StateNoSVID })
		self.wrong.Store(false)
		wait(t, "picture", func() bool { return has("e")(sink.view.Picture()) })
	})
}

func TestEviction(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	server.Put(fakeserver.Entry("e", "/e", "a:1"))
	n := start(t, server)
	n.until("picture", has("e"))
	server.Evict()
	server.Put(fakeserver.Entry("f", "/f", "a:1"))
	n.until("the picture after attesting again", has("e", "f"))
	if server.Calls("AttestAgent") != 2 {
		t.Errorf("attested %d times", server.Calls("AttestAgent"))
	}
}

// Neither knows the other any more: the agent has what the bootstrap source says now, and an SVID that no authority of
// the server's has signed.
func TestAServerThatWasMadeAnew(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	server.Put(fakeserver.Entry("e", "/e", "a:1"))
	bundle := filepath.Join(t.TempDir(), "bundle.pem")
	publish := func() {
		if err := os.WriteFile(bundle, server.BundlePEM(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	publish()
	n := startKnowing(t, server, join.Bootstrap{Path: bundle, Again: time.Nanosecond})
	n.until("picture", has("e"))
	server.Stop()
	server.Rotate(false)
	server.ForgetOld()
	server.Evict()
	publish()
	server.Put(fakeserver.Entry("f", "/f", "a:1"))
	server.Start()
	n.until("the picture after attesting again", has("e", "f"))
	if server.Calls("AttestAgent") != 2 {
		t.Errorf("attested %d times", server.Calls("AttestAgent"))
	}
}

// asked are requests for entries that were never changed.
func asked(ids ...string) []identity.Asked {
	var list []identity.Asked
	for _, id := range ids {
		list = append(list, identity.Asked{EntryID: id})
	}
	return list
}
