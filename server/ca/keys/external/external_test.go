package external_test

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/keys/external"
	"github.com/assay-id/assay/server/ca/keys/keystest"
	"github.com/assay-id/assay/test/fake/spireplugin"
)

func TestMain(m *testing.M) {
	spireplugin.RunIfAsked()
	os.Exit(m.Run())
}

func open(t *testing.T, dir, mode string) (*external.Manager, error) {
	t.Helper()
	path, sum := spireplugin.Self(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	m, err := external.Open(&block.Config{
		Name: "hsm", Cmd: path, Args: spireplugin.Args(spireplugin.Keys), Env: spireplugin.Env(), Checksum: fmt.Sprintf("%x", sum),
		Data: fmt.Sprintf("mode = %q\ndirectory = %q", mode, dir),
	}, dir, attestor.Needs{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Log: log, Now: time.Now})
	if err == nil {
		t.Cleanup(func() { _ = m.Close() })
	}
	return m, err
}

func must(t *testing.T, dir, mode string) *external.Manager {
	t.Helper()
	m, err := open(t, dir, mode)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestSuite(t *testing.T) {
	dirs := map[keys.Manager]string{}
	keystest.Run(t, keystest.Options{
		Open: func(t *testing.T) keys.Manager {
			dir := t.TempDir()
			m := must(t, dir, "")
			dirs[m] = dir
			return m
		},
		Reopen: func(t *testing.T, m keys.Manager) keys.Manager {
			dir := dirs[m]
			if err := m.(io.Closer).Close(); err != nil {
				t.Fatal(err)
			}
			again := must(t, dir, "")
			dirs[again] = dir
			return again
		},
	})
}

func TestPlaces(t *testing.T) {
	dir := t.TempDir()
	m := must(t, dir, "")
	for n := range 5 { // five rotations
		if _, err := m.Generate(t.Context(), fmt.Sprintf("authority-%d", n), keys.EC256); err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			if err := m.Delete(t.Context(), fmt.Sprintf("authority-%d", n-1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	held, err := filepath.Glob(filepath.Join(dir, "key-*"))
	if err != nil || len(held) != 2 {
		t.Errorf("the plugin holds %q, %v, want two", held, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "keys-hsm.json"))
	if err != nil || strings.Count(string(text), "authority-") != 1 {
		t.Errorf("the file says %s, %v", text, err)
	}

	t.Run("a key that somebody else put into the place is not signed with", func(t *testing.T) {
		key := filepath.Join(dir, "key-assay-0")
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		other, err := os.ReadFile(filepath.Join(dir, "key-assay-1"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(key, other, 0o600); err != nil {
			t.Fatal(err)
		}
		again := must(t, dir, "")
		if _, err := again.Get(t.Context(), "authority-4"); !errors.Is(err, keys.ErrNotFound) || !strings.Contains(err.Error(), "is another") {
			t.Errorf("got %v", err)
		}
	})
	for name, text := range map[string]string{
		"garbage": "{", "of a later version": `{"version": 2}`,
		"with two keys in one place": `{"version": 1, "keys": {"a": {"place": 0, "public": "AA=="}, "b": {"place": 0, "public": "AA=="}}}`,
		"with a place that is none":  `{"version": 1, "keys": {"a": {"place": -1, "public": "AA=="}}}`,
		"with a name that is none":   `{"version": 1, "keys": {"a/b": {"place": 1, "public": "AA=="}}}`,
	} {
		t.Run("a file "+name+" is refused", func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "keys-hsm.json"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := open(t, dir, ""); err == nil || !strings.Contains(err.Error(), "keys-hsm.json") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestLies(t *testing.T) {
	digest := sha256.Sum256([]byte("message"))
	for _, c := range []struct{ mode, generate, sign string }{
		{"other-kind", "asked for a key of kind ec-p256, got one of kind ec-p384", ""},
		{"no-key", "parse public key", ""},
		{"sign-other", "", "what came back is no signature by that key"},
		{"error", "it went wrong in", ""},
		{"crash", "plugin has ended", ""},
	} {
		t.Run(c.mode, func(t *testing.T) {
			m := must(t, t.TempDir(), c.mode)
			key, err := m.Generate(t.Context(), "a", keys.EC256)
			if c.generate != "" {
				if err == nil || !strings.Contains(err.Error(), c.generate) {
					t.Errorf("got %v, want %q", err, c.generate)
				}
				if names, err := m.List(t.Context()); err != nil || len(names) != 0 {
					t.Errorf("left behind %v, %v", names, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := key.Sign(nil, digest[:], crypto.SHA256); err == nil || !strings.Contains(err.Error(), c.sign) {
				t.Errorf("got %v, want %q", err, c.sign)
			}
		})
	}
	t.Run("one that hangs costs the patience of who asks, no more", func(t *testing.T) {
		m := must(t, t.TempDir(), "hang")
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := m.Generate(ctx, "a", keys.EC256); err == nil {
			t.Error("there is a key")
		}
		if names, err := m.List(t.Context()); err != nil || len(names) != 0 {
			t.Errorf("left behind %v, %v", names, err)
		}
	})
	t.Run("a fingerprint that changes is nothing to worry about: the signature is verified", func(t *testing.T) {
		key, err := must(t, t.TempDir(), "other-fingerprint").Generate(t.Context(), "a", keys.EC256)
		if err == nil {
			_, err = key.Sign(nil, digest[:], crypto.SHA256)
		}
		if err != nil {
			t.Error(err)
		}
	})
}
