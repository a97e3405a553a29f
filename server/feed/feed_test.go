package feed

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/workloadapi/identity"
)

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

	t.Run("what is committed to a real store goes all the way", func(t *testing.T) {
		store, err := boltkv.Open(filepath.Join(t.TempDir(), "store.db"), boltkv.Config{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		rec, err := records.Open(t.Context(), store, td, records.Config{})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := rec.UpdateNode(t.Context(), agentID(1), func(n *records.Node, _ bool) error {
			n.Type = "test"
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		h := open(t, rec, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		made, rev, err := rec.CreateEntries(t.Context(), []*identity.Entry{entry("", agentID(1), 0)})
		if err != nil || made[0].Err != nil {
			t.Fatal(err, made)
		}
		a.next(t)
		if a.rev != uint64(rev) || a.storeID != store.ID() || !slices.Equal(a.got, []string{made[0].Entry.ID}) {
			t.Errorf("got %v at revision %d of store %q", a.got, a.rev, a.storeID)
		}
		if _, err := rec.DeleteNode(t.Context(), agentID(1)); err != nil {
			t.Fatal(err)
		}
		if err := a.ends(t); status.Code(err) != codes.PermissionDenied {
			t.Errorf("ended with %v", err)
		}
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
		if got := value(t, reg, "assay_server_feed_lag_revisions"); got == 0 {
			t.Error("it is not said who lags")
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
