package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/upstreamtest"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// above is an upstream authority in memory, with what tests want of it.
type above struct {
	t *testing.T

	mu        sync.Mutex // guards the rest
	root      *x509.Certificate
	rootKey   *ecdsa.PrivateKey
	asked     int
	lie       func(*upstream.Signed) // bends an answer
	fail      error
	hang      bool
	published map[string]bool
	noJWT     error
}

func newUpper(t *testing.T) *above {
	a := &above{t: t, published: map[string]bool{}}
	a.another()
	return a
}

// another makes another root, which signs from now on.
func (a *above) another() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, a.rootKey = upstreamtest.Root(a.t, "root", time.Hour)
	a.root = upstreamtest.Issue(a.t, "root", a.rootKey.Public(), 10*365*24*time.Hour, nil, a.rootKey, func(c *x509.Certificate) {
		c.NotBefore = c.NotBefore.Add(-100 * 24 * time.Hour)
	})
	return upstream.RootID(a.root)
}

func (a *above) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
}

func (a *above) Sign(ctx context.Context, r upstream.Request) (*upstream.Signed, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if a.hang {
		a.mu.Unlock()
		<-ctx.Done()
		a.mu.Lock()
		return nil, ctx.Err()
	}
	if a.fail != nil {
		return nil, a.fail
	}
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err != nil {
		return nil, err
	}
	cert := upstreamtest.Issue(a.t, "ours", csr.PublicKey, 0, a.root, a.rootKey, func(c *x509.Certificate) {
		c.URIs, c.RawSubject = csr.URIs, csr.RawSubject
		c.NotBefore, c.NotAfter = r.Now.Add(-time.Minute), r.Now.Add(r.TTL)
	})
	s := &upstream.Signed{Chain: []*x509.Certificate{cert}, Roots: []*x509.Certificate{a.root}}
	if a.lie != nil {
		a.lie(s)
	}
	return s, nil
}

func (a *above) PublishJWT(_ context.Context, key identity.JWTAuthority) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.noJWT != nil {
		return a.noJWT
	}
	a.published[key.KeyID] = true
	return nil
}

func (a *above) PublishWIT(ctx context.Context, key identity.JWTAuthority) error {
	return a.PublishJWT(ctx, key)
}

func (a *above) Follow(context.Context, func(upstream.Bundle)) error { return upstream.ErrNoBundle }

// nested makes a CA below a, whose clock is that of its certificates.
func nested(t *testing.T, a *above) (*CA, *memStore, *clock) {
	t.Helper()
	now := &clock{now: time.Now().Add(-72 * time.Hour)}
	c, store := open(t, Config{Upstream: a, Now: now.Now})
	return c, store, now
}

func activeID(c *CA) string { return c.x509.Load().line.AuthorityID }

