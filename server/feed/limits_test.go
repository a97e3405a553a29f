package feed

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

func helloOf(h *feedv1.Hello) *feedv1.FollowRequest {
	return &feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: h}}
}

func repeat[T any](n int, one func(i int) T) []T {
	list := make([]T, n)
	for i := range list {
		list[i] = one(i)
	}
	return list
}

func TestRefusedMessages(t *testing.T) {
	src := viewtest.New("store")
	src.PutNodes(node(1))
	h := open(t, src, Config{HelloTimeout: time.Hour}) // they are refused for what they say, however long that takes
	held := func(id string) *feedv1.HeldEntry { return &feedv1.HeldEntry{Id: id} }
	for _, c := range []struct {
		name string
		msgs []*feedv1.FollowRequest
	}{
		{"an empty message instead of hello", []*feedv1.FollowRequest{{}}},
		{"an acknowledgement instead of hello", []*feedv1.FollowRequest{ackOf(1)}},
		{"a second hello", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{}), helloOf(&feedv1.Hello{})}},
		{"an acknowledgement of another revision", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{}), ackOf(77)}},
		{"an acknowledgement too many", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{}), ackOf(1), ackOf(1)}},
		{"a store ID that is too long", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{StoreId: strings.Repeat("s", 256)})}},
		{"a version that is too long", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{AgentVersion: strings.Repeat("v", 256)})}},
		{"too many held entries", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{
			Entries: repeat(200_001, func(i int) *feedv1.HeldEntry { return held(fmt.Sprint(i)) }),
		})}},
		{"an entry without ID", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Entries: []*feedv1.HeldEntry{held("")}})}},
		{"an entry ID that is too long", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Entries: []*feedv1.HeldEntry{held(strings.Repeat("i", 256))}})}},
		{"an entry twice", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Entries: []*feedv1.HeldEntry{held("b"), held("a"), held("b")}})}},
		{"a bundle without trust domain", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Bundles: []*feedv1.HeldBundle{{}}})}},
		{"a trust domain that is too long", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Bundles: []*feedv1.HeldBundle{{TrustDomain: strings.Repeat("t", 256)}}})}},
		{"a bundle twice", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Bundles: []*feedv1.HeldBundle{{TrustDomain: "a"}, {TrustDomain: "a"}}})}},
		{"too many bundles", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{
			Bundles: repeat(10_001, func(i int) *feedv1.HeldBundle { return &feedv1.HeldBundle{TrustDomain: fmt.Sprint(i)} }),
		})}},
		{"too many capabilities", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Capabilities: make([]string, 65)})}},
		{"a verdict twice", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Verdicts: []*feedv1.HeldVerdict{{Digest: digest("a")}, {Digest: digest("a")}}})}},
		{"a verdict on no digest", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Verdicts: []*feedv1.HeldVerdict{{Digest: "latest"}}})}},
		{"a running image without a digest", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Running: []string{"shop:latest"}})}},
		{"too many running images", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Running: repeat(20_001, func(i int) string { return fmt.Sprintf("sha256:%064x", i) })})}},
		{"a report of an agent that knows no verdicts", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{}), reportOf(&feedv1.Running{})}},
		{"a report without a digest", []*feedv1.FollowRequest{speaking(), reportOf(&feedv1.Running{Digests: []string{""}})}},
		{"a report of too many images", []*feedv1.FollowRequest{
			speaking(), reportOf(&feedv1.Running{Digests: repeat(20_001, func(i int) string { return fmt.Sprintf("sha256:%064x", i) })}),
		}},
		{"a report that takes back far too many images", []*feedv1.FollowRequest{speaking(), reportOf(&feedv1.Running{RemovedDigests: make([]string, 40_001)})}},
		{"a capability that is too long", []*feedv1.FollowRequest{helloOf(&feedv1.Hello{Capabilities: []string{strings.Repeat("c", 65)}})}},
	} {
		t.Run(c.name+" is refused", func(t *testing.T) {
			a := newAgent()
			a.dial(t, h, 1)
			for _, msg := range c.msgs {
				a.stream.Send(msg) // the stream may have ended at the one before
			}
			if err := a.ends(t); status.Code(err) != codes.InvalidArgument {
				t.Errorf("ended with %v, want InvalidArgument", err)
			}
		})
	}
	t.Run("the server is unharmed", func(t *testing.T) {
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
	})
	t.Run("a caller that is no agent is refused", func(t *testing.T) {
		stream, err := feedv1.NewFeedClient(h.conn).Follow(metadata.AppendToOutgoingContext(t.Context(), "agent", "nobody"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("got %v, want PermissionDenied", err)
		}
	})
}

