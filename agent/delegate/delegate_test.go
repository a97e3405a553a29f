package delegate_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/admin"
	"github.com/assay-id/assay/agent/delegate"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	foreign = spiffeid.RequireTrustDomainFromString("other.test")
	proxyID = spiffeid.RequireFromPath(td, "/proxy")
)

// byPID proves unix:pid.
type byPID struct{}

func (byPID) Attest(_ context.Context, p attestor.Process) ([]attestor.Selector, error) {
	return []attestor.Selector{pidSelector(p.PID)}, nil
}

func pidSelector(pid int) attestor.Selector {
	return attestor.Selector{Type: "unix", Value: fmt.Sprintf("pid:%d", pid)}
}

type site struct {
	src  *workloadapitest.Source
	api  delegatedv1.DelegatedIdentityClient
	next int

	mu    sync.Mutex // guards the lines
	lines []workloadapi.Line
}

// Audit keeps a line.
func (s *site) Audit(l workloadapi.Line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, l)
}

func (s *site) last() workloadapi.Line {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines[len(s.lines)-1]
}

// serve runs both sockets of an agent. This process is the delegate if it has an entry for /proxy.
func serve(t *testing.T) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "delegate") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{src: workloadapitest.NewSource(t, td)}
	var ready sync.WaitGroup
	ready.Add(2)
	attest := workloadapi.NewAttestation([]workloadapi.Attestor{{Type: "unix", Workload: byPID{}}}, workloadapi.AttestationConfig{})
	public := workloadapi.New(s.src, attest, workloadapi.Config{
		SocketPath: filepath.Join(dir, "public", "api.sock"), Audit: s, Reattest: time.Hour, Ready: ready.Done,
	})
	socket := filepath.Join(dir, "private", "admin.sock")
	private := admin.New(view.New(nil), attest, admin.Config{SocketPath: socket, Ready: ready.Done})
	delegate.Register(private, delegate.Config{
		Authorized: []spiffeid.ID{proxyID}, Attest: public, Source: s.src, Pin: private.Pin,
		Entitled: func(facts attestor.Set) ([]spiffeid.ID, <-chan struct{}) {
			x, changed, err := s.src.X509(context.Background(), facts)
			if err != nil {
				t.Error(err)
			}
			var ids []spiffeid.ID
			for _, svid := range x.SVIDs {
				ids = append(ids, svid.ID)
			}
			return ids, changed
		},
		Bundles: func() ([]*identity.Bundle, <-chan struct{}) {
			set, changed := s.src.Bundles(attestor.NewSet(pidSelector(os.Getpid())))
			return append([]*identity.Bundle{set.Own}, set.Federated...), changed
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{public.Run, private.Run} {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	ready.Wait()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); cancel(); wg.Wait() })
	s.api = delegatedv1.NewDelegatedIdentityClient(conn)
	return s
}

// put makes an entry for a process.
func (s *site) put(path string, pid int, federates ...spiffeid.TrustDomain) *identity.Entry {
	s.next++
	e := &identity.Entry{
		ID: fmt.Sprintf("entry-%d", s.next), SPIFFEID: spiffeid.RequireFromPath(td, path), FederatesWith: federates,
		Selectors: attestor.NewSet(pidSelector(pid)), CreatedAt: time.Unix(int64(s.next), 0), Hint: "h" + path,
	}
	s.src.Put(e)
	return e
}

