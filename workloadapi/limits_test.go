package workloadapi_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

func TestLimits(t *testing.T) {
	t.Run("a user over its share of streams is told so, and others are served", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Limits: workloadapi.Limits{Streams: 8}}, newFake(say("a:b")))
		w.put("/one", "a:b")
		for range 4 { // half of all, and one more would be more than are left for others
			wantPaths(t, w.stream(t, t.Context()), "/one")
		}
		wantEnd(t, w.stream(t, t.Context()), codes.ResourceExhausted, "")
		if os.Getuid() == 0 {
			other := w.workload(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
			if got := other.line(t); got != "spiffe://example.org/one" {
				t.Errorf("another user got %s", got)
			}
		}
	})
	t.Run("a stream that ends makes room", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Limits: workloadapi.Limits{Streams: 2}}, newFake(say("a:b")))
		w.put("/one", "a:b")
		for range 5 {
			ctx, cancel := context.WithCancel(t.Context())
			s := w.stream(t, ctx)
			wantPaths(t, s, "/one")
			cancel()
			for { // the server notices a moment later
				if _, err := s.Recv(); err != nil {
					break
				}
			}
			for {
				api, _ := workloadapitest.Dial(t, w.socket)
				_, err := api.FetchJWTSVID(workloadapitest.Header(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}})
				if err == nil {
					break
				}
				workloadapitest.WantCode(t, err, codes.ResourceExhausted)
			}
		}
	})
	t.Run("a call that is canceled takes no place, however soon the next one comes", func(t *testing.T) {
		w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // what ends a call may have to wait for its turn
		const calls = 5000
		if refused := cancelAtOnce(t, w.socket, calls); refused > 0 {
			t.Errorf("%d of %d calls were told that there are too many, where there was one at a time", refused, calls)
		}
	})
	t.Run("a call whose answer nobody reads keeps its place, until its connection ends", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Limits: workloadapi.Limits{Streams: 16}}, newFake(say("a:b")))
		w.put("/one", "a:b")
		if answers := readNothing(t, w.socket, 50); answers != 8 {
			t.Errorf("%d answers are in memory, want 8", answers)
		}
		defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nothing is collected but for who asks
		api, _ := workloadapitest.Dial(t, w.socket)
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			_, err := api.FetchJWTSVID(workloadapitest.Header(t.Context()), &workload.JWTSVIDRequest{Audience: []string{"a"}})
			if err == nil {
				break
			}
			workloadapitest.WantCode(t, err, codes.ResourceExhausted)
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	})
	t.Run("a user over its share of connections is cut off", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Limits: workloadapi.Limits{Connections: 4}}, newFake(say("a:b")))
		var open []net.Conn
		for range 3 {
			c, err := net.Dial("unix", w.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			open = append(open, c)
		}
		if _, err := io.ReadAll(open[2]); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
		if _, err := open[0].Read(make([]byte, 1)); err != nil { // the server's HTTP/2 settings
			t.Errorf("a connection within its share: %v", err)
		}
	})
	t.Run("requests and headers have a size", func(t *testing.T) {
		w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
		w.put("/one", "a:b")
		api, _ := workloadapitest.Dial(t, w.socket)
		ctx := workloadapitest.Header(t.Context())
		_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: string(make([]byte, 1<<20))})
		workloadapitest.WantCode(t, err, codes.ResourceExhausted)
		many := make([]string, 101)
		for i := range many {
			many[i] = fmt.Sprint(i)
		}
		_, err = api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: many})
		workloadapitest.WantCode(t, err, codes.InvalidArgument)
		_, err = api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{string(make([]byte, 5000))}})
		workloadapitest.WantCode(t, err, codes.InvalidArgument)
	})
	t.Run("a token for nobody is refused at once, even to who has no identity yet", func(t *testing.T) {
		w := serve(t, workloadapi.Config{Hold: time.Minute}, newFake(say("a:b")))
		api, _ := workloadapitest.Dial(t, w.socket)
		for _, audience := range [][]string{nil, {}, {""}, {"", ""}} {
			_, err := api.FetchJWTSVID(workloadapitest.Header(t.Context()), &workload.JWTSVIDRequest{Audience: audience})
			workloadapitest.WantCode(t, err, codes.InvalidArgument)
		}
	})
	t.Run("foreign bytes on the socket harm nobody", func(t *testing.T) {
		w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
		w.put("/one", "a:b")
		for _, bytes := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x02\x00", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + string(make([]byte, 100))} {
			c, err := net.Dial("unix", w.socket)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write([]byte(bytes))
			_ = c.(*net.UnixConn).CloseWrite()
			_, _ = io.ReadAll(c)
			_ = c.Close()
		}
		wantPaths(t, w.stream(t, t.Context()), "/one")
	})
}

