package hostile

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/attestor/unix"
	"github.com/assay-id/assay/server"
)

// role is how the test binary knows what it was started as.
const role = "HOSTILE_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "":
		os.Exit(m.Run())
	case "victim":
		if err := beVictim(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "caller":
		beCaller(os.Args[1])
	}
}

// full says whether the attacks run at the size that is for nights.
var full = os.Getenv("HOSTILE_FULL") != ""

// scaled returns the short form's number, or the long one's.
func scaled(short, long int) int {
	if full {
		return long
	}
	return short
}

// introduction is what a victim says when it serves.
type introduction struct {
	Address, ServerSocket, WorkloadSocket string
}

// size is how large a process is.
type size struct {
	Goroutines, Files int
	Heap, RSS, Peak   int64 // bytes; Peak is the largest RSS since the last measurement
}

// handshakeTime is how long a victim waits for a handshake.
const handshakeTime = 5 * time.Second

// beVictim runs a server and an agent in this process, and measures itself whenever a line comes in,
// until its input ends.
func beVictim(dir string) error {
	silent := logrus.New()
	silent.SetOutput(os.Stderr)
	silent.SetLevel(logrus.ErrorLevel)
	cfg := serverConfig(dir)
	cfg.Log = silent
	cfg.Limits.Handshake = handshakeTime
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	failed := make(chan error, 2)
	run := func(ready <-chan struct{}, part func() error) error {
		parts.Go(func() {
			if err := part(); err != nil {
				failed <- err
			}
		})
		select {
		case <-ready:
			return nil
		case err := <-failed:
			return err
		}
	}
	up := make(chan struct{})
	var running server.Running
	cfg.Ready = func(r server.Running) { running = r; close(up) }
	if err := run(up, func() error { return server.Run(ctx, cfg) }); err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix:"+cfg.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	token, err := agentv1.NewAgentClient(conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: wireID("/node")})
	if err != nil {
		return err
	}
	_, err = entryv1.NewEntryClient(conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId: wireID("/mine"), ParentId: wireID("/node"),
		Selectors: []*types.Selector{{Type: unix.Type, Value: fmt.Sprint("uid:", os.Getuid())}},
	}}})
	if err != nil {
		return err
	}
	if err := conn.Close(); err != nil {
		return err
	}
	var port int
	_, text, _ := strings.Cut(running.Address.String(), ":")
	if _, err := fmt.Sscan(text, &port); err != nil {
		return err
	}
	its, err := agentConfig(filepath.Join(dir, "a"), port, token.GetValue())
	if err != nil {
		return err
	}
	its.Log = silent
	up = make(chan struct{})
	its.Ready = func() { close(up) }
	if err := run(up, func() error { return agent.Run(ctx, its) }); err != nil {
		return err
	}
	say := json.NewEncoder(os.Stdout)
	if err := say.Encode(introduction{running.Address.String(), cfg.SocketPath, its.SocketPath}); err != nil {
		return err
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		select {
		case err := <-failed:
			return fmt.Errorf("a part ended: %w", err)
		default:
		}
		s, err := measure()
		if err == nil {
			err = say.Encode(s)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// measure says how large this process is, garbage taken out.
func measure() (size, error) {
	peak, err := memory("VmHWM:")
	if err != nil {
		return size{}, err
	}
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return size{}, err
	}
	rss, err := memory("VmRSS:")
	if err != nil {
		return size{}, err
	}
	return size{
		Goroutines: runtime.NumGoroutine(), Files: len(files), Heap: int64(m.HeapAlloc), RSS: rss, Peak: peak,
	}, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) // proc(5): forget the peak
}

func memory(field string) (int64, error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			var kib int64
			_, err := fmt.Sscan(rest, &kib)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("no %s in /proc/self/status", field)
}

// victim is a server and an agent in a process of their own.
type victim struct {
	t   *testing.T
	is  introduction
	in  io.WriteCloser
	out *json.Decoder
	cmd *exec.Cmd

	local *grpc.ClientConn
	// cert is that of an honest agent.
	cert *tls.Certificate
}

// newVictim starts one that ends with the test.
func newVictim(t *testing.T) *victim {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{t: t, cmd: exec.Command(self, shortDir(t))}
	v.cmd.Env = append(os.Environ(), role+"=victim")
	v.cmd.Stderr = os.Stderr
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if v.in, err = v.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.out = json.NewDecoder(out)
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = v.in.Close()
		if err := v.cmd.Wait(); err != nil {
			t.Errorf("the victim ended with: %v", err)
		}
	})
	if err := v.out.Decode(&v.is); err != nil {
		t.Fatalf("the victim did not start: %v", err)
	}
	v.local = unixConn(t, v.is.ServerSocket)
	if _, v.cert, err = enroll(t.Context(), dialTCP(t, v.is.Address, nil), "honest"); err != nil {
		t.Fatal(err)
	}
	return v
}

