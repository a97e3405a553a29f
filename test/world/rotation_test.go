package world_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"

	"github.com/assay-id/assay/server/wire/adminv1"
	"github.com/assay-id/assay/test/world"
)

// authorities forces rotations.
type authorities struct {
	t testing.TB
	w *world.World
	localauthorityv1.LocalAuthorityClient
}

func rotating(t testing.TB, w *world.World) authorities {
	return authorities{t, w, localauthorityv1.NewLocalAuthorityClient(w.Local)}
}

// renew prepares and activates an X.509 authority and returns the ID of the one before and its own.
func (a authorities) renew() (old, active string) {
	a.t.Helper()
	ctx := a.w.Context()
	next, err := a.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	active = next.GetPreparedAuthority().GetAuthorityId()
	if _, err := a.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: active}); err != nil {
		a.t.Fatal(err)
	}
	state, err := a.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	return state.GetOld().GetAuthorityId(), active
}

func (a authorities) taint(id string) {
	a.t.Helper()
	if _, err := a.TaintX509Authority(a.w.Context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id}); err != nil {
		a.t.Fatal(err)
	}
}

func (a authorities) revoke(id string) {
	a.t.Helper()
	if _, err := a.RevokeX509Authority(a.w.Context(), &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id}); err != nil {
		a.t.Fatal(err)
	}
}

// status returns the counts and the agents that have something left to do.
func (a authorities) status(kind string) (counts *adminv1.RotationCounts, agents []*adminv1.RotatingAgent) {
	a.t.Helper()
	stream, err := adminv1.NewAdminClient(a.w.Local).RotationStatus(a.w.Context(), &adminv1.RotationStatusRequest{Kind: kind})
	if err != nil {
		a.t.Fatal(err)
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return counts, agents
		}
		if err != nil {
			a.t.Fatal(err)
		}
		if resp.GetCounts() != nil {
			counts = resp.GetCounts()
		}
		agents = append(agents, resp.GetAgents()...)
	}
}

// until looks at the status until it is as wanted.
func (a authorities) until(kind string, there func(*adminv1.RotationCounts, []*adminv1.RotatingAgent) bool) (*adminv1.RotationCounts, []*adminv1.RotatingAgent) {
	a.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		counts, agents := a.status(kind)
		if there(counts, agents) {
			return counts, agents
		}
		select {
		case <-tick.C:
		case <-late:
			a.t.Fatalf("not in time: %v, %v", counts, agents)
		}
	}
}

// done looks at the status until nobody holds anything of an earlier authority.
func (a authorities) done(kind string) *adminv1.RotationCounts {
	a.t.Helper()
	counts, _ := a.until(kind, func(_ *adminv1.RotationCounts, left []*adminv1.RotatingAgent) bool { return len(left) == 0 })
	return counts
}

// by reads on until the SVID is signed by the authority, and returns the answer.
func (s *stream) by(authority string) *workload.X509SVIDResponse {
	s.t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			s.t.Fatal(err)
		}
		if n := len(resp.GetSvids()); n > 0 && !slices.ContainsFunc(resp.GetSvids(), func(svid *workload.X509SVID) bool {
			return hex.EncodeToString(leaf(s.t, svid).AuthorityKeyId) != authority
		}) {
			return resp
		}
	}
}

// without reads on until no bundle has the authority, and returns the answer.
func (s *stream) without(authority string) *workload.X509SVIDResponse {
	s.t.Helper()
	for {
		resp, err := s.Recv()
		if err != nil {
			s.t.Fatal(err)
		}
		roots, err := x509.ParseCertificates(resp.GetSvids()[0].GetBundle())
		if err != nil {
			s.t.Fatal(err)
		}
		if !slices.ContainsFunc(roots, func(c *x509.Certificate) bool { return hex.EncodeToString(c.SubjectKeyId) == authority }) {
			return resp
		}
	}
}

// talk does one mutual handshake of two workloads, with the library they would use.
func talk(client, server *workloadapi.X509Source) error {
	near, far := net.Pipe()
	defer func() { _, _ = near.Close(), far.Close() }()
	deadline := time.Now().Add(10 * time.Second)
	_, _ = near.SetDeadline(deadline), far.SetDeadline(deadline)
	answered := make(chan error, 1)
	go func() {
		answered <- tls.Server(far, tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeAny())).Handshake()
	}()
	if err := tls.Client(near, tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeAny())).Handshake(); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	if err := <-answered; err != nil {
		return fmt.Errorf("server: %w", err)
	}
	return nil
}

