package server

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	jointoken "github.com/assay-id/assay/attestor/jointoken/server"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// world is a whole server: real store, real keys, real sockets.
type world struct {
	t       *testing.T
	cfg     Config
	running Running
	local   *grpc.ClientConn
	stop    func() error
}

// honest is a judge that believes all but "liar": the payload is the path below its type, and an
// agent may attest again unless the payload begins with "once". It asks one challenge of "asked".
type honest struct{}

func (honest) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	text := string(payload)
	switch {
	case text == "liar":
		return attestor.Proof{}, fmt.Errorf("%w: a liar", attestor.ErrEvidence)
	case text == "panic":
		panic("the judge lost it")
	case text == "broken":
		return attestor.Proof{}, errors.New("the cloud did not answer: secret detail")
	case strings.HasPrefix(text, "asked"):
		answer, err := ask(ctx, []byte("why?"))
		if err != nil {
			return attestor.Proof{}, err
		}
		if string(answer) != "because" {
			return attestor.Proof{}, fmt.Errorf("%w: wrong answer", attestor.ErrEvidence)
		}
	}
	return attestor.Proof{
		Path: "honest/" + text, CanReattest: !strings.HasPrefix(text, "once"),
		Selectors: []attestor.Selector{{Type: "honest", Value: "name:" + text}},
	}, nil
}

func honestKind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: "honest", Config: func() any { return &struct{}{} },
		Open: func(any, attestor.Needs) (attestor.Judge, error) { return honest{}, nil }}
}

// testConfig is a configuration in a folder of its own, without rates.
func testConfig(t *testing.T) Config {
	t.Helper()
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	if testing.Verbose() {
		silent.SetOutput(os.Stderr)
	}
	dir := t.TempDir()
	cfg := Defaults()
	cfg.TrustDomain = td
	cfg.BindAddress, cfg.BindPort = "127.0.0.1", 0
	cfg.SocketPath = filepath.Join(dir, "private", "api.sock")
	cfg.DataDir = filepath.Join(dir, "data")
	cfg.Judges = []Judge{{Kind: jointoken.Kind()}, {Kind: honestKind()}}
	cfg.Log = silent
	cfg.Metrics = prometheus.NewRegistry()
	cfg.Limits.AttestPerSecond, cfg.Limits.SignPerSecond = -1, -1
	return cfg
}

// start runs a server until the test ends, or until its stop is called.
func start(t *testing.T, change ...func(*Config)) *world {
	t.Helper()
	cfg := testConfig(t)
	for _, f := range change {
		f(&cfg)
	}
	w := &world{t: t, cfg: cfg}
	ready := make(chan Running, 1)
	cfg.Ready = func(r Running) { ready <- r }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg) }()
	stopped := false
	w.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := w.stop(); err != nil {
			t.Errorf("server ended with: %v", err)
		}
	})
	select {
	case w.running = <-ready:
	case err := <-done:
		stopped = true
		cancel()
		t.Fatalf("server did not start: %v", err)
	}
	conn, err := grpc.NewClient("unix:"+cfg.SocketPath, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	w.local = conn
	return w
}

func (w *world) entries() entryv1.EntryClient   { return entryv1.NewEntryClient(w.local) }
func (w *world) agents() agentv1.AgentClient    { return agentv1.NewAgentClient(w.local) }
func (w *world) bundles() bundlev1.BundleClient { return bundlev1.NewBundleClient(w.local) }
func (w *world) svids() svidv1.SVIDClient       { return svidv1.NewSVIDClient(w.local) }
func (w *world) context() context.Context       { return w.t.Context() }
func id(path string) *types.SPIFFEID            { return &types.SPIFFEID{TrustDomain: td.Name(), Path: path} }
func selectors(texts ...string) (s []*types.Selector) {
	for _, text := range texts {
		kind, value, _ := strings.Cut(text, ":")
		s = append(s, &types.Selector{Type: kind, Value: value})
	}
	return s
}

// audit returns the lines of the audit log.
func (w *world) audit() (lines []map[string]any) {
	w.t.Helper()
	path := w.cfg.AuditPath
	if path == "" {
		path = filepath.Join(w.cfg.DataDir, "audit.log")
	}
	file, err := os.Open(path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer file.Close()
	scanner := bufio.NewScanner(file)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		line := map[string]any{}
		if err := json.Unmarshal(scanner.Bytes(), &line); err != nil {
			w.t.Fatalf("audit line %q: %v", scanner.Text(), err)
		}
		lines = append(lines, line)
	}
	return lines
}

// lastAudit returns the last line of an event. It waits for the first one: what the server does by itself is seen
// in its picture before it is in the log.
func (w *world) lastAudit(event string) map[string]any {
	w.t.Helper()
	for late := time.Now().Add(time.Minute); time.Now().Before(late); time.Sleep(10 * time.Millisecond) {
		for _, line := range slices.Backward(w.audit()) {
			if line["event"] == event {
				return line
			}
		}
	}
	w.t.Errorf("no audit line of %s", event)
	return nil
}

