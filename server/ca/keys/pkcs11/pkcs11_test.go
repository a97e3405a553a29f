package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/keys/keystest"
)

// soft is a token whose keys are in the file that the module's path names. The real one is tested with
// SoftHSM in test/lab/pkcs11.
type soft struct{ keys keys.Manager }

func (s soft) Generate(name string, kind keys.Kind) ([]byte, error) {
	key, err := s.keys.Generate(context.Background(), name, kind)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(key.Public())
}

func (s soft) Public(name string) ([]byte, error) {
	key, err := s.keys.Get(context.Background(), name)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(key.Public())
}

func (s soft) Sign(name string, digest []byte, hash crypto.Hash) ([]byte, error) {
	switch name {
	case "crash":
		os.Exit(3)
	case "hang":
		select {}
	case "lie":
		return []byte("no signature"), nil
	}
	key, err := s.keys.Get(context.Background(), name)
	if err != nil {
		return nil, err
	}
	return key.Sign(rand.Reader, digest, hash)
}

func (s soft) Delete(name string) error { return s.keys.Delete(context.Background(), name) }
func (s soft) List() ([]string, error)  { return s.keys.List(context.Background()) }

// asHelper makes this program the helper.
const asHelper = "helper-of-the-test"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == asHelper {
		log := logrus.New()
		log.SetOutput(io.Discard)
		err := Serve(os.Stdin, os.Stdout, func(q Question) (Token, error) {
			if q.PIN != "1234" {
				return nil, errors.New("wrong PIN")
			}
			d, err := keys.OpenDisk(q.Module, log)
			return soft{d}, err
		})
		if err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func config(module string) Config {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return Config{Helper: os.Args[0], Args: []string{asHelper}, Module: module, PIN: "1234", Log: log}
}

func open(t *testing.T, module string) *Manager {
	t.Helper()
	m, err := Open(t.Context(), config(module))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func TestSuite(t *testing.T) {
	modules := map[keys.Manager]string{}
	keystest.Run(t, keystest.Options{
		Open: func(t *testing.T) keys.Manager {
			module := filepath.Join(t.TempDir(), "keys.json")
			m := open(t, module)
			modules[m] = module
			return m
		},
		Reopen: func(t *testing.T, m keys.Manager) keys.Manager {
			if err := m.(*Manager).Close(); err != nil {
				t.Fatal(err)
			}
			return open(t, modules[m])
		},
	})
}

func TestBadModules(t *testing.T) {
	digest := sha256.Sum256(nil)
	make := func(t *testing.T, name string) (*Manager, crypto.Signer) {
		t.Helper()
		m := open(t, filepath.Join(t.TempDir(), "keys.json"))
		key, err := m.Generate(t.Context(), name, keys.EC256)
		if err != nil {
			t.Fatal(err)
		}
		return m, key
	}
	t.Run("a crash fails the signature, and the next question finds another helper", func(t *testing.T) {
		m, key := make(t, "crash")
		if _, err := key.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, errEnded) {
			t.Errorf("got %v", err)
		}
		if _, err := m.Get(t.Context(), "crash"); err != nil {
			t.Error(err)
		}
	})
	t.Run("one that hangs is ended", func(t *testing.T) {
		m, _ := make(t, "hang")
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := m.do(ctx, Question{Op: OpSign, Name: "hang", Digest: digest[:], Hash: crypto.SHA256.String()}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if _, err := m.Get(t.Context(), "hang"); err != nil {
			t.Error(err)
		}
	})
	t.Run("a signature that is none does not leave", func(t *testing.T) {
		_, key := make(t, "lie")
		if _, err := key.Sign(nil, digest[:], crypto.SHA256); err == nil || !strings.Contains(err.Error(), "no signature by that key") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a wrong PIN is an error that does not tell it", func(t *testing.T) {
		cfg := config(filepath.Join(t.TempDir(), "keys.json"))
		cfg.PIN = "98765"
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "wrong PIN") || strings.Contains(err.Error(), "98765") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no helper is an error that names it", func(t *testing.T) {
		cfg := config("")
		cfg.Helper = "/nowhere/assay-pkcs11"
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "/nowhere/assay-pkcs11") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a program that speaks nonsense is an error", func(t *testing.T) {
		cfg := config("")
		cfg.Helper, cfg.Args = "/bin/echo", []string{"hello"}
		if _, err := Open(t.Context(), cfg); !errors.Is(err, errEnded) {
			t.Errorf("got %v", err)
		}
	})
}

func FuzzServe(f *testing.F) {
	f.Add([]byte(`{"id":1,"op":"open","pin":"1234"}` + "\n" + `{"id":2,"op":"list"}` + "\n"))
	f.Add([]byte(`{"id":1,"op":"open"}` + "\n" + `{"id":2,"op":"sign","name":"a","digest":"AA==","hash":"SHA-256"}` + "\n"))
	f.Fuzz(func(_ *testing.T, in []byte) {
		_ = Serve(bytes.NewReader(in), io.Discard, func(Question) (Token, error) { return soft{keys.Memory()}, nil })
	})
}

// dying is the input of a helper that answers and has ended before anybody has listened.
type dying struct {
	*helper
	say string // empty: it ends without an answer
}

func (d dying) Write(line []byte) (int, error) {
	if d.say != "" {
		d.waiting[d.next] <- Answer{ID: d.next, Error: d.say}
	}
	close(d.ended)
	return len(line), nil
}

func (dying) Close() error { return nil }

func TestTheLastAnswerCountsMoreThanTheEnd(t *testing.T) {
	ask := func(say string) error {
		h := &helper{ended: make(chan struct{}), waiting: map[uint64]chan Answer{}}
		h.in = dying{h, say}
		_, err := h.ask(t.Context(), Question{Op: OpOpen})
		return err
	}
	for range 100 { // of two things that are there at once either may be taken
		if err := ask("wrong PIN"); err == nil || err.Error() != "wrong PIN" {
			t.Fatalf("got %v", err)
		}
	}
	if err := ask(""); !errors.Is(err, errEnded) {
		t.Errorf("got %v", err)
	}
}
