package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	own   = spiffeid.RequireTrustDomainFromString("own.test")
	other = spiffeid.RequireTrustDomainFromString("other.test")
	third = spiffeid.RequireTrustDomainFromString("third.test")
)

// authority is a CA of a trust domain.
type authority struct {
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	if template.NotBefore.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newAuthority(t testing.TB, td spiffeid.TrustDomain, change ...func(*x509.Certificate)) *authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: td.Name()}, URIs: []*url.URL{td.ID().URL()},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	for _, c := range change {
		c(template)
	}
	return &authority{td: td, cert: sign(t, template, template, key.Public(), key), key: key}
}

// svid returns a certificate for an ID, and for 127.0.0.1 so that it serves the web too.
func (a *authority) svid(t testing.TB, id string, change ...func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "leaf"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"},
	}
	if id != "" {
		template.URIs = []*url.URL{spiffeid.RequireFromString(id).URL()}
	}
	for _, c := range change {
		c(template)
	}
	return &tls.Certificate{Certificate: [][]byte{sign(t, template, a.cert, key.Public(), a.key).Raw}, PrivateKey: key}
}

// bundle returns a bundle with the authorities.
func bundle(td spiffeid.TrustDomain, sequence uint64, cas ...*authority) *identity.Bundle {
	b := &identity.Bundle{TrustDomain: td, Sequence: sequence, RefreshHint: 5 * time.Minute}
	for _, ca := range cas {
		b.X509 = append(b.X509, identity.X509Authority{Certificate: ca.cert})
	}
	return b
}

// written returns the document of a bundle.
func written(t testing.TB, b *identity.Bundle) []byte {
	t.Helper()
	text, err := b.SPIFFEBundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// stage is a fetcher with a real store, and an endpoint that a test tells what to do.
type stage struct {
	*Fetcher
	rec   *records.Records
	lines *lines
	ca    *authority // of other, which the endpoint's SVID is from
	url   string

	mu     sync.Mutex // guards the rest
	answer http.HandlerFunc
	show   *tls.Certificate
	asked  int
}

// lines are what was written to the audit log.
type lines struct {
	mu   sync.Mutex
	all  []audit.Line
	fail error
}

func (l *lines) Write(line audit.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return l.fail
	}
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

func newStage(t *testing.T, change ...func(*Config)) *stage {
	t.Helper()
	store, err := boltkv.Open(filepath.Join(t.TempDir(), "store"), boltkv.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	rec, err := records.Open(t.Context(), store, own, records.Config{})
	if err != nil {
		t.Fatal(err)
	}
	s := &stage{rec: rec, lines: &lines{}, ca: newAuthority(t, other)}
	s.show = s.ca.svid(t, "spiffe://other.test/spire/server")
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		answer := s.answer
		s.asked++
		s.mu.Unlock()
		answer(w, r)
	}))
	server.Config.ErrorLog = quiet()
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.show, nil
	}}
	server.StartTLS()
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	s.url = "https://localhost:" + u.Port() + "/"
	cfg := Config{Metrics: prometheus.NewRegistry(), Timeout: 10 * time.Second}
	for _, c := range change {
		c(&cfg)
	}
	s.Fetcher = New(rec, s.lines, cfg)
	s.serve(written(t, bundle(other, 7, s.ca)))
	return s
}

// do sets what the endpoint answers.
func (s *stage) do(answer http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

// serve makes the endpoint answer with a text.
func (s *stage) serve(text []byte) {
	s.do(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(text) })
}

// set puts a bundle in the store as an operator would.
func (s *stage) set(t *testing.T, b *identity.Bundle) {
	t.Helper()
	if _, _, err := s.rec.UpdateBundle(t.Context(), b.TrustDomain, func(held *identity.Bundle) error {
		held.X509, held.JWT, held.Origin = b.X509, b.JWT, 0
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// federate makes a federation with other by the profile https_spiffe, and gives the first bundle.
func (s *stage) federate(t *testing.T) {
	t.Helper()
	s.set(t, bundle(other, 0, s.ca))
	if _, err := s.rec.CreateFederation(t.Context(), &records.Federation{
		TrustDomain: other, URL: s.url, EndpointID: spiffeid.RequireFromString("spiffe://other.test/spire/server"),
	}); err != nil {
		t.Fatal(err)
	}
}

// held returns the stored bundle of other.
func (s *stage) held(t *testing.T) *identity.Bundle {
	t.Helper()
	b, err := s.rec.Bundle(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// refresh fetches the bundle of other.
func (s *stage) refresh(t *testing.T) error {
	t.Helper()
	_, known, err := s.Refresh(t.Context(), other)
	if !known {
		t.Fatal("there is no federation")
	}
	return err
}
