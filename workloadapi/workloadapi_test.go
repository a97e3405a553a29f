package workloadapi_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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
	if os.Getenv("WORKLOAD_SOCKET") != "" {
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
	timeout := time.After(10 * time.Second)
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
	dir, err := os.MkdirTemp("", "wapi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // other users connect
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
	attest := workloadapi.NewAttestation(list, workloadapi.AttestationConfig{Log: log, Timeout: time.Second})
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
	return grpc.NewClient("unix:"+socket, insecureOption)
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

func TestSuite(t *testing.T) {
	workloadapitest.Run(t, func(t *testing.T) workloadapitest.Target {
		w := serve(t, workloadapi.Config{Hold: 200 * time.Millisecond}, newFake(byUID))
		return workloadapitest.Target{
			Socket: w.socket, TrustDomain: td,
			Grant: func(_ *testing.T, path, hint string) func() {
				e := *w.put(path, fmt.Sprintf("unix:uid:%d", os.Getuid()))
				e.Hint = hint
				w.src.Put(&e)
				return func() { w.src.Delete(e.ID) }
			},
		}
	})
}

func TestHold(t *testing.T) {
	t.Run("a caller without an entry is refused when the hold is over", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: 50 * time.Millisecond}, newFake(say("a:b")))
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
		w.audit.wait(t, func(l workloadapi.Line) bool { return l.Outcome == "deny" && l.Reason == "no entry matches" })
	})
	t.Run("a caller is refused at once when there is no hold", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: -1}, newFake(say("a:b")))
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
	})
	t.Run("an entry that arrives meanwhile is served at once", func(t *testing.T) {
		for name, call := range map[string]func(*testing.T, *world) error{
			"X.509": func(t *testing.T, w *world) error { _, err := w.stream(t, t.Context()).Recv(); return err },
			"JWT": func(t *testing.T, w *world) error {
				api, _ := workloadapitest.Dial(t, w.socket)
				_, err := api.FetchJWTSVID(workloadapitest.Header(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}})
				return err
			},
			"bundles": func(t *testing.T, w *world) error {
				api, _ := workloadapitest.Dial(t, w.socket)
				s, err := api.FetchJWTBundles(workloadapitest.Header(t.Context()), &workload.JWTBundlesRequest{})
				if err == nil {
					_, err = s.Recv()
				}
				return err
			},
		} {
			t.Run(name, func(t *testing.T) {
				attested := make(chan struct{}, 1)
				w := serve(t, workloadapi.Config{Hold: time.Hour}, newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) {
					attested <- struct{}{}
					return selectors("a:b"), nil
				}))
				got := make(chan error, 1)
				go func() { got <- call(t, w) }()
				<-attested
				w.src.Touch() // a change that does not help
				w.put("/late", "a:b")
				if err := <-got; err != nil {
					t.Error(err)
				}
			})
		}
	})
	t.Run("an attestor that recovers meanwhile counts", func(t *testing.T) {
		var n atomic.Int32
		w := serve(t, workloadapi.Config{Hold: time.Hour}, newFake(say("a:b")), newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) {
				if n.Add(1) == 1 {
					return nil, errors.New("engine is starting")
				}
				return selectors("docker:label:x:y"), nil
			}))
		w.put("/container", "docker:label:x:y")
		wantPaths(t, w.stream(t, t.Context()), "/container")
	})
}

