package vault_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/keys/keystest"
	"github.com/assay-id/assay/server/ca/keys/transit"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
	"github.com/assay-id/assay/server/ca/upstream/vaultpki"
	"github.com/assay-id/assay/server/ca/vault"
	fake "github.com/assay-id/assay/test/fake/vault"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func client(t *testing.T, s *fake.Server, change func(*vault.Config)) *vault.Client {
	t.Helper()
	cfg := vault.Config{Address: s.URL, CAPath: write(t, string(s.CAPEM()))}
	if change == nil {
		cfg.Token = &vault.TokenAuth{Token: s.Token}
	} else {
		change(&cfg)
	}
	c, err := vault.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTransit(t *testing.T) {
	servers := map[keys.Manager]*fake.Server{}
	open := func(t *testing.T, s *fake.Server) keys.Manager {
		m := transit.New(client(t, s, nil), "", "")
		servers[m] = s
		return m
	}
	keystest.Run(t, keystest.Options{
		Open:   func(t *testing.T) keys.Manager { return open(t, fake.New(t)) },
		Reopen: func(t *testing.T, m keys.Manager) keys.Manager { return open(t, servers[m]) },
	})
}

func TestPKI(t *testing.T) {
	s := fake.New(t)
	upstreamtest.Run(t, vaultpki.New(client(t, s, nil), "", upstreamtest.TD), upstreamtest.Options{})
}

func TestLyingPKI(t *testing.T) {
	upstreamtest.RunLies(t, func(t *testing.T, lie func(crypto.PublicKey) upstreamtest.Lie) upstream.Authority {
		s := fake.New(t)
		s.Answer = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/root/sign-intermediate") {
				return false
			}
			var in struct {
				CSR string `json:"csr"`
			}
			if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
				t.Error(err)
			}
			l := lie(upstreamtest.Public(t, []byte(in.CSR)))
			switch {
			case l.Hang:
				_, _ = io.Copy(io.Discard, r.Body) // or nobody notices that the caller has left
				<-r.Context().Done()
				panic(http.ErrAbortHandler) // an empty answer may still get there
			case l.Text == "":
				l.Text = upstreamtest.PEM(l.Chain[0])
			}
			var above []string
			for _, cert := range append(l.Chain[min(1, len(l.Chain)):], l.Roots...) {
				above = append(above, upstreamtest.PEM(cert))
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]any{"certificate": l.Text, "ca_chain": above}})
			return true
		}
		return vaultpki.New(client(t, s, nil), "", upstreamtest.TD)
	})
}

func TestLogin(t *testing.T) {
	for name, way := range map[string]func(t *testing.T, s *fake.Server, c *vault.Config){
		"AppRole": func(_ *testing.T, s *fake.Server, c *vault.Config) {
			c.AppRole = &vault.AppRoleAuth{RoleID: s.RoleID, SecretID: s.SecretID}
		},
		"AppRole with its secret in a file": func(t *testing.T, s *fake.Server, c *vault.Config) {
			c.AppRole = &vault.AppRoleAuth{RoleID: s.RoleID, SecretPath: write(t, s.SecretID+"\n")}
		},
		"Kubernetes": func(t *testing.T, s *fake.Server, c *vault.Config) {
			c.K8s = &vault.K8sAuth{Role: s.Role, TokenPath: write(t, s.JWT)}
		},
	} {
		t.Run("by "+name+", once, and again when the token is revoked", func(t *testing.T) {
			s := fake.New(t)
			m := transit.New(client(t, s, func(c *vault.Config) { way(t, s, c) }), "", "")
			for range 3 {
				if _, err := m.List(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if s.Logins() != 1 {
				t.Errorf("logged in %d times", s.Logins())
			}
			s.Forget()
			if _, err := m.List(t.Context()); err != nil || s.Logins() != 2 {
				t.Errorf("%v after %d logins", err, s.Logins())
			}
		})
	}
	t.Run("with a wrong secret fails, and does not tell it", func(t *testing.T) {
		s := fake.New(t)
		m := transit.New(client(t, s, func(c *vault.Config) { c.AppRole = &vault.AppRoleAuth{RoleID: s.RoleID, SecretID: "hunter2"} }), "", "")
		if _, err := m.List(t.Context()); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a token in a file is read anew", func(t *testing.T) {
		s := fake.New(t)
		path := write(t, "old")
		m := transit.New(client(t, s, func(c *vault.Config) { c.Token = &vault.TokenAuth{Path: path} }), "", "")
		if _, err := m.List(t.Context()); !errors.Is(err, vault.ErrDenied) {
			t.Errorf("got %v", err)
		}
		if err := os.WriteFile(path, []byte(s.Token), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := m.List(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestHostile(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request) bool
		want   string
	}{
		"a huge answer": {func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = w.Write([]byte(`{"data":{"x":"` + strings.Repeat("a", 2<<20) + `"}}`))
			return true
		}, "is over 1048576 bytes long"},
		"no JSON": {func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = w.Write([]byte("<html>"))
			return true
		}, "is not understood"},
		"an empty answer": {func(http.ResponseWriter, *http.Request) bool { return true }, "answer is empty"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "https://127.0.0.1:1/elsewhere", http.StatusTemporaryRedirect)
			return true
		}, "vault answers 307"},
		"a key of another kind": {func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				r.Body = http.NoBody
				return false
			}
			return false
		}, "failed to parse JSON input"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			s := fake.New(t)
			m := transit.New(client(t, s, nil), "", "")
			s.Answer = c.answer
			if _, err := m.Generate(t.Context(), "a", keys.EC256); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	t.Run("a signature by another key does not leave", func(t *testing.T) {
		s := fake.New(t)
		m := transit.New(client(t, s, nil), "", "")
		for _, name := range []string{"a", "b"} {
			if _, err := m.Generate(t.Context(), name, keys.EC256); err != nil {
				t.Fatal(err)
			}
		}
		key, err := m.Get(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		s.Answer = func(_ http.ResponseWriter, r *http.Request) bool {
			r.URL.Path = strings.Replace(r.URL.Path, "/sign/assay-a/", "/sign/assay-b/", 1)
			return false
		}
		if _, err := x509.CreateCertificateRequest(nil, &x509.CertificateRequest{}, key); err == nil || !strings.Contains(err.Error(), "no signature by that key") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("one that hangs ends with the call", func(t *testing.T) {
		s := fake.New(t)
		m := transit.New(client(t, s, nil), "", "")
		s.Answer = func(_ http.ResponseWriter, r *http.Request) bool {
			<-r.Context().Done()
			panic(http.ErrAbortHandler) // an empty answer may still get there
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := m.List(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another's certificate is refused", func(t *testing.T) {
		other, _ := upstreamtest.Root(t, "other", time.Hour)
		s := fake.New(t)
		m := transit.New(client(t, s, func(c *vault.Config) {
			c.CAPath = write(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Raw})))
			c.Token = &vault.TokenAuth{Token: s.Token}
		}), "", "")
		if _, err := m.List(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("plain http to another machine is refused", func(t *testing.T) {
		if _, err := vault.New(vault.Config{Address: "http://vault.example.org:8200"}); err == nil {
			t.Error("no error")
		}
	})
}
