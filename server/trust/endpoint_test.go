package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// picture has one bundle, which a test replaces.
type picture struct {
	atomic.Pointer[identity.Bundle]
}

func (p *picture) Bundle(td spiffeid.TrustDomain) (*identity.Bundle, bool) {
	b := p.Load()
	return b, b != nil && b.TrustDomain == td
}

func silent() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func TestEndpoint(t *testing.T) {
	p := &picture{}
	first, second := newAuthority(t, own), newAuthority(t, own)
	e := NewEndpoint(own, p, 7*time.Minute, nil)
	ask := func(method, path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		e.ServeHTTP(w, httptest.NewRequest(method, "https://localhost"+path, nil))
		return w
	}
	t.Run("there is nothing before the first picture", func(t *testing.T) {
		if r := ask(http.MethodGet, "/"); r.Code != http.StatusInternalServerError {
			t.Error(r.Code)
		}
	})
	for sequence, cas := range [][]*authority{1: {first}, 2: {first, second}} {
		if cas == nil {
			continue
		}
		p.Store(bundle(own, uint64(sequence), cas...))
		t.Run("GET / is the bundle as it is now", func(t *testing.T) {
			for range 2 {
				r := ask(http.MethodGet, "/")
				text, _ := io.ReadAll(r.Body)
				b, err := parse(own, text)
				if err != nil || b.Origin != uint64(sequence) || len(b.X509) != len(cas) || b.RefreshHint != 7*time.Minute {
					t.Errorf("%+v, %v", b, err)
				}
				if r.Header().Get("Content-Type") != "application/json" || !strings.Contains(string(text), `"use":"x509-svid"`) {
					t.Errorf("%v %s", r.Header(), text)
				}
			}
		})
	}
	t.Run("nothing else is there", func(t *testing.T) {
		for _, path := range []string{"/bundle", "//", "/index.html", "/../"} {
			if r := ask(http.MethodGet, path); r.Code != http.StatusNotFound || r.Header().Get("Location") != "" {
				t.Errorf("%s: %d", path, r.Code)
			}
		}
		for _, method := range []string{http.MethodPost, http.MethodHead, http.MethodPut, http.MethodOptions} {
			if r := ask(method, "/"); r.Code != http.StatusMethodNotAllowed || r.Header().Get("Allow") != http.MethodGet {
				t.Errorf("%s: %d", method, r.Code)
			}
		}
	})
}

