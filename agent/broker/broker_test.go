package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/assay-id/assay/agent/broker"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	foreign = spiffeid.RequireTrustDomainFromString("other.test")
	agentID = spiffeid.RequireFromPath(td, "/spire/agent/one")
	meshID  = spiffeid.RequireFromPath(td, "/mesh")
	farID   = spiffeid.RequireFromPath(foreign, "/mesh")
	noneID  = spiffeid.RequireFromPath(td, "/shop")
)

const patience = time.Minute

type byPID struct{}

func (byPID) Attest(_ context.Context, p attestor.Process) ([]attestor.Selector, error) {
	return []attestor.Selector{pidSelector(p.PID)}, nil
}

func pidSelector(pid int) attestor.Selector {
	return attestor.Selector{Type: "unix", Value: fmt.Sprintf("pid:%d", pid)}
}

type site struct {
	src         *workloadapitest.Source
	far         *workloadapitest.Authority
	socket, tcp string
	next        int

	mu      sync.Mutex // guards the rest
	lines   []workloadapi.Line
	crls    [][]byte
	changed chan struct{}
}

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

// told waits for a line that fits: who fails in the handshake knows it before the server has written it down.
func (s *site) told(t *testing.T, fits func(workloadapi.Line) bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		lines := s.all()
		if slices.ContainsFunc(lines, fits) {
			return
		}
		if time.Now().After(deadline) {
			text, _ := json.Marshal(lines)
			t.Fatalf("audited %s", text)
		}
	}
}

func (s *site) bundles() ([]*identity.Bundle, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	own := s.src.Authority.Bundle()
	own.CRLs = s.crls
	return []*identity.Bundle{own, s.far.Bundle()}, s.changed
}

// revoke puts a certificate on the list.
func (s *site) revoke(der []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.crls = [][]byte{der}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *site) all() []workloadapi.Line {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]workloadapi.Line(nil), s.lines...)
}

func serve(t *testing.T) *site {
	t.Helper()
	return serveWith(t, nil)
}

func serveWith(t *testing.T, pods attestor.Pods) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "broker") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{src: workloadapitest.NewSource(t, td), far: workloadapitest.NewAuthority(t, foreign), socket: filepath.Join(dir, "b", "broker.sock"), changed: make(chan struct{})}
	log := logrus.New()
	log.SetOutput(t.Output())
	var ready sync.WaitGroup
	ready.Add(2)
	public := workloadapi.New(s.src, workloadapi.NewAttestation([]workloadapi.Attestor{{Type: "unix", Workload: byPID{}}}, workloadapi.AttestationConfig{}), workloadapi.Config{
		SocketPath: filepath.Join(dir, "public", "api.sock"), Reattest: time.Hour, Ready: ready.Done,
	})
	own := certificate(t, s.src.Authority, agentID)
	served := broker.New(broker.Config{
		SocketPath: s.socket, Address: "127.0.0.1:0", Attest: public, Pods: pods, Source: s.src, Bundles: s.bundles, Audit: s, Log: log, Now: time.Now,
		Own: func() (*tls.Certificate, error) { return own, nil },
		Grants: []broker.Grant{
			{ID: meshID, Types: map[string]bool{broker.PIDReference: false, "type.googleapis.com/spiffe.broker.KubernetesObjectReference": true}},
			{ID: farID, Types: map[string]bool{"*": true}},
		},
		Ready: func(tcp net.Addr) { s.tcp = tcp.String(); ready.Done() },
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{public.Run, served.Run} {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	ready.Wait()
	t.Cleanup(func() { cancel(); wg.Wait() })
	return s
}

func certificate(t *testing.T, a *workloadapitest.Authority, id spiffeid.ID) *tls.Certificate {
	t.Helper()
	svid, err := a.X509(&identity.Entry{ID: "x", SPIFFEID: id})
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: svid.Chain, PrivateKey: svid.Key}
}

// dial connects as the holder of a certificate, and makes sure that the agent is the other end.
func (s *site) dial(t *testing.T, target string, cert *tls.Certificate) brokerapi.APIClient {
	t.Helper()
	config := &tls.Config{
		InsecureSkipVerify: true, // verified below, by SPIFFE's rules
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			leaf, err := x509.ParseCertificate(raw[0])
			if err == nil && (len(leaf.URIs) != 1 || leaf.URIs[0].String() != agentID.String()) {
				err = errors.New("that is not the agent")
			}
			return err
		},
	}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return brokerapi.NewAPIClient(conn)
}

