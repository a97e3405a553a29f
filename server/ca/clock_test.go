package ca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestClock(t *testing.T) {
	// jump is a clock that goes ahead, or back, by a day and comes back after an hour. In between the
	// wheel turns as Run turns it, and everything that was given out while the clock was right must
	// verify by the right clock as long as it lives.
	jump := func(t *testing.T, age, by time.Duration) {
		t.Helper()
		now := &clock{now: epoch}
		store := newStore()
		km := &durable{InMemory: keys.Memory()}
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		for range int(age / time.Hour) {
			now.pass(time.Hour)
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		before := issueChecked(t, c, store, now.Now())
		right := now.Now()
		known := store.held() // to agents that are away from now on

		now.pass(by)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		during := issueChecked(t, c, store, now.Now()) // there is somebody to sign, valid by that clock
		if during[0].NotBefore.After(now.Now()) {
			t.Errorf("dated %s at %s", during[0].NotBefore, now.Now())
		}
		if err := verify(store.held(), before, right.Add(time.Minute)); err != nil {
			t.Errorf("during the jump, what was signed before: %v", err)
		}

		now.pass(-by)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		after := issueChecked(t, c, store, now.Now())
		if after[0].NotBefore.After(now.Now()) {
			t.Errorf("dated %s at %s", after[0].NotBefore, now.Now())
		}
		if err := verify(store.held(), before, now.Now().Add(time.Minute)); err != nil {
			t.Errorf("after the jump, what was signed before: %v", err)
		}
		if err := verify(known, after, now.Now()); err != nil {
			t.Errorf("after the jump, agents that were away do not know the authority: %v", err)
		}
		if held, err := c.ServerCertificate()(nil); err != nil || verify(known, []*x509.Certificate{held.Leaf}, now.Now()) != nil {
			t.Errorf("after the jump, agents that were away do not know the server: %v", err)
		}
		// A restart in the middle changes nothing about it.
		now.pass(by)
		if _, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		now.pass(-by)
		if c, err = Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		if err := verify(known, issueChecked(t, c, store, now.Now()), now.Now()); err != nil {
			t.Errorf("after a restart, agents that were away do not know the authority: %v", err)
		}
		if held, err := c.ServerCertificate()(nil); err != nil || held.Leaf.NotBefore.After(now.Now()) || !now.Now().Before(held.Leaf.NotAfter) {
			t.Errorf("the server's own SVID is not valid now: %v", err)
		}
	}
	for _, age := range []time.Duration{0, 2 * time.Hour, 13 * time.Hour, 19 * time.Hour, 21 * time.Hour, 50 * time.Hour} {
		t.Run(fmt.Sprintf("a day ahead and back after %s, and there always is somebody to sign what is valid now", age), func(t *testing.T) {
			jump(t, age, 24*time.Hour)
		})
		t.Run(fmt.Sprintf("a day back and ahead after %s, likewise", age), func(t *testing.T) { jump(t, age, -24*time.Hour) })
	}
	t.Run("a week ahead and back, likewise but for the bundle", func(t *testing.T) {
		now := &clock{now: epoch}
		c, store := open(t, Config{Now: now.Now})
		for _, by := range []time.Duration{7 * 24 * time.Hour, -7 * 24 * time.Hour} {
			now.pass(by)
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
			issueChecked(t, c, store, now.Now())
		}
	})
	t.Run("until there is another, nothing is signed by an authority from the future", func(t *testing.T) {
		now := &clock{now: epoch}
		c, _ := open(t, Config{Now: now.Now})
		now.pass(-time.Hour)
		_, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload})
		if !errors.Is(err, ErrNoAuthority) {
			t.Errorf("got %v", err)
		}
		if _, err := c.SignJWT(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}}); !errors.Is(err, ErrNoAuthority) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a prepared authority from the future makes way", func(t *testing.T) {
		now := &clock{now: epoch}
		c, store := open(t, Config{Now: now.Now})
		now.pass(13 * time.Hour)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		now.pass(-time.Hour)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := store.states(); n["x509 prepared"] != 1 || n["x509 aside"] != 1 {
			t.Errorf("states %v", n)
		}
		issueChecked(t, c, store, now.Now())
	})
	t.Run("it is said loudly", func(t *testing.T) {
		now := &clock{now: epoch}
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		c, _ := open(t, Config{Now: now.Now, Log: log})
		now.pass(-time.Hour)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), "clock was set back") {
			t.Errorf("logged %s", out.String())
		}
	})
}

