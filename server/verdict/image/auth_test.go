package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

func auths(t *testing.T, text string, mode os.FileMode) (*Auths, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return OpenAuths(path)
}

func TestAuths(t *testing.T) {
	const good = `{"auths": {
		"registry.example.org:5000": {"auth": "dXNlcjpwYXNzOndvcmQ="},
		"https://index.docker.io/v1/": {"username": "hub", "password": "secret"},
		"gcr.io": {"identitytoken": "token"}
	}, "HttpHeaders": {}}`
	a, err := auths(t, good, 0o440)
	if err != nil {
		t.Fatal(err)
	}
	for registry, want := range map[string]authn.AuthConfig{
		"registry.example.org:5000": {Username: "user", Password: "pass:word"},
		"index.docker.io":           {Username: "hub", Password: "secret"},
		"docker.io":                 {Username: "hub", Password: "secret"},
		"gcr.io":                    {IdentityToken: "token"},
	} {
		if got, ok, err := a.For(registry); err != nil || !ok || got != want {
			t.Errorf("%s: got %v, %v, %v", registry, got, ok, err)
		}
	}
	for _, registry := range []string{"registry.example.org", "evil.example.org", "", "registry.example.org:5000.evil.example.org"} {
		if got, ok, err := a.For(registry); err != nil || ok {
			t.Errorf("%s: got %v, %v, %v", registry, got, ok, err)
		}
	}
	t.Run("what is renewed counts at once", func(t *testing.T) {
		if err := os.Chmod(a.path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(a.path, []byte(`{"auths": {"gcr.io": {"username": "a", "password": "b"}}}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, _, err := a.For("gcr.io"); err != nil || got.Username != "a" {
			t.Errorf("got %v, %v", got, err)
		}
		if err := os.Chmod(a.path, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, ok, err := a.For("gcr.io"); err == nil || ok {
			t.Error("a file that others may read by now is used")
		}
	})
	for name, c := range map[string]struct {
		text string
		mode os.FileMode
		want string
	}{
		"others may read it":     {good, 0o604, "has mode 0604, so that others may read or change it; run chmod"},
		"its group may write it": {good, 0o660, "has mode 0660"},
		"no JSON":                {"secret-in-a-wrong-place", 0o600, "is no config.json of Docker"},
		"a store":                {`{"credsStore": "desktop"}`, 0o600, "which are not run"},
		"a helper":               {`{"credHelpers": {"gcr.io": "gcloud"}}`, 0o600, "which are not run"},
		"auth that is none":      {`{"auths": {"gcr.io": {"auth": "hunter2"}}}`, 0o600, `auths."gcr.io": auth is not base64 of user:password`},
		"nothing":                {`{"auths": {"gcr.io": {}}}`, 0o600, "it has no credentials"},
		"too much":               {`{"auths": {}, "x": "` + strings.Repeat("x", maxAuths) + `"}`, 0o600, "longer than"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			_, err := auths(t, c.text, c.mode)
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "secret") {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	if _, err := OpenAuths("/nowhere"); err == nil {
		t.Error("a file that is not there is no error")
	}
}

func FuzzAuths(f *testing.F) {
	f.Add(`{"auths": {"a": {"auth": "dXNlcjpw"}}}`)
	f.Add(`{"auths": {"https://a/v1/": {"username": "x"}}}`)
	path := filepath.Join(f.TempDir(), "config.json")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if a, err := OpenAuths(path); err == nil {
			_, _, _ = a.For("a")
		}
	})
}
