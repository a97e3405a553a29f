package world_test

import (
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/test/world"
)

type stream struct {
	t *testing.T
	workload.SpiffeWorkloadAPI_FetchX509SVIDClient
}

func follow(t *testing.T, a *world.Agent) *stream {
	t.Helper()
	ctx, client := a.Workload()
	s, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return &stream{t, s}
}

// until reads on until the IDs are as wanted.
func (s *stream) until(paths ...string) *workload.X509SVIDResponse {
	s.t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			s.t.Fatalf("waiting for %v: %v", paths, err)
		}
		var got []string
		for _, svid := range resp.GetSvids() {
			got = append(got, svid.GetSpiffeId()[len("spiffe://example.org"):])
		}
		if slices.Equal(got, paths) {
			return resp
		}
	}
}

// ends reads on until the stream ends, and demands the code.
func (s *stream) ends(want codes.Code) {
	s.t.Helper()
	for {
		if _, err := s.Recv(); err != nil {
			if status.Code(err) != want {
				s.t.Fatalf("stream ended with %v, want %v", err, want)
			}
			return
		}
	}
}

func leaf(t *testing.T, svid *workload.X509SVID) *x509.Certificate {
	t.Helper()
	certs, err := x509.ParseCertificates(svid.GetX509Svid())
	if err != nil {
		t.Fatal(err)
	}
	return certs[0]
}

func TestOneEntryFromEndToEnd(t *testing.T) {
	w := world.New(t)
	a := w.Agent("one").Start()
	s := follow(t, a) // before there is an entry: the caller is held
	e := w.Entry(a.ID, "/shop")
	svid := leaf(t, s.until("/shop").GetSvids()[0])

	t.Run("the SVID verifies against the server's bundle", func(t *testing.T) {
		roots := x509.NewCertPool()
		for _, der := range w.Bundle() {
			ca, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			roots.AddCert(ca)
		}
		if _, err := svid.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Error(err)
		}
	})
	t.Run("a JWT-SVID is issued and validated", func(t *testing.T) {
		ctx, client := a.Workload()
		got, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"bank"}})
		if err != nil || len(got.GetSvids()) != 1 {
			t.Fatal(got, err)
		}
		valid, err := client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "bank", Svid: got.GetSvids()[0].GetSvid()})
		if err != nil || valid.GetSpiffeId() != "spiffe://example.org/shop" {
			t.Error(valid, err)
		}
	})
	t.Run("a change of the entry is there in a moment", func(t *testing.T) {
		var took []time.Duration
		for n := range 20 {
			name := fmt.Sprintf("n%d.example.org", n)
			e.DnsNames = []string{name}
			began := time.Now()
			w.Update(e)
			for !slices.Equal(leaf(t, s.until("/shop").GetSvids()[0]).DNSNames, e.GetDnsNames()) {
				continue
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		t.Logf("from the call that changes an entry to the workload's new SVID: median %v, worst %v", took[len(took)/2], took[len(took)-1])
		if took[len(took)/2] > time.Second {
			t.Errorf("median %v", took[len(took)/2])
		}
	})
	t.Run("a deletion takes the identity away", func(t *testing.T) {
		w.Delete(e.GetId())
		s.ends(codes.PermissionDenied)
	})
}

func TestTheServerComesAndGoes(t *testing.T) {
	w := world.New(t)
	a := w.Agent("one").Start()
	w.Entry(a.ID, "/shop")
	s := follow(t, a)
	before := s.until("/shop").GetSvids()[0]

	w.Stop()
	t.Run("an agent without its server serves on", func(t *testing.T) { follow(t, a).until("/shop") })
	a.Stop()
	a.Start()
	t.Run("an agent that restarts meanwhile serves the same", func(t *testing.T) {
		s = follow(t, a)
		if after := s.until("/shop").GetSvids()[0]; !slices.Equal(after.GetX509Svid(), before.GetX509Svid()) {
			t.Error("it does not")
		}
	})
	w.Start()
	t.Run("and hears what is new when the server is back", func(t *testing.T) {
		second := w.Entry(a.ID, "/second", world.Mine)
		s.untilBoth("/shop", "/second")
		w.Delete(second.GetId())
		s.until("/shop")
	})
}

// untilBoth is until for entries that may be of the same second, which are ordered by their IDs.
func (s *stream) untilBoth(a, b string) {
	s.t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			s.t.Fatal(err)
		}
		var got []string
		for _, svid := range resp.GetSvids() {
			got = append(got, svid.GetSpiffeId()[len("spiffe://example.org"):])
		}
		slices.Sort(got)
		want := []string{a, b}
		slices.Sort(want)
		if slices.Equal(got, want) {
			return
		}
	}
}

