package trust

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	stdlog "log" //nolint:depguard // net/http takes no other
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

func quiet() *stdlog.Logger { return stdlog.New(io.Discard, "", 0) }

func TestFetch(t *testing.T) {
	s := newStage(t)
	s.federate(t)
	second := newAuthority(t, other)
	t.Run("a new bundle is stored with its number and told to the audit log", func(t *testing.T) {
		s.serve(written(t, bundle(other, 7, s.ca, second)))
		if err := s.refresh(t); err != nil {
			t.Fatal(err)
		}
		b := s.held(t)
		if len(b.X509) != 2 || b.Origin != 7 || b.RefreshHint != 5*time.Minute {
			t.Errorf("%+v", b)
		}
		if line := s.lines.last(); line.Event != "federation.fetch" || line.Outcome != audit.Allow || line.SPIFFEID != "spiffe://other.test" {
			t.Errorf("%+v", line)
		}
	})
	t.Run("the same bundle is no change, whatever its number", func(t *testing.T) {
		before, lines := s.held(t).Sequence, len(s.lines.all)
		s.serve(written(t, bundle(other, 9, second, s.ca)))
		if err := s.refresh(t); err != nil || s.held(t).Sequence != before || len(s.lines.all) != lines {
			t.Errorf("%v, sequence %d to %d", err, before, s.held(t).Sequence)
		}
	})
	t.Run("an older one is refused, even by a number that came with no change", func(t *testing.T) {
		s.serve(written(t, bundle(other, 8, s.ca)))
		if err := s.refresh(t); !errors.Is(err, ErrRefused) || len(s.held(t).X509) != 2 {
			t.Errorf("%v, %d authorities", err, len(s.held(t).X509))
		}
		if line := s.lines.last(); line.Outcome != audit.Deny {
			t.Errorf("%+v", line)
		}
	})
	t.Run("an operator who sets the bundle starts the count anew", func(t *testing.T) {
		s.set(t, bundle(other, 0, s.ca))
		s.serve(written(t, bundle(other, 2, s.ca, second)))
		if err := s.refresh(t); err != nil || s.held(t).Origin != 2 {
			t.Errorf("%v, origin %d", err, s.held(t).Origin)
		}
	})
	t.Run("the number outlives the process", func(t *testing.T) {
		again := New(s.rec, s.lines, Config{})
		s.serve(written(t, bundle(other, 1, s.ca)))
		if _, _, err := again.Refresh(t.Context(), other); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
	t.Run("without an audit line nothing is stored", func(t *testing.T) {
		s.lines.fail = errors.New("disk is full")
		defer func() { s.lines.fail = nil }()
		s.serve(written(t, bundle(other, 20, second)))
		if err := s.refresh(t); err == nil || s.held(t).Origin != 2 {
			t.Errorf("%v, origin %d", err, s.held(t).Origin)
		}
	})
	t.Run("who is not federated with is not known", func(t *testing.T) {
		if _, known, err := s.Refresh(t.Context(), third); known || err != nil {
			t.Errorf("%v, %v", known, err)
		}
	})
}

// TestHostileEndpoint has one flaw per case: whatever it is, what is held stays.
func TestHostileEndpoint(t *testing.T) {
	s := newStage(t)
	s.federate(t)
	good := written(t, bundle(other, 7, s.ca))
	if err := s.refresh(t); err != nil {
		t.Fatal(err)
	}
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("a redirect was followed")
	}))
	defer elsewhere.Close()
	newer := written(t, bundle(other, 8, s.ca, newAuthority(t, other)))
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(newer) }))
	defer plain.Close()
	doc := func(b *identity.Bundle) http.HandlerFunc {
		text := written(t, b)
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(text) }
	}
	text := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(code)
		}
	}
	key := `{"use":"jwt-svid","kid":"%d","kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"},`
	many := new(strings.Builder)
	for i := range identity.MaxAuthorities + 1 {
		fmt.Fprintf(many, key, i)
	}
	for _, c := range []struct {
		name    string
		answer  http.HandlerFunc
		refused bool
	}{
		{"redirects", status(http.StatusFound), true},
		{"redirects for good", status(http.StatusPermanentRedirect), true},
		// What would be taken if it were followed, unlike the two above, whose end nobody vouches for.
		{"redirects to itself, where a good one is", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Has("again") {
				_, _ = w.Write(newer)
				return
			}
			http.Redirect(w, r, "/?again", http.StatusFound)
		}, true},
		{"redirects to plain HTTP, where a good one is", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, plain.URL, http.StatusTemporaryRedirect)
		}, true},
		{"redirects to another host", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://169.254.169.254/latest/meta-data/", http.StatusTemporaryRedirect)
		}, true},
		{"says its sequence number twice", text(strings.Replace(string(good), `{`, `{"spiffe_sequence":1,`, 1)), true},
		{"says its keys twice", text(strings.Replace(string(good), `{`, `{"Keys":[],`, 1)), true},
		{"has two keys of one ID", text(strings.Replace(string(good), `"keys":[`, `"keys":[`+fmt.Sprintf(key, 1)+strings.Replace(fmt.Sprintf(key, 1), `"kty"`, `"alg":"ES256","kty"`, 1), 1)), true},
		{"has a key that says its use twice", text(strings.Replace(string(good), `"keys":[`, `"keys":[{"use":"jwt-svid",`+strings.TrimPrefix(fmt.Sprintf(key, 1), "{"), 1)), true},
		{"has an empty key", text(strings.Replace(string(good), `"keys":[`, `"keys":[{},`, 1)), true},
		{"says not found", status(http.StatusNotFound), false},
		{"says it is broken", status(http.StatusInternalServerError), false},
		{"is empty", text(""), true},
		{"is HTML", text("<html>secret of the inner network</html>"), true},
		{"is no object", text("[]"), true},
		{"has no keys", text("{}"), true},
		{"has an empty list of keys", text(`{"keys":[]}`), true},
		{"has keys of an unknown use only", text(`{"keys":[{"use":"sig","kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`), true},
		{"has a hint that is no number", text(strings.Replace(string(good), `"spiffe_refresh_hint":300`, `"spiffe_refresh_hint":"soon"`, 1)), true},
		{"has an older sequence number", doc(bundle(other, 6, s.ca)), true},
		{"has an authority of another trust domain", doc(bundle(other, 8, s.ca, newAuthority(t, third))), true},
		{"has an authority that is no CA", doc(bundle(other, 8, s.ca, newAuthority(t, other, func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature
		}))), true},
		{"has an authority that may not sign", doc(bundle(other, 8, s.ca, newAuthority(t, other, func(c *x509.Certificate) {
			c.KeyUsage = x509.KeyUsageDigitalSignature
		}))), true},
		{"has too many authorities", text(strings.Replace(string(good), `"keys":[`, `"keys":[`+many.String(), 1)), true},
		{"has a JWT key without ID", text(strings.Replace(string(good), `"keys":[`, `"keys":[{"use":"jwt-svid","kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"},`, 1)), true},
		{"is huge and says so", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000000000")
			_, _ = w.Write(good)
		}, true},
		{"is huge and does not say so", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(good)
			space := bytes.Repeat([]byte(" "), 64<<10)
			for range maxDocument / len(space) {
				_, _ = w.Write(space)
				w.(http.Flusher).Flush()
			}
		}, true},
		{"has huge headers", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Filler", strings.Repeat("x", 128<<10))
			_, _ = w.Write(good)
		}, false},
		{"is compressed, and a bomb perhaps", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0})
		}, true},
		{"breaks off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(good)+10))
			_, _ = w.Write(good)
		}, false},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, false},
	} {
		t.Run("an endpoint that "+c.name, func(t *testing.T) {
			before := s.held(t)
			s.do(c.answer)
			err := s.refresh(t)
			if err == nil || errors.Is(err, ErrRefused) != c.refused {
				t.Errorf("refused %v: %v", c.refused, err)
			}
			if after := s.held(t); after.Sequence != before.Sequence {
				t.Errorf("the bundle went from %d to %d", before.Sequence, after.Sequence)
			}
			if line := s.lines.last(); c.refused && err != nil && (line.Outcome != audit.Deny || line.Event != "federation.fetch" || line.Reason != err.Error() || line.Peer == "") {
				t.Errorf("the audit log says %+v of %v", line, err)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("what came is repeated: %v", err)
			}
		})
	}
	t.Run("what type it says that its answer has, is nobody's business: the document says what it is", func(t *testing.T) {
		s.do(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-16")
			_, _ = w.Write(good)
		})
		if err := s.refresh(t); err != nil {
			t.Error(err)
		}
	})
	t.Run("the same key twice is the same key", func(t *testing.T) {
		s.do(text(strings.Replace(strings.Replace(string(good), `"spiffe_sequence":7`, `"spiffe_sequence":8`, 1), `"keys":[`, `"keys":[`+fmt.Sprintf(key, 1)+fmt.Sprintf(key, 1), 1)))
		if err := s.refresh(t); err != nil || len(s.held(t).JWT) != 1 {
			t.Errorf("%v, %d keys", err, len(s.held(t).JWT))
		}
	})
	t.Run("after all that a good one is taken", func(t *testing.T) {
		s.do(doc(bundle(other, 8, s.ca, newAuthority(t, other))))
		if err := s.refresh(t); err != nil || len(s.held(t).X509) != 2 {
			t.Error(err)
		}
	})
}