func (s *site) mesh(t *testing.T) brokerapi.APIClient {
	return s.dial(t, "unix:"+s.socket, certificate(t, s.src.Authority, meshID))
}

// put makes an entry for a process.
func (s *site) put(path string, pid int) *identity.Entry {
	s.next++
	e := &identity.Entry{
		ID: fmt.Sprintf("entry-%d", s.next), SPIFFEID: spiffeid.RequireFromPath(td, path),
		Selectors: attestor.NewSet(pidSelector(pid)), CreatedAt: time.Unix(int64(s.next), 0), Hint: "h" + path,
	}
	s.src.Put(e)
	return e
}

func workload(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func byProcess(t *testing.T, pid int) *brokerapi.WorkloadReference {
	t.Helper()
	ref, err := anypb.New(&brokerapi.WorkloadPIDReference{Pid: int32(pid)})
	if err != nil {
		t.Fatal(err)
	}
	return &brokerapi.WorkloadReference{Reference: ref}
}

func header(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
}

type x509Stream = grpc.ServerStreamingClient[brokerapi.SubscribeToX509SVIDResponse]

func subscribe(t *testing.T, api brokerapi.APIClient, ref *brokerapi.WorkloadReference) x509Stream {
	t.Helper()
	stream, err := api.SubscribeToX509SVID(header(t), &brokerapi.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func wantIDs(t *testing.T, stream x509Stream, want string) *brokerapi.SubscribeToX509SVIDResponse {
	t.Helper()
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, svid := range resp.GetSvids() {
		ids = append(ids, svid.GetSpiffeId())
		key, err := x509.ParsePKCS8PrivateKey(svid.GetX509SvidKey())
		if err != nil {
			t.Fatal(err)
		}
		certs, err := x509.ParseCertificates(svid.GetX509Svid())
		if err != nil || len(certs) == 0 {
			t.Fatal(err)
		}
		if signer, ok := key.(*ecdsa.PrivateKey); !ok || !signer.PublicKey.Equal(certs[0].PublicKey) {
			t.Error("the key is not the certificate's")
		}
		if roots, err := x509.ParseCertificates(svid.GetBundle()); err != nil || len(roots) == 0 {
			t.Errorf("bundle: %v", err)
		}
	}
	if got := strings.Join(ids, " "); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	return resp
}

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("got %v, want %s with %q", err, code, text)
	}
}

func TestX509(t *testing.T) {
	s := serve(t)
	cmd := workload(t)
	pid := cmd.Process.Pid
	stream := subscribe(t, s.mesh(t), byProcess(t, pid))
	wantIDs(t, stream, "") // the broker is there before the entry
	e := s.put("/shop", pid)
	resp := wantIDs(t, stream, "spiffe://example.org/shop")
	if hint := resp.GetSvids()[0].GetHint(); hint != "h/shop" {
		t.Errorf("hint %q", hint)
	}
	if l := s.last(); l.Event != "broker_x509_svid" || l.By != meshID.String() || l.ForPID != pid || l.Outcome != "allow" || len(l.SPIFFEIDs) != 1 || l.EntryIDs[0] != e.ID {
		t.Errorf("audit line %+v", l)
	}
	s.src.Delete(e.ID)
	wantIDs(t, stream, "")
	s.put("/shop", pid)
	wantIDs(t, stream, "spiffe://example.org/shop")
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	_, err := stream.Recv()
	wantCode(t, err, codes.NotFound, "process has exited")
	_, err = subscribe(t, s.mesh(t), byProcess(t, pid)).Recv()
	wantCode(t, err, codes.NotFound, "there is no such process")
}

func TestJWTAndBundles(t *testing.T) {
	s := serve(t)
	pid := workload(t).Process.Pid
	api := s.mesh(t)
	fetch := func(id string, audience ...string) (*brokerapi.FetchJWTSVIDResponse, error) {
		return api.FetchJWTSVID(header(t), &brokerapi.FetchJWTSVIDRequest{Reference: byProcess(t, pid), Audience: audience, SpiffeId: id})
	}
	_, err := fetch("", "db")
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	s.put("/shop", pid)
	s.put("/shop/2", pid)
	resp, err := fetch("", "db")
	if err != nil || len(resp.GetSvids()) != 2 || resp.GetSvids()[0].GetSvid() == "" {
		t.Fatalf("got %v, %v", resp, err)
	}
	if l := s.last(); l.Event != "broker_jwt_svid" || l.By != meshID.String() || l.Audience[0] != "db" || len(l.SPIFFEIDs) != 2 {
		t.Errorf("audit line %+v", l)
	}
	if resp, err = fetch("spiffe://example.org/shop/2", "db"); err != nil || len(resp.GetSvids()) != 1 {
		t.Errorf("got %v, %v", resp, err)
	}
	_, err = fetch("spiffe://example.org/bank", "db")
	wantCode(t, err, codes.PermissionDenied, "no identity issued")
	_, err = fetch("shop", "db")
	wantCode(t, err, codes.InvalidArgument, "invalid requested SPIFFE ID")
	_, err = fetch("")
	wantCode(t, err, codes.InvalidArgument, "audience")

	x, err := api.SubscribeToX509Bundles(header(t), &brokerapi.SubscribeToX509BundlesRequest{Reference: byProcess(t, pid)})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := x.Recv(); err != nil || len(got.GetBundles()) != 2 || len(got.GetBundles()["spiffe://other.test"]) == 0 {
		t.Errorf("got %v, %v", got, err)
	}
	j, err := api.SubscribeToJWTBundles(header(t), &brokerapi.SubscribeToJWTBundlesRequest{Reference: byProcess(t, pid)})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := j.Recv(); err != nil || !strings.Contains(string(got.GetBundles()["spiffe://example.org"]), "keys") {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestWhoMayCall(t *testing.T) {
	s := serve(t)
	pid := workload(t).Process.Pid
	s.put("/shop", pid)
	stranger := workloadapitest.NewAuthority(t, td)
	for name, cert := range map[string]*tls.Certificate{
		"a workload that is no broker":        certificate(t, s.src.Authority, noneID),
		"a broker's name by another root":     certificate(t, stranger, meshID),
		"nobody":                              nil,
		"the agent itself":                    certificate(t, s.src.Authority, agentID),
		"a foreign broker by the own root":    certificate(t, s.src.Authority, farID),
		"a broker's name by the foreign root": certificate(t, s.far, meshID),
	} {
		for _, target := range []string{"unix:" + s.socket, s.tcp} {
			stream, err := s.dial(t, target, cert).SubscribeToX509SVID(header(t), &brokerapi.SubscribeToX509SVIDRequest{Reference: byProcess(t, pid)})
			if err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != codes.Unavailable {
				t.Errorf("%s at %s: %v", name, target, err)
			}
		}
	}
	s.told(t, func(l workloadapi.Line) bool {
		return l.Event == "broker_connect" && l.Outcome == "deny" && l.Reason != ""
	})
	far := certificate(t, s.far, farID)
	wantIDs(t, subscribe(t, s.dial(t, "unix:"+s.socket, far), byProcess(t, pid)), "spiffe://example.org/shop")
	wantIDs(t, subscribe(t, s.dial(t, s.tcp, far), byProcess(t, pid)), "spiffe://example.org/shop") // it may

	mesh := certificate(t, s.src.Authority, meshID)
	_, err := subscribe(t, s.dial(t, s.tcp, mesh), byProcess(t, pid)).Recv()
	wantCode(t, err, codes.PermissionDenied, "is not allowed over TCP")
	s.told(t, func(l workloadapi.Line) bool {
		return l.Event == "broker_x509_svid" && l.Outcome == "deny" && l.By == meshID.String() && len(l.SPIFFEIDs) == 0
	})

	stream := subscribe(t, s.dial(t, "unix:"+s.socket, mesh), byProcess(t, pid))
	wantIDs(t, stream, "spiffe://example.org/shop")
	leaf, err := x509.ParseCertificate(mesh.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	s.revoke(s.src.Authority.Revoke(t, leaf))
	_, err = stream.Recv()
	wantCode(t, err, codes.Unauthenticated, "no longer accepted")
}

func TestBadReferences(t *testing.T) {
	s := serve(t)
	api := s.mesh(t)
	pid := os.Getpid()
	of := func(url string, value []byte) *brokerapi.WorkloadReference {
		return &brokerapi.WorkloadReference{Reference: &anypb.Any{TypeUrl: url, Value: value}}
	}
	for name, c := range map[string]struct {
		ref  *brokerapi.WorkloadReference
		code codes.Code
		text string
	}{
		"none":                               {nil, codes.InvalidArgument, "workload reference must be provided"},
		"an empty one":                       {&brokerapi.WorkloadReference{}, codes.InvalidArgument, "workload reference must be provided"},
		"without a type":                     {of("", []byte{8, 1}), codes.InvalidArgument, "workload reference must be provided"},
		"a type that is not for this broker": {of("type.googleapis.com/vendor.Reference", nil), codes.PermissionDenied, "is not allowed to use reference type"},
		"a type nobody knows here":           {of("type.googleapis.com/spiffe.broker.KubernetesObjectReference", nil), codes.InvalidArgument, "is not supported by this agent"},
		"garbage":                            {of(broker.PIDReference, []byte{0xff}), codes.InvalidArgument, "malformed"},
		"no process ID":                      {of(broker.PIDReference, nil), codes.InvalidArgument, "positive process ID"},
		"a negative process ID":              {byProcess(t, -1), codes.InvalidArgument, "positive process ID"},
		"nobody's process ID":                {byProcess(t, 1<<30), codes.NotFound, "no such process"},
		"a huge type":                        {of("a/"+strings.Repeat("x", 10_000), nil), codes.PermissionDenied, "…"},
		"a message over its limit":           {of(broker.PIDReference, make([]byte, 1<<20)), codes.ResourceExhausted, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := subscribe(t, api, c.ref).Recv()
			wantCode(t, err, c.code, c.text)
			_, err = api.FetchJWTSVID(header(t), &brokerapi.FetchJWTSVIDRequest{Reference: c.ref, Audience: []string{"db"}})
			wantCode(t, err, c.code, c.text)
		})
	}
	t.Run("without the header nothing is answered", func(t *testing.T) {
		stream, err := api.SubscribeToX509SVID(t.Context(), &brokerapi.SubscribeToX509SVIDRequest{Reference: byProcess(t, pid)})
		if err == nil {
			_, err = stream.Recv()
		}
		wantCode(t, err, codes.InvalidArgument, "security header missing from request")
		_, err = api.FetchJWTSVID(metadata.AppendToOutgoingContext(t.Context(), "broker.spiffe.io", "yes"), &brokerapi.FetchJWTSVIDRequest{Reference: byProcess(t, pid), Audience: []string{"db"}})
		wantCode(t, err, codes.InvalidArgument, "security header missing from request")
	})
}
