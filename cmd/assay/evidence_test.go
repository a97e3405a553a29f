package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/cmd/cli"
)

// newRunner is the part of a GitHub runner that gives a job its tokens: over TLS, for the secret "s3cret".
// The client of this process trusts it until the test ends.
func newRunner(t *testing.T) *httptest.Server {
	t.Helper()
	runner := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		switch {
		case r.Method != http.MethodGet || r.Header.Get("Authorization") != "Bearer s3cret":
			http.Error(w, "who are you?", http.StatusUnauthorized)
		case r.URL.Path == "/empty":
			fmt.Fprint(w, `{"count":0}`)
		case r.URL.Path == "/html":
			fmt.Fprint(w, `<html>`)
		case query.Get("api-version") != "2.0":
			http.Error(w, "the query of the address is gone", http.StatusBadRequest)
		default:
			fmt.Fprintf(w, `{"count":1857,"value":"token for %s"}`, query.Get("audience"))
		}
	}))
	t.Cleanup(runner.Close)
	before := http.DefaultClient
	http.DefaultClient = runner.Client()
	t.Cleanup(func() { http.DefaultClient = before })
	return runner
}

// clean takes away what the environment of these tests says itself.
func clean(t *testing.T) {
	t.Helper()
	for _, name := range []string{"ASSAY_ID_TOKEN", "ASSAY_ID_TOKEN_FILE", "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"} {
		t.Setenv(name, "")
	}
}

func TestATokenIsFetchedFromTheRunner(t *testing.T) {
	runner := newRunner(t)
	find := func(t *testing.T, path, secret string) (string, error) {
		t.Helper()
		clean(t)
		t.Setenv("ACTIONS_ID_TOKEN_REQUEST_URL", runner.URL+path)
		t.Setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", secret)
		return (&push{audience: "assay & more"}).findToken(t.Context())
	}
	t.Run("for the audience, with the job's secret, and what else the address asks for", func(t *testing.T) {
		if token, err := find(t, "/token?api-version=2.0", "s3cret"); err != nil || token != "token for assay & more" {
			t.Errorf("got %q, %v", token, err)
		}
	})
	for name, c := range map[string]struct{ path, secret, want string }{
		"not with another secret":       {"/token?api-version=2.0", "guess", "401"},
		"not without a secret":          {"/token?api-version=2.0", "", "401"},
		"an answer that holds none":     {"/empty", "s3cret", "holds none"},
		"an answer that is not JSON":    {"/html", "s3cret", "holds none"},
		"an address that is not one":    {"\x7f", "s3cret", "is no URL"},
		"what the runner does not know": {"/token", "s3cret", "400"},
	} {
		t.Run(name, func(t *testing.T) {
			token, err := find(t, c.path, c.secret)
			if err == nil || token != "" || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %q, %v", token, err)
			}
			if err != nil && c.secret != "" && strings.Contains(err.Error(), c.secret) {
				t.Errorf("the error tells the secret: %v", err)
			}
		})
	}
	t.Run("not from one that TLS does not vouch for", func(t *testing.T) {
		http.DefaultClient = &http.Client{Transport: &http.Transport{}}
		defer func() { http.DefaultClient = runner.Client() }()
		if token, err := find(t, "/token?api-version=2.0", "s3cret"); err == nil {
			t.Errorf("got %q", token)
		}
	})
	t.Run("not when there is no time left", func(t *testing.T) {
		clean(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		t.Setenv("ACTIONS_ID_TOKEN_REQUEST_URL", runner.URL)
		if _, err := (&push{}).findToken(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestWhereATokenIsLookedForFirst(t *testing.T) {
	runner := newRunner(t)
	clean(t)
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("from-the-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := func(p push, token string) {
		t.Helper()
		if got, err := p.findToken(t.Context()); err != nil || got != token {
			t.Errorf("got %q, %v, want %q", got, err, token)
		}
	}
	want(push{}, "")
	t.Setenv("ACTIONS_ID_TOKEN_REQUEST_URL", runner.URL+"?api-version=2.0")
	t.Setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "s3cret")
	want(push{audience: "assay"}, "token for assay")
	t.Setenv("ASSAY_ID_TOKEN", "from the environment")
	want(push{}, "from the environment")
	want(push{far: cli.Far{TokenPath: file}}, "from-the-file")
	want(push{token: "from the flag", far: cli.Far{TokenPath: file}}, "from the flag")
	if _, err := (&push{far: cli.Far{TokenPath: file + "x"}}).findToken(t.Context()); err == nil {
		t.Error("a file that is not there is no error")
	}
}