func TestAFederationOfOtherRulesIsNotAsked(t *testing.T) {
	s := newStage(t)
	s.federate(t)
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		t.Error("the endpoint is asked")
		_, _ = w.Write(written(t, bundle(other, 7, s.ca)))
	}))
	defer plain.Close()
	server := spiffeid.RequireFromString("spiffe://other.test/spire/server")
	for name, f := range map[string]records.Federation{
		"without TLS":          {URL: plain.URL},
		"with a password":      {URL: strings.Replace(s.url, "https://", "https://me:secret@", 1), EndpointID: server},
		"with an ID of no one": {URL: s.url, EndpointID: other.ID()},
	} {
		f.TrustDomain = other
		if _, err := s.get(t.Context(), &f); !errors.Is(err, ErrRefused) {
			t.Errorf("an endpoint %s: %v", name, err)
		}
	}
	if text, err := s.get(t.Context(), &records.Federation{TrustDomain: other, URL: s.url, EndpointID: server}); err != nil || len(text) == 0 {
		t.Errorf("one by the rules: %v", err)
	}
}

// overtaken is a store into which somebody else puts a later bundle, just before one is written.
type overtaken struct {
	Store
	origin uint64
}

func (o overtaken) UpdateBundle(_ context.Context, td spiffeid.TrustDomain, change func(*identity.Bundle) error) (*identity.Bundle, kv.Rev, error) {
	b := &identity.Bundle{TrustDomain: td, Origin: o.origin}
	return b, 1, change(b)
}

