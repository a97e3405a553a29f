package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/test/lab/site"
)

// bench is one site to measure, with what the scenes share.
type bench struct {
	*site.Site
	agent   *site.Agent
	node    string // the agent's SPIFFE ID path
	entries entryv1.EntryClient
	conn    *grpc.ClientConn // to the server's private socket
	short   bool
	verbose bool
	results []result
	cleanup []func()
}

func newBench(ctx context.Context, o options) (*bench, error) {
	dir, err := os.MkdirTemp("", "assay-bench-")
	if err != nil {
		return nil, err
	}
	b := &bench{short: o.short, verbose: o.verbose}
	b.later(func() { os.RemoveAll(dir) })
	b.Site, err = site.New(dir, o.bin)
	if err != nil {
		b.close()
		return nil, err
	}
	b.SPIRE = o.spire
	// The driver is one address and must not be slowed as one; debug logs are not what is measured.
	b.LogLevel = "warn"
	b.ServerExtra = "ratelimit {\n    attestation = false\n    signing     = false\n  }"
	if err := b.StartServer(ctx); err != nil {
		b.close()
		return nil, err
	}
	b.later(func() { _ = b.Stop() })
	if b.conn, err = b.DialServer(); err != nil {
		b.close()
		return nil, err
	}
	b.later(func() { b.conn.Close() })
	b.entries = entryv1.NewEntryClient(b.conn)
	return b, nil
}

// startAgent starts the site's agent. With the socket of an engine it attests containers, else processes.
func (b *bench) startAgent(ctx context.Context, engine string) error {
	token, err := b.Token(ctx)
	if err != nil {
		return err
	}
	b.node = "/spire/agent/join_token/" + token
	if b.agent, err = b.NewAgent(ctx, "agent", site.AgentOptions{Token: token, Docker: engine}); err != nil {
		return err
	}
	b.later(func() {
		if b.agent.Process != nil {
			_ = b.agent.Stop(15 * time.Second)
		}
	})
	return b.agent.Start(ctx)
}

func (b *bench) later(f func()) { b.cleanup = append(b.cleanup, f) }

func (b *bench) close() {
	for _, undo := range slices.Backward(b.cleanup) {
		undo()
	}
}

// n is a count: as given, or its hundredth (at least 3) in a short run.
func (b *bench) n(count int) int {
	if b.short {
		return max(3, count/100)
	}
	return count
}

func (b *bench) report(f figure, value float64, more string) {
	b.results = append(b.results, result{Name: f.name, Value: value, Unit: f.unit, Bar: f.bar, Spire: f.spire, More: more})
	if b.verbose {
		fmt.Fprintf(os.Stderr, "bench:   %s: %s %s %s\n", f.name, number(value), f.unit, more)
	}
}

// create makes entries in batches of 100 and returns them.
func (b *bench) create(ctx context.Context, list []*types.Entry) ([]*types.Entry, error) {
	made := make([]*types.Entry, 0, len(list))
	for chunk := range slices.Chunk(list, 100) {
		resp, err := b.entries.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: chunk})
		if err != nil {
			return nil, err
		}
		for _, r := range resp.GetResults() {
			if r.GetStatus().GetCode() != 0 {
				return nil, fmt.Errorf("create entry: %s", r.GetStatus().GetMessage())
			}
			made = append(made, r.GetEntry())
		}
	}
	return made, nil
}

func (b *bench) remove(ctx context.Context, list ...*types.Entry) error {
	ids := make([]string, len(list))
	for i, e := range list {
		ids[i] = e.GetId()
	}
	resp, err := b.entries.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: ids})
	if err != nil {
		return err
	}
	for _, r := range resp.GetResults() {
		if r.GetStatus().GetCode() != 0 {
			return fmt.Errorf("delete entry: %s", r.GetStatus().GetMessage())
		}
	}
	return nil
}

// mine is an entry that this very process matches.
func (b *bench) mine(path string) *types.Entry {
	return entryFor(b.node, path, fmt.Sprintf("uid:%d", os.Getuid()))
}

func entryFor(parent, path, unix string) *types.Entry {
	return &types.Entry{
		SpiffeId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: parent},
		Selectors: []*types.Selector{{Type: "unix", Value: unix}},
	}
}

// unrelated are entries with three selectors each that hang on agents which do not exist.
func unrelated(count int) []*types.Entry {
	list := make([]*types.Entry, count)
	for i := range list {
		e := entryFor(fmt.Sprintf("/spire/agent/join_token/absent-%d", i%997), fmt.Sprintf("/unrelated/%d", i), fmt.Sprintf("uid:%d", i))
		e.Selectors = append(e.Selectors,
			&types.Selector{Type: "unix", Value: fmt.Sprintf("gid:%d", i)},
			&types.Selector{Type: "docker", Value: fmt.Sprintf("label:app:unrelated-%d", i)})
		list[i] = e
	}
	return list
}