// FuzzHello checks that whatever a Hello holds, the update leads to the picture or the Hello is refused.
func FuzzHello(f *testing.F) {
	f.Add("store", uint64(1), "a", int64(0), int64(1000), "b", int64(3), "example.org", uint64(1))
	f.Add("", uint64(0), "", int64(-1), int64(-1), "a", int64(0), "", uint64(0))
	p := picture("store", 5, entry("a", agentID(1), 0), entry("b", agentID(1), 1))
	p.Bundles = []*identity.Bundle{{TrustDomain: td, Sequence: 1}}
	f.Fuzz(func(t *testing.T, store string, rev uint64, id1 string, rev1, created1 int64, id2 string, rev2 int64, name string, seq uint64) {
		h, err := fromHello(&feedv1.Hello{
			StoreId: store, Revision: rev,
			Entries: []*feedv1.HeldEntry{{Id: id1, RevisionNumber: rev1, CreatedAt: created1}, {Id: id2, RevisionNumber: rev2, CreatedAt: 1000}},
			Bundles: []*feedv1.HeldBundle{{TrustDomain: name, SequenceNumber: seq}},
		})
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		u := h.since(p)
		has := map[string]string{id1: fmt.Sprint(rev1, created1), id2: fmt.Sprint(rev2, 1000)}
		for _, id := range u.removedEntries {
			delete(has, id)
		}
		for _, e := range u.entries {
			has[e.ID] = fmt.Sprint(e.Revision, e.CreatedAt.Unix())
		}
		if len(has) != 2 || has["a"] != fmt.Sprint(0, 1000) || has["b"] != fmt.Sprint(1, 1000) {
			t.Fatalf("agent ends up with %v", has)
		}
	})
}

func TestCutOff(t *testing.T) {
	for _, c := range []struct {
		name string
		cut  func(src *viewtest.Source)
	}{
		{"banned", func(src *viewtest.Source) {
			n := node(1)
			n.Banned = true
			src.PutNodes(n)
		}},
		{"evicted", func(src *viewtest.Source) { src.DeleteNode(agentID(1)) }},
	} {
		t.Run("an agent that is "+c.name+" is cut off", func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(node(1))
			src.PutEntries(entry("a", agentID(1), 0))
			h := open(t, src, Config{})
			a := newAgent()
			a.dial(t, h, 1)
			a.hello(t)
			a.next(t)
			c.cut(src)
			err := a.ends(t)
			if status.Code(err) != codes.PermissionDenied {
				t.Fatalf("ended with %v", err)
			}
			details, _ := status.Convert(err).Details()[0].(*types.PermissionDeniedDetails)
			if details.GetReason() != types.PermissionDeniedDetails_AGENT_BANNED {
				t.Errorf("details are %v", details)
			}
			t.Run("and not let in again", func(t *testing.T) {
				a.dial(t, h, 1)
				if err := a.ends(t); status.Code(err) != codes.PermissionDenied {
					t.Errorf("ended with %v", err)
				}
			})
		})
	}

	t.Run("an agent that does not read is cut off all the same", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		var many []*identity.Entry
		for i := range 5_000 {
			e := entry(fmt.Sprintf("e%05d", i), agentID(1), 0)
			e.Hint = strings.Repeat("h", 1000)
			many = append(many, e)
		}
		src.PutEntries(many...)
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		poll(t, func() bool { st := h.server.Status(); return len(st) == 1 && st[0].Pictures == 1 })
		src.DeleteNode(agentID(1))
		poll(t, func() bool { return len(h.server.Status()) == 0 })
		if err := a.ends(t); status.Code(err) != codes.PermissionDenied {
			t.Errorf("ended with %v", err)
		}
	})

	t.Run("a change of its record that leaves it active leaves the stream alone", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		h := open(t, src, Config{})
		a := newAgent()
		a.dial(t, h, 1)
		a.hello(t)
		a.next(t)
		n := node(1)
		n.Serial = "2"
		src.PutNodes(n)
		rev := src.PutEntries(entry("a", agentID(1), 0))
		a.next(t)
		if a.rev != uint64(rev) {
			t.Errorf("next picture is of revision %d, want %d", a.rev, rev)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.asked < 2 {
			t.Errorf("authorization was asked %d times, want another time for the new record", h.asked)
		}
	})

	t.Run("with a stream too many, the oldest ends", func(t *testing.T) {
		src := viewtest.New("store")
		src.PutNodes(node(1))
		h := open(t, src, Config{StreamsPerAgent: 2})
		agents := []*agent{newAgent(), newAgent(), newAgent()}
		for _, a := range agents {
			a.dial(t, h, 1)
			a.hello(t)
			a.next(t)
		}
		if err := agents[0].ends(t); status.Code(err) != codes.Aborted {
			t.Errorf("the oldest ended with %v", err)
		}
		src.PutEntries(entry("a", agentID(1), 0))
		agents[1].next(t)
		agents[2].next(t)
	})
}

