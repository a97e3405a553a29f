package sds_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/sds"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	foreign = spiffeid.RequireTrustDomainFromString("other.test")
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// proves is an attestor that proves the same of everybody.
type proves attestor.Selector

func (p proves) Attest(context.Context, attestor.Process) ([]attestor.Selector, error) {
	return []attestor.Selector{attestor.Selector(p)}, nil
}

// site is a Workload API with SDS on a real socket.
type site struct {
	src   *workloadapitest.Source
	api   secretv3.SecretDiscoveryServiceClient
	audit *lines
	log   *text
	next  int
}

type lines struct {
	mu  sync.Mutex
	all []workloadapi.Line
}

func (l *lines) Audit(line workloadapi.Line) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, line)
}

func (l *lines) last() workloadapi.Line {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[len(l.all)-1]
}

type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (t *text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

// serve starts one whose callers show a:b, and are not held.
func serve(t *testing.T, cfg sds.Config, hold time.Duration) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "sds") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{src: workloadapitest.NewSource(t, td), audit: &lines{}, log: &text{}}
	log := logrus.New()
	log.SetOutput(s.log)
	cfg.Log = log
	attest := workloadapi.NewAttestation([]workloadapi.Attestor{{Type: "a", Workload: proves{Type: "a", Value: "b"}}}, workloadapi.AttestationConfig{})
	ready := make(chan struct{})
	server := workloadapi.New(s.src, attest, workloadapi.Config{
		SocketPath: filepath.Join(dir, "socket"), Hold: hold, Audit: s.audit, Log: log, Ready: func() { close(ready) },
	})
	sds.Register(server, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	failed := make(chan error, 1)
	wg.Go(func() { failed <- server.Run(ctx) })
	select {
	case <-ready:
	case err := <-failed:
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "socket"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); cancel(); wg.Wait() })
	s.api = secretv3.NewSecretDiscoveryServiceClient(conn)
	return s
}

// put makes an entry that callers match.
func (s *site) put(path string, federates ...spiffeid.TrustDomain) *identity.Entry {
	s.next++
	e := &identity.Entry{
		ID: fmt.Sprintf("entry-%d", s.next), SPIFFEID: spiffeid.RequireFromPath(td, path), FederatesWith: federates,
		Selectors: attestor.NewSet(attestor.Selector{Type: "a", Value: "b"}), CreatedAt: time.Unix(int64(s.next), 0),
	}
	s.src.Put(e)
	return e
}

// envoy is a node of this version, with metadata in pairs.
func envoy(minor uint32, metadata ...any) *corev3.Node {
	n := &corev3.Node{Id: "test", UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &corev3.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: minor}},
	}}
	if len(metadata) > 0 {
		value, err := structpb.NewValue(metadata[1])
		if err != nil {
			panic(err)
		}
		n.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{metadata[0].(string): value}}
	}
	return n
}

type stream = secretv3.SecretDiscoveryService_StreamSecretsClient

func (s *site) stream(t *testing.T) stream {
	t.Helper()
	st, err := s.api.StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func send(t *testing.T, st stream, req *discoveryv3.DiscoveryRequest) {
	t.Helper()
	if err := st.Send(req); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, st stream) *discoveryv3.DiscoveryResponse {
	t.Helper()
	resp, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetTypeUrl() != secretType || resp.GetNonce() == "" || resp.GetVersionInfo() == "" {
		t.Fatalf("response with type %q, version %q, nonce %q", resp.GetTypeUrl(), resp.GetVersionInfo(), resp.GetNonce())
	}
	return resp
}

// acknowledge is the word on a response.
func acknowledge(resp *discoveryv3.DiscoveryResponse, names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{
		VersionInfo: resp.GetVersionInfo(), ResponseNonce: resp.GetNonce(), TypeUrl: secretType, ResourceNames: names,
	}
}

func wantStatus(t *testing.T, err error, code codes.Code, message string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), message) {
		t.Fatalf("got %v, want %v %q", err, code, message)
	}
}

func secret(t *testing.T, body *anypb.Any) *tlsv3.Secret {
	t.Helper()
	s := new(tlsv3.Secret)
	if err := body.UnmarshalTo(s); err != nil {
		t.Fatal(err)
	}
	return s
}

// say describes secrets in order: a certificate by its path, a bundle by its form and trust domains.
func say(t *testing.T, bodies ...*anypb.Any) string {
	t.Helper()
	var out []string
	for _, body := range bodies {
		s := secret(t, body)
		out = append(out, s.GetName()+"="+describe(t, s))
	}
	return strings.Join(out, " ")
}

func describe(t *testing.T, s *tlsv3.Secret) string {
	t.Helper()
	if c := s.GetTlsCertificate(); c != nil {
		pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		if err != nil {
			t.Fatal(err)
		}
		if len(pair.Leaf.URIs) == 0 {
			return pair.Leaf.Subject.CommonName
		}
		return pair.Leaf.URIs[0].Path
	}
	v := s.GetValidationContext()
	if v.GetCustomValidatorConfig() == nil {
		return "plain:" + subjects(t, v.GetTrustedCa())
	}
	if got := v.GetCustomValidatorConfig().GetName(); got != "envoy.tls.cert_validator.spiffe" || v.GetTrustedCa() != nil {
		t.Fatalf("validator %q with plain authorities %v", got, v.GetTrustedCa())
	}
	config := new(tlsv3.SPIFFECertValidatorConfig)
	if err := v.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
		t.Fatal(err)
	}
	var parts []string
	for _, one := range config.GetTrustDomains() {
		if got := subjects(t, one.GetTrustBundle()); got != one.GetName() {
			t.Errorf("the bundle of %s has authorities of %s", one.GetName(), got)
		}
		parts = append(parts, one.GetName())
	}
	return "spiffe:" + strings.Join(parts, ",")
}

func subjects(t *testing.T, from *corev3.DataSource) string {
	t.Helper()
	var names []string
	rest := from.GetInlineBytes()
	for {
		block, more := pem.Decode(rest)
		if block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		names, rest = append(names, cert.Subject.CommonName), more
	}
	return strings.Join(names, ",")
}
