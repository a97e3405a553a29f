package issue_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"io"
	"math/big"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/issue"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// fakeSigner is a server that signs what it is asked, or does not.
type fakeSigner struct {
	t testing.TB

	mu      sync.Mutex // guards the rest
	ca      *x509.Certificate
	key     *ecdsa.PrivateKey
	jti     bool // tokens are for one use
	jwtKey  string
	x509TTL time.Duration
	jwtTTL  time.Duration
	delay   time.Duration
	err     error            // for everything
	errs    map[string]error // by entry
	asked   []identity.Asked
	batches [][]string
	jwts    int
}

func newSigner(t testing.TB) *fakeSigner {
	s := &fakeSigner{t: t, x509TTL: time.Hour, jwtTTL: 5 * time.Minute, delay: 2 * time.Millisecond, errs: map[string]error{}, jwtKey: "k1"}
	s.rotate()
	return s
}

func (s *fakeSigner) rotate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(1000 * time.Hour), IsCA: true,
		Subject:               pkix.Name{CommonName: "authority"},
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		s.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ca, s.key = cert, key
}

// set changes the signer.
func (s *fakeSigner) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *fakeSigner) count() (x509Calls, jwtCalls int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.batches), s.jwts
}

func (s *fakeSigner) wait(ctx context.Context) error {
	s.mu.Lock()
	delay := s.delay
	s.mu.Unlock()
	select {
	case <-time.After(delay):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *fakeSigner) SignX509(ctx context.Context, asked []identity.Asked, csrs [][]byte) ([][][]byte, []error) {
	ids := make([]string, len(asked))
	for n := range asked {
		ids[n] = asked[n].EntryID
	}
	waitErr := s.wait(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.batches = append(s.batches, ids)
	s.asked = append(s.asked, asked...)
	chains, errs := make([][][]byte, len(ids)), make([]error, len(ids))
	for n, id := range ids {
		if errs[n] = errors.Join(waitErr, s.err, s.errs[id]); errs[n] != nil {
			continue
		}
		csr, err := x509.ParseCertificateRequest(csrs[n])
		if err != nil || csr.CheckSignature() != nil {
			s.t.Errorf("bad CSR: %v", err)
			continue
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(len(s.batches)*1000 + n)), URIs: []*url.URL{csr.URIs[0]},
			NotBefore: time.Now(), NotAfter: time.Now().Add(s.x509TTL), BasicConstraintsValid: true,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, s.ca, csr.PublicKey, s.key)
		if err != nil {
			s.t.Error(err)
		}
		chains[n] = [][]byte{der}
	}
	return chains, errs
}

func (s *fakeSigner) SignJWT(ctx context.Context, asked identity.Asked, audience []string) (*identity.JWTSVID, error) {
	id := asked.EntryID
	waitErr := s.wait(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jwts++
	if err := errors.Join(waitErr, s.err, s.errs[id]); err != nil {
		return nil, err
	}
	head := base64.RawURLEncoding.EncodeToString([]byte(`{"kid":"` + s.jwtKey + `"}`))
	body := strconv.Itoa(s.jwts)
	if s.jti {
		body = base64.RawURLEncoding.EncodeToString([]byte(`{"jti":"` + body + `"}`))
	}
	return &identity.JWTSVID{
		EntryID: id, ID: spiffeid.RequireFromPath(td, "/"+id), Token: head + "." + body + ".x",
		IssuedAt: time.Now(), ExpiresAt: time.Now().Add(s.jwtTTL),
	}, nil
}

func (s *fakeSigner) SignWIT(ctx context.Context, asked identity.Asked, _ []byte, _ string) (*identity.JWTSVID, error) {
	return s.SignJWT(ctx, asked, nil)
}

// memory is a Store in memory.
type memory struct {
	mu  sync.Mutex
	all func() []keep.SVID
	old []keep.SVID
}

func (m *memory) SVIDs() []keep.SVID { return m.old }
func (m *memory) SaveSVIDs(all func() []keep.SVID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = all
}

func (m *memory) saved() []keep.SVID {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all == nil {
		return nil
	}
	return m.all()
}

// world is an issuer with its view and signer.
type world struct {
	t       testing.TB
	view    *view.View
	signer  *fakeSigner
	store   *memory
	issuer  *issue.Issuer
	rev     uint64
	entries map[string]*identity.Entry
	bundle  *identity.Bundle
	others  []*identity.Bundle
	stop    func()
	metrics *prometheus.Registry
}

// bubble runs the test in a synctest bubble with a world that ends with it.
func bubble(t *testing.T, cfg issue.Config, fn func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, view: view.New(nil), signer: newSigner(t), store: &memory{}, entries: map[string]*identity.Entry{}}
		w.bundle = &identity.Bundle{
			TrustDomain: td, Sequence: 1, X509: []identity.X509Authority{{Certificate: w.signer.ca}},
			JWT: []identity.JWTAuthority{{KeyID: "k1"}},
		}
		w.apply()
		w.start(cfg)
		defer func() { w.stop() }()
		fn(w)
	})
}

