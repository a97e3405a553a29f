package world_test

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/test/world"
)

const (
	passes = "scan:policy:prod"
	fails  = "scan:status:prod:fail"
)

var (
	gate       = world.Selector(passes)
	quarantine = world.Selector(fails)
)

func TestAVerdictTakesAnIdentityAndGivesItBack(t *testing.T) {
	w := world.New(t)
	digest := world.Digest("a")
	a := w.Agent("one", world.In(world.Running(digest))).Start()
	w.Verdict(digest, passes)
	w.Entry(a.ID, "/shop", world.Mine, gate)
	w.Entry(a.ID, "/isolated", world.Mine, quarantine)
	s := follow(t, a)
	s.until("/shop")

	t.Run("a condemned image has the quarantine identity, within the stream", func(t *testing.T) {
		w.Verdict(digest, fails)
		s.until("/isolated")
	})
	t.Run("and its own again when it is cleared, without a restart", func(t *testing.T) {
		w.Verdict(digest, passes)
		s.until("/shop")
	})
	t.Run("an image that nothing is left for loses its stream", func(t *testing.T) {
		w.Verdict(digest)
		s.ends(codes.PermissionDenied)
		ctx, client := a.Workload()
		if _, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"bank"}}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("JWT-SVID: %v", err)
		}
	})
	t.Run("who calls while there is nothing gets it when it comes", func(t *testing.T) {
		s := follow(t, a)
		w.Verdict(digest, passes)
		s.until("/shop")
	})
}

func TestAJWTSVIDIsNotGivenOutOfTheCache(t *testing.T) {
	w := world.New(t)
	digest := world.Digest("a")
	a := w.Agent("one", world.In(world.Running(digest)), func(c *agent.Config) { c.WorkloadHold = 500 * time.Millisecond }).Start()
	w.Verdict(digest, passes)
	w.Entry(a.ID, "/shop", world.Mine, gate)
	w.Entry(a.ID, "/plain")
	s := follow(t, a)
	s.untilBoth("/shop", "/plain")
	ctx, client := a.Workload()
	fetch := func() (string, error) {
		resp, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"bank"}, SpiffeId: "spiffe://example.org/shop"})
		if err != nil {
			return "", err
		}
		return resp.GetSvids()[0].GetSvid(), nil
	}
	first, err := fetch()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := fetch(); err != nil || again != first {
		t.Fatalf("the second is not the first from the cache: %v", err)
	}
	w.Verdict(digest, fails)
	s.until("/plain")
	if _, err := fetch(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("after the withdrawal: %v", err)
	}
	w.Verdict(digest, passes)
	s.untilBoth("/shop", "/plain")
	if again, err := fetch(); err != nil || again == first {
		t.Errorf("after the restoration the old token is given out again, or none: %v", err)
	}
}

func TestAnImageThatTheEngineKnowsByItsManifest(t *testing.T) {
	w := world.New(t)
	manifest := world.Digest("a")
	a := w.Agent("one", world.In(world.RunningManifest(manifest))).Start()
	w.Verdict(manifest, passes)
	w.Entry(a.ID, "/shop", world.Mine, gate)
	w.Entry(a.ID, "/plain")
	s := follow(t, a)
	s.untilBoth("/shop", "/plain")
	w.Verdict(manifest, fails)
	s.until("/plain")
}

func TestTwoNodesTwoImages(t *testing.T) {
	w := world.New(t)
	good, bad := world.Digest("a"), world.Digest("b")
	one, two := w.Agent("one", world.In(world.Running(good))).Start(), w.Agent("two", world.In(world.Running(bad))).Start()
	three := w.Agent("three", world.In(world.Running(bad))).Start()
	w.Verdict(good, passes)
	w.Verdict(bad, passes)
	for _, a := range []*world.Agent{one, two, three} {
		w.Entry(a.ID, "/shop", world.Mine, gate)
		w.Entry(a.ID, "/plain")
	}
	streams := []*stream{follow(t, one), follow(t, two), follow(t, three)}
	for _, s := range streams {
		s.untilBoth("/shop", "/plain")
	}
	w.Verdict(bad, fails)
	streams[1].until("/plain")
	streams[2].until("/plain")
	t.Run("the other image's workloads keep theirs", func(t *testing.T) { follow(t, one).untilBoth("/shop", "/plain") })
}

func TestNobodyAssertsVerdictsHimself(t *testing.T) {
	w := world.New(t)
	digest := world.Digest("a")
	liar := world.Running(digest, passes, "prov:policy:ci", "sig:policy:ci")
	a := w.Agent("one", world.In(liar)).Start()
	w.Entry(a.ID, "/shop", world.Mine, gate)
	w.Entry(a.ID, "/built", world.Mine, world.Selector("prov:policy:ci"))
	w.Entry(a.ID, "/plain")
	follow(t, a).until("/plain")
}

func TestAVerdictEnds(t *testing.T) {
	w := world.New(t)
	digest := world.Digest("a")
	t.Run("by its time, also for an agent that is connected", func(t *testing.T) {
		a := w.Agent("one", world.In(world.Running(digest))).Start()
		w.VerdictUntil(digest, time.Now().Add(3*time.Second), passes)
		w.Entry(a.ID, "/shop", world.Mine, gate)
		w.Entry(a.ID, "/plain")
		s := follow(t, a)
		s.untilBoth("/shop", "/plain")
		s.until("/plain")
		t.Run("and a later one gives the identity back", func(t *testing.T) {
			w.Verdict(digest, passes)
			s.untilBoth("/shop", "/plain")
		})
	})
	t.Run("for an agent that is cut off, after its lease, also over a restart", func(t *testing.T) {
		a := w.Agent("two", world.In(world.Running(digest)), func(c *agent.Config) { c.VerdictLease = time.Second }).Start()
		w.Verdict(digest, passes)
		w.Entry(a.ID, "/shop", world.Mine, gate)
		w.Entry(a.ID, "/plain")
		s := follow(t, a)
		s.untilBoth("/shop", "/plain")
		w.Stop()
		s.until("/plain")
		a.Stop()
		a.Start()
		follow(t, a).until("/plain")
		w.Start()
		follow(t, a).untilBoth("/shop", "/plain")
	})
}

func TestTheImageOfARunningStreamIsKnownAfterReconnection(t *testing.T) {
	w := world.New(t)
	digest := world.Digest("a")
	a := w.Agent("one", world.In(world.Running(digest))).Start()
	w.Verdict(digest, passes)
	w.Entry(a.ID, "/shop", world.Mine, gate)
	s := follow(t, a)
	s.until("/shop")
	w.Stop()
	w.Start()
	w.Entry(a.ID, "/second")
	s.untilBoth("/shop", "/second")
	w.Verdict(digest, fails)
	s.until("/second")
}