func TestAttestation(t *testing.T) {
	t.Run("attestors that fail, hang or panic cost only their own selectors", func(t *testing.T) {
		release := make(chan struct{})
		t.Cleanup(func() { close(release) })
		w := serve(t, workloadapi.Config{}, newFake(say("a:b")), newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) {
				return nil, errors.New("engine is down")
			}),
			newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) { <-release; return nil, nil }),
			newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) { panic("bad bytes") }),
			newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) {
				return []attestor.Selector{{Type: "a", Value: "line\nbreak"}, {Type: "c", Value: "d"}}, nil
			}))
		w.put("/ok", "a:b", "c:d")
		wantPaths(t, w.stream(t, t.Context()), "/ok")
		for _, want := range []string{"engine is down", "deadline exceeded", "bad bytes"} {
			if !strings.Contains(w.log.String(), want) {
				t.Errorf("the log does not say %q", want)
			}
		}
	})
	t.Run("if all fail the caller hears that attestation failed", func(t *testing.T) {
		w := serve(t, workloadapi.Config{}, newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) { return nil, errors.New("down") }))
		wantEnd(t, w.stream(t, t.Context()), codes.Unavailable, "workload attestation failed")
		w.audit.wait(t, func(l workloadapi.Line) bool { return l.Outcome == "error" && l.Reason == "every attestor failed" })
	})
	t.Run("an attestor without an answer is none that failed", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: -1}, newFake(say()), newFake(
			func(context.Context, attestor.Process) ([]attestor.Selector, error) { return nil, errors.New("down") }))
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
	})
	t.Run("without attestors nobody has an identity", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: -1})
		w.put("/everybody") // an entry without selectors, which no server makes
		wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "no identity issued")
	})
}

func TestReattestation(t *testing.T) {
	var say atomic.Pointer[[]string]
	var fail atomic.Pointer[error]
	failed := make(chan struct{}, 1)
	set := func(texts ...string) { say.Store(&texts) }
	changing := func() *fakeAttestor {
		return newFake(func(context.Context, attestor.Process) ([]attestor.Selector, error) {
			if err := fail.Load(); err != nil {
				select {
				case failed <- struct{}{}:
				default:
				}
				return nil, *err
			}
			return selectors(*say.Load()...), nil
		})
	}
	t.Run("a stream follows what the process has become", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{}, a)
		<-a.ready
		w.put("/one", "v:1")
		w.put("/two", "v:2")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		set("v:2")
		a.changed(os.Getpid())
		wantPaths(t, s, "/two")
		set("v:1", "v:2")
		a.changed() // anybody
		wantPaths(t, s, "/one /two")
		set("v:3")
		a.changed(1, os.Getpid())
		wantEnd(t, s, codes.PermissionDenied, "no identity issued")
		w.audit.wait(t, func(l workloadapi.Line) bool { return l.Outcome == "deny" && l.Reason == "no entry matches any more" })
	})
	t.Run("facts are renewed on a timer", func(t *testing.T) {
		set("v:1")
		w := serve(t, workloadapi.Config{Reattest: 50 * time.Millisecond}, changing())
		w.put("/one", "v:1")
		w.put("/two", "v:2")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		set("v:2")
		wantPaths(t, s, "/two")
	})
	t.Run("an attestor that fails later keeps its last word, for a while", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{KeepFacts: time.Hour}, a)
		<-a.ready
		w.put("/one", "v:1")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		down := errors.New("engine restarts")
		fail.Store(&down)
		a.changed(os.Getpid())
		<-failed
		w.put("/also", "v:1") // the stream is alive and still has its facts
		wantPaths(t, s, "/one /also")
		fail.Store(nil)
	})
	t.Run("its last word does not count for ever", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{KeepFacts: -1}, a)
		<-a.ready
		w.put("/one", "v:1")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		down := errors.New("engine is gone")
		fail.Store(&down)
		defer fail.Store(nil)
		a.changed(os.Getpid())
		wantEnd(t, s, codes.Unavailable, "workload attestation failed")
	})
	t.Run("nothing is sent when nothing differs", func(t *testing.T) {
		set("v:1")
		a := changing()
		w := serve(t, workloadapi.Config{}, a)
		<-a.ready
		w.put("/one", "v:1")
		s := w.stream(t, t.Context())
		wantPaths(t, s, "/one")
		for range 10 {
			w.src.Touch()
			a.changed(os.Getpid())
		}
		set("v:1", "w:2") // other facts, same identities
		a.changed(os.Getpid())
		w.put("/two", "v:1")
		wantPaths(t, s, "/one /two") // and not "/one" once more
	})
}

type child struct {
	*exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
}

