package nested

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
)

// spire is a server above as SPIRE's is, with an agent beside it: NewDownstreamX509CA, PublishJWTAuthority and
// GetBundle, and no push. A server of ours is above in test/compat.
type spire struct {
	svidv1.UnimplementedSVIDServer
	bundlev1.UnimplementedBundleServer
	workload.UnimplementedSpiffeWorkloadAPIServer

	root    *x509.Certificate
	rootKey crypto.Signer
	socket  string
	port    int

	mu     sync.Mutex // guards the rest
	keys   []*types.JWTKey
	asked  chan struct{} // a token for each GetBundle
	refuse error
	domain string
	lie    func(crypto.PublicKey) upstreamtest.Lie
}

// svid makes an SVID of the trust domain.
func (s *spire) svid(t *testing.T, path string) (cert []byte, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(upstreamtest.TD, path)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{id.URL()}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}, s.root, key.Public(), s.rootKey)
	if err != nil {
		t.Fatal(err)
	}
	return der, key
}

// newSPIRE starts both; serverPath is the path of the server's own ID.
func newSPIRE(t *testing.T, serverPath string) *spire {
	t.Helper()
	s := &spire{socket: filepath.Join(t.TempDir(), "w.sock"), asked: make(chan struct{}, 100), domain: upstreamtest.TD.Name()}
	s.root, s.rootKey = upstreamtest.Root(t, "SPIRE", 24*time.Hour)
	cert, key := s.svid(t, serverPath)
	pool := x509.NewCertPool()
	pool.AddCert(s.root)
	remote := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool, MinVersion: tls.VersionTLS12,
	})))
	svidv1.RegisterSVIDServer(remote, s)
	bundlev1.RegisterBundleServer(remote, s)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.port = tcp.Addr().(*net.TCPAddr).Port
	leaf, leafKey := s.svid(t, "/below")
	pkcs8, err := x509.MarshalPKCS8PrivateKey(leafKey)
	if err != nil {
		t.Fatal(err)
	}
	agent := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(agent, &agentOf{answer: &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: "spiffe://example.org/below", X509Svid: leaf, X509SvidKey: pkcs8, Bundle: s.root.Raw,
	}}}})
	unix, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	for server, l := range map[*grpc.Server]net.Listener{remote: tcp, agent: unix} {
		go func() { _ = server.Serve(l) }()
		t.Cleanup(server.Stop)
	}
	return s
}

type agentOf struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	answer *workload.X509SVIDResponse
}

func (a *agentOf) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := stream.Send(a.answer); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// told is a lie on the wire.
func told(ctx context.Context, l upstreamtest.Lie) (*svidv1.NewDownstreamX509CAResponse, error) {
	out := new(svidv1.NewDownstreamX509CAResponse)
	switch {
	case l.Hang:
		<-ctx.Done()
		return nil, ctx.Err()
	case l.Text != "":
		return &svidv1.NewDownstreamX509CAResponse{CaCertChain: [][]byte{[]byte(l.Text)}}, nil
	}
	for _, cert := range l.Chain {
		out.CaCertChain = append(out.CaCertChain, cert.Raw)
	}
	for _, cert := range l.Roots {
		out.X509Authorities = append(out.X509Authorities, cert.Raw)
	}
	return out, nil
}

func TestLyingServer(t *testing.T) {
	upstreamtest.RunLies(t, func(t *testing.T, lie func(crypto.PublicKey) upstreamtest.Lie) upstream.Authority {
		s := newSPIRE(t, "/spire/server")
		s.lie = lie
		return s.authority(t)
	})
}

func (s *spire) NewDownstreamX509CA(ctx context.Context, r *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse != nil {
		return nil, s.refuse
	}
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "invalid CSR")
	}
	if s.lie != nil {
		return told(ctx, s.lie(csr.PublicKey))
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), RawSubject: csr.RawSubject, URIs: csr.URIs,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Duration(r.GetPreferredTtl()) * time.Second),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}, s.root, csr.PublicKey, s.rootKey)
	if err != nil {
		return nil, err
	}
	return &svidv1.NewDownstreamX509CAResponse{CaCertChain: [][]byte{der}, X509Authorities: [][]byte{s.root.Raw}}, nil
}