// denied returns the last line of an event, which must be that of a refusal.
func (w *world) denied(t *testing.T, event string) map[string]any {
	t.Helper()
	line := w.lastAudit(event)
	if line["outcome"] != "deny" {
		t.Errorf("audit line %v", line)
	}
	return line
}

// counts returns the values of a counter by one of its labels.
func (w *world) counts(name, label string) (map[string]int, error) {
	w.t.Helper()
	families, err := w.cfg.Metrics.(prometheus.Gatherer).Gather()
	if err != nil {
		return nil, err
	}
	counts := map[string]int{}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == label {
					counts[l.GetValue()] += int(m.GetCounter().GetValue())
				}
			}
		}
	}
	return counts, nil
}

// unharmed checks that the server still does its work.
func (w *world) unharmed() {
	w.t.Helper()
	if _, err := w.entries().CountEntries(w.context(), &entryv1.CountEntriesRequest{}); err != nil {
		w.t.Errorf("server is harmed: %v", err)
	}
	if err := w.running.Ready(); err != nil {
		w.t.Errorf("server is not ready: %v", err)
	}
}

// bundle returns the X.509 authorities.
func (w *world) bundle() *x509.CertPool {
	w.t.Helper()
	b, err := w.bundles().GetBundle(w.context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for _, a := range b.GetX509Authorities() {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			w.t.Fatal(err)
		}
		pool.AddCert(cert)
	}
	return pool
}

// clientTLS verifies the server as an agent does: its chain and its SPIFFE ID.
func (w *world) clientTLS(cert *tls.Certificate) *tls.Config {
	w.t.Helper()
	roots := w.bundle()
	config := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"},
		InsecureSkipVerify: true, // there is no host name to verify; see below
		VerifyConnection: func(state tls.ConnectionState) error {
			leaf := state.PeerCertificates[0]
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/spire/server" {
				return errors.New("not the server")
			}
			_, err := leaf.Verify(x509.VerifyOptions{Roots: roots})
			return err
		},
	}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	return config
}

// dial connects over TCP.
func (w *world) dial(cert *tls.Certificate) *grpc.ClientConn {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+w.running.Address.String(), grpc.WithTransportCredentials(credentials.NewTLS(w.clientTLS(cert))))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// csr makes a request as SPIRE's agents do.
func csr(t *testing.T, key any, uris ...string) []byte {
	t.Helper()
	template := &x509.CertificateRequest{Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}}
	for _, text := range uris {
		uri, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, uri)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// attest does an attestation on a connection without a certificate.
func (w *world) attest(kind string, payload []byte, answer string) (*tls.Certificate, *agentv1.AttestAgentResponse_Result, error) {
	w.t.Helper()
	key := newKey(w.t)
	return w.attestWith(w.dial(nil), key, &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: kind, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr(w.t, key)},
	}, answer)
}

func (w *world) attestWith(conn *grpc.ClientConn, key *ecdsa.PrivateKey, params *agentv1.AttestAgentRequest_Params, answer string) (*tls.Certificate, *agentv1.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithTimeout(w.context(), 20*time.Second)
	defer cancel()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: params}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return nil, nil, err
		}
		if result := resp.GetResult(); result != nil {
			return &tls.Certificate{Certificate: result.GetSvid().GetCertChain(), PrivateKey: key}, result, stream.CloseSend()
		}
		err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte(answer)}})
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, nil, err
		}
	}
}

// agent attests and returns the SPIFFE ID's path, the certificate and a connection with it.
func (w *world) agent(name string) (string, *tls.Certificate, *grpc.ClientConn) {
	w.t.Helper()
	cert, result, err := w.attest("honest", []byte(name), "because")
	if err != nil {
		w.t.Fatalf("attest %s: %v", name, err)
	}
	return result.GetSvid().GetId().GetPath(), cert, w.dial(cert)
}

// create makes an entry and returns it.
func (w *world) create(e *types.Entry) *types.Entry {
	w.t.Helper()
	resp, err := w.entries().BatchCreateEntry(w.context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		w.t.Fatal(err)
	}
	if r := resp.GetResults()[0]; r.GetStatus().GetCode() != 0 {
		w.t.Fatalf("create entry: %v", r.GetStatus())
	}
	return resp.GetResults()[0].GetEntry()
}

// refused checks a refusal's code and a part of its message.
func refused(t *testing.T, err error, code codes.Code, part string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), part) {
		t.Errorf("got %v, want %s with %q", err, code, part)
	}
}

// reason returns the reason in the details of a refusal.
func reason(err error) types.PermissionDeniedDetails_Reason {
	for _, d := range status.Convert(err).Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			return d.GetReason()
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}