// TestServe fetches from a real endpoint with the real client's rules.
func TestServe(t *testing.T) {
	p := &picture{}
	ca := newAuthority(t, own)
	p.Store(bundle(own, 3, ca))
	show := ca.svid(t, "spiffe://own.test/spire/server")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- NewEndpoint(own, p, time.Minute, nil).Serve(ctx, l, SVIDConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return show, nil }), silent())
	}()
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS12}}
	resp, err := (&http.Client{Transport: transport}).Get("https://" + l.Addr().String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if b, bad := parse(own, text); err != nil || bad != nil || b.Origin != 3 {
		t.Errorf("%v, %v", err, bad)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// put writes a certificate and its key as PEM.
func put(t *testing.T, certPath, keyPath string, pair *tls.Certificate) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{
		certPath: {Type: "CERTIFICATE", Bytes: pair.Certificate[0]}, keyPath: {Type: "PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFileCertificate(t *testing.T) {
	ca := newAuthority(t, own)
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if _, err := OpenFileCertificate(cert, key); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no files: %v", err)
	}
	first, second := ca.svid(t, ""), ca.svid(t, "")
	put(t, cert, key, first)
	synctest.Test(t, func(t *testing.T) {
		f, err := OpenFileCertificate(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = f.Run(t.Context(), time.Hour, silent()) }()
		shows := func(want *tls.Certificate) {
			t.Helper()
			have, err := f.Config().GetCertificate(nil)
			if err != nil || string(have.Certificate[0]) != string(want.Certificate[0]) {
				t.Errorf("another certificate is shown, %v", err)
			}
		}
		hour := func() {
			time.Sleep(time.Hour + time.Second) // of the bubble
			synctest.Wait()
		}
		shows(first)
		put(t, cert, filepath.Join(dir, "elsewhere"), second)
		hour()
		shows(first) // the key does not fit yet
		put(t, cert, key, second)
		hour()
		shows(second)
		if err := os.Remove(cert); err != nil {
			t.Fatal(err)
		}
		hour()
		shows(second)
	})
}

func TestACME(t *testing.T) {
	a := ACME{Domain: "bundle.own.test", DirectoryURL: "https://localhost:1/", Cache: t.TempDir()}
	if _, err := a.Config(silent()); !errors.Is(err, errTerms) {
		t.Errorf("without consent: %v", err)
	}
	a.AcceptTOS = true
	config, err := a.Config(silent())
	if err != nil {
		t.Fatal(err)
	}
	t.Run("nothing is ordered for another name", func(t *testing.T) {
		_, err := config.GetCertificate(&tls.ClientHelloInfo{ServerName: "elsewhere.test"})
		if err == nil || !strings.Contains(err.Error(), "not configured in HostWhitelist") {
			t.Error(err)
		}
	})
}

// TestACMETellsTheOperator holds that a certificate that does not come, or is not renewed, is in the log.
func TestACMETellsTheOperator(t *testing.T) {
	const domain = "bundle.own.test"
	start := time.Unix(1_800_000_000, 0)
	refused := errors.New("the directory is away")
	leaf := func(left time.Duration) *tls.Certificate {
		return &tls.Certificate{Leaf: &x509.Certificate{NotBefore: start.Add(left - 60*time.Hour), NotAfter: start.Add(left)}}
	}
	for _, c := range []struct {
		what  string
		hello tls.ClientHelloInfo
		cert  *tls.Certificate
		err   error
		after []time.Duration
		want  []string
	}{
		{"no certificate, which is said once for all who ask in a while", tls.ClientHelloInfo{ServerName: "Bundle.own.test"}, nil, refused, []time.Duration{0, time.Second, warnAgain, warnAgain + 1}, []string{"there is no certificate", "there is no certificate"}},
		{"another name", tls.ClientHelloInfo{ServerName: "elsewhere.test"}, nil, refused, []time.Duration{0}, nil},
		{"no name", tls.ClientHelloInfo{}, nil, refused, []time.Duration{0}, nil},
		{"a challenge", tls.ClientHelloInfo{ServerName: domain, SupportedProtos: []string{"acme-tls/1"}}, nil, refused, []time.Duration{0}, nil},
		{"a certificate that is good for long", tls.ClientHelloInfo{ServerName: domain}, leaf(11 * time.Hour), nil, []time.Duration{0}, nil},
		{"one that nobody renews", tls.ClientHelloInfo{ServerName: domain}, leaf(9 * time.Hour), nil, []time.Duration{0, time.Second}, []string{"has not been renewed"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			log, lines := logtest.NewNullLogger()
			now := start
			get := ACME{Domain: domain}.warned(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.cert, c.err }, func() time.Time { return now }, log)
			for _, d := range c.after {
				now = start.Add(d)
				if cert, err := get(&c.hello); cert != c.cert || !errors.Is(err, c.err) {
					t.Errorf("it answers %v, %v", cert, err)
				}
			}
			got := lines.AllEntries()
			if len(got) != len(c.want) {
				t.Fatalf("%d lines: %v", len(got), got)
			}
			for i, line := range got {
				if line.Level != logrus.WarnLevel || !strings.Contains(line.Message, c.want[i]) || line.Data["domain"] != domain {
					t.Errorf("it says %v %q %v", line.Level, line.Message, line.Data)
				}
				if c.err != nil && line.Data["error"] != c.err.Error() {
					t.Errorf("it does not say why: %v", line.Data)
				}
			}
		})
	}
}
