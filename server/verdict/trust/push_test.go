package trust_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/zclconf/go-cty/cty"

	"github.com/assay-id/assay/server/verdict/trust"
)

// issuer is an OIDC issuer over TLS.
type issuer struct {
	*httptest.Server
	caFile string
	asked  atomic.Int64 // for keys

	mu   sync.Mutex
	keys []jose.JSONWebKey // guarded by mu
	// answer, if set, takes the place of the usual answers.
	answer func(http.ResponseWriter, *http.Request) bool // guarded by mu
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	is := &issuer{}
	is.Server = httptest.NewUnstartedServer(http.HandlerFunc(is.serve))
	is.StartTLS()
	t.Cleanup(is.Close)
	is.caFile = filepath.Join(t.TempDir(), "ca.pem")
	put(t, is.caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: is.Certificate().Raw}))
	return is
}

func (is *issuer) serve(w http.ResponseWriter, r *http.Request) {
	is.mu.Lock()
	keys, answer := is.keys, is.answer
	is.mu.Unlock()
	if r.URL.Path == "/keys" {
		is.asked.Add(1)
	}
	if answer != nil && answer(w, r) {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, is.URL, is.URL+"/keys")
	case "/keys":
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: keys})
	default:
		http.NotFound(w, r)
	}
}

func (is *issuer) set(answer func(http.ResponseWriter, *http.Request) bool, keys ...crypto.PublicKey) {
	is.mu.Lock()
	defer is.mu.Unlock()
	is.answer, is.keys = answer, nil
	for i, k := range keys {
		is.keys = append(is.keys, jose.JSONWebKey{Key: k, KeyID: fmt.Sprint("k", i), Use: "sig"})
	}
}

// token signs claims.
func token(t testing.TB, key any, keyID string, alg jose.SignatureAlgorithm, claims map[string]any) string {
	t.Helper()
	return signJWT(t, key, keyID, alg, asJSON(claims))
}

func signJWT(t testing.TB, key any, keyID string, alg jose.SignatureAlgorithm, payload []byte) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: keyID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := s.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

const audience = "https://assay.example"

// claimsOf are those of a job.
func claimsOf(is *issuer, change map[string]any) map[string]any {
	c := map[string]any{
		"iss": is.URL, "aud": audience, "sub": "repo:acme/shop:ref:refs/heads/main",
		"iat": received.Unix(), "nbf": received.Unix(), "exp": received.Add(5 * time.Minute).Unix(),
		"repository_owner_id": "17",
	}
	maps.Copy(c, change)
	for k, v := range c {
		if v == nil {
			delete(c, k)
		}
	}
	return c
}

