package caller

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/wire/adminv1"
	"github.com/assay-id/assay/server/wire/downstreamv1"
	"github.com/assay-id/assay/server/wire/evidencev1"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// pictures is View and Nodes over one map: the view may lag behind.
type pictures struct {
	mu      sync.Mutex
	shown   map[spiffeid.ID]*records.Node // what the view has
	stored  map[spiffeid.ID]*records.Node // what the records have
	entries map[spiffeid.ID][]*identity.Entry
	bundles map[spiffeid.TrustDomain]*identity.Bundle
	changed chan struct{}
	rev     kv.Rev
	broken  error
}

func newPictures() *pictures {
	return &pictures{
		shown: map[spiffeid.ID]*records.Node{}, stored: map[spiffeid.ID]*records.Node{},
		entries: map[spiffeid.ID][]*identity.Entry{}, bundles: map[spiffeid.TrustDomain]*identity.Bundle{},
		changed: make(chan struct{}),
	}
}

// put changes a node; a nil one is evicted. With lag, the view does not get to know.
func (p *pictures) put(id spiffeid.ID, n *records.Node, lag bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rev++
	p.stored[id] = n
	if n == nil {
		delete(p.stored, id)
	}
	if lag {
		return
	}
	p.shown[id] = n
	if n == nil {
		delete(p.shown, id)
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *pictures) Node(id spiffeid.ID) (*records.Node, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, ok := p.shown[id]
	return n, ok
}

func (p *pictures) FollowNode(id spiffeid.ID) (*records.Node, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.shown[id], p.changed
}

func (p *pictures) EntriesBySPIFFEID(id spiffeid.ID) []*identity.Entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.entries[id]
}

func (p *pictures) Wait(context.Context, kv.Rev) error { return nil }

func (p *pictures) Bundle(td spiffeid.TrustDomain) (*identity.Bundle, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, ok := p.bundles[td]
	return b, ok
}

// truth is Nodes.
type truth struct{ *pictures }

func (p truth) Node(_ context.Context, id spiffeid.ID) (*records.Node, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken != nil {
		return nil, p.broken
	}
	n, ok := p.stored[id]
	if !ok {
		return nil, records.ErrNotFound
	}
	return n, nil
}

func (p truth) UpdateNode(_ context.Context, id spiffeid.ID, change func(*records.Node, bool) error) (*records.Node, kv.Rev, error) {
	p.mu.Lock()
	n, ok := p.stored[id]
	if !ok {
		n = &records.Node{ID: id}
	}
	n = n.Clone()
	err := change(n, ok)
	p.mu.Unlock()
	if err != nil {
		return nil, 0, err
	}
	p.put(id, n, false)
	return n, p.rev, nil
}

// lines is an audit log in memory.
type lines struct {
	mu  sync.Mutex
	all []audit.Line
}

func (l *lines) Write(line audit.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, line)
	return nil
}

func (l *lines) last() audit.Line {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.all) == 0 {
		return audit.Line{}
	}
	return l.all[len(l.all)-1]
}

// issuer is a CA of a trust domain.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newIssuer(t *testing.T, td spiffeid.TrustDomain) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"test"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{cert: cert, key: key}
}

func (i *issuer) bundle(td spiffeid.TrustDomain) *identity.Bundle {
	return &identity.Bundle{TrustDomain: td, X509: []identity.X509Authority{{Certificate: i.cert}}, Sequence: 1}
}

// leaf signs a certificate for the URIs.
func (i *issuer) leaf(t *testing.T, serial int64, life time.Duration, uris ...string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, text := range uris {
		uri, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, uri)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.cert, key.Public(), i.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// follow is a feed that stays until its stream ends.
type follow struct {
	feedv1.UnimplementedFeedServer
	entered chan struct{}
}

func (f *follow) Follow(stream feedv1.Feed_FollowServer) error {
	if f.entered == nil {
		return status.Error(codes.Unimplemented, "nothing to follow")
	}
	f.entered <- struct{}{}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// world is a server with every service there is, none of which does anything.
type world struct {
	*pictures
	audit    *lines
	authz    *Authorizer
	ca       *issuer
	feed     *follow
	services map[string]grpc.ServiceInfo
	tcp      string
	unix     string
}

func newWorld(t *testing.T, adminIDs ...spiffeid.ID) *world {
	t.Helper()
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	w := &world{pictures: newPictures(), audit: &lines{}, ca: newIssuer(t, td), feed: &follow{}}
	w.bundles[td] = w.ca.bundle(td)
	w.authz = New(w.pictures, truth{w.pictures}, w.audit, Config{TrustDomain: td, AdminIDs: adminIDs, Log: silent})
	verifier := &Verifier{TrustDomain: td, Bundles: w.pictures, AdminIDs: adminIDs, Now: time.Now}
	own := w.ca.leaf(t, 1000, time.Hour, "spiffe://example.org/spire/server")

	serve := func(l net.Listener, creds credentials.TransportCredentials) map[string]grpc.ServiceInfo {
		s := grpc.NewServer(grpc.Creds(creds), grpc.UnaryInterceptor(w.authz.Unary), grpc.StreamInterceptor(w.authz.Stream))
		agentv1.RegisterAgentServer(s, agentv1.UnimplementedAgentServer{})
		bundlev1.RegisterBundleServer(s, bundlev1.UnimplementedBundleServer{})
		entryv1.RegisterEntryServer(s, entryv1.UnimplementedEntryServer{})
		svidv1.RegisterSVIDServer(s, svidv1.UnimplementedSVIDServer{})
		trustdomainv1.RegisterTrustDomainServer(s, trustdomainv1.UnimplementedTrustDomainServer{})
		localauthorityv1.RegisterLocalAuthorityServer(s, localauthorityv1.UnimplementedLocalAuthorityServer{})
		loggerv1.RegisterLoggerServer(s, loggerv1.UnimplementedLoggerServer{})
		debugv1.RegisterDebugServer(s, debugv1.UnimplementedDebugServer{})
		grpc_health_v1.RegisterHealthServer(s, grpc_health_v1.UnimplementedHealthServer{})
		feedv1.RegisterFeedServer(s, w.feed)
		downstreamv1.RegisterDownstreamServer(s, downstreamv1.UnimplementedDownstreamServer{})
		evidencev1.RegisterEvidenceServer(s, evidencev1.UnimplementedEvidenceServer{})
		adminv1.RegisterAdminServer(s, adminv1.UnimplementedAdminServer{})
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(l) }()
		t.Cleanup(func() { s.Stop(); <-done })
		return s.GetServiceInfo()
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.services = serve(tcp, credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*own},
		ClientAuth: tls.RequestClientCert, VerifyConnection: verifier.Verify,
	}))
	w.tcp = tcp.Addr().String()
	w.unix = filepath.Join(t.TempDir(), "api.sock")
	local, err := net.Listen("unix", w.unix)
	if err != nil {
		t.Fatal(err)
	}
	serve(local, UnixCredentials())
	return w
}

// dial connects over TCP, with a client certificate if there is one.
func (w *world) dial(t *testing.T, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	config := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient("passthrough:///"+w.tcp, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (w *world) dialUnix(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+w.unix, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