// rotated returns a store and keys as an hourly snapshot from before the last rotation and today's
// keys would be: the active authority's key is gone, its prepared successor's is there.
func rotated(t *testing.T, now *clock) (*memStore, *durable) {
	t.Helper()
	store, km := newStore(), &durable{InMemory: keys.Memory()}
	c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
	if err != nil {
		t.Fatal(err)
	}
	now.pass(13 * time.Hour)
	if err := c.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, line := range store.lines {
		if line.State == StateActive {
			_ = km.Delete(t.Context(), line.KeyID)
		}
	}
	return store, km
}

func TestRestored(t *testing.T) {
	t.Run("where the active key is gone the prepared successor takes over, loudly, and no new authority is made", func(t *testing.T) {
		now := &clock{now: epoch}
		store, km := rotated(t, now)
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		if len(store.lines) != 4 || store.states()["x509 active"] != 1 || strings.Count(out.String(), "successor takes over") != 2 {
			t.Errorf("states %v, logged %s", store.states(), out.String())
		}
		issueChecked(t, c, store, now.Now())
	})
}

func TestCheck(t *testing.T) {
	now := &clock{now: epoch}
	check := func(t *testing.T, store *memStore, km keys.Manager, n int, want ...string) {
		t.Helper()
		lines, err := store.Journal(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		commits := store.commits
		got := Check(t.Context(), lines, store.held(), km, testTD, now.Now())
		text := strings.Join(got, "\n")
		if len(got) != n {
			t.Errorf("%d findings, want %d: %s", len(got), n, text)
		}
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("want %q in %s", w, text)
			}
		}
		if store.commits != commits {
			t.Error("something was written")
		}
	}
	fresh := func(t *testing.T) (*memStore, *durable) {
		t.Helper()
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		if _, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		return store, km
	}
	t.Run("what belongs together has no findings", func(t *testing.T) {
		store, km := fresh(t)
		check(t, store, km, 0)
		check(t, store, nil, 0)
		check(t, store, keys.Memory(), 0) // ended with the last run, as is its way
		check(t, newStore(), km, 0)
	})
	t.Run("a lost key is named with what to do", func(t *testing.T) {
		store, _ := fresh(t)
		check(t, store, &durable{InMemory: keys.Memory()}, 2, "of the active x509 authority", "new_authority_on_lost_key", "of the active jwt authority")
		now.pass(25 * time.Hour)
		check(t, store, &durable{InMemory: keys.Memory()}, 0) // expired anyway
		now.pass(-25 * time.Hour)
	})
	t.Run("where a successor is there it is named", func(t *testing.T) {
		at := &clock{now: epoch}
		store, km := rotated(t, at)
		now.pass(13 * time.Hour)
		check(t, store, km, 2, "takes over at the next start")
		now.pass(-13 * time.Hour)
	})
	t.Run("a journal that is lost, or an authority that nobody verifies", func(t *testing.T) {
		store, km := fresh(t)
		bundle := store.bundle
		store.bundle = nil
		check(t, store, km, 2, "x509 authority", "not in the bundle")
		store.bundle, store.lines = bundle, nil
		check(t, store, km, 1, "the journal of authorities is empty, but the bundle of example.org names 2")
	})
	t.Run("a line that makes no sense, and one too many", func(t *testing.T) {
		store, km := fresh(t)
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		other, err := c.makeAuthority(t.Context(), KindX509)
		if err != nil {
			t.Fatal(err)
		}
		other.line.State = StateActive
		store.lines["other"] = other.line
		store.lines["bad"] = records.Journal{Kind: KindJWT, AuthorityID: "bad", State: "asleep"}
		store.bundle = &identity.Bundle{TrustDomain: testTD, X509: append(store.bundle.X509, identity.X509Authority{Certificate: other.cert}), JWT: store.bundle.JWT}
		check(t, store, km, 2, `state "asleep" is unknown`, "is a second one that is active")
	})
}