func source(t testing.TB, name string, o trust.OIDCBlock) *trust.Source {
	t.Helper()
	s, problems := trust.NewSource(trust.SourceBlock{Name: name, Repositories: []string{"registry.example/" + name + "/*"}, OIDC: []trust.OIDCBlock{o}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return s
}

func owned(is *issuer, by string) trust.OIDCBlock {
	return trust.OIDCBlock{
		Issuer: is.URL, Audience: cty.StringVal(audience), CAPath: is.caFile,
		Conditions: where(map[string]string{"repository_owner_id": by}),
	}
}

// clock is a clock that tests move.
type clock struct{ at atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.at.Store(received.UnixNano())
	return c
}
func (c *clock) now() time.Time          { return time.Unix(0, c.at.Load()) }
func (c *clock) forward(d time.Duration) { c.at.Add(int64(d)) }

func callers(t testing.TB, c *clock, sources ...*trust.Source) *trust.Callers {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	all, err := trust.NewCallers(sources, trust.CallersConfig{Now: c.now, Log: log, Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func rsaKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Skipf("this Go makes no such key: %v", err)
	}
	return k
}

func TestToken(t *testing.T) {
	is := newIssuer(t)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rs := rsaKey(t, 2048)
	is.set(nil, ec.Public(), ed.Public(), rs.Public())
	at := newClock()
	c := callers(t, at, source(t, "shop", owned(is, "17")), source(t, "other", owned(is, "18")), source(t, "also", owned(is, "17")))
	good := func(change map[string]any) string { return token(t, ec, "k0", jose.ES256, claimsOf(is, change)) }

	t.Run("a good token may push for its sources' repositories", func(t *testing.T) {
		p, err := c.Token(t.Context(), good(nil))
		if err != nil {
			t.Fatal(err)
		}
		if p.Kind != "oidc" || p.Issuer != is.URL || p.Subject != "repo:acme/shop:ref:refs/heads/main" || !p.ExpiresAt.Equal(received.Add(5*time.Minute)) {
			t.Errorf("push is %+v", p)
		}
		if !c.Current(p) {
			t.Error("it was let in by other sources")
		}
		if len(p.Sources) != 2 || p.Sources[0].Name() != "also" || p.Sources[1].Name() != "shop" {
			t.Errorf("sources are %v", p.Sources)
		}
		if got := p.For("registry.example/shop/web"); len(got) != 1 || got[0].Name() != "shop" {
			t.Errorf("sources for the shop are %v", got)
		}
		if got := p.For("registry.example/other/web"); len(got) != 0 {
			t.Errorf("sources for the other are %v", got)
		}
	})
	t.Run("every allowed algorithm verifies", func(t *testing.T) {
		for _, tok := range []string{
			token(t, ed, "k1", jose.EdDSA, claimsOf(is, nil)), token(t, rs, "k2", jose.RS256, claimsOf(is, nil)),
			token(t, rs, "k2", jose.PS384, claimsOf(is, nil)), token(t, ec, "", jose.ES256, claimsOf(is, nil)),
		} {
			if _, err := c.Token(t.Context(), tok); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("a list of audiences may hold ours", func(t *testing.T) {
		if _, err := c.Token(t.Context(), good(map[string]any{"aud": []string{"x", audience}})); err != nil {
			t.Error(err)
		}
	})
	t.Run("a clock that is half a minute off is borne", func(t *testing.T) {
		for _, change := range []map[string]any{
			{"exp": received.Add(-30 * time.Second).Unix()}, {"nbf": received.Add(30 * time.Second).Unix()}, {"iat": received.Add(30 * time.Second).Unix()},
		} {
			if _, err := c.Token(t.Context(), good(change)); err != nil {
				t.Error(err)
			}
		}
	})
	unsigned := func(header string) string {
		e := base64.RawURLEncoding.EncodeToString
		return e([]byte(header)) + "." + e(asJSON(claimsOf(is, nil))) + "."
	}
	otherEC, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(good(nil), ".")
	mixed := parts[0] + "." + base64.RawURLEncoding.EncodeToString(asJSON(claimsOf(is, map[string]any{"repository_owner_id": "18"}))) + "." + parts[2]
	der := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte(goKey(t, ec, crypto.SHA256).pem)})
	for _, c2 := range []struct {
		name, token string
		why         error
		says        string
	}{
		{"a token of another audience", good(map[string]any{"aud": "https://elsewhere.example"}), trust.ErrAudience, "https://elsewhere.example"},
		{"a token without audience", good(map[string]any{"aud": nil}), trust.ErrAudience, audience},
		{"a token of an unknown issuer", good(map[string]any{"iss": "https://stranger.example"}), trust.ErrUntrusted, "stranger.example"},
		{"a token without issuer", good(map[string]any{"iss": nil}), trust.ErrUntrusted, `""`},
		{"a wrong issuer key", token(t, otherEC, "k0", jose.ES256, claimsOf(is, nil)), trust.ErrSignature, "key ID"},
		{"a key ID of another key", token(t, ec, "k2", jose.ES256, claimsOf(is, nil)), trust.ErrSignature, "key ID"},
		{"alg none", unsigned(`{"alg":"none"}`), trust.ErrSignature, "none"},
		{"alg None in other spelling", unsigned(`{"alg":"nOnE"}`), trust.ErrSignature, "nOnE"},
		{"HMAC with the public key", token(t, der, "k0", jose.HS256, claimsOf(is, nil)), trust.ErrSignature, "HS256"},
		{"changed claims", mixed, trust.ErrSignature, "key ID"},
		{"an expired token", good(map[string]any{"exp": received.Add(-2 * time.Minute).Unix()}), trust.ErrTime, "expired at"},
		{"a token without expiry", good(map[string]any{"exp": nil}), trust.ErrTime, "no exp"},
		{"an expiry that is no time", good(map[string]any{"exp": "never"}), trust.ErrSignature, "never"},
		{"a token of the future", good(map[string]any{"nbf": received.Add(2 * time.Minute).Unix()}), trust.ErrTime, "nbf"},
		{"a token made in the future", good(map[string]any{"iat": received.Add(2 * time.Minute).Unix()}), trust.ErrTime, "iat"},
		{"another owner", good(map[string]any{"repository_owner_id": "1"}), trust.ErrIdentity, `repository_owner_id is "1"`},
		{"no owner", good(map[string]any{"repository_owner_id": nil}), trust.ErrIdentity, "repository_owner_id is not stated"},
		{"an owner in a list", good(map[string]any{"repository_owner_id": []string{"17"}}), trust.ErrIdentity, "not stated"},
		{"a claim twice", signJWT(t, ec, "k0", jose.ES256, []byte(`{"iss":"`+is.URL+`","repository_owner_id":"1","repository_owner_id":"17"}`)), trust.ErrMalformed, "twice"},
		{"claims that are a list", signJWT(t, ec, "k0", jose.ES256, []byte(`[]`)), trust.ErrUntrusted, `""`},
		{"20 KiB", strings.Repeat("a", 20<<10), trust.ErrTooLarge, "20480"},
		{"rubbish", "hello", trust.ErrMalformed, "three parts"},
		{"an encrypted token", "a.b.c.d.e", trust.ErrMalformed, "three parts"},
		{"claims that are no base64", "a.%.c", trust.ErrMalformed, "base64"},
	} {
		t.Run(c2.name+" is refused", func(t *testing.T) {
			_, err := c.Token(t.Context(), c2.token)
			refused(t, err, c2.why, c2.says)
			if strings.Contains(err.Error(), parts[2]) {
				t.Error("the refusal holds the token's signature")
			}
		})
	}
	t.Run("of a claim that is a list one value must be what is asked for", func(t *testing.T) {
		asks := trust.OIDCBlock{Issuer: is.URL, Audience: cty.StringVal(audience), CAPath: is.caFile, Claims: cty.ObjectVal(map[string]cty.Value{
			"groups": cty.TupleVal([]cty.Value{cty.StringVal("ops"), cty.StringVal("^dev-[a-z]+$")}), "realm_access.roles": cty.StringVal("pki"),
		})}
		roles := map[string]any{"roles": []any{"other", "pki"}}
		for name, c2 := range map[string]struct {
			groups, roles any
			says          string // "" is accepted
		}{
			"the last of three": {[]any{"a", "b", "dev-shop"}, roles, ""},
			"a text":            {"ops", roles, ""},
			"a list of others":  {[]any{"a", "dev-1", "xops"}, roles, "none of the 3 values of groups"},
			"an empty list":     {[]any{}, roles, "none of the 0 values of groups"},
			"a list in a list":  {[]any{[]any{"ops"}}, roles, "none of the 0 values of groups"},
			"an object":         {map[string]any{"ops": true}, roles, "groups is not stated"},
			"another list that lacks what it must have": {[]any{"ops"}, map[string]any{"roles": []any{"pkix"}}, "none of the 1 values of realm_access.roles"},
		} {
			_, err := callers(t, at, source(t, "shop", asks)).Token(t.Context(), good(map[string]any{"groups": c2.groups, "realm_access": c2.roles}))
			if c2.says != "" {
				refused(t, err, trust.ErrIdentity, c2.says)
			} else if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("a source that is removed accepts nothing", func(t *testing.T) {
		c := callers(t, at, source(t, "shop", owned(is, "17")))
		if _, err := c.Token(t.Context(), good(nil)); err != nil {
			t.Fatal(err)
		}
		c.Replace(nil)
		_, err := c.Token(t.Context(), good(nil))
		refused(t, err, trust.ErrUntrusted)
	})
	t.Run("an algorithm that the source does not list is refused", func(t *testing.T) {
		o := owned(is, "17")
		o.Algorithms = []string{"RS256"}
		_, err := callers(t, at, source(t, "shop", o)).Token(t.Context(), good(nil))
		refused(t, err, trust.ErrSignature, "ES256")
	})
	t.Run("keys from a file need no network", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "jwks.json")
		put(t, path, asJSON(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: ec.Public(), KeyID: "k0"}}}))
		o := owned(is, "17")
		o.CAPath, o.JWKSPath = "", path
		before := is.asked.Load()
		if _, err := callers(t, at, source(t, "shop", o)).Token(t.Context(), good(nil)); err != nil {
			t.Fatal(err)
		}
		if is.asked.Load() != before {
			t.Error("the issuer was asked")
		}
	})
}

func TestIssuerKeys(t *testing.T) {
	first, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	second, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	setup := func(t *testing.T) (*issuer, *clock, *trust.Callers, func(at *clock, key *ecdsa.PrivateKey, id string) string) {
		t.Helper()
		is, at := newIssuer(t), newClock()
		is.set(nil, first.Public())
		return is, at, callers(t, at, source(t, "shop", owned(is, "17"))), func(at *clock, key *ecdsa.PrivateKey, id string) string {
			return token(t, key, id, jose.ES256, claimsOf(is, map[string]any{
				"iat": at.now().Unix(), "nbf": at.now().Unix(), "exp": at.now().Add(time.Minute).Unix(),
			}))
		}
	}
	t.Run("many tokens at once fetch once", func(t *testing.T) {
		is, at, c, tok := setup(t)
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				if _, err := c.Token(t.Context(), tok(at, first, "k0")); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := is.asked.Load(); n != 1 {
			t.Errorf("the issuer was asked %d times", n)
		}
	})
	t.Run("a rotated key is found without a restart", func(t *testing.T) {
		is, at, c, tok := setup(t)
		if _, err := c.Token(t.Context(), tok(at, first, "k0")); err != nil {
			t.Fatal(err)
		}
		is.set(nil, first.Public(), second.Public())
		at.forward(time.Minute)
		if _, err := c.Token(t.Context(), tok(at, second, "k1")); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("invented key IDs do not make us ask again and again", func(t *testing.T) {
		is, at, c, tok := setup(t)
		for i := range 20 {
			_, err := c.Token(t.Context(), tok(at, second, fmt.Sprint("invented", i)))
			refused(t, err, trust.ErrSignature)
		}
		if n := is.asked.Load(); n != 1 {
			t.Errorf("the issuer was asked %d times", n)
		}
	})
	t.Run("a removed key is forgotten within the hour", func(t *testing.T) {
		is, at, c, tok := setup(t)
		if _, err := c.Token(t.Context(), tok(at, first, "k0")); err != nil {
			t.Fatal(err)
		}
		is.set(nil, second.Public())
		at.forward(time.Hour)
		_, err := c.Token(t.Context(), tok(at, first, "k0"))
		refused(t, err, trust.ErrSignature)
	})
	t.Run("an issuer that is away for some hours is borne, for a day is not", func(t *testing.T) {
		is, at, c, tok := setup(t)
		if _, err := c.Token(t.Context(), tok(at, first, "k0")); err != nil {
			t.Fatal(err)
		}
		is.set(func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, "away", http.StatusBadGateway)
			return true
		})
		at.forward(5 * time.Hour)
		if _, err := c.Token(t.Context(), tok(at, first, "k0")); err != nil {
			t.Fatal(err)
		}
		at.forward(20 * time.Hour)
		unavailable(t, c, tok(at, first, "k0"), "502")
	})
	t.Run("an issuer that was never there is tried again", func(t *testing.T) {
		is, at, c, tok := setup(t)
		is.set(func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, "away", http.StatusBadGateway)
			return true
		})
		unavailable(t, c, tok(at, first, "k0"), "502")
		is.set(nil, first.Public())
		unavailable(t, c, tok(at, first, "k0"), "502") // not so soon
		at.forward(20 * time.Second)
		if _, err := c.Token(t.Context(), tok(at, first, "k0")); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("a caller that goes away does not spoil it for the next", func(t *testing.T) {
		is, at, c, tok := setup(t)
		ctx, cancel := context.WithCancel(t.Context())
		is.set(func(http.ResponseWriter, *http.Request) bool { cancel(); return false }, first.Public())
		if _, err := c.Token(ctx, tok(at, first, "k0")); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		is.set(nil, first.Public())
		if _, err := c.Token(t.Context(), tok(at, first, "k0")); err != nil {
			t.Fatal(err)
		}
	})
	reply := func(path, body string) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != path {
				return false
			}
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, body)
			return true
		}
	}
	const discovery = "/.well-known/openid-configuration"
	for _, c := range []struct {
		name   string
		answer func(is *issuer) func(http.ResponseWriter, *http.Request) bool
		says   string
	}{
		{"keys by plain http", func(is *issuer) func(http.ResponseWriter, *http.Request) bool {
			return reply(discovery, fmt.Sprintf(`{"issuer":%q,"jwks_uri":"http://127.0.0.1/keys"}`, is.URL))
		}, "no https URL"},
		{"a discovery document of another issuer", func(*issuer) func(http.ResponseWriter, *http.Request) bool {
			return reply(discovery, `{"issuer":"https://stranger.example","jwks_uri":"https://stranger.example/keys"}`)
		}, "did not match"},
		{"a discovery document of 2 MiB", func(*issuer) func(http.ResponseWriter, *http.Request) bool {
			return reply(discovery, strings.Repeat(" ", 2<<20))
		}, "longer than"},
		{"keys of 2 MiB", func(*issuer) func(http.ResponseWriter, *http.Request) bool {
			return reply("/keys", strings.Repeat(" ", 2<<20))
		}, "longer than"},
		{"a redirect", func(*issuer) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, "https://stranger.example"+r.URL.Path, http.StatusFound)
				return true
			}
		}, "redirects"},
		{"symmetric keys alone", func(*issuer) func(http.ResponseWriter, *http.Request) bool {
			return reply("/keys", `{"keys":[{"kty":"oct","k":"AAAA","kid":"k0"}]}`)
		}, "no public key"},
		{"101 keys", func(*issuer) func(http.ResponseWriter, *http.Request) bool {
			return reply("/keys", `{"keys":[`+strings.TrimSuffix(strings.Repeat(`{"kty":"oct","k":"AAAA"},`, 101), ",")+`]}`)
		}, "101 keys"},
		{"a key set that is no JSON", func(*issuer) func(http.ResponseWriter, *http.Request) bool { return reply("/keys", `<html>`) }, "unreadable JSON"},
	} {
		t.Run(c.name+" is not taken", func(t *testing.T) {
			is, at, callers, tok := setup(t)
			is.set(c.answer(is), first.Public())
			unavailable(t, callers, tok(at, first, "k0"), c.says)
		})
	}
	t.Run("a certificate of a stranger is not taken", func(t *testing.T) {
		is, at := newIssuer(t), newClock()
		is.set(nil, first.Public())
		o := owned(is, "17")
		o.CAPath = ""
		unavailable(t, callers(t, at, source(t, "shop", o)), token(t, first, "k0", jose.ES256, claimsOf(is, nil)), "certificate")
	})
	t.Run("a weak key is not taken", func(t *testing.T) {
		weak := rsaKey(t, 1024)
		is, at, c, _ := setup(t)
		is.set(nil, weak.Public())
		unavailable(t, c, token(t, first, "k0", jose.ES256, claimsOf(is, map[string]any{"exp": at.now().Add(time.Minute).Unix()})), "no public key")
	})
}

