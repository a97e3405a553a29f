// Package robust injects faults into the built binaries: it kills, fills disks, damages files, takes the
// server away and loses keys, and compares what is left with a small model of what was acknowledged.
//
//	fault                                       where
//	kill -9 during parallel creates             kill_test.go
//	full disk, read-only disk                   disk_test.go
//	damaged, cut, missing store; snapshots      damage_test.go
//	key file cut, removed, unreadable, lost     keys_test.go
//	second server, port in use                  start_test.go
//	server away past every TTL                  away_test.go
//	agent restarted, its state lost             agent_test.go
//	clock a day ahead, a day back, right again  clock_test.go; hour by hour in server/ca (TestClock),
//	                                            server/records (TestRun), server/view, agent/issue, agent/join
//	workload dead after connect, reused PID,
//	inherited connection                        caller_test.go; each race in workloadapi/peer (TestPeer),
//	                                            workloadapi (TestProcess…)
//
// The tests need the binaries in bin/ (make robust builds them), and root for the disks of their own;
// what is skipped says so. No test asserts how long something takes.
package robust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/assay-id/assay/server/wire/adminv1"
	"github.com/assay-id/assay/test/lab/site"
)

// patience is how long a wait may take before it is a failure: far above what any should take, so
// that a busy machine fails nothing.
const patience = 90 * time.Second

const bin = "../../bin"

func patiently(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// newSite makes a site and starts nothing.
func newSite(t *testing.T) *site.Site {
	t.Helper()
	// Not t.TempDir: its path holds the test's name, and a socket's path may have 107 bytes.
	dir, err := os.MkdirTemp("", "robust") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := site.New(dir, bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the server's log:\n%s", site.Tail(s.ServerLog(), 60))
		}
	})
	return s
}

// start starts the site's server and waits until it is healthy. It is killed when the test ends.
func start(t *testing.T, s *site.Site) {
	t.Helper()
	if err := s.StartServer(patiently(t)); err != nil {
		t.Fatal(err)
	}
	server := s.Server()
	t.Cleanup(server.Kill)
}

// stop stops the site's server gently.
func stop(t *testing.T, s *site.Site) {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
}

// dial returns a connection to the server's private socket.
func dial(t *testing.T, s *site.Site) *grpc.ClientConn {
	t.Helper()
	conn, err := s.DialServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// refused starts a server that must not start, and returns its one sentence.
func refused(t *testing.T, s *site.Site, want ...string) string {
	t.Helper()
	said, err := s.FailServer(patiently(t))
	if err != nil {
		t.Fatal(err)
	}
	// The log of what was done before goes to standard error too.
	lines := strings.Split(strings.TrimSpace(said), "\n")
	last := lines[len(lines)-1]
	for _, w := range want {
		if !strings.Contains(last, w) {
			t.Errorf("want %q in what the server said: %s", w, last)
		}
	}
	if !strings.HasPrefix(last, "Error: ") || strings.Contains(said, "panic") || strings.Contains(said, "goroutine ") {
		t.Errorf("the server said: %s", said)
	}
	return strings.TrimPrefix(last, "Error: ")
}

// offline runs assay-server check on a stopped server's data directory, and returns what it wrote.
func offline(t *testing.T, s *site.Site) (ok bool, said string) {
	t.Helper()
	out, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), "check", "-dataDir", s.ServerData())
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return err == nil, out
}

func mustCheck(t *testing.T, s *site.Site) {
	t.Helper()
	if ok, said := offline(t, s); !ok {
		t.Fatalf("assay-server check: %s", said)
	}
}

// root skips what needs it.
func root(t *testing.T, what string) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_REAL") != "" {
		t.Fatalf("%s needs root", what)
	}
	t.Skipf("SKIPPED: %s needs root", what)
}

// history is the model: what a server acknowledged, and what it may or may not have done because
// nobody heard its answer.
type history struct {
	mu      sync.Mutex // guards the rest
	held    map[string]*types.Entry
	asked   map[string]bool // SPIFFE ID paths of creations without an answer
	leaving map[string]*types.Entry
	rev     uint64
}

func newHistory() *history {
	return &history{held: map[string]*types.Entry{}, asked: map[string]bool{}, leaving: map[string]*types.Entry{}}
}

// newEntry is an entry for the processes of this test's user.
func newEntry(parent, path string) *types.Entry {
	return &types.Entry{
		SpiffeId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: parent},
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
		DnsNames:  []string{"a" + strings.ReplaceAll(path, "/", "-") + ".example.org"},
		Hint:      path,
	}
}

// create creates an entry and takes down what the server said.
func (h *history) create(ctx context.Context, conn *grpc.ClientConn, e *types.Entry) (*types.Entry, error) {
	path := e.GetSpiffeId().GetPath()
	h.mu.Lock()
	h.asked[path] = true
	h.mu.Unlock()
	resp, err := entryv1.NewEntryClient(conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		return nil, err
	}
	result := resp.GetResults()[0]
	h.mu.Lock()
	defer h.mu.Unlock()
	if code := codes.Code(result.GetStatus().GetCode()); code != codes.OK {
		delete(h.asked, path) // it said no
		return nil, status.Error(code, result.GetStatus().GetMessage())
	}
	delete(h.asked, path)
	h.held[result.GetEntry().GetId()] = result.GetEntry()
	return result.GetEntry(), nil
}