func (s *spire) PublishJWTAuthority(_ context.Context, r *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.hasKey(r.GetJwtAuthority().GetKeyId()) {
		s.keys = append(s.keys, r.GetJwtAuthority())
	}
	return &bundlev1.PublishJWTAuthorityResponse{JwtAuthorities: s.keys}, nil
}

func (s *spire) hasKey(id string) bool {
	for _, k := range s.keys {
		if k.GetKeyId() == id {
			return true
		}
	}
	return false
}

func (s *spire) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.asked <- struct{}{}:
	default:
	}
	return &types.Bundle{TrustDomain: s.domain, X509Authorities: []*types.X509Certificate{{Asn1: s.root.Raw}}, JwtAuthorities: s.keys, SequenceNumber: 1}, nil
}

func (s *spire) authority(t *testing.T) *Authority {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	a, err := New(Config{TrustDomain: upstreamtest.TD, ServerAddress: "127.0.0.1", ServerPort: s.port, Socket: s.socket, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	return a
}

func TestSuite(t *testing.T) {
	s := newSPIRE(t, "/spire/server")
	upstreamtest.Run(t, s.authority(t), upstreamtest.Options{JWT: true, Bundle: true, Published: func(id string) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.hasKey(id)
	}})
}

func TestPoll(t *testing.T) {
	s := newSPIRE(t, "/spire/server")
	ctx, cancel := context.WithCancel(t.Context())
	heard := 0
	err := s.authority(t).Follow(ctx, func(upstream.Bundle) {
		if heard++; heard == 2 {
			cancel()
		}
	})
	if heard != 2 || !errors.Is(err, context.Canceled) {
		t.Errorf("heard %d times: %v", heard, err)
	}
}

func TestHostile(t *testing.T) {
	ask := func(t *testing.T, a *Authority) error {
		t.Helper()
		_, key := upstreamtest.Root(t, "x", time.Hour)
		_, err := a.Sign(t.Context(), upstream.Request{CSR: upstreamtest.CSR(t, key), TTL: time.Hour, Now: time.Now()})
		return err
	}
	t.Run("a server with another ID of the trust domain is none", func(t *testing.T) {
		if err := ask(t, newSPIRE(t, "/shop/front").authority(t)); err == nil || !strings.Contains(err.Error(), "/shop/front") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("who has no entry is told what is missing", func(t *testing.T) {
		s := newSPIRE(t, "/spire/server")
		s.refuse = status.Error(codes.PermissionDenied, "caller is not a downstream workload")
		if err := ask(t, s.authority(t)); err == nil || !strings.Contains(err.Error(), "needs an entry there with -downstream for spiffe://example.org/below, which it called as") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a bundle of another trust domain is refused", func(t *testing.T) {
		s := newSPIRE(t, "/spire/server")
		s.domain = "evil.org"
		err := s.authority(t).Follow(t.Context(), func(upstream.Bundle) { t.Error("it was taken") })
		if !errors.Is(err, upstream.ErrRefused) || !strings.Contains(err.Error(), "evil.org") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a bundle that is none is refused", func(t *testing.T) {
		s := newSPIRE(t, "/spire/server")
		s.domain = "No Domain"
		err := s.authority(t).Follow(t.Context(), func(upstream.Bundle) { t.Error("it was taken") })
		if !errors.Is(err, upstream.ErrRefused) || !strings.Contains(err.Error(), "its bundle") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("an SVID of another trust domain is not shown", func(t *testing.T) {
		a := newSPIRE(t, "/spire/server").authority(t)
		a.cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("other.test")
		if err := ask(t, a); err == nil || !strings.Contains(err.Error(), "not of trust domain other.test") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("more certificates than there may be are not parsed", func(t *testing.T) {
		if _, err := parse(make([][]byte, upstream.MaxChain+1), upstream.MaxChain); err == nil || !strings.Contains(err.Error(), "9 certificates, the limit is 8") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no agent is an error that names the socket", func(t *testing.T) {
		s := newSPIRE(t, "/spire/server")
		a := s.authority(t)
		a.cfg.Socket = "/nowhere/agent.sock"
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := a.Sign(ctx, upstream.Request{}); err == nil || !strings.Contains(err.Error(), "/nowhere/agent.sock") {
			t.Errorf("got %v", err)
		}
	})
}