func TestABundleThatWasOvertakenIsRefused(t *testing.T) {
	s := newStage(t)
	s.federate(t)
	for origin, refused := range map[uint64]bool{6: false, 7: false, 8: true} {
		f := New(overtaken{s.rec, origin}, s.lines, Config{})
		if _, _, err := f.Refresh(t.Context(), other); errors.Is(err, ErrRefused) != refused || err != nil && !refused {
			t.Errorf("number 7 in place of %d: %v", origin, err)
		}
	}
}

func TestEachAuthorityOfADocumentIsLookedAt(t *testing.T) {
	ca := newAuthority(t, other)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	good := identity.JWTAuthority{KeyID: "a", Key: ca.cert.PublicKey}
	with := func(change func(*identity.Bundle)) []byte {
		b := bundle(other, 7, ca)
		b.JWT, b.WIT = []identity.JWTAuthority{good}, []identity.JWTAuthority{good}
		change(b)
		return written(t, b)
	}
	b, err := parse(other, with(func(*identity.Bundle) {}))
	if err != nil || len(b.X509) != 1 || len(b.JWT) != 1 || len(b.WIT) != 1 {
		t.Fatalf("%+v, %v", b, err)
	}
	long := strings.Repeat("k", identity.MaxKeyID+1)
	unknown := strings.Repeat(`{"use":"later","kty":"EC"},`, 2*identity.MaxAuthorities)
	for name, c := range map[string]struct {
		text []byte
		says string
	}{
		"a weak JWT key":                {with(func(b *identity.Bundle) { b.JWT[0].Key = weak.Public() }), "JWT authority"},
		"a weak WIT key":                {with(func(b *identity.Bundle) { b.WIT[0].Key = weak.Public() }), "WIT authority"},
		"a JWT key with a long ID":      {with(func(b *identity.Bundle) { b.JWT[0].KeyID = long }), "key ID of"},
		"a WIT key with a long ID":      {with(func(b *identity.Bundle) { b.WIT[0].KeyID = long }), "key ID of"},
		"no end of keys for later uses": {[]byte(strings.Replace(string(written(t, bundle(other, 7, ca))), `"keys":[`, `"keys":[`+unknown, 1)), "the limit is"},
	} {
		if _, err := parse(other, c.text); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error is %v, want %q", name, err, c.says)
		}
	}
}

