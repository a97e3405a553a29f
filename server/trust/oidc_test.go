package trust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/assay-id/assay/workloadapi/identity"
)

func TestDiscovery(t *testing.T) {
	p := &picture{}
	ask := func(t *testing.T, cfg OIDC, method, host, path string) (int, http.Header, map[string]any) {
		t.Helper()
		r := httptest.NewRequest(method, "https://localhost"+path, nil)
		r.Host = host
		w := httptest.NewRecorder()
		NewDiscovery(own, p, cfg, nil).ServeHTTP(w, r)
		text, _ := io.ReadAll(w.Body)
		var doc map[string]any
		if w.Code == http.StatusOK {
			if err := json.Unmarshal(text, &doc); err != nil {
				t.Fatal(err)
			}
		}
		return w.Code, w.Header(), doc
	}
	simple := OIDC{Domains: []string{"oidc.example.org", "other.example.org"}}
	t.Run("there are no keys before the first picture", func(t *testing.T) {
		if code, _, _ := ask(t, simple, http.MethodGet, "oidc.example.org", "/keys"); code != http.StatusInternalServerError {
			t.Error(code)
		}
	})
	small, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	large, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	old, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p.Store(&identity.Bundle{TrustDomain: own, JWT: []identity.JWTAuthority{{KeyID: "c", Key: small.Public()}, {KeyID: "a", Key: large.Public()}, {KeyID: "b", Key: old.Public()}}})
	for _, c := range []struct {
		what         string
		cfg          OIDC
		host, path   string
		issuer, keys string
	}{
		{"the domain that was asked is the issuer", simple, "other.example.org", discoveryPath, "https://other.example.org", "https://other.example.org/keys"},
		{"its port is kept, its case does not matter", simple, "OIDC.example.org:8443", discoveryPath, "https://OIDC.example.org:8443", "https://OIDC.example.org:8443/keys"},
		{"unless there is one", OIDC{Domains: simple.Domains, Issuer: "https://i.example.org", JWKSURI: "https://k.example.org/k"}, "oidc.example.org", discoveryPath, "https://i.example.org", "https://k.example.org/k"},
		{"below a prefix", OIDC{Domains: simple.Domains, Prefix: "/t"}, "oidc.example.org", "/t" + discoveryPath, "https://oidc.example.org/t", "https://oidc.example.org/t/keys"},
		{"without TLS", OIDC{Domains: simple.Domains, Plain: true}, "oidc.example.org", discoveryPath, "http://oidc.example.org", "http://oidc.example.org/keys"},
	} {
		t.Run(c.what, func(t *testing.T) {
			code, head, doc := ask(t, c.cfg, http.MethodGet, c.host, c.path)
			if code != http.StatusOK || doc["issuer"] != c.issuer || doc["jwks_uri"] != c.keys || head.Get("Content-Type") != "application/json" {
				t.Errorf("%d %v %v", code, head, doc)
			}
		})
	}
	for use, cfg := range map[string]OIDC{"": simple, "sig": {Domains: simple.Domains, SetKeyUse: true}} {
		t.Run("keys have what they sign with, and use "+use, func(t *testing.T) {
			r := httptest.NewRequest(http.MethodGet, "https://oidc.example.org/keys", nil)
			w := httptest.NewRecorder()
			NewDiscovery(own, p, cfg, nil).ServeHTTP(w, r)
			var set jose.JSONWebKeySet
			if err := json.Unmarshal(w.Body.Bytes(), &set); err != nil || len(set.Keys) != 3 {
				t.Fatalf("%s, %v", w.Body, err)
			}
			for n, want := range []struct{ id, alg string }{{"a", "ES384"}, {"b", "RS256"}, {"c", "ES256"}} {
				if k := set.Keys[n]; k.KeyID != want.id || k.Algorithm != want.alg || k.Use != use || !k.IsPublic() {
					t.Errorf("%+v", k)
				}
			}
		})
	}
	for _, c := range []struct {
		what, method, host, path string
		cfg                      OIDC
		code                     int
	}{
		{"another name", http.MethodGet, "evil.example.org", "/keys", simple, http.StatusBadRequest},
		{"a name below", http.MethodGet, "a.oidc.example.org", "/keys", simple, http.StatusBadRequest},
		{"no name", http.MethodGet, "", "/keys", simple, http.StatusBadRequest},
		{"another path", http.MethodGet, "oidc.example.org", "/", simple, http.StatusNotFound},
		{"a path without its prefix", http.MethodGet, "oidc.example.org", "/keys", OIDC{Domains: simple.Domains, Prefix: "/t"}, http.StatusNotFound},
		{"another method", http.MethodPost, "oidc.example.org", "/keys", simple, http.StatusMethodNotAllowed},
	} {
		t.Run(c.what+" is refused", func(t *testing.T) {
			if code, head, _ := ask(t, c.cfg, c.method, c.host, c.path); code != c.code || head.Get("Location") != "" {
				t.Errorf("%d", code)
			}
		})
	}
}
