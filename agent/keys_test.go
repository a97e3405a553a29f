package agent_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/test/fake/fakeserver"
)

// shelf is a program with keys that may be lost.
type shelf struct {
	mu     sync.Mutex // guards the rest
	keys   map[string]*ecdsa.PrivateKey
	closed int
}

func (s *shelf) Name() string { return "shelf" }

func (s *shelf) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed++
	return nil
}

func (s *shelf) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.keys)
}

func (s *shelf) Generate(_ context.Context, place string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[place] = key
	return s.Key(place, key.Public())
}

func (s *shelf) Key(place string, public crypto.PublicKey) (crypto.Signer, error) {
	return &shelved{s, place, public.(*ecdsa.PublicKey)}, nil
}

func (s *shelf) Has(_ context.Context, place string, public crypto.PublicKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if key := s.keys[place]; key == nil || !key.PublicKey.Equal(public) {
		return keep.ErrKeyGone
	}
	return nil
}

type shelved struct {
	shelf  *shelf
	place  string
	public *ecdsa.PublicKey
}

func (k *shelved) Public() crypto.PublicKey { return k.public }

func (k *shelved) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := k.shelf.Has(context.Background(), k.place, k.public); err != nil {
		return nil, err
	}
	k.shelf.mu.Lock()
	defer k.shelf.mu.Unlock()
	return k.shelf.keys[k.place].Sign(random, digest, opts)
}

func TestKeysElsewhere(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	server.Put(fakeserver.Entry("e", "/shop", mine))
	keys := &shelf{keys: map[string]*ecdsa.PrivateKey{}}
	n := newNode(t, server)
	n.cfg.KeyManager = agent.KeysExternal
	n.cfg.Elsewhere = func() (keep.Elsewhere, error) { return keys, nil }
	n.start()
	s := n.process().follow()
	s.until("/shop")
	if got := server.Calls("AttestAgent"); got != 1 {
		t.Fatalf("attested %d times", got)
	}
	t.Run("a key that is lost while the agent runs has it attest again, and workloads do not notice", func(t *testing.T) {
		keys.lose()
		server.Stop()
		server.Start()
		n.wait("another attestation", func() bool { return server.Calls("AttestAgent") == 2 })
		n.wait("readiness", func() bool { return n.health.Ready() == nil })
		server.Put(fakeserver.Entry("f", "/second", mine))
		s.until("/shop", "/second")
		said := false
		for _, line := range n.log.AllEntries() {
			said = said || strings.Contains(line.Message, "the key of the agent's SVID is lost; attesting again")
		}
		if !said {
			t.Error("the log does not say that the key is lost")
		}
	})
	t.Run("one that is there is used after a restart", func(t *testing.T) {
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		if keys.closed != 1 {
			t.Errorf("closed %d times", keys.closed)
		}
		n.start()
		n.wait("readiness", func() bool { return n.health.Ready() == nil })
		if got := server.Calls("AttestAgent"); got != 2 {
			t.Errorf("attested %d times", got)
		}
	})
	t.Run("one that cannot be opened ends the start", func(t *testing.T) {
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		c := n.cfg
		c.Elsewhere = func() (keep.Elsewhere, error) { return nil, errors.New("no such program") }
		if err := agent.Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "open agent key store: no such program") {
			t.Errorf("got %v", err)
		}
	})
}