func TestAbove(t *testing.T) {
	t.Run("the root above is in the bundle, and what is signed carries the chain", func(t *testing.T) {
		a := newUpper(t)
		c, store, now := nested(t, a)
		b := store.held()
		if len(b.X509) != 1 || !b.X509[0].Certificate.Equal(a.root) {
			t.Fatalf("bundle holds %d authorities", len(b.X509))
		}
		chain, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload})
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(b, chain, now.Now()); err != nil || len(chain) != 2 {
			t.Errorf("%d certificates: %v", len(chain), err)
		}
		below, err := c.SignDownstream(t.Context(), newKey(t).Public(), 0)
		if err != nil || len(below) != 2 || below[0].Subject.OrganizationalUnit[0] != "DOWNSTREAM-2" {
			t.Errorf("%v, %v", below, err)
		}
		if !a.published[c.jwt.Load().line.AuthorityID] {
			t.Error("the JWT key is not known above")
		}
	})
	t.Run("a restart asks nobody", func(t *testing.T) {
		a := newUpper(t)
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		first, err := Open(t.Context(), km, store, testTD, Config{Upstream: a})
		if err != nil {
			t.Fatal(err)
		}
		a.set(func() { a.fail = errors.New("away") })
		second, err := Open(t.Context(), km, store, testTD, Config{Upstream: a})
		if err != nil {
			t.Fatal(err)
		}
		if activeID(first) != activeID(second) || a.asked != 1 {
			t.Errorf("%s, then %s; asked %d times", activeID(first), activeID(second), a.asked)
		}
		chain, err := second.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload})
		if err != nil || verify(store.held(), chain, time.Now()) != nil {
			t.Errorf("%v, %v", chain, err)
		}
	})
	t.Run("a first start without anybody above fails and leaves no key behind", func(t *testing.T) {
		a := newUpper(t)
		a.fail = errors.New("away")
		km := &durable{InMemory: keys.Memory()}
		if _, err := Open(t.Context(), km, newStore(), testTD, Config{Upstream: a}); err == nil || !strings.Contains(err.Error(), "away") {
			t.Errorf("got %v", err)
		}
		names, _ := km.List(t.Context())
		for _, name := range names {
			if strings.HasPrefix(name, "ca-x509-") {
				t.Errorf("a key is left: %s", name)
			}
		}
	})
	t.Run("a server that was its own root gets another above it, and goes back", func(t *testing.T) {
		a := newUpper(t)
		now := &clock{now: time.Now().Add(-72 * time.Hour)}
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		own, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		for n, cfg := range []Config{{Now: now.Now, Upstream: a}, {Now: now.Now}} {
			c, err := Open(t.Context(), km, store, testTD, cfg)
			if err != nil {
				t.Fatal(err)
			}
			before := c.x509.Load()
			now.pass(time.Minute)
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
			after := c.x509.Load()
			if after == before || (after.line.UpstreamID != "") != (n == 0) {
				t.Errorf("%d: %+v signs", n, after.line)
			}
			if !store.held().HasX509(own.x509.Load().cert) {
				t.Errorf("%d: the first root has left the bundle", n)
			}
			issueChecked(t, c, store, now.Now())
		}
	})
}