func TestAForcedRotationReachesEverybody(t *testing.T) {
	w := world.New(t)
	var streams []*stream
	var sources []*workloadapi.X509Source
	var agents []*world.Agent
	for _, name := range []string{"one", "two", "three"} {
		a := w.Agent(name).Start()
		agents = append(agents, a)
		w.Entry(a.ID, "/shop/"+name)
		w.Entry(a.ID, "/bank/"+name)
		for range 3 {
			s := follow(t, a)
			s.until("/shop/"+name, "/bank/"+name)
			streams = append(streams, s)
		}
		source, err := workloadapi.NewX509Source(w.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+a.Socket())))
		if err != nil {
			t.Fatal(err)
		}
		defer source.Close()
		sources = append(sources, source)
	}
	// All the while, workloads of different nodes talk to each other.
	ctx, cancel := context.WithCancel(w.Context())
	var talking sync.WaitGroup
	var talks atomic.Int64
	talking.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			if err := talk(sources[n%3], sources[(n+1)%3]); err != nil {
				t.Errorf("handshake %d: %v", n, err)
				return
			}
			talks.Add(1)
		}
	})
	// The server waits for its agents; a test that fails for one handshake waits for the library as well,
	// which has what it was sent a moment later, and for handshakes that began before.
	allHave := func(what string, has func(*workloadapi.X509Source) bool) {
		t.Helper()
		for _, source := range sources {
			for !has(source) {
				select {
				case <-source.Updated():
				case <-w.Context().Done():
					t.Fatalf("a workload's source never had %s", what)
				}
			}
		}
	}
	defer talking.Wait()
	defer cancel()

	force := rotating(t, w)
	old, active := force.renew()
	t.Run("who holds something of the old authority is known before it is tainted", func(t *testing.T) {
		counts, left := force.until("x509", func(_ *adminv1.RotationCounts, left []*adminv1.RotatingAgent) bool {
			return !slices.ContainsFunc(left, func(a *adminv1.RotatingAgent) bool { return len(a.GetHeld()) == 0 || a.GetHeld()[0].GetSvids() != 2 })
		})
		if counts.GetAgents() != 3 || counts.GetHolding() != 3 || len(left) != 3 {
			t.Errorf("%v: %v", counts, left)
		}
		for _, a := range left {
			if a.GetOwnAuthorityId() != old || len(a.GetHeld()) != 1 || a.GetHeld()[0].GetAuthorityId() != old || a.GetHeld()[0].GetSvids() != 2 {
				t.Errorf("agent %v", a)
			}
		}
	})
	allHave("the new authority in its bundle", func(source *workloadapi.X509Source) bool {
		bundle, err := source.GetX509BundleForTrustDomain(world.TrustDomain)
		return err == nil && slices.ContainsFunc(bundle.X509Authorities(), func(c *x509.Certificate) bool { return hex.EncodeToString(c.SubjectKeyId) == active })
	})
	began := time.Now()
	force.taint(old)
	for _, s := range streams {
		s.by(active)
	}
	t.Logf("from the taint to the last of %d streams: %v", len(streams), time.Since(began))
	t.Run("agents replace their own SVIDs too, and the status says when all is done", func(t *testing.T) {
		counts := force.done("x509")
		if counts.GetAgents() != 3 || counts.GetCurrent() != 3 || counts.GetHolding() != 0 || counts.GetUnknown() != 0 {
			t.Errorf("%v", counts)
		}
		t.Logf("from the taint to the last agent's word: %v", time.Since(began))
	})
	allHave("an SVID of the new authority", func(source *workloadapi.X509Source) bool {
		svid, err := source.GetX509SVID()
		return err == nil && hex.EncodeToString(svid.Certificates[0].AuthorityKeyId) == active
	})
	for seen := talks.Load(); talks.Load() < seen+2 && !t.Failed(); {
		time.Sleep(time.Millisecond)
	}
	force.revoke(old)
	for _, s := range streams {
		s.without(old)
	}
	t.Run("a revoked authority is in no bundle, and a workload that comes now has nothing of it", func(t *testing.T) {
		resp := follow(t, agents[0]).until("/shop/one", "/bank/one")
		for _, svid := range resp.GetSvids() {
			if by := hex.EncodeToString(leaf(t, svid).AuthorityKeyId); by != active {
				t.Errorf("%s is signed by %s", svid.GetSpiffeId(), by)
			}
		}
		if n := len(w.Bundle()); n != 1 {
			t.Errorf("%d authorities in the server's bundle", n)
		}
	})
	t.Run("agents go on to be served, also after a restart", func(t *testing.T) {
		agents[1].Stop()
		agents[1].Start()
		w.Entry(agents[1].ID, "/third")
		follow(t, agents[1]).until("/shop/two", "/bank/two", "/third")
	})
	cancel()
	talking.Wait()
	if talks.Load() == 0 {
		t.Error("nobody talked")
	}
	t.Logf("%d handshakes meanwhile", talks.Load())
}

