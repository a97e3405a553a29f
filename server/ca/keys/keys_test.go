package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sirupsen/logrus"
)

func quiet() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

func openDisk(t *testing.T, path string) *OnDisk {
	t.Helper()
	d, err := OpenDisk(path, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// TestManagers is what every Manager must do.
func TestManagers(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) Manager{
		"memory": func(*testing.T) Manager { return Memory() },
		"disk":   func(t *testing.T) Manager { return openDisk(t, filepath.Join(t.TempDir(), "keys.json")) },
	} {
		t.Run(name, func(t *testing.T) { testManager(t, open) })
	}
}

func testManager(t *testing.T, open func(t *testing.T) Manager) {
	ctx := t.Context()
	digest := sha256.Sum256([]byte("message"))

	t.Run("a key of each kind signs what its public half verifies", func(t *testing.T) {
		m := open(t)
		for _, kind := range []Kind{EC256, EC384, RSA2048} {
			key, err := m.Generate(ctx, string(kind), kind)
			if err != nil {
				t.Fatal(err)
			}
			signature, err := key.Sign(nil, digest[:], crypto.SHA256)
			if err != nil {
				t.Fatal(err)
			}
			switch public := key.Public().(type) {
			case *ecdsa.PublicKey:
				if want := map[Kind]int{EC256: 256, EC384: 384}[kind]; public.Curve.Params().BitSize != want {
					t.Errorf("%s made a key of %d bits", kind, public.Curve.Params().BitSize)
				}
				if !ecdsa.VerifyASN1(public, digest[:], signature) {
					t.Errorf("signature of %s does not verify", kind)
				}
			case *rsa.PublicKey:
				if want := 2048; public.N.BitLen() != want {
					t.Errorf("%s made a key of %d bits", kind, public.N.BitLen())
				}
				if err := rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], signature); err != nil {
					t.Errorf("signature of %s: %v", kind, err)
				}
			}
			got, err := m.Get(ctx, string(kind))
			if err != nil || !equal(got.Public(), key.Public()) {
				t.Errorf("got another key back: %v", err)
			}
		}
	})

	t.Run("what is not there is not found", func(t *testing.T) {
		m := open(t)
		if _, err := m.Get(ctx, "nobody"); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if err := m.Delete(ctx, "nobody"); err != nil {
			t.Errorf("delete: %v", err)
		}
	})

	t.Run("a name is never used twice and its key never replaced", func(t *testing.T) {
		m := open(t)
		first, err := m.Generate(ctx, "a", EC256)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Generate(ctx, "a", EC256); !errors.Is(err, ErrExists) {
			t.Errorf("got %v", err)
		}
		if got, err := m.Get(ctx, "a"); err != nil || !equal(got.Public(), first.Public()) {
			t.Errorf("key was replaced: %v", err)
		}
	})

	t.Run("a deleted key is gone, and its name free again", func(t *testing.T) {
		m := open(t)
		for range 2 {
			if _, err := m.Generate(ctx, "a", EC256); err != nil {
				t.Fatal(err)
			}
			if err := m.Delete(ctx, "a"); err != nil {
				t.Fatal(err)
			}
			if _, err := m.Get(ctx, "a"); !errors.Is(err, ErrNotFound) {
				t.Errorf("got %v", err)
			}
		}
	})

	t.Run("bad names and kinds are refused", func(t *testing.T) {
		m := open(t)
		for _, name := range []string{"", "a/b", "a b", "a\n", "ü", strings.Repeat("a", MaxName+1)} {
			if _, err := m.Generate(ctx, name, EC256); err == nil {
				t.Errorf("name %q was taken", name)
			}
		}
		for _, kind := range []Kind{"", "rsa-1024", "ed25519"} {
			if _, err := m.Generate(ctx, "a", kind); err == nil {
				t.Errorf("kind %q was taken", kind)
			}
		}
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := m.Generate(canceled, "a", EC256); !errors.Is(err, context.Canceled) {
			t.Errorf("canceled: %v", err)
		}
		if names, err := m.List(ctx); err != nil || len(names) != 0 {
			t.Errorf("left behind %v, %v", names, err)
		}
	})

	t.Run("many at once lose nothing", func(t *testing.T) {
		m := open(t)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for j := range 4 {
					name := fmt.Sprintf("k-%d-%d", i, j)
					if _, err := m.Generate(ctx, name, EC256); err != nil {
						t.Error(err)
					}
					if j%2 == 1 {
						if err := m.Delete(ctx, name); err != nil {
							t.Error(err)
						}
					}
					if _, err := m.List(ctx); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		names, err := m.List(ctx)
		if err != nil || len(names) != 16 || !slices.IsSorted(names) {
			t.Errorf("%d keys, sorted %t: %v", len(names), slices.IsSorted(names), err)
		}
	})

	t.Run("a key does not print itself", func(t *testing.T) {
		key, err := open(t).Generate(ctx, "shy", EC256)
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := json.Marshal(map[string]any{"key": key})
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{
			fmt.Sprint(key), fmt.Sprintf("%v", key), fmt.Sprintf("%+v", key), fmt.Sprintf("%#v", key),
			fmt.Sprintf("%s", key), fmt.Sprintf("%d", key), fmt.Sprintf("%x", key),
		} {
			if text != "private key shy" {
				t.Errorf("printed %q", text)
			}
		}
		if string(encoded) != `{"key":"private key shy"}` {
			t.Errorf("encoded %s", encoded)
		}
	})
}

func equal(a, b crypto.PublicKey) bool {
	return a.(interface{ Equal(crypto.PublicKey) bool }).Equal(b)
}

func TestPersistence(t *testing.T) {
	if Memory().Persistent() {
		t.Error("memory claims to last")
	}
	if !openDisk(t, filepath.Join(t.TempDir(), "keys.json")).Persistent() {
		t.Error("disk does not claim to last")
	}
}

func TestGenerate(t *testing.T) {
	t.Run("the largest kind of key is as large as it says", func(t *testing.T) {
		key, err := Generate(RSA4096)
		if err != nil {
			t.Fatal(err)
		}
		if n := key.Public().(*rsa.PublicKey).N.BitLen(); n != 4096 {
			t.Errorf("%d bits", n)
		}
	})
}

func TestParseKind(t *testing.T) {
	t.Run("SPIRE's spellings are known and others named", func(t *testing.T) {
		if k, err := ParseKind("rsa-4096"); err != nil || k != RSA4096 {
			t.Errorf("got %q, %v", k, err)
		}
		if _, err := ParseKind("EC-P256"); err == nil || !strings.Contains(err.Error(), "ec-p256") {
			t.Errorf("got %v", err)
		}
	})
}