// missing is what the metric says of identities that are wanted and not there.
func (w *world) missing() float64 {
	w.t.Helper()
	families, err := w.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "assay_agent_svids_missing" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	w.t.Fatal("there is no such metric")
	return 0
}

func (w *world) start(cfg issue.Config) {
	w.t.Helper()
	cfg.TrustDomain = td
	log := logrus.New()
	log.SetOutput(io.Discard)
	cfg.Log = log
	w.metrics = prometheus.NewRegistry()
	cfg.Metrics = w.metrics
	var err error
	if w.issuer, err = issue.New(w.view, w.signer, w.store, cfg); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.issuer.Run(ctx)
	}()
	w.stop = func() { cancel(); <-done }
}

func set(selectors ...string) attestor.Set {
	var all []attestor.Selector
	for _, text := range selectors {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			panic(err)
		}
		all = append(all, s)
	}
	return attestor.NewSet(all...)
}

func entry(id string, age int, selectors ...string) *identity.Entry {
	return &identity.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), Selectors: set(selectors...),
		CreatedAt: time.Unix(int64(1000-age), 0).UTC(),
	}
}

func (w *world) put(entries ...*identity.Entry) {
	for _, e := range entries {
		w.entries[e.ID] = e
	}
	w.apply()
}

func (w *world) delete(ids ...string) {
	for _, id := range ids {
		delete(w.entries, id)
	}
	w.apply()
}

func (w *world) apply() {
	w.t.Helper()
	w.rev++
	u := view.Update{StoreID: "s", Rev: w.rev, Full: true, Bundles: append([]*identity.Bundle{w.bundle}, w.others...)}
	for _, e := range w.entries {
		u.Entries = append(u.Entries, e)
	}
	if err := w.view.Apply(u); err != nil {
		w.t.Fatal(err)
	}
}

// fetch asks once and demands an answer.
func (w *world) fetch(facts attestor.Set) (identity.X509Context, <-chan struct{}) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	c, changed, err := w.issuer.X509(ctx, facts)
	if err != nil {
		w.t.Fatal(err)
	}
	return c, changed
}

// stream follows facts as an open stream does.
type stream struct {
	w      *world
	mu     sync.Mutex
	got    []identity.X509Context
	errs   []error
	cancel context.CancelFunc
	done   chan struct{}
}

func (w *world) stream(facts attestor.Set) *stream {
	ctx, cancel := context.WithCancel(w.t.Context())
	s := &stream{w: w, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for {
			c, changed, err := w.issuer.X509(ctx, facts)
			if ctx.Err() != nil {
				return
			}
			s.mu.Lock()
			s.got, s.errs = append(s.got, c), append(s.errs, err)
			s.mu.Unlock()
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return s
}

func (s *stream) close() { s.cancel(); <-s.done }

// last waits until everything is quiet and returns the stream's last answer.
func (s *stream) last() (identity.X509Context, error) {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.got) == 0 {
		s.w.t.Fatal("the stream got nothing yet")
	}
	return s.got[len(s.got)-1], s.errs[len(s.errs)-1]
}

func (s *stream) count() int {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.got)
}

// pass lets time go by, in the bubble.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func ids(c identity.X509Context) []string {
	out := []string{}
	for _, s := range c.SVIDs {
		out = append(out, s.EntryID)
	}
	return out
}