func TestABundleIsTheSameOnlyWithTheSameKeys(t *testing.T) {
	one, two := newAuthority(t, other), newAuthority(t, other)
	key := func(id string, of *authority) identity.JWTAuthority {
		return identity.JWTAuthority{KeyID: id, Key: of.cert.PublicKey}
	}
	whole := func() *identity.Bundle {
		return &identity.Bundle{
			TrustDomain: other, RefreshHint: time.Minute, X509: []identity.X509Authority{{Certificate: one.cert}, {Certificate: two.cert}},
			JWT: []identity.JWTAuthority{key("a", one), key("b", two)}, WIT: []identity.JWTAuthority{key("c", one)},
		}
	}
	for name, change := range map[string]func(*identity.Bundle){
		"another certificate":            func(b *identity.Bundle) { b.X509[1].Certificate = newAuthority(t, other).cert },
		"a certificate less":             func(b *identity.Bundle) { b.X509 = b.X509[:1] },
		"another key of the same ID":     func(b *identity.Bundle) { b.JWT[0].Key = two.cert.PublicKey },
		"the same key of another ID":     func(b *identity.Bundle) { b.JWT[0].KeyID = "x" },
		"a key less":                     func(b *identity.Bundle) { b.JWT = b.JWT[:1] },
		"another WIT key of the same ID": func(b *identity.Bundle) { b.WIT[0].Key = two.cert.PublicKey },
		"no WIT key":                     func(b *identity.Bundle) { b.WIT = nil },
		"another hint":                   func(b *identity.Bundle) { b.RefreshHint = time.Hour },
	} {
		b := whole()
		if change(b); same(whole(), b) || same(b, whole()) {
			t.Errorf("a bundle with %s is the same", name)
		}
	}
	b := whole()
	slices.Reverse(b.X509)
	slices.Reverse(b.JWT)
	if !same(whole(), b) {
		t.Error("the same in another order is another")
	}
}

func TestSlowEndpoint(t *testing.T) {
	s := newStage(t, func(c *Config) { c.Timeout = 200 * time.Millisecond })
	s.federate(t)
	for name, answer := range map[string]http.HandlerFunc{
		"says nothing": func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			panic(http.ErrAbortHandler) // an empty answer may still get there
		},
		"says a byte and no more": func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "{")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			panic(http.ErrAbortHandler) // or what it said may seem to be all
		},
		"drips": func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil { // never still for long, and never done
				if _, err := io.WriteString(w, " "); err != nil {
					return
				}
				w.(http.Flusher).Flush()
				runtime.Gosched()
			}
		},
	} {
		t.Run("an endpoint that "+name+" is given up", func(t *testing.T) {
			s.do(answer)
			if err := s.refresh(t); err == nil || !strings.Contains(err.Error(), "took too long") {
				t.Error(err)
			}
		})
	}
}

