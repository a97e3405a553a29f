package robust

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

// newAgent starts an agent and waits until it is healthy. It is killed when the test ends.
func newAgent(t *testing.T, s *site.Site, name string, o site.AgentOptions) *site.Agent {
	t.Helper()
	ctx := patiently(t)
	if o.Token == "" && o.Blocks == "" {
		var err error
		if o.Token, err = s.Token(ctx); err != nil {
			t.Fatal(err)
		}
	}
	a, err := s.NewAgent(ctx, name, o)
	if err != nil {
		t.Fatal(err)
	}
	startAgent(t, a)
	return a
}

func startAgent(t *testing.T, a *site.Agent) {
	t.Helper()
	launchAgent(t, a)
	if err := a.Healthy(patiently(t)); err != nil {
		t.Fatal(err)
	}
}

// launchAgent starts an agent that nobody may admit.
func launchAgent(t *testing.T, a *site.Agent) {
	t.Helper()
	if err := a.Launch(); err != nil {
		t.Fatal(err)
	}
	process := a.Process
	t.Cleanup(func() {
		process.Kill()
		if t.Failed() {
			t.Logf("end of the log of %s:\n%s", a.Dir, site.Tail(a.Log, 40))
		}
	})
}

// workload follows its X.509 stream, as a client does that lives through all of it. Each update must be
// usable by itself: the SVID verifies with the bundle beside it.
type workload struct {
	t  *testing.T
	mu sync.Mutex // guards the rest
	// last is what the workload has, nil if it has nothing; err is why the stream broke last.
	last    *workloadapi.X509Context
	err     error
	updates int
	changed chan struct{} // closed, and replaced, with each update
}

func (w *workload) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, svid := range c.SVIDs {
		if !time.Now().Before(svid.Certificates[0].NotAfter) {
			w.t.Errorf("an SVID was served that expired at %s", svid.Certificates[0].NotAfter)
		}
		if svid.Certificates[0].NotBefore.After(time.Now()) {
			w.t.Errorf("an SVID was served that begins at %s", svid.Certificates[0].NotBefore)
		}
		if _, _, err := x509svid.Verify(svid.Certificates, c.Bundles); err != nil {
			w.t.Errorf("an SVID was served that its bundle does not verify: %v", err)
		}
	}
	w.last, w.err = c, nil
	w.note()
}

func (w *workload) OnX509ContextWatchError(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if status.Code(err) == codes.Canceled {
		return // the test is over
	}
	w.err = err
	w.note()
}

func (w *workload) note() {
	w.updates++
	close(w.changed)
	w.changed = make(chan struct{})
}

// newWorkload starts to follow.
func newWorkload(t *testing.T, socket string) *workload {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	w := &workload{t: t, changed: make(chan struct{})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = client.WatchX509Context(ctx, w)
	}()
	t.Cleanup(func() { cancel(); <-done; client.Close() })
	return w
}

// until waits until good says of what the workload has that it is.
func (w *workload) until(what string, good func(c *workloadapi.X509Context, err error) bool) *workloadapi.X509Context {
	w.t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		w.mu.Lock()
		last, err, changed := w.last, w.err, w.changed
		w.mu.Unlock()
		if good(last, err) {
			return last
		}
		select {
		case <-changed:
		case <-timeout.C:
			w.t.Fatalf("no %s after %v; the workload has %v, %v", what, patience, paths(last), err)
		}
	}
}

// has waits until the workload has exactly these SPIFFE IDs.
func (w *workload) has(want ...string) *workloadapi.X509Context {
	w.t.Helper()
	return w.until(fmt.Sprint(want), func(c *workloadapi.X509Context, err error) bool {
		return err == nil && fmt.Sprint(paths(c)) == fmt.Sprint(want)
	})
}

func paths(c *workloadapi.X509Context) []string {
	if c == nil {
		return nil
	}
	var all []string
	for _, svid := range c.SVIDs {
		all = append(all, svid.ID.Path())
	}
	return all
}

// client is a workload that asks once.
func client(t *testing.T, socket string) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// signed asks for a JWT-SVID that nobody has asked for before, so that the server must sign it.
func signed(t *testing.T, socket, audience string) error {
	t.Helper()
	_, err := client(t, socket).FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: audience})
	return err
}

// watchSocket looks all the time, until the returned function is called, whether the socket's file is
// there, and fails the test if it ever is not.
func watchSocket(t *testing.T, path string) (stop func()) {
	t.Helper()
	ended := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			if _, err := os.Lstat(path); err != nil {
				t.Errorf("the socket is missing: %v", err)
				return
			}
			// Who connects is served or refused, and never told that there is no such file.
			if conn, err := net.Dial("unix", path); err == nil {
				_ = conn.Close()
			} else if os.IsNotExist(err) || strings.Contains(err.Error(), "no such file") {
				t.Errorf("the socket is missing: %v", err)
				return
			}
			select {
			case <-ended:
				return
			case <-tick.C:
			}
		}
	})
	return sync.OnceFunc(func() { close(ended); group.Wait() })
}

// hasPath is a condition for until: the SPIFFE ID is among what the workload has.
func hasPath(path string) func(*workloadapi.X509Context, error) bool {
	return func(c *workloadapi.X509Context, err error) bool {
		return err == nil && slices.Contains(paths(c), path)
	}
}