// writeHeaders encodes those of a call.
func writeHeaders(enc *hpack.Encoder, method string) {
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", method},
		{":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		_ = enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // to memory
	}
}

// readNothing makes so many calls, one after another, and lets nothing of their answers through but that there is one.
// It returns how many there are, and hangs up.
func readNothing(t *testing.T, socket string, calls uint32) (answers int) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var head bytes.Buffer
	frames, enc := http2.NewFramer(conn, conn), hpack.NewEncoder(&head)
	_, err = io.WriteString(conn, http2.ClientPreface)
	err = errors.Join(err, frames.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	for i := range calls {
		head.Reset()
		writeHeaders(enc, grpc_health_v1.Health_Check_FullMethodName)
		err = errors.Join(err, frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: head.Bytes(), EndHeaders: true}),
			frames.WriteData(2*i+1, true, make([]byte, 5))) // an empty message
		for {
			if err != nil {
				t.Fatal(err)
			}
			var f http2.Frame
			if f, err = frames.ReadFrame(); err != nil {
				continue
			}
			headers, ok := f.(*http2.HeadersFrame)
			if ok && !headers.StreamEnded() { // as that of a refusal is
				answers++
			}
			if _, reset := f.(*http2.RSTStreamFrame); ok || reset {
				break
			}
		}
	}
	return answers
}

// cancelAtOnce opens so many calls on one connection, each canceled before the next, as fast as they can
// be read. It returns how many were told that there are too many.
func cancelAtOnce(t *testing.T, socket string, calls uint32) (refused int) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var attack, head bytes.Buffer
	attack.WriteString(http2.ClientPreface)
	out, enc := http2.NewFramer(&attack, nil), hpack.NewEncoder(&head)
	_ = out.WriteSettings() // to memory, like all that follows
	for i := range calls {
		head.Reset()
		writeHeaders(enc, workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName)
		_ = out.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: head.Bytes(), EndHeaders: true})
		_ = out.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
	}
	last := [8]byte{1}
	_ = out.WritePing(false, last)
	go func() { _, _ = conn.Write(attack.Bytes()) }() // a connection that was cut misses the ping
	in, dec := http2.NewFramer(nil, conn), hpack.NewDecoder(4096, nil)
	for {
		f, err := in.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if ping, ok := f.(*http2.PingFrame); ok && ping.Data == last {
			break
		}
		headers, ok := f.(*http2.HeadersFrame)
		if !ok {
			continue
		}
		fields, err := dec.DecodeFull(headers.HeaderBlockFragment())
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range fields {
			if f.Name == "grpc-status" && f.Value == strconv.Itoa(int(codes.ResourceExhausted)) {
				refused++
			}
		}
	}
	return refused
}