func TestWhoTheEndpointIs(t *testing.T) {
	s := newStage(t)
	s.federate(t)
	foreign := newAuthority(t, other)
	for _, c := range []struct {
		name string
		show func() *stage
	}{
		{"another SPIFFE ID of its trust domain", func() *stage { s.show = s.ca.svid(t, "spiffe://other.test/workload"); return s }},
		{"the ID of another trust domain", func() *stage { s.show = s.ca.svid(t, "spiffe://third.test/spire/server"); return s }},
		{"an SVID of an unknown authority", func() *stage { s.show = foreign.svid(t, "spiffe://other.test/spire/server"); return s }},
		{"a certificate without an ID", func() *stage { s.show = s.ca.svid(t, ""); return s }},
		{"an expired SVID", func() *stage {
			s.show = s.ca.svid(t, "spiffe://other.test/spire/server", func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
			})
			return s
		}},
	} {
		t.Run("https_spiffe refuses "+c.name, func(t *testing.T) {
			s.mu.Lock()
			c.show()
			s.mu.Unlock()
			if err := s.refresh(t); !errors.Is(err, ErrRefused) || s.held(t).Origin != 0 {
				t.Error(err)
			}
		})
	}
	t.Run("https_spiffe needs a bundle to begin with", func(t *testing.T) {
		if _, err := s.rec.DeleteBundle(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		if err := s.refresh(t); err == nil || !strings.Contains(err.Error(), "bundle set") {
			t.Error(err)
		}
	})
}