// stream is one workload's open X.509 stream.
type stream struct {
	conn   *grpc.ClientConn
	client workload.SpiffeWorkloadAPI_FetchX509SVIDClient
	cancel context.CancelFunc
}

// dialWorkload returns a connection of its own to the Workload API.
func dialWorkload(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10))
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// open opens a stream on a connection of its own and reads the first answer.
func open(ctx context.Context, socket string) (*stream, *workload.X509SVIDResponse, error) {
	conn, err := dialWorkload(socket)
	if err != nil {
		return nil, nil, err
	}
	return openOn(ctx, conn)
}

// openOn opens a stream on a connection, which is the stream's from then on, and reads the first answer.
func openOn(ctx context.Context, conn *grpc.ClientConn) (*stream, *workload.X509SVIDResponse, error) {
	var err error
	ctx, cancel := context.WithCancel(withHeader(ctx))
	s := &stream{conn: conn, cancel: cancel}
	if s.client, err = workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{}); err != nil {
		s.close()
		return nil, nil, err
	}
	first, err := s.client.Recv()
	if err != nil {
		s.close()
		return nil, nil, err
	}
	return s, first, nil
}

func (s *stream) close() {
	s.cancel()
	s.conn.Close()
}

// until reads answers until good says yes.
func (s *stream) until(good func(*workload.X509SVIDResponse) bool) error {
	for {
		resp, err := s.client.Recv()
		if err != nil {
			return err
		}
		if good(resp) {
			return nil
		}
	}
}

// served waits until this process has an SVID: a stock agent learns of an entry when it asks for news.
func (b *bench) served(ctx context.Context) error {
	for {
		s, _, err := open(ctx, b.agent.Socket)
		if err == nil {
			s.close()
			return nil
		}
		if b.SPIRE.Agent == "" || !sleep(ctx, 100*time.Millisecond) {
			return err
		}
	}
}

// rounds is how often to do what takes a stock agent seconds and ours milliseconds.
func (b *bench) rounds(count int) int {
	if b.SPIRE.Agent != "" {
		return max(3, b.n(count)/15)
	}
	return b.n(count)
}

// openMany opens streams, some at a time.
func openMany(ctx context.Context, socket string, count int) ([]*stream, error) {
	streams := make([]*stream, count)
	err := parallel(16, count, func(i int) error {
		s, _, err := open(ctx, socket)
		streams[i] = s
		return err
	})
	if err != nil {
		closeAll(streams)
		return nil, err
	}
	return streams, nil
}

func closeAll(streams []*stream) {
	for _, s := range streams {
		if s != nil {
			s.close()
		}
	}
}

// parallel calls f(0) to f(count-1) from the given number of goroutines and joins their errors.
func parallel(workers, count int, f func(i int) error) error {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
		next = make(chan int)
	)
	for range workers {
		wg.Go(func() {
			for i := range next {
				if err := f(i); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	for i := range count {
		next <- i
	}
	close(next)
	wg.Wait()
	if len(errs) > 3 {
		errs = append(errs[:3], fmt.Errorf("and %d more", len(errs)-3))
	}
	return errors.Join(errs...)
}

// cpu returns the CPU time that the live threads of a process have used.
func cpu(pid int) (time.Duration, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	if len(tasks) == 0 {
		return 0, fmt.Errorf("read the CPU time of process %d: it has ended", pid)
	}
	var total time.Duration
	for _, path := range tasks {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the thread ended
		}
		first, _, _ := strings.Cut(string(text), " ")
		ns, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse %s: %w", path, err)
		}
		total += time.Duration(ns)
	}
	return total, nil
}

// cpuOf returns the CPU time that processes use while f runs.
func cpuOf(f func() error, pids ...int) (time.Duration, error) {
	var before, after time.Duration
	for _, pid := range pids {
		c, err := cpu(pid)
		if err != nil {
			return 0, err
		}
		before += c
	}
	if err := f(); err != nil {
		return 0, err
	}
	for _, pid := range pids {
		c, err := cpu(pid)
		if err != nil {
			return 0, err
		}
		after += c
	}
	return after - before, nil
}

// rss returns a process's resident memory in MiB.
func rss(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, found := strings.CutPrefix(line, "VmRSS:"); found {
			kb, err := strconv.Atoi(strings.Fields(rest)[0])
			return float64(kb) / 1024, err
		}
	}
	return 0, fmt.Errorf("find VmRSS of process %d", pid)
}

// times are the samples of a wall-clock figure.
type times []time.Duration

// at returns the given percentile in milliseconds.
func (t times) at(percent int) float64 {
	sorted := slices.Sorted(slices.Values(t))
	i := min(len(sorted)-1, len(sorted)*percent/100)
	return float64(sorted[i].Microseconds()) / 1000
}

func micros(d time.Duration, n int) float64 { return float64(d.Nanoseconds()) / 1000 / float64(n) }