func TestAForcedRotationOfJWTKeys(t *testing.T) {
	w := world.New(t)
	a := w.Agent("one").Start()
	w.Entry(a.ID, "/shop")
	follow(t, a).until("/shop")
	ctx, client := a.Workload()
	bundles, err := workloadapi.NewBundleSource(w.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+a.Socket())))
	if err != nil {
		t.Fatal(err)
	}
	defer bundles.Close()
	fetch := func() string {
		t.Helper()
		resp, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"bank"}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetSvids()[0].GetSvid()
	}
	valid := func(token string) error {
		_, err := jwtsvid.ParseAndValidate(token, bundles, []string{"bank"})
		return err
	}
	first := fetch()
	force := rotating(t, w)
	next, err := force.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	active := next.GetPreparedAuthority().GetAuthorityId()
	if _, err := force.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: active}); err != nil {
		t.Fatal(err)
	}
	if again := fetch(); again != first {
		t.Error("a good token was thrown away")
	}
	state, err := force.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	old := state.GetOld().GetAuthorityId()
	if _, err := force.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	force.done("jwt")
	second := fetch()
	t.Run("a token of a tainted key is not given out of the cache, and good until the key is revoked", func(t *testing.T) {
		if second == first {
			t.Error("the same token")
		}
		if err := errors.Join(valid(first), valid(second)); err != nil {
			t.Error(err)
		}
	})
	if _, err := force.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: old}); err != nil {
		t.Fatal(err)
	}
	t.Run("then it is refused by every verifier that follows the bundle", func(t *testing.T) {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		late := time.After(time.Minute)
		for valid(first) == nil {
			select {
			case <-tick.C:
			case <-late:
				t.Fatal("it is accepted")
			}
		}
		if err := valid(second); err != nil {
			t.Error(err)
		}
		ctx, client := a.Workload()
		if _, err := client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "bank", Svid: first}); err == nil {
			t.Error("the agent accepts it")
		}
	})
}

// BenchmarkTaint measures what a taint takes until the last of 1,000 streams, on 50 agents with an entry
// each, has an SVID of the new authority.
func BenchmarkTaint(b *testing.B) {
	const agents, each = 50, 20
	w := world.New(b)
	arrived := make(chan string, 4*agents*each)
	var work sync.WaitGroup
	for i := range agents {
		a := w.Agent(fmt.Sprint(i)).Start()
		w.Entry(a.ID, fmt.Sprintf("/shop/%d", i))
		ctx, client := a.Workload()
		for range each {
			stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err != nil {
				b.Fatal(err)
			}
			work.Go(func() {
				for {
					resp, err := stream.Recv()
					if err != nil {
						return
					}
					if cert, err := x509.ParseCertificates(resp.GetSvids()[0].GetX509Svid()); err == nil {
						arrived <- hex.EncodeToString(cert[0].AuthorityKeyId)
					}
				}
			})
		}
	}
	force := rotating(b, w)
	state, err := force.GetX509AuthorityState(w.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		b.Fatal(err)
	}
	all := func(authority string) {
		for n := 0; n < agents*each; {
			if <-arrived == authority {
				n++
			}
		}
	}
	all(state.GetActive().GetAuthorityId())
	var took []time.Duration
	for b.Loop() {
		old, active := force.renew()
		began := time.Now()
		force.taint(old)
		// Each stream is told of the bundle, with what it held, and then of the SVID.
		all(active)
		took = append(took, time.Since(began))
		force.done("x509")
		force.revoke(old)
		for drained := false; !drained; {
			select {
			case <-arrived:
			case <-time.After(300 * time.Millisecond):
				drained = true
			}
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "taint-p50-ms")
	b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "taint-max-ms")
	b.Cleanup(work.Wait)
}
