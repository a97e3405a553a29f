package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
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

func TestKeysThatAreElsewhere(t *testing.T) {
	t.Run("are asked once a round and with the lock let go, so that whoever asks about authorities does not wait", func(t *testing.T) {
		now := &clock{now: epoch}
		km := &durable{InMemory: keys.Memory()}
		c, err := Open(t.Context(), km, newStore(), testTD, Config{Now: now.Now})
		if err != nil {
			t.Fatal(err)
		}
		asked := 0
		km.before = func(op string) error {
			if op == "generate key" {
				asked++
				if len(c.Authorities()) != 2 { // it would wait forever
					t.Error("not the two authorities of the start")
				}
			}
			return errors.New("away")
		}
		now.pass(13 * time.Hour)
		if err := c.step(t.Context()); err == nil || asked != 2 {
			t.Errorf("asked %d times for two authorities: %v", asked, err)
		}
		km.before = nil
		if err := c.step(t.Context()); err != nil || c.find(KindX509, StatePrepared) == nil || c.find(KindJWT, StatePrepared) == nil {
			t.Errorf("it is back, and there are no successors: %v", err)
		}
	})
}