func TestNoDescriptorIsLeaked(t *testing.T) {
	w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
	w.put("/one", "a:b")
	fetch := func() {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		conn, err := dial(w.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		s, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(workloadapitest.Header(ctx), &workload.X509SVIDRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		if err != nil {
			t.Error(err)
		}
	}
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	fetch()
	before := count()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				fetch()
			}
		})
	}
	for range 100 { // callers that leave at once
		c, err := net.Dial("unix", w.socket)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	wg.Wait()
	w.stop()
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestThousandsOfStreams(t *testing.T) {
	const connections, perConnection = 40, 50
	w := serve(t, workloadapi.Config{Limits: workloadapi.Limits{Connections: 16384, Streams: 65536}}, newFake(say("a:b")))
	w.put("/one", "a:b")
	streams := openStreams(t, w, connections, perConnection)
	made := w.src.Made()
	w.put("/two", "a:b")
	for _, s := range streams {
		wantPaths(t, s, "/one /two")
	}
	if n := w.src.Made() - made; n > 10 { // some may have found the picture before the entry
		t.Errorf("one change was answered %d times for %d streams with the same facts", n, len(streams))
	}
}

// openStreams opens streams and waits for the first message of each.
func openStreams(t testing.TB, w *world, connections, perConnection int) []x509Stream {
	t.Helper()
	streams := make([]x509Stream, connections*perConnection)
	var wg sync.WaitGroup
	for i := range connections {
		api, _ := workloadapitest.Dial(t, w.socket)
		wg.Go(func() {
			for j := range perConnection {
				s, err := api.FetchX509SVID(workloadapitest.Header(t.Context()), &workload.X509SVIDRequest{})
				if err == nil {
					_, err = s.Recv()
				}
				if err != nil {
					t.Error(err)
					return
				}
				streams[i*perConnection+j] = s
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return streams
}

// playManyWorkloads opens streams, says so, and stays until its input ends. With WORKLOAD_SHARE set
// they share a connection.
func playManyWorkloads() {
	n, err := strconv.Atoi(os.Getenv("WORKLOAD_STREAMS"))
	if err != nil {
		panic(err)
	}
	var conn *grpc.ClientConn
	for range n {
		if conn == nil || os.Getenv("WORKLOAD_SHARE") == "" {
			if conn, err = dial(os.Getenv("WORKLOAD_SOCKET")); err != nil {
				panic(err)
			}
		}
		s, err := workload.NewSpiffeWorkloadAPIClient(conn).
			FetchX509SVID(workloadapitest.Header(context.Background()), &workload.X509SVIDRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		if err != nil {
			panic(err)
		}
	}
	fmt.Println("open")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// TestMemoryOfAStream keeps the promise of 20 KiB for each open stream. A connection costs about as
// much again, nearly all of it the stacks of gRPC's own two goroutines for it.
func TestMemoryOfAStream(t *testing.T) {
	const streams = 500
	for _, c := range []struct {
		name, share string
		limit       uint64 // bytes
	}{
		{"on a connection it shares", "1", 20 << 10},
		{"with a connection of its own", "", 48 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := serve(t, workloadapi.Config{}, newFake(say("a:b")))
			w.put("/one", "a:b")
			used := func() uint64 {
				for range 4 { // stacks shrink by half each time
					runtime.GC()
				}
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return m.HeapAlloc + m.StackInuse
			}
			w.workload(t, nil, "WORKLOAD_STREAMS=1").line(t) // what is made once
			before := used()
			w.workload(t, nil, "WORKLOAD_STREAMS="+strconv.Itoa(streams), "WORKLOAD_SHARE="+c.share).line(t)
			each := (used() - before) / streams
			t.Logf("%d bytes for each stream", each)
			if each > c.limit {
				t.Errorf("%d bytes for each stream, the limit is %d", each, c.limit)
			}
		})
	}
}

// BenchmarkUpdate is one change sent to 5,000 open streams. ns/stream is the time, client included,
// of each; the clients run in the same process and take about as much as the server.
func BenchmarkUpdate(b *testing.B) {
	w := serve(b, workloadapi.Config{Limits: workloadapi.Limits{Connections: 16384, Streams: 65536}},
		newFake(func(_ context.Context, p attestor.Process) ([]attestor.Selector, error) { return selectors("a:b"), nil }))
	w.put("/one", "a:b")
	const streams = 5000
	all := openStreams(b, w, 50, streams/50)
	runtime.GC()
	var before, after syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	for b.Loop() {
		w.src.Rotate()
		for _, s := range all {
			if _, err := s.Recv(); err != nil {
				b.Fatal(err)
			}
		}
	}
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
	b.ReportMetric(float64(cpu)/float64(b.N)/streams, "cpu-ns/stream")
}
