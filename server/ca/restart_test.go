package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

func TestRestart(t *testing.T) {
	t.Run("with keys on disk and a real store the same authorities go on", func(t *testing.T) {
		dir := t.TempDir()
		var ids []string
		for round := range 3 {
			c, r, closeAll, err := openFiles(t.Context(), dir, time.Now)
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
			if err := closeAll(); err != nil {
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
		if !errors.Is(err, ErrLostKey) || !strings.Contains(err.Error(), "put the keys back") || !strings.Contains(err.Error(), "new_authority_on_lost_key") {
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
		"an unknown kind":                   func(l *records.Journal, _ records.Journal) { l.Kind = "other" },
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
