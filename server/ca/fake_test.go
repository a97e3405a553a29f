package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	testTD   = spiffeid.RequireTrustDomainFromString("example.org")
	workload = spiffeid.RequireFromString("spiffe://example.org/shop/front")
	epoch    = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

// memStore is a Store in memory whose operations can be made to fail. As in the real one, times
// come back in whole seconds and what is stored is a copy.
type memStore struct {
	mu      sync.Mutex
	lines   map[string]records.Journal
	bundle  *identity.Bundle
	commits int // that changed something

	// before and after are asked with the operation's name. An error of before keeps the operation
	// from happening, one of after comes although it happened.
	before, after func(op string) error
}

func newStore() *memStore { return &memStore{lines: map[string]records.Journal{}} }

func (s *memStore) ask(hook func(string) error, op string) error {
	if hook == nil {
		return nil
	}
	return hook(op)
}

func (s *memStore) Journal(context.Context) ([]records.Journal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(s.before, "read journal"); err != nil {
		return nil, err
	}
	return slices.Collect(maps.Values(s.lines)), nil
}

func (s *memStore) PutJournal(_ context.Context, upserts []records.Journal, deletes []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(s.before, "write journal"); err != nil {
		return err
	}
	for _, line := range upserts {
		for _, t := range []*time.Time{&line.NotBefore, &line.NotAfter, &line.CreatedAt, &line.ActivatedAt} {
			*t = t.Truncate(time.Second)
		}
		s.lines[line.AuthorityID] = line
	}
	for _, id := range deletes {
		delete(s.lines, id)
	}
	s.commits++
	return s.ask(s.after, "write journal")
}

func (s *memStore) Bundle(context.Context, spiffeid.TrustDomain) (*identity.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(s.before, "read bundle"); err != nil {
		return nil, err
	}
	if s.bundle == nil {
		return nil, fmt.Errorf("bundle: %w", records.ErrNotFound)
	}
	return s.bundle, nil
}

func (s *memStore) UpdateBundle(_ context.Context, td spiffeid.TrustDomain, change func(*identity.Bundle) error) (*identity.Bundle, kv.Rev, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(s.before, "write bundle"); err != nil {
		return nil, 0, err
	}
	next := &identity.Bundle{TrustDomain: td}
	if s.bundle != nil {
		next = s.bundle.Clone()
	}
	for range 2 { // as after a conflict
		if err := change(next.Clone()); err != nil {
			return nil, 0, err
		}
	}
	if err := change(next); err != nil {
		return nil, 0, err
	}
	next.Sequence++
	s.bundle = next
	s.commits++
	return next, kv.Rev(next.Sequence), s.ask(s.after, "write bundle")
}

// held returns the bundle as a verifier has it.
func (s *memStore) held() *identity.Bundle {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundle
}

// states counts the journal's lines by kind and state.
func (s *memStore) states() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	states := map[string]int{}
	for _, line := range s.lines {
		states[line.Kind+" "+line.State]++
	}
	return states
}

// durable is keys in memory that outlive the CA that made them, as a file's do, with the same
// hooks as memStore.
type durable struct {
	*keys.InMemory
	before, after func(op string) error
}

func (d *durable) Persistent() bool { return true }

func (d *durable) Generate(ctx context.Context, name string, kind keys.Kind) (crypto.Signer, error) {
	if d.before != nil {
		if err := d.before("generate key"); err != nil {
			return nil, err
		}
	}
	key, err := d.InMemory.Generate(ctx, name, kind)
	if err == nil && d.after != nil {
		err = d.after("generate key")
	}
	return key, err
}

func (d *durable) Delete(ctx context.Context, name string) error {
	if d.before != nil {
		if err := d.before("delete key"); err != nil {
			return err
		}
	}
	err := d.InMemory.Delete(ctx, name)
	if err == nil && d.after != nil {
		err = d.after("delete key")
	}
	return err
}

// clock is a clock that a test turns.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// open makes a CA over a fresh store that stands still at epoch.
func open(t testing.TB, cfg Config) (*CA, *memStore) {
	t.Helper()
	store := newStore()
	if cfg.Now == nil {
		cfg.Now = func() time.Time { return epoch }
	}
	c, err := Open(t.Context(), &durable{InMemory: keys.Memory()}, store, testTD, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c, store
}

// step is what Run does every ten seconds.
func (c *CA) step(ctx context.Context) error {
	early := c.ahead(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.Join(early, c.turn(ctx))
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// verify says whether a verifier that holds the bundle accepts the chain at the given time.
func verify(b *identity.Bundle, chain []*x509.Certificate, now time.Time) error {
	source := x509bundle.NewSet(b.X509Bundle())
	id, _, err := x509svid.Verify(chain, source, x509svid.WithTime(now))
	if err != nil {
		return err
	}
	if want, _ := x509svid.IDFromCert(chain[0]); id != want {
		return fmt.Errorf("verified as %s", id)
	}
	return nil
}

func jwtSource(b *identity.Bundle) jwtbundle.Source { return jwtbundle.NewSet(b.JWTBundle()) }

var errDisk = errors.New("input/output error")