func TestManyAgentsSeeOnlyTheirOwn(t *testing.T) {
	w := world.New(t)
	const n = 10
	var work sync.WaitGroup
	agents := make([]*world.Agent, n)
	for i := range n {
		agents[i] = w.Agent(fmt.Sprint(i)).Start()
		w.Entry(agents[i].ID, fmt.Sprintf("/shop/%d", i))
	}
	for i, a := range agents {
		s := follow(t, a)
		work.Go(func() {
			resp, err := s.Recv()
			if err != nil || len(resp.GetSvids()) != 1 || resp.GetSvids()[0].GetSpiffeId() != fmt.Sprintf("spiffe://example.org/shop/%d", i) {
				t.Errorf("agent %d: %v %v", i, resp.GetSvids(), err)
			}
		})
	}
	work.Wait()
}

func TestBanAndEviction(t *testing.T) {
	agentID := func(t *testing.T, w *world.World) *types.SPIFFEID {
		t.Helper()
		resp, err := w.Agents().ListAgents(w.Context(), &agentv1.ListAgentsRequest{})
		if err != nil || len(resp.GetAgents()) != 1 {
			t.Fatal(resp, err)
		}
		return resp.GetAgents()[0].GetId()
	}
	// banned bans an agent and returns how long it went on serving.
	banned := func(t *testing.T) time.Duration {
		t.Helper()
		w := world.New(t)
		a := w.Agent("one", func(c *agent.Config) { c.WorkloadHold = -1 }).Start()
		w.Entry(a.ID, "/shop")
		eventually(t, "ready", func() bool { return a.Health.Ready() == nil })
		var s *stream
		eventually(t, "served", func() bool {
			s = follow(t, a)
			_, err := s.Recv()
			return err == nil
		})
		began := time.Now()
		if _, err := w.Agents().BanAgent(w.Context(), &agentv1.BanAgentRequest{Id: agentID(t, w)}); err != nil {
			t.Fatal(err)
		}
		s.ends(codes.PermissionDenied)
		took := time.Since(began)
		eventually(t, "the ban", func() bool { return a.Health.Ready() != nil })
		if a.Health.Live() != nil {
			t.Error("it ended")
		}
		follow(t, a).ends(codes.PermissionDenied)
		return took
	}
	t.Run("a banned agent serves nothing within a second, and stays", func(t *testing.T) {
		took := banned(t)
		for range 4 { // who waits for something does so each time, a loaded machine seldom
			if took <= time.Second || t.Failed() {
				return
			}
			took = min(took, banned(t))
		}
		if took > time.Second {
			t.Errorf("after %v at the least", took)
		}
	})
	t.Run("an evicted agent whose token is spent stays, and comes back with a new one", func(t *testing.T) {
		w := world.New(t)
		a := w.Agent("one").Start()
		e := w.Entry(a.ID, "/shop")
		follow(t, a).until("/shop")
		if _, err := w.Agents().DeleteAgent(w.Context(), &agentv1.DeleteAgentRequest{Id: agentID(t, w)}); err != nil {
			t.Fatal(err)
		}
		if a.Health.Live() != nil {
			t.Error("it ended")
		}
		a.Stop()
		a.NewToken()
		e.Hint = "again" // only an agent that is known hears of it
		w.Update(e)
		a.Start()
		eventually(t, "the new picture", func() bool {
			resp, err := follow(t, a).Recv()
			return err == nil && resp.GetSvids()[0].GetHint() == "again"
		})
	})
}

func TestRotationOfShortLivedSVIDs(t *testing.T) {
	// The agent's own is renewed within the three turns of the workload's, and has time for it on a loaded machine.
	w := world.New(t, func(c *server.Config) { c.CA.AgentTTL, c.CA.X509SVIDTTL = 9*time.Second, 4*time.Second })
	a := w.Agent("one").Start()
	w.Entry(a.ID, "/shop")
	s := follow(t, a)
	last := leaf(t, s.until("/shop").GetSvids()[0])
	const turns = 3
	late := 0
	for range turns {
		next := leaf(t, s.until("/shop").GetSvids()[0])
		if !next.NotAfter.After(last.NotAfter) || next.SerialNumber.Cmp(last.SerialNumber) == 0 {
			t.Error("the same again")
		}
		if time.Now().After(last.NotAfter) {
			late++
		}
		last = next
	}
	if late == turns { // a loaded machine may be late once
		t.Error("renewed after it had expired")
	}
}

// eventually polls for what has no channel.
func eventually(t *testing.T, what string, ok func() bool) {
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
