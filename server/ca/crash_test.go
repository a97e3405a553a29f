package ca

import (
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/ca/keys"
)

// TestCrash stops the world at every step of two rotations, before and after it took effect.
func TestCrash(t *testing.T) {
	type crash struct{ op string }
	// run plays two days in steps of two hours, to where the first authorities are pruned, and reports whether it
	// crashed.
	run := func(t *testing.T, km *durable, store *memStore, now *clock, held *[][]*x509.Certificate) (crashed bool) {
		t.Helper()
		defer func() {
			if r := recover(); r != nil {
				if _, ok := r.(crash); !ok {
					panic(r)
				}
				crashed = true
				store.mu.TryLock() // whoever crashed held it
				store.mu.Unlock()
			}
		}()
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now, X509SVIDTTL: 6 * time.Hour})
		if err != nil {
			t.Fatalf("restart: %v", err)
		}
		for now.Now().Before(epoch.Add(50 * time.Hour)) {
			*held = append(*held, issueChecked(t, c, store, now.Now()))
			for _, chain := range (*held)[max(0, len(*held)-4):] {
				if now.Now().Before(chain[0].NotAfter) {
					if err := verify(store.held(), chain, now.Now()); err != nil {
						t.Fatalf("an SVID stopped verifying: %v", err)
					}
				}
			}
			now.pass(2 * time.Hour)
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := store.states(); s["x509 active"] != 1 || s["jwt active"] != 1 || s["x509 prepared"] > 1 || s["jwt prepared"] > 1 {
				t.Fatalf("journal holds %v", s)
			}
		}
		return false
	}
	for _, when := range []string{"before", "after"} {
		t.Run("a crash just "+when+" any step is picked up by the next start", func(t *testing.T) {
			for step := 1; ; step++ {
				km, store, now := &durable{InMemory: keys.Memory()}, newStore(), &clock{now: epoch}
				n, where := 0, ""
				hook := func(op string) error {
					if op == "read bundle" || op == "read journal" {
						return nil
					}
					if n++; n == step {
						where = op
						panic(crash{op})
					}
					return nil
				}
				if when == "before" {
					km.before, store.before = hook, hook
				} else {
					km.after, store.after = hook, hook
				}
				var held [][]*x509.Certificate
				if !run(t, km, store, now, &held) {
					if step < 20 {
						t.Errorf("only %d steps in two days", step)
					}
					return
				}
				if run(t, km, store, now, &held) {
					t.Fatal("crashed twice")
				}
				if t.Failed() {
					t.Fatalf("crash %s step %d, %s", when, step, where)
				}
			}
		})
	}
}

