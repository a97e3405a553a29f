package robust

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/clock"
	"github.com/assay-id/assay/test/lab/site"
)

// TestClockSet sets the wall clock of a running server, or of a running agent, a day ahead or back, and
// later right again. The workload's own clock goes right all the time: it is never served what begins in
// its future or has ended, and newWorkload looks at each answer.
func TestClockSet(t *testing.T) {
	t.Parallel()
	for _, side := range []string{"server", "agent"} {
		for name, by := range map[string]time.Duration{"ahead": 24 * time.Hour, "back": -24 * time.Hour} {
			t.Run("the "+side+"'s clock is set a day "+name+" and right again", func(t *testing.T) {
				t.Parallel()
				setClock(t, side, by)
			})
		}
	}
}

func setClock(t *testing.T, side string, by time.Duration) {
	t.Helper()
	s := newSite(t)
	metrics := freePort(t)
	s.ServerBlocks = fmt.Sprintf("node_attestor \"join_token\" {}\ntelemetry {\n  prometheus {\n    port = %d\n  }\n}", metrics)
	h := newHistory()
	start(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	node := onlyAgent(t, s)
	for i := range 20 {
		h.mustCreate(t, dial(t, s), newEntry(node, fmt.Sprintf("/w/%d", i)))
	}
	w := newWorkload(t, a.Socket)
	had := w.until("all it is to have", func(c *workloadapi.X509Context, err error) bool { return err == nil && len(paths(c)) == 20 })
	bundle := shown(t, s)

	pid := s.Server().PID()
	if side == "agent" {
		pid = a.PID()
	}
	set, err := clock.Of(pid)
	if err != nil {
		lab.Missing(t, "a clock of a process's own", err)
	}
	defer set.Close()
	before := issued(t, metrics)
	if err := set.Set(by); err != nil {
		t.Fatal(err)
	}
	// Timers take no notice of a clock that is set; each side looks at it now and then.
	switch {
	case side == "server":
		// A day from now its authorities have expired, a day ago they were not made yet: it makes others.
		eventually(t, "the server to notice", func() error {
			if shown(t, s) == bundle {
				return errors.New("the bundle is the same")
			}
			return nil
		})
		for range 10 {
			got, err := client(t, a.Socket).FetchX509Context(patiently(t))
			if err != nil || len(paths(got)) != 20 {
				t.Errorf("while the server's clock is wrong the workload gets %v, %v", paths(got), err)
			}
			inTime(t, got)
		}
	case by > 0:
		// By its clock everything has expired, so it serves nothing, and does not have it all signed again.
		w.until("Unavailable on the stream", func(_ *workloadapi.X509Context, err error) bool { return status.Code(err) == codes.Unavailable })
		if _, err := client(t, a.Socket).FetchX509SVID(patiently(t)); status.Code(err) != codes.Unavailable {
			t.Errorf("want Unavailable, got %v", err)
		}
	default:
		// By its clock nothing has begun; that an SVID is new is no reason not to serve it.
		h.mustCreate(t, dial(t, s), newEntry(node, "/during"))
		inTime(t, w.until("an entry made meanwhile", hasPath("/during")))
	}
	h.check(t, dial(t, s)) // nothing was swept away
	if err := set.Set(0); err != nil {
		t.Fatal(err)
	}

	// By itself all is as it was: the same agent, the same identities, and a new entry arrives.
	h.mustCreate(t, dial(t, s), newEntry(node, "/after"))
	after := w.until("the new entry and all it had", func(c *workloadapi.X509Context, err error) bool {
		return err == nil && len(paths(c)) == len(h.held)
	})
	// One for each new entry; the agent asks for a handful more while the clocks disagree, once a minute.
	if n := issued(t, metrics) - before; n > 30 {
		t.Errorf("%v SVIDs were signed for 20 that were good", n)
	}
	if now := agents(t, s); len(now) != 1 || now[0] != node {
		t.Errorf("the agents were %s and are %v", node, now)
	}
	if now := shown(t, s); !strings.Contains(now, strings.TrimSpace(bundle)) {
		t.Errorf("the bundle lost an authority: it was\n%s\nand is\n%s", bundle, now)
	}
	same := 0
	for _, old := range had.SVIDs {
		for _, svid := range after.SVIDs {
			if svid.Certificates[0].Equal(old.Certificates[0]) {
				same++
			}
		}
	}
	if same != 20 {
		t.Errorf("%d of 20 SVIDs are still the same", same)
	}
	inTime(t, after)
	h.check(t, dial(t, s))
	eventually(t, "health", func() error {
		_, err := s.ServerCLI(patiently(t), "healthcheck")
		if err == nil {
			_, err = a.CLI(patiently(t), "healthcheck", "-socketPath", a.Socket)
		}
		return err
	})
}

// inTime fails the test if an SVID is not valid now.
func inTime(t *testing.T, c *workloadapi.X509Context) {
	t.Helper()
	for _, svid := range c.SVIDs {
		cert, now := svid.Certificates[0], time.Now()
		if now.Before(cert.NotBefore) || !now.Before(cert.NotAfter) {
			t.Errorf("at %s an SVID was served that is valid from %s to %s", now, cert.NotBefore, cert.NotAfter)
		}
	}
}

// issued returns how many SVIDs the server has signed.
func issued(t *testing.T, port int) float64 {
	t.Helper()
	sum := 0.0
	eventually(t, "the server's metrics", func() error {
		code, body, err := fetch(t, fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
		if err != nil {
			return err
		}
		sum = 0
		found := false
		for line := range strings.Lines(body) {
			if !strings.HasPrefix(line, "assay_server_svids_issued_total") {
				continue
			}
			var n float64
			if _, err := fmt.Sscan(line[strings.LastIndex(line, " ")+1:], &n); err != nil {
				return err
			}
			sum, found = sum+n, true
		}
		if code != 200 || !found {
			return errors.New("no count of SVIDs")
		}
		return nil
	})
	return sum
}
