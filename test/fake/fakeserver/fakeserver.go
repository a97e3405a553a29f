// Package fakeserver is a small, correct server for tests of the agent: real gRPC over real TLS, a CA
// of its own, entries and agents in memory. It answers an Assay agent by the feed, or stands in for a
// SPIRE server that knows no feed, or none but the oldest call for entries.
//
// What it does not have is what an agent cannot see: storage, rules for entries, rate limits.
package fakeserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"

	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// TrustDomain is the server's.
var TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// Which calls for entries the server knows.
const (
	Feed = iota // all
	Sync        // SyncAuthorizedEntries and GetAuthorizedEntries, as a SPIRE server
	Get         // GetAuthorizedEntries alone, as an old one
)

// Config says how the server behaves. The zero value works.
type Config struct {
	// Knows is Feed, Sync or Get.
	Knows int
	// AgentTTL, X509TTL and JWTTTL default to an hour, an hour and five minutes.
	AgentTTL, X509TTL, JWTTTL time.Duration
	// Reattestable is what agents are told at attestation.
	Reattestable bool
	// Challenge, if set, is sent after the evidence and must come back with "!" at its end.
	Challenge string
	// MaxConnectionAge ends connections by age, 0: never.
	MaxConnectionAge time.Duration
	// MaxBatch is the most X509-SVIDs signed in one call; larger ones get ResourceExhausted. 0: 500.
	MaxBatch int
	// SyncPage is how many entries SyncAuthorizedEntries sends at once; 0: 500.
	SyncPage int
}

// Server is a running server. Use New.
type Server struct {
	t   testing.TB
	cfg Config
	// Addr is where it listens, over restarts too.
	Addr string

	mu      sync.Mutex // guards the rest
	grpc    *grpc.Server
	ca      *authority
	old     []*authority
	jwtKeys map[string]*ecdsa.PrivateKey
	jwtID   string
	seq     uint64
	tainted map[string]bool // by certificate
	storeID string
	rev     uint64
	entries map[string]*types.Entry
	others  map[string]*types.Bundle // federated bundles
	agents  map[string]*agent
	tokens  map[string]bool
	changed chan struct{}
	drift   int
	calls   map[string]int
	busy    map[string][]time.Duration
	hello   *feedv1.Hello
	reports []*feedv1.Running
	// capabilities are those of the feed.
	capabilities []string
	acked        uint64
	block        chan struct{} // not nil: signing waits for it
	unknown      map[string]bool
}

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

type agent struct {
	serial, next string
	banned       bool
}

// New starts a server that stops with the test.
func New(t testing.TB, cfg Config) *Server {
	t.Helper()
	if cfg.AgentTTL == 0 {
		cfg.AgentTTL = time.Hour
	}
	if cfg.X509TTL == 0 {
		cfg.X509TTL = time.Hour
	}
	if cfg.JWTTTL == 0 {
		cfg.JWTTTL = 5 * time.Minute
	}
	if cfg.MaxBatch == 0 {
		cfg.MaxBatch = 500
	}
	if cfg.SyncPage == 0 {
		cfg.SyncPage = 500
	}
	s := &Server{
		t: t, cfg: cfg, jwtKeys: map[string]*ecdsa.PrivateKey{}, tainted: map[string]bool{}, storeID: "store-1", rev: 1,
		entries: map[string]*types.Entry{}, others: map[string]*types.Bundle{}, agents: map[string]*agent{},
		tokens: map[string]bool{}, changed: make(chan struct{}), calls: map[string]int{}, busy: map[string][]time.Duration{}, unknown: map[string]bool{},
	}
	s.ca = newAuthority(t)
	s.newJWTKey("key-1")
	s.seq = 1
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// Start makes the server listen, at the same address as before if there was one.
func (s *Server) Start() {
	s.t.Helper()
	addr := s.Addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	lis, err := net.Listen("tcp", addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.Addr = lis.Addr().String()
	srv := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(s.tls())),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: s.cfg.MaxConnectionAge, MaxConnectionAgeGrace: 50 * time.Millisecond}),
		grpc.ChainUnaryInterceptor(s.countUnary), grpc.ChainStreamInterceptor(s.countStream),
	)
	agentv1.RegisterAgentServer(srv, &agentService{s: s})
	bundlev1.RegisterBundleServer(srv, &bundleService{s: s})
	entryv1.RegisterEntryServer(srv, &entryService{s: s})
	svidv1.RegisterSVIDServer(srv, &svidService{s: s})
	if s.cfg.Knows == Feed {
		feedv1.RegisterFeedServer(srv, &feedService{s: s})
	}
	s.mu.Lock()
	s.grpc = srv
	s.mu.Unlock()
	go func() { _ = srv.Serve(lis) }() // Stop ends it
}