func TestStoreFaults(t *testing.T) {
	// A datastore that failed for a moment made a server of this kind forget its authorities.
	t.Run("a journal that cannot be read stops the start and nothing is made in its place", func(t *testing.T) {
		km, store := &durable{InMemory: keys.Memory()}, newStore()
		cfg := Config{Now: func() time.Time { return epoch }, NewAuthorityOnLostKey: true}
		first, err := Open(t.Context(), km, store, testTD, cfg)
		if err != nil {
			t.Fatal(err)
		}
		commits := store.commits
		for _, op := range []string{"read journal", "read bundle"} {
			store.before = func(o string) error {
				if o == op {
					return errDisk
				}
				return nil
			}
			if _, err := Open(t.Context(), km, store, testTD, cfg); !errors.Is(err, errDisk) {
				t.Errorf("%s failed: got %v", op, err)
			}
		}
		if names, _ := km.List(t.Context()); store.commits != commits || len(names) != 2 {
			t.Errorf("%d commits, %d keys", store.commits-commits, len(names))
		}
		store.before = nil
		again, err := Open(t.Context(), km, store, testTD, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if again.x509.Load().line.AuthorityID != first.x509.Load().line.AuthorityID || again.jwt.Load().line.AuthorityID != first.jwt.Load().line.AuthorityID {
			t.Error("another authority took over")
		}
	})

	for name, after := range map[string]bool{"is not": false, "is, unknown to us,": true} {
		t.Run("while the journal "+name+" written the active authority goes on, and one key is made", func(t *testing.T) {
			now := &clock{now: epoch}
			km, store := &durable{InMemory: keys.Memory()}, newStore()
			c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
			if err != nil {
				t.Fatal(err)
			}
			first := c.x509.Load()
			now.pass(12*time.Hour + time.Minute)
			fail := func(op string) error {
				if op == "write journal" {
					return errDisk
				}
				return nil
			}
			if after {
				store.after = fail
			} else {
				store.before = fail
			}
			for range 30 {
				if err := c.step(t.Context()); !errors.Is(err, errDisk) {
					t.Fatalf("got %v", err)
				}
				if c.x509.Load() != first {
					t.Fatal("an authority that is not journaled took over")
				}
				now.pass(checkEvery)
			}
			if names, _ := km.List(t.Context()); len(names) != 4 {
				t.Errorf("%d keys, want those of both active and both pending authorities", len(names))
			}
			if b := store.held(); len(b.X509) != 1 || len(b.JWT) != 1 {
				t.Errorf("published before it was journaled: %d X.509, %d JWT", len(b.X509), len(b.JWT))
			}
			store.before, store.after = nil, nil
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := store.states(); s["x509 prepared"] != 1 || s["jwt prepared"] != 1 {
				t.Errorf("journal holds %v", s)
			}
			// And through the activation.
			now.pass(9 * time.Hour)
			if after {
				store.after = fail
			} else {
				store.before = fail
			}
			if err := c.step(t.Context()); !errors.Is(err, errDisk) || c.x509.Load() != first {
				t.Errorf("activated without the journal: %v", err)
			}
			store.before, store.after = nil, nil
			if err := c.step(t.Context()); err != nil || c.x509.Load() == first {
				t.Errorf("not activated: %v", err)
			}
			issueChecked(t, c, store, now.Now())
		})
	}

	t.Run("an authority that cannot be published does not take over", func(t *testing.T) {
		now := &clock{now: epoch}
		c, store := open(t, Config{Now: now.Now})
		first := c.x509.Load()
		store.before = func(op string) error {
			if op == "write bundle" {
				return errDisk
			}
			return nil
		}
		for range 23 {
			now.pass(time.Hour)
			if err := c.step(t.Context()); now.Now().Sub(epoch) >= 12*time.Hour && !errors.Is(err, errDisk) {
				t.Fatalf("got %v", err)
			}
			if c.x509.Load() != first {
				t.Fatal("took over")
			}
		}
		now.pass(time.Hour + time.Second)
		if _, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload}); !errors.Is(err, ErrNoAuthority) {
			t.Errorf("an expired authority signed: %v", err)
		}
		if _, err := c.SignJWT(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}}); !errors.Is(err, ErrNoAuthority) {
			t.Errorf("an expired authority signed: %v", err)
		}
		store.before = nil
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		issueChecked(t, c, store, now.Now())
	})

	t.Run("a first start that cannot be journaled leaves no key behind", func(t *testing.T) {
		km, store := &durable{InMemory: keys.Memory()}, newStore()
		store.before = func(op string) error {
			if op == "write journal" {
				return errDisk
			}
			return nil
		}
		for range 3 {
			if _, err := Open(t.Context(), km, store, testTD, Config{Now: func() time.Time { return epoch }}); !errors.Is(err, errDisk) {
				t.Errorf("got %v", err)
			}
		}
		if names, _ := km.List(t.Context()); len(names) != 0 {
			t.Errorf("%d keys", len(names))
		}
	})

	t.Run("a server whose disk is full starts with the authorities it has", func(t *testing.T) {
		now := &clock{now: epoch}
		km, store := &durable{InMemory: keys.Memory()}, newStore()
		if _, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		now.pass(13 * time.Hour)
		store.before = func(op string) error {
			if strings.HasPrefix(op, "write") {
				return errDisk
			}
			return nil
		}
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		issueChecked(t, c, store, now.Now())
	})
}