// workload starts a process that does nothing.
func workload(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

type x509Stream = grpc.ServerStreamingClient[delegatedv1.SubscribeToX509SVIDsResponse]

func (s *site) subscribe(t *testing.T, req *delegatedv1.SubscribeToX509SVIDsRequest) x509Stream {
	t.Helper()
	st, err := s.api.SubscribeToX509SVIDs(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// wantPaths reads the next answer, checks its keys, and compares the SPIFFE IDs' paths.
func wantPaths(t *testing.T, st x509Stream, want string) *delegatedv1.SubscribeToX509SVIDsResponse {
	t.Helper()
	resp, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, one := range resp.GetX509Svids() {
		svid := one.GetX509Svid()
		leaf, err := x509.ParseCertificate(svid.GetCertChain()[0])
		if err != nil {
			t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(one.GetX509SvidKey())
		if err != nil {
			t.Fatal(err)
		}
		if !key.(*ecdsa.PrivateKey).PublicKey.Equal(leaf.PublicKey) || leaf.NotAfter.Unix() != svid.GetExpiresAt() {
			t.Error("key or expiry is not the certificate's")
		}
		if leaf.URIs[0].Path != svid.GetId().GetPath() || svid.GetHint() != "h"+svid.GetId().GetPath() {
			t.Errorf("got %v with a certificate for %v", svid.GetId(), leaf.URIs)
		}
		paths = append(paths, svid.GetId().GetPath())
	}
	if got := strings.Join(paths, " "); got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
	return resp
}

func wantStatus(t *testing.T, err error, code codes.Code, message string) {
	t.Helper()
	if status.Code(err) != code || status.Convert(err).Message() != message {
		t.Fatalf("got %v, want %v %q", err, code, message)
	}
}

func TestX509(t *testing.T) {
	s := serve(t)
	s.src.Federate(workloadapitest.NewAuthority(t, foreign).Bundle())
	proxy := s.put("/proxy", os.Getpid())
	app := workload(t)
	pid := int32(app.Process.Pid)
	t.Run("a process is followed by its PID, and lost with it", func(t *testing.T) {
		st := s.subscribe(t, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: pid})
		wantPaths(t, st, "")
		e := s.put("/app", app.Process.Pid, foreign)
		if got := wantPaths(t, st, "/app").GetFederatesWith(); !slices.Equal(got, []string{"spiffe://other.test"}) {
			t.Errorf("federates with %v", got)
		}
		if l := s.last(); l.Event != "delegated_x509_svid" || l.PID != os.Getpid() || l.By != proxyID.String() || l.ForPID != app.Process.Pid || strings.Join(l.SPIFFEIDs, "") != "spiffe://example.org/app" || l.Outcome != "allow" {
			t.Errorf("audit line is %+v", l)
		}
		s.src.Rotate()
		wantPaths(t, st, "/app")
		s.src.Delete(e.ID)
		wantPaths(t, st, "")
		s.put("/app", app.Process.Pid)
		wantPaths(t, st, "/app")
		if err := app.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_, err := st.Recv()
		wantStatus(t, err, codes.PermissionDenied, "no identity issued")
	})
	selectors := []*types.Selector{{Type: "unix", Value: fmt.Sprintf("pid:%d", pid)}, {Type: "unix", Value: "more"}}
	t.Run("whoever shows selectors is followed", func(t *testing.T) {
		st := s.subscribe(t, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors})
		wantPaths(t, st, "/app")
		if l := s.last(); l.ForPID != 0 || l.ForFacts == "" {
			t.Errorf("audit line is %+v", l)
		}
	})
	t.Run("requests that make no sense", func(t *testing.T) {
		for _, c := range []struct {
			name, want string
			code       codes.Code
			req        *delegatedv1.SubscribeToX509SVIDsRequest
		}{
			{"neither", "must provide either selectors or non-zero PID, but not both", codes.InvalidArgument, &delegatedv1.SubscribeToX509SVIDsRequest{}},
			{"both", "must provide either selectors or non-zero PID, but not both", codes.InvalidArgument, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: 1, Selectors: selectors}},
			{"a negative PID", "must provide either selectors or non-zero PID, but not both", codes.InvalidArgument, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: -1}},
			{"a selector of no type", "could not parse provided selectors", codes.InvalidArgument, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Value: "x"}}}},
			{"a process that is not there", "there is no such process", codes.NotFound, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: 1 << 30}},
		} {
			_, err := s.subscribe(t, c.req).Recv()
			wantStatus(t, err, c.code, c.want)
		}
	})
	t.Run("a delegate that is one no more loses its streams", func(t *testing.T) {
		st := s.subscribe(t, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors})
		wantPaths(t, st, "/app")
		s.src.Delete(proxy.ID)
		_, err := st.Recv()
		wantStatus(t, err, codes.PermissionDenied, "no identity issued")
	})
}