// poll waits for something that nobody tells.
func poll(t *testing.T, done func() bool) {
	t.Helper()
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	timeout := time.After(time.Minute)
	for !done() {
		select {
		case <-ticker.C:
		case <-timeout:
			t.Fatal("waited in vain")
		}
	}
}

func TestTime(t *testing.T) {
	t.Run("a stream without hello ends after ten seconds", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(node(1))
			h := open(t, src, Config{})
			start := time.Now()
			a := newAgent()
			a.dial(t, h, 1)
			if err := a.ends(t); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("ended with %v", err)
			}
			if d := time.Since(start); d != 10*time.Second {
				t.Errorf("ended after %v", d)
			}
		})
	})

	t.Run("a picture that is never acknowledged ends the stream after two minutes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(node(1))
			h := open(t, src, Config{})
			a := newAgent()
			a.dial(t, h, 1)
			a.hello(t)
			if err := a.receive(t); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if err := a.ends(t); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("ended with %v", err)
			}
			if d := time.Since(start); d != 2*time.Minute {
				t.Errorf("ended after %v", d)
			}
		})
	})

	t.Run("a quiet stream lives for days, and an SVID that expires ends it within a minute", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(node(1))
			h := open(t, src, Config{})
			a := newAgent()
			a.dial(t, h, 1)
			a.hello(t)
			a.next(t)
			expired := make(chan time.Time, 1)
			time.AfterFunc(48*time.Hour, func() {
				h.mu.Lock()
				h.denied[agentID(1)] = deny(types.PermissionDeniedDetails_AGENT_EXPIRED)
				h.mu.Unlock()
				expired <- time.Now()
			})
			if err := a.ends(t); status.Code(err) != codes.PermissionDenied {
				t.Errorf("ended with %v", err)
			}
			if d := time.Since(<-expired); d > time.Minute {
				t.Errorf("ended %v after the expiry", d)
			}
		})
	})

	t.Run("an entry that expires is taken away at that second", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(node(1))
			e := entry("a", agentID(1), 0)
			e.ExpiresAt = time.Now().Add(time.Hour)
			src.PutEntries(e, entry("b", agentID(1), 0))
			h := open(t, src, Config{})
			a := newAgent()
			a.dial(t, h, 1)
			a.hello(t)
			a.next(t)
			a.next(t)
			if !time.Now().Equal(e.ExpiresAt) {
				t.Errorf("the next picture came at %v, want %v", time.Now(), e.ExpiresAt)
			}
			if len(a.entries) != 1 {
				t.Errorf("holds %d entries, want b alone", len(a.entries))
			}
			a.holds(t, h, 1)
		})
	})

	t.Run("an agent that is ahead of the store is told everything after ten seconds", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			src := viewtest.New("store")
			src.PutNodes(node(1))
			h := open(t, src, Config{})
			a := newAgent()
			a.storeID, a.rev = "store", 1000
			a.dial(t, h, 1)
			a.hello(t)
			a.next(t)
			if !a.full || a.rev != 1 {
				t.Errorf("got full=%v at revision %d", a.full, a.rev)
			}
		})
	})
}

func TestThousandsOfStreams(t *testing.T) {
	const many = 2000
	t.Run("a change that concerns them all reaches two thousand agents", func(t *testing.T) {
		src := viewtest.New("store")
		var nodes []*records.Node
		for i := range many {
			nodes = append(nodes, node(i))
		}
		src.PutNodes(nodes...)
		alias := entry("alias", agentID(0), 0)
		alias.ParentID = spiffeid.RequireFromPath(td, "/spire/server")
		alias.SPIFFEID = spiffeid.RequireFromPath(td, "/site/one")
		alias.Selectors = attestor.NewSet(attestor.Selector{Type: "site", Value: "one"})
		src.PutEntries(alias)
		reg := prometheus.NewPedanticRegistry()
		h := open(t, src, Config{Metrics: reg})
		agents := make([]*agent, many)
		for i := range agents {
			agents[i] = newAgent()
			agents[i].dial(t, h, i)
			agents[i].hello(t)
		}
		for _, a := range agents {
			a.next(t)
		}
		if got := value(t, reg, "assay_server_feed_streams"); got != many {
			t.Fatalf("%v streams, want %d", got, many)
		}
		rev := src.PutEntries(entry("new", alias.SPIFFEID, 0))
		for i, a := range agents {
			a.next(t)
			if a.rev != uint64(rev) || len(a.entries) != 1 {
				t.Fatalf("agent %d is at revision %d with %d entries", i, a.rev, len(a.entries))
			}
		}
	})
}
