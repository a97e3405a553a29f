package workloadapi_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	foreign = spiffeid.RequireTrustDomainFromString("other.test")
)

// TestMain lets the test binary play workloads.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("WORKLOAD_STREAMS") != "":
		playManyWorkloads()
		return
	case os.Getenv("WORKLOAD_SOCKET") != "":
		playWorkload()
		return
	}
	os.Exit(m.Run())
}

// playWorkload opens a stream and prints what it gets, one line each, until its input ends.
func playWorkload() {
	conn, err := dial(os.Getenv("WORKLOAD_SOCKET"))
	if err != nil {
		fmt.Println(err)
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).
		FetchX509SVID(workloadapitest.Header(context.Background()), &workload.X509SVIDRequest{})
	for err == nil {
		var resp *workload.X509SVIDResponse
		if resp, err = stream.Recv(); err == nil {
			fmt.Println(resp.GetSvids()[0].GetSpiffeId())
		}
	}
	fmt.Println(status.Code(err), status.Convert(err).Message())
}

// fakeAttestor proves what its function says, and tells watchers what it is told to.
type fakeAttestor struct {
	attest func(ctx context.Context, p attestor.Process) ([]attestor.Selector, error)

	mu      sync.Mutex
	changed func(...int)
	ready   chan struct{}
}

func (f *fakeAttestor) Attest(ctx context.Context, p attestor.Process) ([]attestor.Selector, error) {
	return f.attest(ctx, p)
}

func (f *fakeAttestor) Watch(ctx context.Context, changed func(...int)) error {
	f.mu.Lock()
	f.changed = changed
	f.mu.Unlock()
	close(f.ready)
	<-ctx.Done()
	return nil
}

// say is an attestor that proves fixed selectors.
func say(texts ...string) func(context.Context, attestor.Process) ([]attestor.Selector, error) {
	return func(context.Context, attestor.Process) ([]attestor.Selector, error) { return selectors(texts...), nil }
}

func selectors(texts ...string) []attestor.Selector {
	var out []attestor.Selector
	for _, text := range texts {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			panic(err)
		}
		out = append(out, s)
	}
	return out
}

func newFake(attest func(context.Context, attestor.Process) ([]attestor.Selector, error)) *fakeAttestor {
	return &fakeAttestor{attest: attest, ready: make(chan struct{})}
}

// byUID proves unix:uid and unix:pid.
func byUID(_ context.Context, p attestor.Process) ([]attestor.Selector, error) {
	return selectors(fmt.Sprintf("unix:uid:%d", p.UID), fmt.Sprintf("unix:pid:%d", p.PID)), nil
}

type world struct {
	socket string
	src    *workloadapitest.Source
	audit  *auditLog
	log    *lockedBuffer
	stop   func()
	next   int
}

// auditLog keeps the lines and wakes who waits for one.
type auditLog struct {
	mu    sync.Mutex
	lines []workloadapi.Line
	more  chan struct{}
}

func (a *auditLog) Audit(l workloadapi.Line) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lines = append(a.lines, l)
	close(a.more)
	a.more = make(chan struct{})
}

// wait returns the first line that fits.
func (a *auditLog) wait(t *testing.T, fits func(workloadapi.Line) bool) workloadapi.Line {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		a.mu.Lock()
		i := slices.IndexFunc(a.lines, fits)
		lines, more := a.lines, a.more
		a.mu.Unlock()
		if i >= 0 {
			return lines[i]
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("no such line among %+v", lines)
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// serve runs a Workload API with these attestors until the test ends.
func serve(t testing.TB, cfg workloadapi.Config, attestors ...*fakeAttestor) *world {
	t.Helper()
	return serveWithin(t, time.Minute, cfg, attestors...)
}

// serveWithin is serve where an attestor has this long for its answer.
func serveWithin(t testing.TB, timeout time.Duration, cfg workloadapi.Config, attestors ...*fakeAttestor) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "wapi") //nolint:usetesting // t.TempDir is closed to other users and too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w := &world{
		socket: filepath.Join(dir, "public", "api.sock"), src: workloadapitest.NewSource(t, td),
		audit: &auditLog{more: make(chan struct{})}, log: &lockedBuffer{},
	}
	log := logrus.New()
	log.SetOutput(w.log)
	cfg.Log = log
	cfg.SocketPath = w.socket
	if cfg.Audit == nil {
		cfg.Audit = w.audit
	}
	ready := make(chan struct{})
	cfg.Ready = func() { close(ready) }
	var list []workloadapi.Attestor
	for i, a := range attestors {
		list = append(list, workloadapi.Attestor{Type: fmt.Sprintf("fake%d", i), Workload: a})
	}
	attest := workloadapi.NewAttestation(list, workloadapi.AttestationConfig{Log: log, Timeout: timeout})
	server := workloadapi.New(w.src, attest, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	failed := make(chan error, 1)
	wg.Go(func() { failed <- server.Run(ctx) })
	wg.Go(func() { _ = attest.Run(ctx) })
	select {
	case <-ready:
	case err := <-failed:
		t.Fatal(err)
	}
	w.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		if err := <-failed; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(w.stop)
	return w
}

// put makes an entry; entries are as old as they were put early.
func (w *world) put(path string, sels ...string) *identity.Entry {
	w.next++
	e := &identity.Entry{
		ID: fmt.Sprintf("entry-%04d", w.next), SPIFFEID: spiffeid.RequireFromPath(td, path),
		Selectors: attestor.NewSet(selectors(sels...)...), CreatedAt: time.Unix(int64(w.next), 0),
	}
	w.src.Put(e)
	return e
}

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

type x509Stream = grpc.ServerStreamingClient[workload.X509SVIDResponse]

func (w *world) stream(t testing.TB, ctx context.Context) x509Stream {
	t.Helper()
	api, _ := workloadapitest.Dial(t, w.socket)
	s, err := api.FetchX509SVID(workloadapitest.Header(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// paths returns the paths of the next message's SPIFFE IDs.
func paths(t testing.TB, s x509Stream) string {
	t.Helper()
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, svid := range resp.GetSvids() {
		out = append(out, strings.TrimPrefix(svid.GetSpiffeId(), td.IDString()))
	}
	return strings.Join(out, " ")
}

func wantPaths(t testing.TB, s x509Stream, want string) {
	t.Helper()
	if got := paths(t, s); got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func wantEnd(t testing.TB, s x509Stream, code codes.Code, message string) {
	t.Helper()
	_, err := s.Recv()
	workloadapitest.WantCode(t, err, code)
	if got := status.Convert(err).Message(); message != "" && got != message {
		t.Errorf("got %q, want %q", got, message)
	}
}