// Stop cuts all connections and stops listening. Start undoes it.
func (s *Server) Stop() {
	s.mu.Lock()
	srv := s.grpc
	s.mu.Unlock()
	srv.Stop()
}

// BundlePEM returns the CA certificates, for trust_bundle_path.
func (s *Server) BundlePEM() []byte {
	var out []byte
	for _, c := range s.Authorities() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// Authorities returns the CA certificates, the active one first.
func (s *Server) Authorities() []*x509.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	certs := []*x509.Certificate{s.ca.cert}
	for _, a := range s.old {
		certs = append(certs, a.cert)
	}
	return certs
}

// Token makes a join token.
func (s *Server) Token(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[token] = true
}

// Put creates or replaces entries as one commit, and returns its revision.
func (s *Server) Put(entries ...*types.Entry) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range entries {
		s.entries[e.GetId()] = e
	}
	return s.commit()
}

// Delete deletes entries as one commit.
func (s *Server) Delete(ids ...string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		delete(s.entries, id)
	}
	return s.commit()
}

// PutBundle creates or replaces a federated bundle.
func (s *Server) PutBundle(b *types.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others[b.GetTrustDomain()] = b
	s.commit()
}

// Rotate makes a new CA and JWT key; the old ones stay in the bundle, tainted if so wanted.
func (s *Server) Rotate(taint bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.old = append(s.old, s.ca)
	s.tainted[string(s.ca.cert.Raw)] = taint
	s.tainted[s.jwtID] = taint
	s.ca = newAuthority(s.t)
	s.newJWTKey(fmt.Sprintf("key-%d", len(s.jwtKeys)+1))
	s.seq++
	s.commit()
}

// ForgetOld drops all but the active authorities from the bundle, as a revocation does.
func (s *Server) ForgetOld() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.old = nil
	for id := range s.jwtKeys {
		if id != s.jwtID {
			delete(s.jwtKeys, id)
		}
	}
	s.seq++
	s.commit()
}

// Restore makes the store another one, as a restored backup is.
func (s *Server) Restore(storeID string, rev uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.storeID, s.rev = storeID, rev
}

// Drift makes the next n pictures carry a wrong checksum.
func (s *Server) Drift(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drift = n
}

// Block makes signing wait until the returned function is called.
func (s *Server) Block() (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	block := make(chan struct{})
	s.block = block
	return sync.OnceFunc(func() {
		s.mu.Lock()
		s.block = nil
		s.mu.Unlock()
		close(block)
	})
}

// Busy makes the next calls of a method be sent away, one for each hint when to come back.
func (s *Server) Busy(method string, hints ...time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy[method] = append(s.busy[method], hints...)
}

// Unknown makes signing for the entry fail with NotFound, as on a server that lags behind.
func (s *Server) Unknown(id string, unknown bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unknown[id] = unknown
}

// Ban bans all agents, Evict forgets them, Unban lets them attest again. All cut the feeds.
func (s *Server) Ban() {
	s.eachAgent(func(a *agent) { a.banned, a.serial, a.next = true, "", "" })
}

// Evict makes the server forget all agents.
func (s *Server) Evict() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.agents)
	s.wake()
}

// Unban lifts all bans.
func (s *Server) Unban() { s.Evict() }

func (s *Server) eachAgent(fn func(*agent)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.agents {
		fn(a)
	}
	s.wake()
}

