// Package keystest is the suite that every keys.Manager passes.
package keystest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/assay-id/assay/server/ca/keys"
)

// Options say what a Manager is like.
type Options struct {
	// Open returns an empty Manager.
	Open func(t *testing.T) keys.Manager
	// Reopen returns another Manager over the same keys, as after a restart; nil if keys end with the process.
	Reopen func(t *testing.T, m keys.Manager) keys.Manager
	// InProcess says that keys are in this process's memory.
	InProcess bool
}

// Run holds a Manager to what server/ca expects of one.
func Run(t *testing.T, o Options) {
	open := o.Open
	ctx := t.Context()
	digest := sha256.Sum256([]byte("message"))

	t.Run("a key of each kind signs what its public half verifies", func(t *testing.T) {
		m := open(t)
		for _, kind := range []keys.Kind{keys.EC256, keys.EC384, keys.RSA2048} {
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
				if want := map[keys.Kind]int{keys.EC256: 256, keys.EC384: 384}[kind]; public.Curve.Params().BitSize != want {
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
		if _, err := m.Get(ctx, "nobody"); !errors.Is(err, keys.ErrNotFound) {
			t.Errorf("got %v", err)
		}
		if err := m.Delete(ctx, "nobody"); err != nil {
			t.Errorf("delete: %v", err)
		}
	})

	t.Run("a name is never used twice and its key never replaced", func(t *testing.T) {
		m := open(t)
		first, err := m.Generate(ctx, "a", keys.EC256)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Generate(ctx, "a", keys.EC256); !errors.Is(err, keys.ErrExists) {
			t.Errorf("got %v", err)
		}
		if got, err := m.Get(ctx, "a"); err != nil || !equal(got.Public(), first.Public()) {
			t.Errorf("key was replaced: %v", err)
		}
	})

	t.Run("a deleted key is gone, and its name free again", func(t *testing.T) {
		m := open(t)
		for range 2 {
			if _, err := m.Generate(ctx, "a", keys.EC256); err != nil {
				t.Fatal(err)
			}
			if err := m.Delete(ctx, "a"); err != nil {
				t.Fatal(err)
			}
			if _, err := m.Get(ctx, "a"); !errors.Is(err, keys.ErrNotFound) {
				t.Errorf("got %v", err)
			}
		}
	})

	t.Run("bad names and kinds are refused", func(t *testing.T) {
		m := open(t)
		for _, name := range []string{"", "a/b", "a b", "a\n", "ü", strings.Repeat("a", keys.MaxName+1)} {
			if _, err := m.Generate(ctx, name, keys.EC256); err == nil {
				t.Errorf("name %q was taken", name)
			}
		}
		for _, kind := range []keys.Kind{"", "rsa-1024", "ed25519"} {
			if _, err := m.Generate(ctx, "a", kind); err == nil {
				t.Errorf("kind %q was taken", kind)
			}
		}
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := m.Generate(canceled, "a", keys.EC256); !errors.Is(err, context.Canceled) {
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
					if _, err := m.Generate(ctx, name, keys.EC256); err != nil {
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
		key, err := open(t).Generate(ctx, "shy", keys.EC256)
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

	t.Run("what is signed is a digest of the size of its hash", func(t *testing.T) {
		m := open(t)
		for _, kind := range []keys.Kind{keys.EC256, keys.RSA2048} {
			key, err := m.Generate(ctx, "d-"+string(kind), kind)
			if err != nil {
				t.Fatal(err)
			}
			if kind == keys.RSA2048 || !o.InProcess {
				if _, err := key.Sign(nil, digest[:20], crypto.SHA256); err == nil {
					t.Errorf("%s signed 20 bytes as SHA-256", kind)
				}
			}
		}
		key, err := m.Generate(ctx, "d-384", keys.EC384)
		if err != nil {
			t.Fatal(err)
		}
		long := sha512.Sum384([]byte("message"))
		signature, err := key.Sign(nil, long[:], crypto.SHA384)
		if err != nil || !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), long[:], signature) {
			t.Errorf("SHA-384: %v", err)
		}
	})

	t.Run("whether keys are in this process, it says", func(t *testing.T) {
		key, err := open(t).Generate(ctx, "where", keys.EC256)
		if err != nil {
			t.Fatal(err)
		}
		if keys.InProcess(key) != o.InProcess {
			t.Errorf("InProcess says %t", keys.InProcess(key))
		}
	})

	t.Run("keys that are said to last do, and no others", func(t *testing.T) {
		m := open(t)
		if m.Persistent() != (o.Reopen != nil) {
			t.Fatalf("Persistent says %t", m.Persistent())
		}
		if o.Reopen == nil {
			return
		}
		first, err := m.Generate(ctx, "lasting", keys.EC256)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Generate(ctx, "gone", keys.EC256); err != nil {
			t.Fatal(err)
		}
		if err := m.Delete(ctx, "gone"); err != nil {
			t.Fatal(err)
		}
		again := o.Reopen(t, m)
		key, err := again.Get(ctx, "lasting")
		if err != nil || !equal(key.Public(), first.Public()) {
			t.Fatalf("got another key back: %v", err)
		}
		signature, err := key.Sign(nil, digest[:], crypto.SHA256)
		if err != nil || !ecdsa.VerifyASN1(first.Public().(*ecdsa.PublicKey), digest[:], signature) {
			t.Errorf("it does not sign: %v", err)
		}
		if _, err := again.Get(ctx, "gone"); !errors.Is(err, keys.ErrNotFound) {
			t.Errorf("a deleted key: %v", err)
		}
		if names, err := again.List(ctx); err != nil || !slices.Equal(names, []string{"lasting"}) {
			t.Errorf("%v, %v", names, err)
		}
	})
}

func equal(a, b crypto.PublicKey) bool {
	return a.(interface{ Equal(crypto.PublicKey) bool }).Equal(b) // all keys have it
}
