package external_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/keep/external"
	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/test/fake/spireplugin"
)

func TestMain(m *testing.M) {
	spireplugin.RunIfAsked()
	os.Exit(m.Run())
}

// machine is a data directory of an agent, and the directory of its plugin.
type machine struct {
	data, plugin string
	name         string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	return &machine{data: t.TempDir(), plugin: t.TempDir(), name: "hsm"}
}

// goes says how the plugin behaves from now on.
func (m *machine) goes(t *testing.T, mode string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.plugin, "mode"), []byte(mode), 0o600); err != nil {
		t.Fatal(err)
	}
}

// start opens what a starting agent opens. The plugin ends with the test, or with stop.
func (m *machine) start(t *testing.T) (k *keep.Keep, stop func()) {
	t.Helper()
	path, sum := spireplugin.Self(t)
	log := logrus.New()
	log.SetOutput(io.Discard)
	elsewhere, err := external.Open(&block.Config{
		Name: m.name, Cmd: path, Args: spireplugin.Args(spireplugin.AgentKeys), Env: spireplugin.Env(), Checksum: fmt.Sprintf("%x", sum), Data: fmt.Sprintf("directory = %q", m.plugin),
	}, attestor.Needs{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Log: log, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := keep.ElsewhereKeys(m.data, elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = keys.Close() }) // twice is once
	if k, err = keep.Open(m.data, keys, log); err != nil {
		t.Fatal(err)
	}
	return k, func() {
		if err := keys.Close(); err != nil {
			t.Error(err)
		}
	}
}

// holds are the places with a key.
func (m *machine) holds(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(m.plugin, "key-*"))
	if err != nil {
		t.Fatal(err)
	}
	for i, path := range found {
		found[i] = strings.TrimPrefix(filepath.Base(path), "key-")
	}
	slices.Sort(found)
	return found
}

// certified makes an SVID for a new key, and keeps it.
func certified(t *testing.T, k *keep.Keep) *keep.Own {
	t.Helper()
	key, err := k.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/spire/agent/x"}}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	own := &keep.Own{Chain: []*x509.Certificate{cert}, Key: key}
	if err := k.SaveOwn(own); err != nil {
		t.Fatal(err)
	}
	return own
}

func sign(key crypto.Signer) error {
	digest := sha256.Sum256([]byte("message"))
	_, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	return err
}

