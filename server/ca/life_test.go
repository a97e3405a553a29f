package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// issued is what a workload got, and must be able to use until it ends.
type issued struct {
	chain []*x509.Certificate
	token *identity.JWTSVID
}

func issueBoth(t *testing.T, c *CA) issued {
	t.Helper()
	chain, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload})
	if err != nil {
		t.Fatal(err)
	}
	token, err := c.SignJWT(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	return issued{chain, token}
}

// check says what a verifier with the bundle makes of both at the time of the bubble.
func (i issued) check(b *identity.Bundle, now time.Time) error {
	if now.Before(i.chain[0].NotAfter) {
		if err := verify(b, i.chain, now); err != nil {
			return err
		}
	}
	// go-spiffe looks at the clock itself.
	if now.Before(i.token.ExpiresAt) {
		if _, err := jwtsvid.ParseAndValidate(i.token.Token, jwtSource(b), []string{"a"}); err != nil {
			return err
		}
	}
	return nil
}

func TestRotation(t *testing.T) {
	t.Run("over four days authorities follow each other on schedule and nothing issued stops verifying", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store, start := newStore(), time.Now()
			c, err := Open(t.Context(), &durable{InMemory: keys.Memory()}, store, testTD, Config{})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- c.Run(ctx) }()

			type event struct {
				At   string
				What string
			}
			var got []event
			seen := map[string]string{} // state by authority
			note := func() {
				for _, line := range c.Authorities() {
					if line.Kind == KindX509 && seen[line.AuthorityID] != line.State {
						seen[line.AuthorityID] = line.State
						got = append(got, event{time.Since(start).Truncate(time.Minute).String(), line.State})
					}
				}
			}
			held := []issued{issueBoth(t, c)}
			for time.Since(start) < 4*24*time.Hour {
				synctest.Wait()
				if time.Since(start) < 48*time.Hour {
					note()
				}
				now, b := time.Now(), store.held()
				for _, i := range held {
					if err := i.check(b, now); err != nil {
						t.Fatalf("after %s: %v", time.Since(start), err)
					}
				}
				if n := len(b.X509); n > 5 {
					t.Fatalf("after %s the bundle has %d X.509 authorities", time.Since(start), n)
				}
				fresh := issueBoth(t, c)
				if lifetime := fresh.chain[0].NotAfter.Sub(now); lifetime < time.Hour-time.Second {
					t.Fatalf("after %s an SVID was cut to %s", time.Since(start), lifetime)
				}
				held = append(held, fresh)
				if len(held) > 8 {
					held = held[1:]
				}
				<-time.After(10 * time.Minute)
			}
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
			// A day's authority is prepared at half of it and takes over at five sixths.
			want := []event{
				{"0s", "active"},
				{"12h0m0s", "prepared"}, {"20h0m0s", "active"}, {"20h0m0s", "old"},
				{"24h0m0s", "prepared"}, {"32h0m0s", "active"}, {"32h0m0s", "old"},
				{"36h0m0s", "prepared"}, {"44h0m0s", "active"}, {"44h0m0s", "old"},
			}
			normalize := func(events []event) map[event]int {
				set := map[event]int{}
				for _, e := range events {
					at, _ := time.ParseDuration(e.At)
					// Seen at the first look after the tick after its time.
					set[event{at.Truncate(15 * time.Minute).String(), e.What}]++
				}
				return set
			}
			if diff := cmp.Diff(normalize(want), normalize(got)); diff != "" {
				t.Error(diff)
			}
			// Prepared, active, and those that expired less than a day ago.
			if n := len(c.Authorities()); n > 10 {
				t.Errorf("%d lines in the journal", n)
			}
			names, err := c.keys.List(t.Context())
			if err != nil || len(names) > 4 {
				t.Errorf("%d keys: %v", len(names), err)
			}
		})
	})

	t.Run("a long-lived authority is prepared 30 and replaced 7 days ahead", func(t *testing.T) {
		year := 365 * 24 * time.Hour
		a := &authority{line: records.Journal{CreatedAt: epoch, NotAfter: epoch.Add(year)}}
		for _, c := range []struct {
			ahead             time.Duration
			prepare, activate bool
		}{
			{30*24*time.Hour + time.Second, false, false},
			{30 * 24 * time.Hour, true, false},
			{7*24*time.Hour + time.Second, true, false},
			{7 * 24 * time.Hour, true, true},
		} {
			now := epoch.Add(year - c.ahead)
			if a.shouldPrepare(now) != c.prepare || a.shouldActivate(now) != c.activate {
				t.Errorf("%s ahead: prepare %t, activate %t", c.ahead, a.shouldPrepare(now), a.shouldActivate(now))
			}
		}
	})

	t.Run("the bundle keeps an expired authority for a day and others' until they expire", func(t *testing.T) {
		now := &clock{now: epoch}
		c, store := open(t, Config{Now: now.Now})
		foreign, _ := open(t, Config{CATTL: 48 * time.Hour})
		if _, _, err := store.UpdateBundle(t.Context(), testTD, func(b *identity.Bundle) error {
			for _, a := range b.X509 {
				if bytes.Equal(a.Certificate.Raw, foreign.x509.Load().cert.Raw) {
					return nil
				}
			}
			b.X509 = append(b.X509, identity.X509Authority{Certificate: foreign.x509.Load().cert})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		first := c.x509.Load().cert
		for _, s := range []struct {
			at             time.Duration
			first, foreign bool
		}{
			{24 * time.Hour, true, true}, {48*time.Hour - time.Second, true, true},
			{48 * time.Hour, false, true}, {72 * time.Hour, false, false},
		} {
			now.pass(s.at - now.Now().Sub(epoch))
			for range 2 { // prepared on the first, activated on the second look
				if err := c.step(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			b := store.held()
			if b.HasX509(first) != s.first || b.HasX509(foreign.x509.Load().cert) != s.foreign {
				t.Errorf("after %s: own %t, foreign %t", s.at, b.HasX509(first), b.HasX509(foreign.x509.Load().cert))
			}
		}
	})

	t.Run("nothing is written while nothing is due", func(t *testing.T) {
		now := &clock{now: epoch}
		c, store := open(t, Config{Now: now.Now})
		before, sequence := store.commits, store.held().Sequence
		for range 100 {
			now.pass(checkEvery)
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if store.commits != before || store.held().Sequence != sequence {
			t.Errorf("%d commits", store.commits-before)
		}
	})

	t.Run("an authority prepared late waits until it is known", func(t *testing.T) {
		now := &clock{now: epoch}
		c, store := open(t, Config{Now: now.Now})
		first := c.x509.Load()
		now.pass(23 * time.Hour) // the server was down over both dates
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if c.x509.Load() != first || store.states()["x509 prepared"] != 1 {
			t.Errorf("took over at once: %v", store.states())
		}
		now.pass(maxGrace)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if c.x509.Load() == first {
			t.Error("did not take over")
		}
	})

	t.Run("a tainted authority is flagged in the bundle and never unflagged", func(t *testing.T) {
		now := &clock{now: epoch}
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		ids := []string{c.x509.Load().line.AuthorityID, c.jwt.Load().line.AuthorityID}
		now.pass(21 * time.Hour)
		_ = c.step(t.Context())
		now.pass(time.Minute)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			line := store.lines[id]
			if line.State != StateOld {
				t.Fatalf("state is %s", line.State)
			}
			line.State = StateTainted
			store.lines[id] = line
		}
		if c, err = Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		tainted := func() (n int) {
			b := store.held()
			for _, a := range b.X509 {
				if a.Tainted {
					n++
				}
			}
			for _, a := range b.JWT {
				if a.Tainted {
					n++
				}
			}
			return n
		}
		if tainted() != 2 {
			t.Errorf("%d authorities are tainted", tainted())
		}
		sequence := store.held().Sequence
		for range 3 {
			if err := c.step(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if tainted() != 2 || store.held().Sequence != sequence {
			t.Errorf("%d are tainted, %d changes", tainted(), store.held().Sequence-sequence)
		}
		issueChecked(t, c, store, now.Now())
	})
}

// issueChecked signs one of each and has the published bundle verify the certificate.
func issueChecked(t *testing.T, c *CA, store *memStore, now time.Time) []*x509.Certificate {
	t.Helper()
	chain, err := c.SignWorkload(t.Context(), WorkloadParams{PublicKey: newKey(t).Public(), ID: workload})
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(store.held(), chain, now); err != nil {
		t.Fatalf("signed before it was published: %v", err)
	}
	token, err := c.SignJWT(t.Context(), JWTParams{ID: workload, Audience: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jwtsvid.ParseInsecure(token.Token, []string{"a"})
	if err != nil && !strings.Contains(err.Error(), "expired") {
		t.Fatal(err)
	}
	_ = parsed
	if _, found := store.held().JWTBundle().FindJWTAuthority(c.jwt.Load().line.AuthorityID); !found {
		t.Fatal("token signed before its key was published")
	}
	return chain
}

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

func TestRestart(t *testing.T) {
	t.Run("with keys on disk and a real store the same authorities go on", func(t *testing.T) {
		dir := t.TempDir()
		var ids []string
		for round := range 3 {
			store, err := boltkv.Open(filepath.Join(dir, "store.db"), boltkv.Config{})
			if err != nil {
				t.Fatal(err)
			}
			r, err := records.Open(t.Context(), store, testTD, records.Config{})
			if err != nil {
				t.Fatal(err)
			}
			km, err := keys.OpenDisk(filepath.Join(dir, "keys.json"), logrus.New())
			if err != nil {
				t.Fatal(err)
			}
			c, err := Open(t.Context(), km, r, testTD, Config{})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, c.x509.Load().line.AuthorityID+" "+c.jwt.Load().line.AuthorityID)
			if ids[round] != ids[0] {
				t.Errorf("round %d: authorities %s, want %s", round, ids[round], ids[0])
			}
			b, err := r.Bundle(t.Context(), testTD)
			if err != nil || b.Sequence != 1 || len(b.X509) != 1 || len(b.JWT) != 1 {
				t.Errorf("bundle %+v, %v", b, err)
			}
			if err := issueBoth(t, c).check(b, time.Now()); err != nil {
				t.Error(err)
			}
			if err := errors.Join(km.Close(), store.Close()); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("with keys in memory a new authority takes over and the old one still verifies", func(t *testing.T) {
		store, now := newStore(), &clock{now: epoch}
		var held [][]*x509.Certificate
		for range 3 {
			c, err := Open(t.Context(), keys.Memory(), store, testTD, Config{Now: now.Now})
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, issueChecked(t, c, store, now.Now()))
			for _, chain := range held {
				if err := verify(store.held(), chain, now.Now()); err != nil {
					t.Error(err)
				}
			}
			now.pass(10 * time.Minute)
		}
		if diff := cmp.Diff(map[string]int{"x509 active": 1, "x509 old": 2, "jwt active": 1, "jwt old": 2}, store.states()); diff != "" {
			t.Error(diff)
		}
	})

	// lost returns a store whose active authorities have no keys any more.
	lost := func(t *testing.T, now *clock) *memStore {
		store := newStore()
		if _, err := Open(t.Context(), &durable{InMemory: keys.Memory()}, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		return store
	}

	t.Run("a lost key stops the start, says what to do and changes nothing", func(t *testing.T) {
		now := &clock{now: epoch}
		store := lost(t, now)
		commits := store.commits
		_, err := Open(t.Context(), &durable{InMemory: keys.Memory()}, store, testTD, Config{Now: now.Now})
		if !errors.Is(err, ErrLostKey) || !strings.Contains(err.Error(), "put the key file back") || !strings.Contains(err.Error(), "new_authority_on_lost_key") {
			t.Errorf("got %v", err)
		}
		if store.commits != commits {
			t.Error("something was written")
		}
	})

	t.Run("with consent a lost key is replaced, loudly, and what it signed still verifies", func(t *testing.T) {
		now := &clock{now: epoch}
		store := lost(t, now)
		old := store.held().X509[0].Certificate
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		c, err := Open(t.Context(), &durable{InMemory: keys.Memory()}, store, testTD, Config{Now: now.Now, Log: log, NewAuthorityOnLostKey: true})
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(out.String(), "level=error"); n != 2 {
			t.Errorf("%d errors in the log: %s", n, out.String())
		}
		if !store.held().HasX509(old) {
			t.Error("the old authority left the bundle")
		}
		issueChecked(t, c, store, now.Now())
	})

	t.Run("the lost key of an authority that expired is no reason to stop", func(t *testing.T) {
		now := &clock{now: epoch}
		store := lost(t, now)
		now.pass(25 * time.Hour)
		c, err := Open(t.Context(), &durable{InMemory: keys.Memory()}, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		issueChecked(t, c, store, now.Now())
	})

	t.Run("the lost key of a prepared authority is no reason to stop", func(t *testing.T) {
		now := &clock{now: epoch}
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		first := c.x509.Load().line.AuthorityID
		now.pass(13 * time.Hour)
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, line := range store.lines {
			if line.State == StatePrepared {
				_ = km.Delete(t.Context(), line.KeyID)
			}
		}
		if c, err = Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		if c.x509.Load().line.AuthorityID != first {
			t.Error("another authority took over")
		}
		if diff := cmp.Diff(map[string]int{"x509 active": 1, "x509 prepared": 1, "x509 old": 1, "jwt active": 1, "jwt prepared": 1, "jwt old": 1}, store.states()); diff != "" {
			t.Error(diff)
		}
	})

	t.Run("after weeks of absence there is a new authority at once", func(t *testing.T) {
		now := &clock{now: epoch}
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		if _, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		now.pass(21 * 24 * time.Hour)
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		issueChecked(t, c, store, now.Now())
		if names, _ := km.List(t.Context()); len(names) != 2 || len(store.lines) != 2 || len(store.held().X509) != 1 {
			t.Errorf("%d keys, %d lines, %d authorities", len(names), len(store.lines), len(store.held().X509))
		}
	})

	t.Run("an empty journal under a bundle that is not is a lost journal", func(t *testing.T) {
		now := &clock{now: epoch}
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		if _, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		clear(store.lines)
		_, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if !errors.Is(err, ErrJournal) || !strings.Contains(err.Error(), "restore the store") {
			t.Errorf("got %v", err)
		}
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now, NewAuthorityOnLostKey: true})
		if err != nil {
			t.Fatal(err)
		}
		issueChecked(t, c, store, now.Now())
	})

	t.Run("a key store that cannot be asked is not one without the key", func(t *testing.T) {
		now := &clock{now: epoch}
		store := lost(t, now)
		_, err := Open(t.Context(), brokenKeys{keys.Memory()}, store, testTD, Config{Now: now.Now, NewAuthorityOnLostKey: true})
		if !errors.Is(err, errDisk) {
			t.Errorf("got %v", err)
		}
	})
}

type brokenKeys struct{ *keys.InMemory }

func (brokenKeys) Get(context.Context, string) (crypto.Signer, error) { return nil, errDisk }

func TestBrokenJournal(t *testing.T) {
	for name, breakIt := range map[string]func(line *records.Journal, other records.Journal){
		"an unknown state":                  func(l *records.Journal, _ records.Journal) { l.State = "resting" },
		"an unknown kind":                   func(l *records.Journal, _ records.Journal) { l.Kind = "wit" },
		"no certificate":                    func(l *records.Journal, _ records.Journal) { l.Certificate = nil },
		"half a certificate":                func(l *records.Journal, _ records.Journal) { l.Certificate = l.Certificate[:100] },
		"another's certificate":             func(l *records.Journal, o records.Journal) { l.Certificate = o.Certificate },
		"no public key":                     func(l *records.Journal, _ records.Journal) { l.PublicKey = nil },
		"another's public key":              func(l *records.Journal, o records.Journal) { l.PublicKey = o.PublicKey },
		"another's key":                     func(l *records.Journal, o records.Journal) { l.KeyID = o.KeyID },
		"an expiry that is not its own":     func(l *records.Journal, _ records.Journal) { l.NotAfter = l.NotAfter.Add(time.Hour) },
		"times in the wrong order":          func(l *records.Journal, _ records.Journal) { l.NotBefore = l.NotAfter },
		"no time of creation":               func(l *records.Journal, _ records.Journal) { l.CreatedAt = time.Time{} },
		"a name that is not its key's":      func(l *records.Journal, _ records.Journal) { l.AuthorityID = "ab" + l.AuthorityID[2:] },
		"an expiry before its own creation": func(l *records.Journal, _ records.Journal) { l.CreatedAt = l.NotAfter.Add(time.Hour) },
	} {
		t.Run("a line with "+name+" stops the start", func(t *testing.T) {
			store, km := newStore(), &durable{InMemory: keys.Memory()}
			cfg := Config{Now: func() time.Time { return epoch }}
			c, err := Open(t.Context(), km, store, testTD, cfg)
			if err != nil {
				t.Fatal(err)
			}
			other, err := c.makeAuthority(t.Context(), KindX509)
			if err != nil {
				t.Fatal(err)
			}
			line := c.x509.Load().line
			delete(store.lines, line.AuthorityID)
			breakIt(&line, other.line)
			store.lines[line.AuthorityID] = line
			commits := store.commits
			if _, err := Open(t.Context(), km, store, testTD, cfg); !errors.Is(err, ErrJournal) {
				t.Errorf("got %v", err)
			}
			if store.commits != commits {
				t.Error("something was written")
			}
		})
	}

	t.Run("the journal of another trust domain stops the start", func(t *testing.T) {
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		cfg := Config{Now: func() time.Time { return epoch }}
		if _, err := Open(t.Context(), km, store, spiffeid.RequireTrustDomainFromString("other.org"), cfg); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), km, store, testTD, cfg); !errors.Is(err, ErrJournal) {
			t.Errorf("got %v", err)
		}
	})

	t.Run("of two active authorities the newest signs", func(t *testing.T) {
		now := &clock{now: epoch}
		store, km := newStore(), &durable{InMemory: keys.Memory()}
		c, err := Open(t.Context(), km, store, testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		now.pass(time.Hour)
		second, err := c.makeAuthority(t.Context(), KindX509)
		if err != nil {
			t.Fatal(err)
		}
		line := second.with(StateActive, now.Now()).line
		store.lines[line.AuthorityID] = line
		if c, err = Open(t.Context(), km, store, testTD, Config{Now: now.Now}); err != nil {
			t.Fatal(err)
		}
		if c.x509.Load().line.AuthorityID != line.AuthorityID || store.states()["x509 active"] != 1 {
			t.Errorf("journal holds %v", store.states())
		}
		issueChecked(t, c, store, now.Now())
	})
}

func TestConfig(t *testing.T) {
	t.Run("impossible settings are refused", func(t *testing.T) {
		for name, cfg := range map[string]Config{
			"negative CA TTL":   {CATTL: -time.Hour},
			"negative SVID TTL": {X509SVIDTTL: -1},
			"tiny JWT TTL":      {JWTSVIDTTL: time.Millisecond},
			"negative agent":    {AgentTTL: -time.Second},
			"negative backdate": {Backdate: -time.Second},
			"key type":          {KeyType: "rsa-1024"},
			"JWT key type":      {JWTKeyType: "ed25519"},
		} {
			if _, err := Open(t.Context(), keys.Memory(), newStore(), testTD, cfg); err == nil {
				t.Errorf("%s was taken", name)
			}
		}
	})

	t.Run("a CA TTL that will cut SVIDs short is warned of", func(t *testing.T) {
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		if _, err := Open(t.Context(), keys.Memory(), newStore(), testTD, Config{Log: log, CATTL: 3 * time.Hour}); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(out.String(), "level=warning"); n != 2 || !strings.Contains(out.String(), "x509_svid_ttl") {
			t.Errorf("%d warnings: %s", n, out.String())
		}
	})

	t.Run("each key type can sign both kinds", func(t *testing.T) {
		for _, kind := range []keys.Kind{keys.EC256, keys.EC384, keys.RSA2048} {
			store := newStore()
			c, err := Open(t.Context(), keys.Memory(), store, testTD, Config{KeyType: kind})
			if err != nil {
				t.Fatal(err)
			}
			if err := issueBoth(t, c).check(store.held(), time.Now()); err != nil {
				t.Errorf("%s: %v", kind, err)
			}
		}
	})
}

func FuzzJournal(f *testing.F) {
	store, km := newStore(), keys.Memory()
	c, err := Open(f.Context(), km, store, testTD, Config{Now: func() time.Time { return epoch }})
	if err != nil {
		f.Fatal(err)
	}
	for _, line := range store.lines {
		f.Add(line.Kind, line.AuthorityID, line.State, line.Certificate, line.PublicKey, line.NotAfter.Unix(), line.CreatedAt.Unix())
	}
	f.Add("jwt", "", "old", []byte{}, []byte{0x30}, int64(0), int64(-1))
	f.Fuzz(func(t *testing.T, kind, id, state string, cert, public []byte, notAfter, created int64) {
		a, err := decode(records.Journal{
			Kind: kind, AuthorityID: id, State: state, Certificate: cert, PublicKey: public,
			NotBefore: epoch, NotAfter: time.Unix(notAfter, 0), CreatedAt: time.Unix(created, 0),
		}, nil, testTD)
		if err != nil {
			if !errors.Is(err, ErrJournal) {
				t.Errorf("unmarked error %v", err)
			}
			return
		}
		// What was taken can be published and read back.
		c := &CA{td: testTD, lines: map[string]*authority{id: a}, cfg: c.cfg}
		b := &identity.Bundle{TrustDomain: testTD}
		c.merge(b, epoch)
		if _, err := b.Wire(); err != nil {
			t.Error(err)
		}
		_ = fmt.Sprint(a.fields())
	})
}