func TestHostileAbove(t *testing.T) {
	for name, lie := range map[string]func(a *above) func(*upstream.Signed){
		"signs another key": func(a *above) func(*upstream.Signed) {
			return func(s *upstream.Signed) {
				s.Chain[0] = upstreamtest.Issue(t, "x", newKey(t).Public(), time.Hour, a.root, a.rootKey, nil)
			}
		},
		"answers with nothing":  func(*above) func(*upstream.Signed) { return func(s *upstream.Signed) { *s = upstream.Signed{} } },
		"answers with its root": func(a *above) func(*upstream.Signed) { return func(s *upstream.Signed) { s.Chain[0] = a.root } },
		"names another root": func(*above) func(*upstream.Signed) {
			return func(s *upstream.Signed) { s.Roots[0], _ = upstreamtest.Root(t, "x", time.Hour) }
		},
		"answers without a chain": func(*above) func(*upstream.Signed) { return func(s *upstream.Signed) { s.Chain = nil } },
	} {
		t.Run("an upstream authority that "+name+" changes nothing", func(t *testing.T) {
			a := newUpper(t)
			c, store, now := nested(t, a)
			before, x509s := activeID(c), len(store.held().X509)
			a.set(func() { a.lie = lie(a) })
			now.pass(13 * time.Hour)
			err := c.step(t.Context())
			if !errors.Is(err, upstream.ErrRefused) {
				t.Errorf("got %v", err)
			}
			var m dto.Metric
			if err := c.metrics.above.WithLabelValues("sign").Write(&m); err != nil || m.GetCounter().GetValue() != 1 {
				t.Errorf("%v failures are counted (%v)", m.GetCounter(), err)
			}
			if activeID(c) != before || len(store.held().X509) != x509s || store.states()["x509 prepared"] != 0 {
				t.Error("something has changed")
			}
			if _, _, err := c.PrepareAuthority(t.Context(), KindX509); !errors.Is(err, upstream.ErrRefused) {
				t.Errorf("asked for by hand: %v", err)
			}
			issueChecked(t, c, store, now.Now())
			if names, _ := c.keys.List(t.Context()); len(names) != 3 { // the new JWT key is prepared
				t.Errorf("keys are left: %v", names)
			}
			a.set(func() { a.lie = nil })
			if err := c.step(t.Context()); err != nil || c.find(KindX509, StatePrepared) == nil {
				t.Errorf("it came round, and there is no successor: %v", err)
			}
		})
	}
	t.Run("one that hangs holds up nobody", func(t *testing.T) {
		a := newUpper(t)
		c, store, now := nested(t, a)
		a.set(func() { a.hang = true })
		now.pass(13 * time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		stepped := make(chan error, 1)
		go func() { stepped <- c.ahead(ctx) }()
		for asked := 1; asked < 2; {
			a.set(func() { asked = a.asked })
		}
		if len(c.Authorities()) == 0 {
			t.Error("no authorities")
		}
		issueChecked(t, c, store, now.Now())
		if _, _, err := c.PrepareAuthority(t.Context(), KindJWT); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-stepped; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

// hear is what following brings.
func (c *CA) hear(b upstream.Bundle) { c.news.Store(&b) }

// telling is an upstream authority that says what it is told to, and no more.
type telling struct {
	*above
	says upstream.Bundle
}

func (a telling) Follow(_ context.Context, fn func(upstream.Bundle)) error {
	fn(a.says)
	return upstream.ErrNoBundle
}

func TestWhatIsHeardFromAboveIsChecked(t *testing.T) {
	a := newUpper(t)
	c, _, _ := nested(t, a)
	good := identity.X509Authority{Certificate: a.root}
	expired := identity.X509Authority{Certificate: upstreamtest.Issue(t, "old", a.rootKey.Public(), 0, nil, a.rootKey, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-200*24*time.Hour), time.Now().Add(-100*24*time.Hour)
	})}
	for name, says := range map[string]upstream.Bundle{
		"nothing":               {},
		"a root that is none":   {X509: []identity.X509Authority{good, {}}},
		"a root that has ended": {X509: []identity.X509Authority{expired}},
		"a key without an ID":   {X509: []identity.X509Authority{good}, JWT: []identity.JWTAuthority{{Key: newKey(t).Public()}}},
	} {
		c.cfg.Upstream = telling{a, says}
		if c.followAbove(t.Context()); c.news.Load() != nil {
			t.Errorf("%s is taken over", name)
		}
	}
	c.cfg.Upstream = telling{a, upstream.Bundle{X509: []identity.X509Authority{expired, good}}}
	if c.followAbove(t.Context()); c.news.Load() == nil || len(c.news.Load().X509) != 1 {
		t.Errorf("heard %+v", c.news.Load())
	}
}

func TestAChainThatIsBrokenIsNotLoaded(t *testing.T) {
	a := newUpper(t)
	c, _, _ := nested(t, a)
	active := c.x509.Load()
	other, _ := upstreamtest.Root(t, "root", time.Hour)
	for name, link := range map[string]struct {
		der []byte
		ok  bool
	}{"who signed it": {a.root.Raw, true}, "another of its name": {other.Raw, false}, "no certificate": {[]byte{1}, false}} {
		line := active.line
		line.Chain = [][]byte{link.der}
		if _, err := decode(line, active.signer, testTD); (err == nil) != link.ok || err != nil && !errors.Is(err, ErrJournal) {
			t.Errorf("a chain of %s: %v", name, err)
		}
	}
}

func TestTaintAbove(t *testing.T) {
	setup := func(t *testing.T) (*CA, *memStore, *clock, *above, string) {
		a := newUpper(t)
		c, store, now := nested(t, a)
		return c, store, now, a, upstream.RootID(a.root)
	}
	t.Run("a root that is tainted above has the authority replaced, and leaves when it has left above", func(t *testing.T) {
		c, store, now, a, old := setup(t)
		oldRoot, before := a.root, activeID(c)
		next := a.another()
		c.hear(upstream.Bundle{X509: []identity.X509Authority{{Certificate: oldRoot, Tainted: true}, {Certificate: a.root}}})
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if activeID(c) == before || c.x509.Load().line.UpstreamID != next {
			t.Fatalf("%s signs, below %s", activeID(c), c.x509.Load().line.UpstreamID)
		}
		for _, x := range store.held().X509 {
			if x.Tainted != (upstream.RootID(x.Certificate) == old) {
				t.Errorf("%s: tainted %t", upstream.RootID(x.Certificate), x.Tainted)
			}
		}
		if chain, err := c.ServerCertificate()(nil); err != nil || hex.EncodeToString(chain.Leaf.AuthorityKeyId) != activeID(c) {
			t.Errorf("the server's own SVID is by another: %v", err)
		}
		c.hear(upstream.Bundle{X509: []identity.X509Authority{{Certificate: a.root}}})
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if b := store.held(); len(b.X509) != 1 || upstream.RootID(b.X509[0].Certificate) != next {
			t.Errorf("bundle holds %d authorities", len(b.X509))
		}
		// What is above may say what it likes: nothing revoked comes back.
		c.hear(upstream.Bundle{X509: []identity.X509Authority{{Certificate: oldRoot}, {Certificate: a.root}}})
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if b := store.held(); len(b.X509) != 1 {
			t.Error("a revoked root is back")
		}
		issueChecked(t, c, store, now.Now())
	})
	t.Run("a root that left while this server was away is tainted before it goes", func(t *testing.T) {
		c, store, now, a, old := setup(t)
		c.hear(upstream.Bundle{X509: []identity.X509Authority{{Certificate: a.root}}})
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		oldRoot := a.root
		next := a.another()
		a.set(func() { a.fail = errors.New("away") })
		c.hear(upstream.Bundle{X509: []identity.X509Authority{{Certificate: a.root}}})
		if err := c.step(t.Context()); err == nil {
			t.Error("no error")
		}
		if b := store.held(); len(b.X509) != 2 || !b.HasX509(oldRoot) {
			t.Errorf("the root that signs has left: %d", len(b.X509))
		}
		issueChecked(t, c, store, now.Now())
		a.set(func() { a.fail = nil })
		for range 2 {
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if b := store.held(); len(b.X509) != 1 || c.x509.Load().line.UpstreamID != next || c.lines[aboveID(kindAbove, old)].line.State != StateRevoked {
			t.Errorf("%d roots, %s signs", len(b.X509), c.x509.Load().line.UpstreamID)
		}
	})
	t.Run("a root that is tainted and goes on signing is not taken for another", func(t *testing.T) {
		c, store, now, a, _ := setup(t)
		before := activeID(c)
		c.hear(upstream.Bundle{X509: []identity.X509Authority{{Certificate: a.root, Tainted: true}}})
		if err := c.step(t.Context()); !errors.Is(err, errTaintedAbove) {
			t.Errorf("got %v", err)
		}
		if activeID(c) != before {
			t.Error("another signs")
		}
		issueChecked(t, c, store, now.Now())
	})
	t.Run("by hand: only the root of an old one, and taint comes before revoke", func(t *testing.T) {
		c, store, now, a, old := setup(t)
		if _, err := c.TaintUpstream(t.Context(), old); !errors.Is(err, ErrActive) {
			t.Errorf("the active one's: %v", err)
		}
		if _, err := c.TaintUpstream(t.Context(), "aa"); !errors.Is(err, ErrNotAbove) {
			t.Errorf("nobody's: %v", err)
		}
		next := a.another()
		line, _, err := c.PrepareAuthority(t.Context(), KindX509)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.TaintUpstream(t.Context(), next); !errors.Is(err, ErrActive) {
			t.Errorf("the prepared one's: %v", err)
		}
		if _, err := c.ActivateAuthority(t.Context(), KindX509, line.AuthorityID); err != nil {
			t.Fatal(err)
		}
		if _, err := c.RevokeUpstream(t.Context(), old); !errors.Is(err, ErrNotTainted) {
			t.Errorf("untainted: %v", err)
		}
		if rev, err := c.TaintUpstream(t.Context(), old); err != nil || rev == 0 {
			t.Fatal(rev, err)
		}
		if _, err := c.TaintUpstream(t.Context(), old); !errors.Is(err, ErrTainted) {
			t.Errorf("again: %v", err)
		}
		if _, err := c.RevokeUpstream(t.Context(), old); err != nil {
			t.Fatal(err)
		}
		if b := store.held(); len(b.X509) != 1 || upstream.RootID(b.X509[0].Certificate) != next {
			t.Errorf("%d roots", len(b.X509))
		}
		if _, err := c.RevokeUpstream(t.Context(), old); !errors.Is(err, ErrNotAbove) {
			t.Errorf("again: %v", err)
		}
		issueChecked(t, c, store, now.Now())
		for _, step := range []func(context.Context, string, string) (any, kv.Rev, error){
			func(ctx context.Context, kind, id string) (any, kv.Rev, error) {
				return c.TaintAuthority(ctx, kind, id)
			},
			func(ctx context.Context, kind, id string) (any, kv.Rev, error) {
				return c.RevokeAuthority(ctx, kind, id)
			},
		} {
			if _, _, err := step(t.Context(), KindX509, line.AuthorityID); !errors.Is(err, ErrUpstream) {
				t.Errorf("a local one: %v", err)
			}
		}
	})
	t.Run("JWT keys follow what is above, and stay away once revoked", func(t *testing.T) {
		c, store, _, a, _ := setup(t)
		x509s := []identity.X509Authority{{Certificate: a.root}}
		key := identity.JWTAuthority{KeyID: "theirs", Key: newKey(t).Public(), ExpiresAt: time.Now().Add(time.Hour)}
		has := func() (there, tainted bool) {
			for _, k := range store.held().JWT {
				if k.KeyID == "theirs" {
					return true, k.Tainted
				}
			}
			return false, false
		}
		tainted := key
		tainted.Tainted = true
		for n, step := range []struct {
			jwt            []identity.JWTAuthority
			there, tainted bool
		}{
			{[]identity.JWTAuthority{key}, true, false},
			{[]identity.JWTAuthority{tainted}, true, true},
			{[]identity.JWTAuthority{key}, true, true},
			{nil, false, false},
			{[]identity.JWTAuthority{key}, false, false},
		} {
			c.hear(upstream.Bundle{X509: x509s, JWT: step.jwt})
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
			if there, tainted := has(); there != step.there || tainted != step.tainted {
				t.Errorf("step %d: there %t, tainted %t", n, there, tainted)
			}
		}
	})
	t.Run("a JWT key that is not known above does not sign yet", func(t *testing.T) {
		c, _, now, a, _ := setup(t)
		before := c.jwt.Load()
		a.set(func() { a.noJWT = errors.New("away") })
		now.pass(21 * time.Hour)
		if err := c.step(t.Context()); err == nil || !strings.Contains(err.Error(), "away") {
			// Its successor was prepared and is to be told next time.
			err = c.step(t.Context())
			if err == nil || !strings.Contains(err.Error(), "away") {
				t.Errorf("got %v", err)
			}
		}
		now.pass(time.Hour)
		_ = c.step(t.Context())
		if c.jwt.Load() != before {
			t.Error("it signs")
		}
		a.set(func() { a.noJWT = nil })
		if err := c.step(t.Context()); err != nil || c.jwt.Load() == before {
			t.Errorf("it is known and does not sign: %v", err)
		}
	})
}
