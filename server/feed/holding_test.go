package feed

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/view/viewtest"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

func holdingOf(held ...*feedv1.HeldAuthority) *feedv1.FollowRequest {
	return &feedv1.FollowRequest{Message: &feedv1.FollowRequest_Holding{Holding: &feedv1.Holding{Authorities: held}}}
}

// until looks until what is looked for is there.
func until(t *testing.T, what string, there func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for !there() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestHolding(t *testing.T) {
	src := viewtest.New("store")
	src.PutNodes(node(1), node(2))
	src.PutBundles(&identity.Bundle{TrustDomain: td, Sequence: 1})
	h := open(t, src, Config{Authority: func(context.Context) string { return "a0" }})
	a := newAgent()
	a.dial(t, h, 1)
	a.hello(t)
	if err := a.receive(t); err != nil {
		t.Fatal(err)
	}
	t.Run("an agent that has not put its first picture in force is behind", func(t *testing.T) {
		if n := h.server.Behind(0); n != 1 {
			t.Errorf("%d agents are behind", n)
		}
		a.ack(t)
		until(t, "nobody is behind", func() bool { return h.server.Behind(0) == 0 })
	})
	t.Run("so is one that has not put a later bundle in force", func(t *testing.T) {
		rev := src.PutBundles(&identity.Bundle{TrustDomain: td, Sequence: 2})
		if err := a.receive(t); err != nil {
			t.Fatal(err)
		}
		if n := h.server.Behind(rev); n != 1 {
			t.Errorf("%d agents are behind", n)
		}
		a.ack(t)
		until(t, "nobody is behind", func() bool { return h.server.Behind(rev) == 0 })
	})
	t.Run("so is one whose stream has just ended, until it is away for longer than it takes to reconnect", func(t *testing.T) {
		var later atomic.Int64
		h := open(t, src, Config{Now: func() time.Time { return time.Now().Add(time.Duration(later.Load())) }})
		b := newAgent()
		b.dial(t, h, 2)
		b.hello(t)
		if err := b.receive(t); err != nil {
			t.Fatal(err)
		}
		b.ack(t)
		until(t, "nobody is behind", func() bool { return h.server.Behind(0) == 0 })
		b.cancel()
		id := node(2).ID
		until(t, "the agent is expected back", func() bool { return h.server.Returning()[id] })
		rev := src.PutBundles(&identity.Bundle{TrustDomain: td, Sequence: 3})
		if n := h.server.Behind(rev); n != 1 {
			t.Errorf("%d agents are behind", n)
		}
		b.dial(t, h, 2)
		b.hello(t)
		until(t, "the agent is back", func() bool { return !h.server.Returning()[id] })
		b.cancel()
		until(t, "the agent is expected back again", func() bool { return h.server.Returning()[id] })
		later.Store(int64(31 * time.Second))
		if n := h.server.Behind(rev); n != 0 || len(h.server.Returning()) != 0 {
			t.Errorf("%d agents are behind and %d expected, when nobody was there for 31 s", n, len(h.server.Returning()))
		}
	})
	t.Run("what an agent says it holds is in its status, with who signed its own", func(t *testing.T) {
		if st := h.server.Status()[0]; st.Reports || st.Authority != "a0" {
			t.Errorf("before: %+v", st)
		}
		a.send(t, holdingOf(&feedv1.HeldAuthority{AuthorityId: "b", JwtSvids: 1}, &feedv1.HeldAuthority{AuthorityId: "a", X509Svids: 3}))
		until(t, "the report", func() bool { return h.server.Status()[0].Reports })
		if diff := cmp.Diff([]HeldAuthority{{ID: "a", X509: 3}, {ID: "b", JWT: 1}}, h.server.Status()[0].Held); diff != "" {
			t.Error(diff)
		}
		a.send(t, holdingOf())
		until(t, "nothing is held", func() bool { return len(h.server.Status()[0].Held) == 0 })
	})
	for name, msg := range map[string]*feedv1.FollowRequest{
		"a report of too many authorities":     holdingOf(make([]*feedv1.HeldAuthority, maxHolding+1)...),
		"a report of an authority without ID":  holdingOf(&feedv1.HeldAuthority{X509Svids: 1}),
		"a report of an ID that is no such":    holdingOf(&feedv1.HeldAuthority{AuthorityId: strings.Repeat("a", 256)}),
		"a report in place of the hello":       nil,
		"a report of nothing known, malformed": {},
	} {
		t.Run(name+" ends the stream", func(t *testing.T) {
			a := newAgent()
			a.dial(t, h, 2)
			if msg == nil {
				a.send(t, holdingOf())
			} else {
				a.hello(t)
				a.next(t)
				a.send(t, msg)
			}
			if err := a.ends(t); status.Code(err) != codes.InvalidArgument {
				t.Errorf("got %v", err)
			}
		})
	}
}