func TestTheKeyIsInThePlugin(t *testing.T) {
	m := newMachine(t)
	k, stop := m.start(t)
	first := certified(t, k)
	if got := m.holds(t); !slices.Equal(got, []string{"agent-svid-A"}) {
		t.Fatalf("the plugin holds %q", got)
	}
	t.Run("a key that is made and never used leaves the one in use alone, however often", func(t *testing.T) {
		for range 3 {
			if _, err := k.NewKey(); err != nil {
				t.Fatal(err)
			}
		}
		if err := sign(first.Key); err != nil {
			t.Errorf("the key in use: %v", err)
		}
		if got := m.holds(t); !slices.Equal(got, []string{"agent-svid-A", "agent-svid-B"}) {
			t.Errorf("the plugin holds %q", got)
		}
	})
	t.Run("two places do for every renewal", func(t *testing.T) {
		for range 3 {
			before := certified(t, k)
			if err := sign(before.Key); err != nil {
				t.Error(err)
			}
		}
		if got := m.holds(t); len(got) != 2 {
			t.Errorf("the plugin holds %q", got)
		}
	})
	last := certified(t, k)
	stop()
	t.Run("no private key is on disk", func(t *testing.T) {
		err := filepath.WalkDir(m.data, func(path string, _ os.DirEntry, err error) error {
			if text, readErr := os.ReadFile(path); readErr == nil && strings.Contains(string(text), "PRIVATE") {
				t.Errorf("%s has a key", path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	t.Run("after a restart it is there, and the next goes to the other place", func(t *testing.T) {
		again, stop := m.start(t)
		defer stop()
		own := again.Own()
		if own == nil || again.Lost() != nil {
			t.Fatalf("it is lost: %v", again.Lost())
		}
		if !own.Chain[0].Equal(last.Chain[0]) {
			t.Error("it is another SVID")
		}
		if err := sign(own.Key); err != nil {
			t.Error(err)
		}
		certified(t, again)
		if err := sign(own.Key); err != nil {
			t.Errorf("the one before was overwritten: %v", err)
		}
	})
	t.Run("it signs SHA-256 alone", func(t *testing.T) {
		k, stop := m.start(t)
		defer stop()
		digest := sha512.Sum512([]byte("message"))
		if _, err := certified(t, k).Key.Sign(rand.Reader, digest[:], crypto.SHA512); err == nil || !strings.Contains(err.Error(), "SHA-256 only") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("it prints its name and nothing else", func(t *testing.T) {
		if text := fmt.Sprintf("%v %+v %s", first.Key, first.Key, first.Key); strings.Contains(text, "0x") {
			t.Errorf("it prints %s", text)
		}
	})
}

func TestAfterARestart(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, m *machine)
		kept bool
		said string
	}{
		{"a plugin that lost the key has the agent begin anew", func(t *testing.T, m *machine) { m.goes(t, "lost") }, false, "plugin \"hsm\" has no key agent-svid-A"},
		{"a plugin with another key in its place too", func(t *testing.T, m *machine) {
			other := newMachine(t)
			k, stop := other.start(t)
			certified(t, k)
			stop()
			if err := os.Rename(filepath.Join(other.plugin, "key-agent-svid-A"), filepath.Join(m.plugin, "key-agent-svid-A")); err != nil {
				t.Fatal(err)
			}
		}, false, "the key agent-svid-A of plugin \"hsm\" is another"},
		{"a plugin that fails may have it all the same", func(t *testing.T, m *machine) { m.goes(t, "error") }, true, ""},
		{"a plugin that crashes may have it all the same", func(t *testing.T, m *machine) { m.goes(t, "crash") }, true, ""},
		{"a plugin of another name is another", func(_ *testing.T, m *machine) { m.name = "other" }, false, "its key is in the plugin \"hsm\", and the key manager is the plugin \"other\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			k, stop := m.start(t)
			certified(t, k)
			stop()
			c.do(t, m)
			again, _ := m.start(t)
			own := again.Own()
			if (own != nil) != c.kept || c.said != "" && !strings.Contains(fmt.Sprint(again.Lost()), c.said) {
				t.Fatalf("kept: %v, lost: %v", own != nil, again.Lost())
			}
			if !c.kept {
				if _, err := k.NewKey(); err == nil {
					t.Error("a plugin that was closed made a key")
				}
				return
			}
			if err := sign(own.Key); err == nil || errors.Is(err, keep.ErrKeyGone) {
				t.Errorf("signed with: %v", err)
			}
			m.goes(t, "")
			deadline := time.Now().Add(time.Minute)
			for err := sign(own.Key); err != nil; err = sign(own.Key) { // it is started again after a pause
				if time.Now().After(deadline) {
					t.Fatal(err)
				}
			}
		})
	}
	t.Run("another key manager does not have it", func(t *testing.T) {
		m := newMachine(t)
		k, stop := m.start(t)
		certified(t, k)
		stop()
		keys, err := keep.DiskKeys(m.data)
		if err != nil {
			t.Fatal(err)
		}
		log := logrus.New()
		log.SetOutput(io.Discard)
		disk, err := keep.Open(m.data, keys, log)
		if err != nil {
			t.Fatal(err)
		}
		if own := disk.Own(); own != nil || !strings.Contains(fmt.Sprint(disk.Lost()), "its key is in the plugin \"hsm\", and the key manager is another") {
			t.Errorf("kept: %v, lost: %v", own != nil, disk.Lost())
		}
	})
	t.Run("what key_manager \"disk\" kept is taken over", func(t *testing.T) {
		m := newMachine(t)
		keys, err := keep.DiskKeys(m.data)
		if err != nil {
			t.Fatal(err)
		}
		log := logrus.New()
		log.SetOutput(io.Discard)
		disk, err := keep.Open(m.data, keys, log)
		if err != nil {
			t.Fatal(err)
		}
		certified(t, disk)
		k, _ := m.start(t)
		if own := k.Own(); own == nil || sign(own.Key) != nil {
			t.Errorf("it is lost: %v", k.Lost())
		}
		certified(t, k)
		if got := m.holds(t); !slices.Equal(got, []string{"agent-svid-A"}) {
			t.Errorf("the plugin holds %q", got)
		}
	})
}

func TestLies(t *testing.T) {
	for _, c := range []struct{ mode, generate, sign string }{
		{"other-kind", "is no key of the kind ec-p256", ""},
		{"no-key", "answered no public key", ""},
		{"error", "it went wrong in", ""},
		{"crash", "plugin has ended", ""},
		{"", "", "sign-other: what plugin \"hsm\" answered is no signature by that key: the plugin says that it has the key"},
		{"", "", "error: it went wrong in"},
		{"", "", "crash: plugin has ended"},
		{"", "", "lost: gone from its key manager"},
	} {
		how, want, _ := strings.Cut(c.sign, ": ")
		t.Run(c.mode+how, func(t *testing.T) {
			m := newMachine(t)
			k, _ := m.start(t)
			m.goes(t, c.mode)
			key, err := k.NewKey()
			if c.generate != "" {
				if err == nil || !strings.Contains(err.Error(), c.generate) {
					t.Errorf("got %v, want %q", err, c.generate)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			m.goes(t, how)
			if err = sign(key); err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, keep.ErrKeyGone) != (how == "lost") {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
	t.Run("one that hangs is given up", func(t *testing.T) {
		m := newMachine(t)
		m.goes(t, "hang")
		path, sum := spireplugin.Self(t)
		log := logrus.New()
		log.SetOutput(io.Discard)
		keys, err := external.Open(&block.Config{
			Name: "hsm", Cmd: path, Args: spireplugin.Args(spireplugin.AgentKeys), Env: spireplugin.Env(), Checksum: fmt.Sprintf("%x", sum), Data: fmt.Sprintf("directory = %q", m.plugin),
		}, attestor.Needs{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Log: log, Now: time.Now})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = keys.Close() }()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := keys.Generate(ctx, "agent-svid-A"); err == nil || !errors.Is(err, context.DeadlineExceeded) && status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
	})
}