func (w *world) workload(t *testing.T, attr *syscall.SysProcAttr) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "WORKLOAD_SOCKET="+w.socket, "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = attr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return &child{Cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout)}
}

func (c *child) line(t *testing.T) string {
	t.Helper()
	text, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("workload said %q: %v", text, err)
	}
	return strings.TrimSpace(text)
}

func TestProcesses(t *testing.T) {
	t.Run("each process gets its own identity", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("needs root to be somebody else")
		}
		w := serve(t, workloadapi.Config{Hold: -1}, newFake(byUID))
		w.put("/nobody", "unix:uid:65534")
		w.put("/root", "unix:uid:0")
		other := w.workload(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
		if got := other.line(t); got != "spiffe://example.org/nobody" {
			t.Errorf("another user got %s", got)
		}
		own := w.workload(t, nil)
		if got := own.line(t); got != "spiffe://example.org/root" {
			t.Errorf("root got %s", got)
		}
		stranger := w.workload(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 4711}})
		if got := stranger.line(t); got != "PermissionDenied no identity issued" {
			t.Errorf("a stranger got %s", got)
		}
		l := w.audit.wait(t, func(l workloadapi.Line) bool { return l.UID == 65534 && l.Outcome == "allow" })
		if l.PID != other.Process.Pid || !slices.Equal(l.SPIFFEIDs, []string{"spiffe://example.org/nobody"}) || l.Rev == 0 ||
			len(l.EntryIDs) != 1 || len(l.Types) != 1 || l.Facts == "" || l.Selectors != nil {
			t.Errorf("audited as %+v", l)
		}
	})
	t.Run("a process that dies during attestation gets no answer", func(t *testing.T) {
		begun, release := make(chan int, 1), make(chan struct{})
		w := serve(t, workloadapi.Config{}, newFake(func(_ context.Context, p attestor.Process) ([]attestor.Selector, error) {
			begun <- p.PID
			<-release
			return selectors("a:b"), nil
		}))
		w.put("/dead", "a:b")
		ch := w.workload(t, nil)
		if pid := <-begun; pid != ch.Process.Pid {
			t.Fatalf("attested %d", pid)
		}
		_ = ch.Process.Kill() // a zombie is as dead
		if err := unix.Waitid(unix.P_PID, ch.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
			t.Fatal(err)
		}
		close(release)
		w.stop()
		w.audit.mu.Lock()
		defer w.audit.mu.Unlock()
		for _, l := range w.audit.lines {
			if l.Outcome == "allow" {
				t.Errorf("an identity was handed out: %+v", l)
			}
		}
		if n := w.src.Made(); n != 0 {
			t.Errorf("an SVID was made %d times", n)
		}
	})
	t.Run("a stream ends with its process", func(t *testing.T) {
		w := serve(t, workloadapi.Config{}, newFake(byUID))
		ch := w.workload(t, nil)
		w.put("/child", fmt.Sprintf("unix:pid:%d", ch.Process.Pid))
		if got := ch.line(t); got != "spiffe://example.org/child" {
			t.Fatal(got)
		}
		made := w.src.Made()
		_ = ch.Process.Kill()
		_ = ch.Wait()
		w.stop()
		if w.src.Made() != made {
			t.Error("something was made for a dead process")
		}
	})
}

func TestSourceErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		code codes.Code
		text string
	}{
		{"nothing valid is held", fmt.Errorf("sign: %w", identity.ErrUnavailable), codes.Unavailable, "identity is not available at the moment"},
		{"the source ends", context.Canceled, codes.Unavailable, "identity is not available at the moment"},
		{"anything else", errors.New("secret detail"), codes.Internal, "internal error"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
			w.put("/one", "a:b")
			w.src.Fail(c.err)
			wantEnd(t, w.stream(t, t.Context()), c.code, c.text)
			api, _ := workloadapitest.Dial(t, w.socket)
			_, err := api.FetchJWTSVID(workloadapitest.Header(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}})
			workloadapitest.WantCode(t, err, c.code)
			w.src.Fail(nil)
			wantPaths(t, w.stream(t, t.Context()), "/one")
		})
	}
}