// remove deletes an entry and takes down what the server said.
func (h *history) remove(ctx context.Context, conn *grpc.ClientConn, e *types.Entry) error {
	h.mu.Lock()
	h.leaving[e.GetId()] = e
	delete(h.held, e.GetId())
	h.mu.Unlock()
	resp, err := entryv1.NewEntryClient(conn).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{e.GetId()}})
	if err != nil {
		return err
	}
	if code := codes.Code(resp.GetResults()[0].GetStatus().GetCode()); code != codes.OK {
		return status.Error(code, resp.GetResults()[0].GetStatus().GetMessage())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.leaving, e.GetId())
	return nil
}

// mustCreate creates an entry that the server has to take.
func (h *history) mustCreate(t *testing.T, conn *grpc.ClientConn, e *types.Entry) *types.Entry {
	t.Helper()
	made, err := h.create(patiently(t), conn, e)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// stored returns all entries that a server has.
func stored(t *testing.T, conn *grpc.ClientConn) map[string]*types.Entry {
	t.Helper()
	all := map[string]*types.Entry{}
	req := &entryv1.ListEntriesRequest{PageSize: 500}
	for {
		resp, err := entryv1.NewEntryClient(conn).ListEntries(patiently(t), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.GetEntries() {
			if all[e.GetId()] != nil {
				t.Errorf("entry %s is listed twice", e.GetId())
			}
			all[e.GetId()] = e
		}
		if req.PageToken = resp.GetNextPageToken(); req.GetPageToken() == "" {
			return all
		}
	}
}

// check compares what a server has with what was acknowledged, and then takes what it has for granted:
// an answer that nobody heard is not allowed to come true later.
func (h *history) check(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	all := stored(t, conn)
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, want := range h.held {
		got := all[id]
		if got == nil {
			t.Errorf("entry %s was acknowledged and is lost", id)
			continue
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("entry %s is not what was acknowledged (-) but (+):\n%s", id, diff)
		}
	}
	paths := map[string]string{}
	for id, got := range all {
		path := got.GetSpiffeId().GetPath()
		if before, twice := paths[path]; twice {
			t.Errorf("%s and %s are one entry", before, id)
		}
		paths[path] = id
		switch {
		case h.held[id] != nil:
		case h.leaving[id] != nil:
		case h.asked[path]:
			want := newEntry(got.GetParentId().GetPath(), path)
			want.Id, want.CreatedAt = got.GetId(), got.GetCreatedAt()
			if !proto.Equal(want, got) {
				t.Errorf("entry %s is half there: %v", id, got)
			}
		default:
			t.Errorf("entry %s is there, which was never created, or deleted: %v", id, got)
		}
	}
	h.held, h.asked, h.leaving = all, map[string]bool{}, map[string]*types.Entry{}
}

// revision makes a snapshot, and with it checks that revisions do not go back. It returns its path.
func (h *history) revision(t *testing.T, conn *grpc.ClientConn) string {
	t.Helper()
	made, err := adminv1.NewAdminClient(conn).TakeSnapshot(patiently(t), &adminv1.TakeSnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if made.GetRevision() < h.rev {
		t.Errorf("revision went back from %d to %d", h.rev, made.GetRevision())
	}
	h.rev = made.GetRevision()
	return made.GetPath()
}

// copyOf returns a copy of the model, to go back to with a backup.
func (h *history) copyOf() *history {
	h.mu.Lock()
	defer h.mu.Unlock()
	return &history{held: maps.Clone(h.held), asked: maps.Clone(h.asked), leaving: maps.Clone(h.leaving)}
}

// eventually asks until ask returns nil.
func eventually(t *testing.T, what string, ask func() error) {
	t.Helper()
	ctx := patiently(t)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("wait for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

// fetch returns status and body of a URL on this machine.
func fetch(t *testing.T, url string) (int, string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(patiently(t), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// onlyAgent waits for the one agent to be admitted and returns its SPIFFE ID's path.
func onlyAgent(t *testing.T, s *site.Site) string {
	t.Helper()
	var all []string
	eventually(t, "the agent to be admitted", func() error {
		if all = agents(t, s); len(all) != 1 {
			return fmt.Errorf("agents are %v", all)
		}
		return nil
	})
	return all[0]
}

// agents returns the SPIFFE ID paths of the admitted agents.
func agents(t *testing.T, s *site.Site) []string {
	t.Helper()
	out, err := s.ServerCLI(patiently(t), "agent", "list", "-output", "json")
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Agents []struct {
			ID struct {
				Path string `json:"path"`
			} `json:"id"`
		} `json:"agents"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, a := range list.Agents {
		paths = append(paths, a.ID.Path)
	}
	return paths
}