func TestWhoIsNoDelegate(t *testing.T) {
	s := serve(t)
	s.put("/app", 1)
	calls := map[string]func() error{
		"X509-SVIDs": func() error {
			_, err := s.subscribe(t, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "unix", Value: "pid:1"}}}).Recv()
			return err
		},
		"JWT-SVIDs": func() error {
			_, err := s.api.FetchJWTSVIDs(t.Context(), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Pid: 1})
			return err
		},
		"which processes there are": func() error {
			_, err := s.api.FetchJWTSVIDs(t.Context(), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Pid: 1 << 30})
			return err
		},
		"X.509 bundles": func() error {
			st, err := s.api.SubscribeToX509Bundles(t.Context(), &delegatedv1.SubscribeToX509BundlesRequest{})
			if err == nil {
				_, err = st.Recv()
			}
			return err
		},
		"JWT bundles": func() error {
			st, err := s.api.SubscribeToJWTBundles(t.Context(), &delegatedv1.SubscribeToJWTBundlesRequest{})
			if err == nil {
				_, err = st.Recv()
			}
			return err
		},
	}
	for name, call := range calls {
		t.Run(name+" are not for whoever has no identity", func(t *testing.T) {
			wantStatus(t, call(), codes.PermissionDenied, "no identity issued")
		})
	}
	s.put("/other", os.Getpid())
	for name, call := range calls {
		t.Run(name+" are not for whoever has another identity", func(t *testing.T) {
			wantStatus(t, call(), codes.PermissionDenied, "caller not configured as an authorized delegate")
			if l := s.last(); l.Outcome != "deny" || l.By != "spiffe://example.org/other" || l.Reason != "caller not configured as an authorized delegate" {
				t.Errorf("audit line is %+v", l)
			}
		})
	}
}

func TestJWT(t *testing.T) {
	s := serve(t)
	s.put("/proxy", os.Getpid())
	s.put("/app", 1)
	t.Run("tokens for a process", func(t *testing.T) {
		resp, err := s.api.FetchJWTSVIDs(t.Context(), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Pid: 1})
		if err != nil {
			t.Fatal(err)
		}
		got := resp.GetSvids()
		if len(got) != 1 || got[0].GetId().GetPath() != "/app" || got[0].GetToken() == "" || got[0].GetExpiresAt() <= got[0].GetIssuedAt() {
			t.Errorf("got %v", got)
		}
		if l := s.last(); l.Event != "delegated_jwt_svid" || l.ForPID != 1 || !slices.Equal(l.Audience, []string{"a"}) {
			t.Errorf("audit line is %+v", l)
		}
	})
	for _, c := range []struct {
		name, want string
		code       codes.Code
		req        *delegatedv1.FetchJWTSVIDsRequest
	}{
		{"no audience", "audience must be specified", codes.InvalidArgument, &delegatedv1.FetchJWTSVIDsRequest{Pid: 1}},
		{"an empty audience", "audience must be specified", codes.InvalidArgument, &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{""}, Pid: 1}},
		{"nobody", "must provide either selectors or non-zero PID, but not both", codes.InvalidArgument, &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"a"}}},
		{
			"selectors that match nothing", "no identity issued", codes.PermissionDenied,
			&delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"a"}, Selectors: []*types.Selector{{Type: "unix", Value: "no"}}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.api.FetchJWTSVIDs(t.Context(), c.req)
			wantStatus(t, err, c.code, c.want)
		})
	}
}

func TestBundles(t *testing.T) {
	s := serve(t)
	s.put("/proxy", os.Getpid(), foreign)
	x, err := s.api.SubscribeToX509Bundles(t.Context(), &delegatedv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	j, err := s.api.SubscribeToJWTBundles(t.Context(), &delegatedv1.SubscribeToJWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"spiffe://example.org"}
	for range 2 {
		certs, err := x.Recv()
		if err != nil {
			t.Fatal(err)
		}
		keys, err := j.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, got := range [][]string{slices.Sorted(maps.Keys(certs.GetCaCertificates())), slices.Sorted(maps.Keys(keys.GetBundles()))} {
			if !slices.Equal(got, want) {
				t.Errorf("got bundles of %v, want %v", got, want)
			}
		}
		if _, err := x509.ParseCertificates(certs.GetCaCertificates()[want[0]]); err != nil || !strings.Contains(string(keys.GetBundles()[want[0]]), `"keys"`) {
			t.Errorf("bundles cannot be read: %v", err)
		}
		want = append(want, "spiffe://other.test")
		s.src.Federate(workloadapitest.NewAuthority(t, foreign).Bundle())
	}
}