// Calls returns how often a method was called, by its last name, for example "AttestAgent".
func (s *Server) Calls(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// Hello returns the last Hello of an agent, and the revision last acknowledged.
func (s *Server) Hello() (*feedv1.Hello, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hello, s.acked
}

// Speak makes the server say on its next feeds what it understands.
func (s *Server) Speak(capabilities ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.capabilities = capabilities
}

// Reports returns what agents have said to run, after their Hellos.
func (s *Server) Reports() []*feedv1.Running {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.reports)
}

// Rev returns the revision.
func (s *Server) Rev() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rev
}

// commit makes a revision. mu is held.
func (s *Server) commit() uint64 {
	s.rev++
	s.wake()
	return s.rev
}

func (s *Server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// bundle returns the own bundle. mu is held.
func (s *Server) bundle() *types.Bundle {
	b := &types.Bundle{TrustDomain: TrustDomain.Name(), SequenceNumber: s.seq}
	for _, a := range append([]*authority{s.ca}, s.old...) {
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: a.cert.Raw, Tainted: s.tainted[string(a.cert.Raw)]})
	}
	for id, key := range s.jwtKeys {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			s.t.Error(err)
		}
		b.JwtAuthorities = append(b.JwtAuthorities, &types.JWTKey{
			PublicKey: der, KeyId: id, ExpiresAt: time.Now().Add(24 * time.Hour).Unix(), Tainted: s.tainted[id],
		})
	}
	return b
}

// newJWTKey makes the active JWT key. mu is held or not needed yet.
func (s *Server) newJWTKey(id string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	s.jwtKeys[id], s.jwtID = key, id
}

// picture returns what agents may have. mu is held.
func (s *Server) picture() (entries map[string]*types.Entry, bundles map[string]*types.Bundle) {
	entries, bundles = map[string]*types.Entry{}, map[string]*types.Bundle{TrustDomain.Name(): s.bundle()}
	for id, e := range s.entries {
		entries[id] = e
		for _, td := range e.GetFederatesWith() {
			if b := s.others[td]; b != nil {
				bundles[td] = b
			}
		}
	}
	return entries, bundles
}

// checksum is what the agent must hold with the picture.
func checksum(entries map[string]*types.Entry, bundles map[string]*types.Bundle) ([]byte, error) {
	var es []*identity.Entry
	for _, w := range entries {
		e, err := identity.EntryFromWire(w)
		if err != nil {
			return nil, err
		}
		es = append(es, e)
	}
	var bs []*identity.Bundle
	for _, w := range bundles {
		b, err := identity.BundleFromWire(w)
		if err != nil {
			return nil, err
		}
		bs = append(bs, b)
	}
	return identity.Checksum(es, bs), nil
}

func newAuthority(t testing.TB) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}},
		URIs: []*url.URL{TrustDomain.ID().URL()}, NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert: cert, key: key}
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // crypto/rand never fails
	}
	return n.Add(n, big.NewInt(1))
}

// issue signs a leaf.
func (a *authority) issue(id spiffeid.ID, public crypto.PublicKey, dns []string, ttl time.Duration) (*x509.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
		URIs: []*url.URL{id.URL()}, DNSNames: dns,
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// tls shows a server SVID of the active CA and asks for a client certificate.
func (s *Server) tls() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			s.mu.Lock()
			ca := s.ca
			s.mu.Unlock()
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, err
			}
			id, err := spiffeid.FromPath(TrustDomain, "/spire/server")
			if err != nil {
				return nil, err
			}
			cert, err := ca.issue(id, key.Public(), nil, time.Hour)
			if err != nil {
				return nil, err
			}
			return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			pool := x509.NewCertPool()
			for _, c := range s.Authorities() {
				pool.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
			return err
		},
	}
}

// caller returns the calling agent's certificate.
func caller(ctx context.Context) (*x509.Certificate, error) {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nil, errors.New("no client certificate")
	}
	return info.State.PeerCertificates[0], nil
}

// Banned reports whether an agent is banned.
func (s *Server) Banned() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.agents {
		if a.banned {
			return true
		}
	}
	return false
}