func unavailable(t *testing.T, c *trust.Callers, token, says string) {
	t.Helper()
	_, err := c.Token(t.Context(), token)
	if !errors.Is(err, trust.ErrUnavailable) || errors.Is(err, trust.ErrRefused) || !strings.Contains(err.Error(), says) {
		t.Errorf("got %v, want unavailable because of %q", err, says)
	}
}

func TestFieldsOfCISystems(t *testing.T) {
	is := newIssuer(t)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwks := filepath.Join(t.TempDir(), "jwks.json")
	put(t, jwks, asJSON(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: ec.Public()}}}))
	for _, c := range []struct {
		name, issuer string
		claims       map[string]any
		want         map[string]string
	}{
		{"GitHub", github, map[string]any{
			"repository": "acme/shop", "repository_id": "15", "repository_owner": "acme", "repository_owner_id": "17", "sha": commit,
			"ref": "refs/heads/main", "event_name": "push", "workflow_ref": "acme/shop/.github/workflows/ci.yml@refs/heads/main", "workflow_sha": "19",
			"job_workflow_ref": "acme/ci/.github/workflows/build.yml@refs/tags/v1", "job_workflow_sha": "0a", "runner_environment": "self-hosted",
			"run_id": "21", "run_attempt": "1", "repository_visibility": "private", "environment": "production", "sub": "repo:acme/shop:environment:production",
		}, map[string]string{
			"build_signer_uri": acmeSigner, "build_signer_digest": "0a", "runner_environment": "self-hosted",
			"source_repo_uri": "https://github.com/acme/shop", "source_repo_digest": commit, "source_repo_ref": "refs/heads/main",
			"source_repo_id": "15", "source_repo_owner_uri": "https://github.com/acme", "source_repo_owner_id": "17",
			"build_config_uri": "https://github.com/acme/shop/.github/workflows/ci.yml@refs/heads/main", "build_config_digest": "19",
			"build_trigger": "push", "run_invocation_uri": "https://github.com/acme/shop/actions/runs/21/attempts/1",
			"source_repo_visibility": "private", "deployment_environment": "production", "token_subject": "repo:acme/shop:environment:production",
		}},
		{"GitHub on a tenant's host", "https://token.actions.acme.ghe.com", map[string]any{
			"repository": "acme/shop", "repository_owner_id": "17", "workflow_ref": "acme/shop/.github/workflows/ci.yml@refs/heads/main", "sub": "s",
		}, map[string]string{
			"source_repo_uri": "https://acme.ghe.com/acme/shop", "source_repo_owner_id": "17", "token_subject": "s",
			"build_config_uri": "https://acme.ghe.com/acme/shop/.github/workflows/ci.yml@refs/heads/main",
		}},
		{"a GitHub server", "https://git.acme.example/_services/token", map[string]any{
			"repository": "acme/shop", "repository_owner_id": "17", "workflow_ref": "x", "sub": "s",
		}, map[string]string{
			"source_repo_uri": "https://git.acme.example/acme/shop", "source_repo_owner_id": "17", "token_subject": "s",
			"build_config_uri": "https://git.acme.example/x",
		}},
		{"GitLab", "https://gitlab.com", map[string]any{
			"project_path": "acme/shop", "project_id": 15, "namespace_path": "acme", "namespace_id": 17, "sha": commit, "ref": "main", "ref_type": "branch",
			"pipeline_source": "push", "ci_config_ref_uri": "gitlab.com/acme/shop//.gitlab-ci.yml@refs/heads/main", "ci_config_sha": "19",
			"runner_environment": "gitlab-hosted", "job_id": "21", "project_visibility": "private", "environment": "production", "sub": "s",
		}, map[string]string{
			"build_signer_uri": "https://gitlab.com/acme/shop//.gitlab-ci.yml@refs/heads/main", "build_signer_digest": "19", "runner_environment": "gitlab-hosted",
			"source_repo_uri": "https://gitlab.com/acme/shop", "source_repo_digest": commit, "source_repo_ref": "refs/heads/main", "source_repo_id": "15",
			"source_repo_owner_uri": "https://gitlab.com/acme", "source_repo_owner_id": "17",
			"build_config_uri": "https://gitlab.com/acme/shop//.gitlab-ci.yml@refs/heads/main", "build_config_digest": "19", "build_trigger": "push",
			"run_invocation_uri": "https://gitlab.com/acme/shop/-/jobs/21", "source_repo_visibility": "private", "deployment_environment": "production",
			"token_subject": "s",
		}},
		{"CircleCI", "https://oidc.circleci.com/org/17", map[string]any{
			"oidc.circleci.com/project-id": "15", "oidc.circleci.com/vcs-ref": "refs/heads/main", "oidc.circleci.com/vcs-origin": "github.com/acme/shop",
			"oidc.circleci.com/ssh-rerun": true, "sub": "s",
		}, map[string]string{
			"source_repo_id": "15", "source_repo_owner_id": "17", "source_repo_ref": "refs/heads/main", "source_repo_uri": "github.com/acme/shop",
			"runner_environment": "ssh-rerun", "token_subject": "s",
		}},
		{"Buildkite", "https://agent.buildkite.com", map[string]any{
			"organization_slug": "acme", "organization_id": "17", "pipeline_slug": "shop", "pipeline_id": "15", "build_commit": commit, "build_branch": "main", "sub": "s",
		}, map[string]string{
			"source_repo_digest": commit, "source_repo_id": "15", "source_repo_owner_id": "17", "source_repo_ref": "refs/heads/main", "token_subject": "s",
		}},
		{"an issuer of one's own", "https://ci.example", map[string]any{"sub": "s", "repository": "acme/shop"}, map[string]string{"token_subject": "s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := source(t, "shop", trust.OIDCBlock{
				Issuer: c.issuer, Audience: cty.StringVal(audience), JWKSPath: jwks, Claims: cty.ObjectVal(map[string]cty.Value{"sub": cty.StringVal(c.claims["sub"].(string))}),
			})
			all := claimsOf(is, map[string]any{"repository_owner_id": nil, "iss": c.issuer})
			maps.Copy(all, c.claims)
			p, err := callers(t, newClock(), s).Token(t.Context(), token(t, ec, "", jose.ES256, all))
			if err != nil {
				t.Fatal(err)
			}
			c.want["issuer"] = c.issuer
			if !maps.Equal(p.Fields, c.want) {
				t.Errorf("fields are %v,\nwant %v", p.Fields, c.want)
			}
		})
	}
}
