package certmanager

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
	fake "github.com/assay-id/assay/test/fake/certmanager"
)

func open(t *testing.T, s *fake.Server, token string) *Authority {
	t.Helper()
	a, err := Open(Config{Namespace: s.Namespace, Name: s.Issuer, KubeConfig: s.KubeConfig(t, token)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestSuite(t *testing.T) {
	s := fake.New(t)
	upstreamtest.Run(t, open(t, s, s.Token), upstreamtest.Options{})
	if n := s.Left(); n != 0 {
		t.Errorf("%d requests are left", n)
	}
}

func TestLyingIssuer(t *testing.T) {
	upstreamtest.RunLies(t, func(t *testing.T, lie func(crypto.PublicKey) upstreamtest.Lie) upstream.Authority {
		s := fake.New(t)
		var mu sync.Mutex // guards told
		var told upstreamtest.Lie
		s.Answer = func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			switch r.Method {
			case http.MethodPost:
				text, err := io.ReadAll(r.Body)
				r.Body = io.NopCloser(bytes.NewReader(text))
				var in struct {
					Spec struct{ Request []byte }
				}
				if err = errors.Join(err, json.Unmarshal(text, &in)); err != nil {
					t.Error(err)
				}
				told = lie(upstreamtest.Public(t, in.Spec.Request))
				return false
			case http.MethodGet:
				switch {
				case told.Hang:
					_, _ = io.Copy(io.Discard, r.Body) // or nobody notices that the caller has left
					<-r.Context().Done()
					panic(http.ErrAbortHandler) // an empty answer may still get there
				case told.Text == "":
					told.Text = upstreamtest.PEM(told.Chain...)
				}
				_ = json.NewEncoder(w).Encode(map[string]any{"status": map[string]any{
					"conditions":  []any{map[string]any{"type": "Ready", "status": "True", "reason": "Issued"}},
					"certificate": []byte(told.Text), "ca": []byte(upstreamtest.PEM(told.Roots...)),
				}})
				return true
			}
			return false
		}
		return open(t, s, s.Token)
	})
}

func TestRefusals(t *testing.T) {
	ask := func(t *testing.T, a *Authority) error {
		t.Helper()
		_, signer := upstreamtest.Root(t, "x", time.Hour)
		_, err := a.Sign(t.Context(), upstream.Request{CSR: upstreamtest.CSR(t, signer), TTL: time.Hour, Now: time.Now()})
		return err
	}
	for _, condition := range []string{"Denied", "InvalidRequest"} {
		t.Run("a request that ends with "+condition+" is an error at once, and deleted", func(t *testing.T) {
			s := fake.New(t)
			s.Condition, s.Message = condition, "no authorities for you"
			if err := ask(t, open(t, s, s.Token)); err == nil || !strings.Contains(err.Error(), "no authorities for you") {
				t.Errorf("got %v", err)
			}
			if n := s.Left(); n != 0 {
				t.Errorf("%d requests are left", n)
			}
		})
	}
	t.Run("another's token is refused, and not told", func(t *testing.T) {
		s := fake.New(t)
		if err := ask(t, open(t, s, "hunter2")); err == nil || !strings.Contains(err.Error(), "401") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got %v", err)
		}
	})
	for name, c := range map[string]struct{ answer, want string }{
		"a huge answer": {`{"x":"` + strings.Repeat("a", 2<<20) + `"}`, "is over 1048576 bytes long"},
		"no JSON":       {"<html>", "is not understood"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			s := fake.New(t)
			s.Answer = func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write([]byte(c.answer)); return true }
			if err := ask(t, open(t, s, s.Token)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("a server that sends elsewhere is not followed", func(t *testing.T) {
		s := fake.New(t)
		s.Answer = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/elsewhere" {
				t.Error("it is followed")
				return false
			}
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
			return true
		}
		if err := ask(t, open(t, s, s.Token)); err == nil || !strings.Contains(err.Error(), "answers 307") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("an issuer that never answers ends with the call", func(t *testing.T) {
		s := fake.New(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		looks := 0
		s.Answer = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet {
				return false
			}
			_, _ = w.Write([]byte(`{"status":{"conditions":[{"type":"Ready","status":"False","reason":"Pending","message":"waiting for a human"}]}}`))
			if looks++; looks == 2 {
				cancel()
			}
			return true
		}
		_, signer := upstreamtest.Root(t, "x", time.Hour)
		_, err := open(t, s, s.Token).Sign(ctx, upstream.Request{CSR: upstreamtest.CSR(t, signer), TTL: time.Hour, Now: time.Now()})
		if !errors.Is(err, context.Canceled) || s.Left() != 0 {
			t.Errorf("got %v; %d requests are left", err, s.Left())
		}
	})
}

func TestKubeConfig(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"no YAML":                       {"\t:", "is not understood"},
		"no context":                    {"current-context: x", `has no context "x"`},
		"no cluster":                    {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]", `no cluster "c"`},
		"no user":                       {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]", `no user "u"`},
		"a user by nothing":             {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]\nusers: [{name: u, user: {}}]", "neither a token nor a client certificate"},
		"a program for credentials":     {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]\nusers: [{name: u, user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: aws, args: [eks, get-token]}}}]", "has its credentials from a program (exec: \"aws\"), which is not run; give the server a kubeconfig with a tokenFile"},
		"a program beside a token":      {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]\nusers: [{name: u, user: {token: t, exec: {command: sh}}}]", "which is not run"},
		"a provider of credentials":     {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]\nusers: [{name: u, user: {auth-provider: {name: gcp}}}]", "auth-provider (\"gcp\"), which is not supported"},
		"a password":                    {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]\nusers: [{name: u, user: {username: a, password: b}}]", "has a password"},
		"somebody else":                 {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h'}}]\nusers: [{name: u, user: {token: t, as: root}}]", "acts as \"root\""},
		"a server that is not verified": {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h', insecure-skip-tls-verify: true}}]\nusers: [{name: u, user: {token: t}}]", "has insecure-skip-tls-verify, which is not supported"},
		"a server of another name":      {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h', tls-server-name: a}}]\nusers: [{name: u, user: {token: t}}]", "has tls-server-name, which is not supported"},
		"a proxy":                       {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h', proxy-url: 'http://p'}}]\nusers: [{name: u, user: {token: t}}]", "has proxy-url, which is not supported"},
		"roots that are none":           {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'https://h', certificate-authority-data: QUFBQQ==}}]\nusers: [{name: u, user: {token: t}}]", "no certificates in PEM"},
		"plain http":                    {"current-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: 'http://h'}}]\nusers: [{name: u, user: {token: t}}]", "is no https URL"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "config")
			if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(Config{KubeConfig: path}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