// size measures the victim.
func (v *victim) size() size {
	v.t.Helper()
	var s size
	if _, err := io.WriteString(v.in, "\n"); err != nil {
		v.t.Fatalf("the victim is gone: %v", err)
	}
	if err := v.out.Decode(&s); err != nil {
		v.t.Fatalf("the victim is gone: %v", err)
	}
	return s
}

// patron is somebody honest: he calls the server over TCP, as an agent and as a stranger of another
// address than the attacker's, and the agent over its socket, on new connections each time, as whoever
// comes while the victim is attacked would.
type patron struct {
	mu   sync.Mutex
	took []time.Duration
}

func (p *patron) visit(ctx context.Context, v *victim) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, cert := range []*tls.Certificate{nil, v.cert} {
		from := "127.0.0.1"
		if cert == nil {
			from = "127.0.0.2"
		}
		remote := dialTCP(v.t, v.is.Address, cert, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext(ctx, "tcp", address)
		}))
		_, err := bundlev1.NewBundleClient(remote).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err := errors.Join(err, remote.Close()); err != nil {
			return fmt.Errorf("the server, from %s: %w", from, err)
		}
	}
	conn := unixConn(v.t, v.is.WorkloadSocket)
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return fmt.Errorf("the agent: %w", err)
	}
	resp, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("the agent: %w", err)
	}
	if len(resp.GetSvids()) == 0 {
		return errors.New("the agent: no identity")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.took = append(p.took, time.Since(began))
	return nil
}

// visits makes some, and reports those that failed.
func (p *patron) visits(t *testing.T, v *victim, when string, n int) {
	t.Helper()
	for range n {
		if err := p.visit(t.Context(), v); err != nil {
			t.Errorf("%s the attack, somebody honest was not served: %v", when, err)
			return
		}
	}
}

func (p *patron) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	slices.Sort(p.took)
	if len(p.took) == 0 {
		return "none"
	}
	return fmt.Sprintf("%d, half of them under %s, the longest %s", len(p.took), p.took[len(p.took)/2].Round(time.Millisecond), p.took[len(p.took)-1].Round(time.Millisecond))
}

// bounds are what an attack may cost the victim.
type bounds struct {
	// Peak is how much memory it may take while it lasts.
	Peak int64
}

// What an attack may leave behind: what pools and caches keep.
const (
	leftGoroutines = 25
	leftFiles      = 10
	leftHeap       = 24 << 20
)

// suffer attacks the victim. Somebody honest must be served before, during and after; afterwards the
// victim must be as it was.
func (v *victim) suffer(t *testing.T, b bounds, attack func(t *testing.T)) {
	t.Helper()
	v.t = t
	var before, during, after patron
	before.visits(t, v, "before", 3)
	was := v.settle(nil)
	over := make(chan struct{})
	var honest sync.WaitGroup
	honest.Go(func() {
		for n := 0; ; n++ { // at least twice, whatever the attack takes
			during.visits(t, v, "during", 1)
			select {
			case <-over:
				if n > 0 {
					return
				}
			default:
			}
			if t.Failed() {
				return
			}
		}
	})
	attack(t)
	close(over)
	honest.Wait()
	peak := v.size().Peak
	after.visits(t, v, "after", 3)
	is := v.settle(&was)
	t.Logf("honest visits before: %s; during: %s; after: %s", &before, &during, &after)
	t.Logf("before: %s; after: %s; the most in between: %d MiB", was, is, peak>>20)
	if grown := peak - was.RSS; b.Peak > 0 && grown > b.Peak {
		t.Errorf("the attack took %d MiB of memory, the limit is %d", grown>>20, b.Peak>>20)
	}
}

func (s size) String() string {
	return fmt.Sprintf("%d goroutines, %d files, heap %d MiB, RSS %d MiB", s.Goroutines, s.Files, s.Heap>>20, s.RSS>>20)
}

// settle waits until the victim is no larger than it was, within what pools keep, and reports if it
// stays larger. Without a size to compare with, it waits until two measurements agree.
func (v *victim) settle(was *size) size {
	v.t.Helper()
	deadline := time.Now().Add(patience)
	last := v.size()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		is := v.size()
		switch {
		case was == nil && is.Goroutines == last.Goroutines && is.Files == last.Files:
			return is
		case was != nil && is.Goroutines <= was.Goroutines+leftGoroutines && is.Files <= was.Files+leftFiles && is.Heap <= was.Heap+leftHeap:
			return is
		case time.Now().After(deadline):
			if was != nil {
				v.t.Errorf("the victim stays larger: it was %s and is %s", was, is)
			}
			return is
		}
		last = is
	}
	return last
}

// eventually waits for what another process is about to do.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
		<-tick.C
	}
}

// timedOut reports whether a connection's deadline has passed.
func timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