func TestBundles(t *testing.T) {
	open := func(t *testing.T, cfg workloadapi.Config) (*world, workload.SpiffeWorkloadAPIClient) {
		cfg.Hold = -1
		w := serve(t, cfg, newFake(say("a:b")))
		w.src.Federate(workloadapitest.NewAuthority(t, foreign).Bundle())
		api, _ := workloadapitest.Dial(t, w.socket)
		return w, api
	}
	t.Run("federated bundles come with the entries that ask for them", func(t *testing.T) {
		w, api := open(t, workloadapi.Config{})
		e := *w.put("/one", "a:b")
		s := w.stream(t, t.Context())
		first, err := s.Recv()
		if err != nil || len(first.GetFederatedBundles()) != 0 {
			t.Fatalf("got %v, %v", first, err)
		}
		e.FederatesWith = []spiffeid.TrustDomain{foreign}
		w.src.Put(&e)
		second, err := s.Recv()
		if err != nil || len(second.GetFederatedBundles()["spiffe://other.test"]) == 0 {
			t.Fatalf("got %v, %v", second, err)
		}
		b, err := api.FetchJWTBundles(workloadapitest.Header(t.Context()), &workload.JWTBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := b.Recv()
		if err != nil || len(got.GetBundles()) != 2 {
			t.Fatalf("got %v, %v", got, err)
		}
		for name, text := range got.GetBundles() {
			if _, err := jwtbundle.Parse(spiffeid.RequireTrustDomainFromString(name), text); err != nil {
				t.Error(err)
			}
			if bytes.Contains(text, []byte(`"use"`)) {
				t.Errorf("%s: has a use: %s", name, text)
			}
		}
	})
	t.Run("verifiers without an identity get nothing", func(t *testing.T) {
		_, api := open(t, workloadapi.Config{})
		s, err := api.FetchX509Bundles(workloadapitest.Header(t.Context()), &workload.X509BundlesRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		workloadapitest.WantCode(t, err, codes.PermissionDenied)
		_, err = api.ValidateJWTSVID(workloadapitest.Header(t.Context()), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
		workloadapitest.WantCode(t, err, codes.PermissionDenied)
	})
	t.Run("or, if allowed, the own bundle", func(t *testing.T) {
		w, api := open(t, workloadapi.Config{AllowUnauthenticatedVerifiers: true})
		ctx := workloadapitest.Header(t.Context())
		s, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Recv()
		if err != nil || len(got.GetBundles()) != 1 || len(got.GetBundles()["spiffe://example.org"]) == 0 {
			t.Errorf("got %v, %v", got, err)
		}
		token, err := w.src.Authority.JWT(map[string]any{"sub": "spiffe://example.org/x", "aud": "a", "exp": time.Now().Add(time.Minute).Unix()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token}); err != nil {
			t.Error(err)
		}
		x := w.stream(t, t.Context())
		wantEnd(t, x, codes.PermissionDenied, "no identity issued")
	})
}

func TestValidate(t *testing.T) {
	w := serve(t, workloadapi.Config{Hold: -1, AllowedForeignJWTClaims: []string{"team"}}, newFake(say("a:b")))
	other := workloadapitest.NewAuthority(t, foreign)
	w.src.Federate(other.Bundle())
	e := *w.put("/one", "a:b")
	e.FederatesWith = []spiffeid.TrustDomain{foreign}
	w.src.Put(&e)
	api, _ := workloadapitest.Dial(t, w.socket)
	validate := func(token string) (*workload.ValidateJWTSVIDResponse, error) {
		return api.ValidateJWTSVID(workloadapitest.Header(t.Context()), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
	}
	claims := func(sub string, change func(map[string]any)) map[string]any {
		m := map[string]any{
			"sub": sub, "aud": []string{"b", "a"}, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(),
			"team": "red", "secret": "x",
		}
		change(m)
		return m
	}
	own, alien := "spiffe://example.org/x", "spiffe://other.test/x"
	nothing := func(map[string]any) {}
	stranger := workloadapitest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("unknown.test"))
	for _, c := range []struct {
		name   string
		by     *workloadapitest.Authority
		sub    string
		change func(map[string]any)
	}{
		{"no exp", w.src.Authority, own, func(m map[string]any) { delete(m, "exp") }},
		{"expired", w.src.Authority, own, func(m map[string]any) { m["exp"] = time.Now().Add(-time.Hour).Unix() }},
		{"no aud", w.src.Authority, own, func(m map[string]any) { delete(m, "aud") }},
		{"another aud", w.src.Authority, own, func(m map[string]any) { m["aud"] = "c" }},
		{"no sub", w.src.Authority, own, func(m map[string]any) { delete(m, "sub") }},
		{"a sub that is no SPIFFE ID", w.src.Authority, "root", nothing},
		{"signed by the federated domain for ours", other, own, nothing},
		{"signed by us for the federated domain", w.src.Authority, alien, nothing},
		{"a trust domain that does not concern the caller", stranger, "spiffe://unknown.test/x", nothing},
	} {
		t.Run("refused: "+c.name, func(t *testing.T) {
			token, err := c.by.JWT(claims(c.sub, c.change))
			if err != nil {
				t.Fatal(err)
			}
			_, err = validate(token)
			workloadapitest.WantCode(t, err, codes.InvalidArgument)
		})
	}
	t.Run("refused: no signature", func(t *testing.T) {
		// {"alg":"none"}, {"sub":"spiffe://example.org/x","aud":"a","exp":9999999999}
		_, err := validate("eyJhbGciOiJub25lIn0.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94IiwiYXVkIjoiYSIsImV4cCI6OTk5OTk5OTk5OX0.")
		workloadapitest.WantCode(t, err, codes.InvalidArgument)
	})
	t.Run("all claims of an own token are returned", func(t *testing.T) {
		token, err := w.src.Authority.JWT(claims(own, nothing))
		if err != nil {
			t.Fatal(err)
		}
		got, err := validate(token)
		if err != nil || got.GetSpiffeId() != own || got.GetClaims().AsMap()["secret"] != "x" {
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("only trusted claims of a foreign token are returned", func(t *testing.T) {
		token, err := other.JWT(claims(alien, nothing))
		if err != nil {
			t.Fatal(err)
		}
		got, err := validate(token)
		if err != nil {
			t.Fatal(err)
		}
		m := got.GetClaims().AsMap()
		if m["secret"] != nil || m["team"] != "red" || m["sub"] != alien || m["exp"] == nil {
			t.Errorf("got %v", m)
		}
	})
}

func TestShutdown(t *testing.T) {
	w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
	w.put("/one", "a:b")
	s := w.stream(t, t.Context())
	wantPaths(t, s, "/one")
	done := make(chan struct{})
	go func() { w.stop(); close(done) }()
	wantEnd(t, s, codes.Unavailable, "") // never Canceled: go-spiffe would not come back
	<-done
	if _, err := os.Lstat(w.socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestAuditTo(t *testing.T) {
	out := &lockedBuffer{}
	w := serve(t, workloadapi.Config{Hold: -1, Audit: workloadapi.AuditTo(out, nil), LogSelectors: []string{"a"}}, newFake(say("a:b", "secret:password")))
	wantEnd(t, w.stream(t, t.Context()), codes.PermissionDenied, "")
	w.put("/one", "a:b")
	wantPaths(t, w.stream(t, t.Context()), "/one")
	w.stop()
	if strings.Contains(out.String(), "password") {
		t.Errorf("a value that must not be logged: %s", out.String())
	}
	var lines []workloadapi.Line
	for text := range strings.Lines(out.String()) {
		var l workloadapi.Line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		lines = append(lines, l)
	}
	if len(lines) != 2 || lines[0].Outcome != "deny" || lines[1].Outcome != "allow" ||
		!slices.Equal(lines[1].Selectors, []string{"a:b"}) || !slices.Equal(lines[1].Types, []string{"a", "secret"}) {
		t.Errorf("got %+v", lines)
	}
}