func TestWebProfile(t *testing.T) {
	web := newAuthority(t, other, func(c *x509.Certificate) { c.URIs = nil })
	roots := x509.NewCertPool()
	roots.AddCert(web.cert)
	s := newStage(t, func(c *Config) { c.Roots = roots })
	if _, err := s.rec.CreateFederation(t.Context(), &records.Federation{TrustDomain: other, URL: s.url}); err != nil {
		t.Fatal(err)
	}
	t.Run("a certificate that the web does not know is refused", func(t *testing.T) {
		if err := s.refresh(t); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
	t.Run("one for another name is refused", func(t *testing.T) {
		s.mu.Lock()
		s.show = web.svid(t, "", func(c *x509.Certificate) { c.DNSNames = []string{"elsewhere.test"} })
		s.mu.Unlock()
		if err := s.refresh(t); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
	t.Run("a good one needs no bundle to begin with", func(t *testing.T) {
		s.mu.Lock()
		s.show = web.svid(t, "")
		s.mu.Unlock()
		if err := s.refresh(t); err != nil || s.held(t).Origin != 7 {
			t.Error(err)
		}
	})
}

func TestRun(t *testing.T) {
	s := newStage(t, func(c *Config) { c.Shortest = time.Millisecond })
	s.set(t, bundle(other, 0, s.ca))
	watch, err := s.rec.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	// until waits for a bundle of other in the store.
	until := func(good func(*identity.Bundle) bool) {
		t.Helper()
		found := errors.New("found")
		err := s.rec.Follow(t.Context(), watch.Rev, func(c records.Change) error {
			for _, b := range c.Bundles {
				if b.TrustDomain == other && b.Bundle != nil && good(b.Bundle) {
					return found
				}
			}
			return nil
		})
		if !errors.Is(err, found) {
			t.Fatal(err)
		}
	}
	t.Run("a federation that is created is fetched from at once", func(t *testing.T) {
		if _, err := s.rec.CreateFederation(t.Context(), &records.Federation{
			TrustDomain: other, URL: s.url, EndpointID: spiffeid.RequireFromString("spiffe://other.test/spire/server"),
		}); err != nil {
			t.Fatal(err)
		}
		until(func(b *identity.Bundle) bool { return b.Origin == 7 })
	})
	t.Run("an endpoint that failed is asked again", func(t *testing.T) {
		second := newAuthority(t, other)
		text := written(t, &identity.Bundle{TrustDomain: other, Sequence: 9, RefreshHint: time.Second, X509: []identity.X509Authority{{Certificate: s.ca.cert}, {Certificate: second.cert}}})
		failures := 3
		s.do(func(w http.ResponseWriter, _ *http.Request) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if failures--; failures >= 0 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			_, _ = w.Write(text)
		})
		// The fetcher waits half of five minutes by the first hint; who cannot wait asks.
		for s.refresh(t) != nil {
		}
		until(func(b *identity.Bundle) bool { return b.Origin == 9 })
	})
	t.Run("a change of the federation counts at once", func(t *testing.T) {
		s.serve(written(t, bundle(other, 11, s.ca)))
		if _, _, err := s.rec.UpdateFederation(t.Context(), other, func(f *records.Federation) error {
			f.URL += "?"
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		until(func(b *identity.Bundle) bool { return b.Origin == 11 })
	})
	t.Run("a federation that ended is fetched from no more", func(t *testing.T) {
		if _, err := s.rec.DeleteFederation(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		if _, known, err := s.Refresh(t.Context(), other); known || err != nil {
			t.Errorf("%v, %v", known, err)
		}
	})
}

func TestStaticWins(t *testing.T) {
	s := newStage(t)
	s.federate(t)
	f := New(s.rec, s.lines, Config{Static: []*records.Federation{{TrustDomain: other, URL: "https://localhost:1/", EndpointID: spiffeid.RequireFromString("spiffe://other.test/spire/server")}}})
	if _, known, err := f.Refresh(t.Context(), other); !known || err == nil || errors.Is(err, ErrRefused) {
		t.Errorf("%v, %v", known, err)
	}
	if s.asked != 0 {
		t.Error("the stored federation's endpoint was asked")
	}
}

func TestWait(t *testing.T) {
	f := New(nil, nil, Config{})
	for hint, want := range map[time.Duration]time.Duration{
		0: usual / 2, time.Second: time.Minute, 10 * time.Minute: 5 * time.Minute, 365 * 24 * time.Hour: longest,
	} {
		if got := f.wait(&identity.Bundle{RefreshHint: hint}); got != want {
			t.Errorf("hint %s: %s, want %s", hint, got, want)
		}
	}
	for failures, want := range map[int]time.Duration{0: 5 * time.Second, 1: 10 * time.Second, 6: usual, 1000: usual} {
		if got := f.retry(failures); got != want {
			t.Errorf("%d failures: %s, want %s", failures, got, want)
		}
	}
	for range 1000 {
		if d := jitter(time.Minute); d < 54*time.Second || d > 66*time.Second {
			t.Fatal(d)
		}
	}
}

func TestHints(t *testing.T) {
	ca := newAuthority(t, other)
	good := string(written(t, bundle(other, 7, ca)))
	for hint, want := range map[string]time.Duration{
		"300": 5 * time.Minute, "0": 0, "-5": 0, "9223372036854775807": maxHint, "null": 0,
	} {
		b, err := parse(other, []byte(strings.Replace(good, `"spiffe_refresh_hint":300`, `"spiffe_refresh_hint":`+hint, 1)))
		if err != nil || b.RefreshHint != want {
			t.Errorf("hint %s: %v, %v", hint, b, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(written(f, bundle(other, 7, newAuthority(f, other))))
	f.Add([]byte(`{"keys":[{"use":"x509-svid"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := parse(other, text)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Fatal(err)
			}
			return
		}
		again, err := parse(other, written(t, b))
		if err != nil || !same(b, again) {
			t.Fatalf("%v, %v", again, err)
		}
	})
}
