package ca

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// lineIn returns the one authority of the kind in the state.
func lineIn(t *testing.T, c *CA, kind, state string) records.Journal {
	t.Helper()
	var found []records.Journal
	for _, line := range c.Authorities() {
		if line.Kind == kind && line.State == state {
			found = append(found, line)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d %s authorities are %s", len(found), kind, state)
	}
	return found[0]
}

// published says whether the bundle names an authority, and whether as tainted.
func published(b *identity.Bundle, line records.Journal) (there, tainted bool) {
	for _, a := range b.X509 {
		if string(a.Certificate.Raw) == string(line.Certificate) && line.Kind == KindX509 {
			return true, a.Tainted
		}
	}
	for _, a := range b.JWT {
		if a.KeyID == line.AuthorityID && line.Kind == KindJWT {
			return true, a.Tainted
		}
	}
	return false, false
}

func TestForcedRotation(t *testing.T) {
	for _, kind := range []string{KindX509, KindJWT} { // wit_test.go has the third
		t.Run(kind, func(t *testing.T) {
			c, store := open(t, Config{})
			ctx := t.Context()
			first := lineIn(t, c, kind, StateActive)
			held := issueBoth(t, c)

			t.Run("what was not prepared is not activated, and what is active is neither tainted nor revoked", func(t *testing.T) {
				if _, err := c.ActivateAuthority(ctx, kind, first.AuthorityID); !errors.Is(err, ErrNotPrepared) {
					t.Errorf("activate: %v", err)
				}
				if _, _, err := c.TaintAuthority(ctx, kind, first.AuthorityID); !errors.Is(err, ErrActive) {
					t.Errorf("taint: %v", err)
				}
				if _, _, err := c.RevokeAuthority(ctx, kind, first.AuthorityID); !errors.Is(err, ErrActive) {
					t.Errorf("revoke: %v", err)
				}
				if _, _, err := c.TaintAuthority(ctx, kind, "nobody"); !errors.Is(err, ErrUnknownAuthority) {
					t.Errorf("taint nobody: %v", err)
				}
				other := lineIn(t, c, map[string]string{KindX509: KindJWT, KindJWT: KindX509}[kind], StateActive)
				if _, _, err := c.TaintAuthority(ctx, kind, other.AuthorityID); !errors.Is(err, ErrUnknownAuthority) {
					t.Errorf("taint one of the other kind: %v", err)
				}
			})

			replaced, _, err := c.PrepareAuthority(ctx, kind)
			if err != nil {
				t.Fatal(err)
			}
			second, rev, err := c.PrepareAuthority(ctx, kind)
			if err != nil {
				t.Fatal(err)
			}
			t.Run("a prepared one is published, does not sign, and takes the place of another", func(t *testing.T) {
				if there, _ := published(store.held(), second); !there || rev == 0 {
					t.Errorf("published: %t at %d", there, rev)
				}
				if got := lineIn(t, c, kind, StateActive); got.AuthorityID != first.AuthorityID {
					t.Errorf("active is %s", got.AuthorityID)
				}
				if got := lineIn(t, c, kind, StateRevoked); got.AuthorityID != replaced.AuthorityID {
					t.Errorf("revoked is %s, want the one that was prepared first", got.AuthorityID)
				}
				if there, _ := published(store.held(), replaced); there {
					t.Error("the bundle names the one that was prepared first")
				}
				if _, err := c.keys.Get(ctx, replaced.KeyID); !errors.Is(err, keys.ErrNotFound) {
					t.Errorf("its key: %v", err)
				}
				if _, _, err := c.TaintAuthority(ctx, kind, second.AuthorityID); !errors.Is(err, ErrNotOld) {
					t.Errorf("taint: %v", err)
				}
				if _, _, err := c.RevokeAuthority(ctx, kind, second.AuthorityID); !errors.Is(err, ErrNotOld) {
					t.Errorf("revoke: %v", err)
				}
			})

			if _, err := c.ActivateAuthority(ctx, kind, second.AuthorityID); err != nil {
				t.Fatal(err)
			}
			fresh := issueBoth(t, c)
			t.Run("an activated one signs, and what the old one signed is good", func(t *testing.T) {
				if a := c.current(kind); a.line.AuthorityID != second.AuthorityID {
					t.Errorf("%s signs", a.line.AuthorityID)
				}
				if _, err := c.keys.Get(ctx, first.KeyID); !errors.Is(err, keys.ErrNotFound) {
					t.Errorf("the old one's key: %v", err)
				}
				if kind == KindX509 { // go-spiffe looks at the clock itself where it is about tokens
					if err := verify(store.held(), held.chain, epoch); err != nil {
						t.Error(err)
					}
				}
				if _, _, err := c.RevokeAuthority(ctx, kind, first.AuthorityID); !errors.Is(err, ErrNotTainted) {
					t.Errorf("revoke without taint: %v", err)
				}
			})

			server, err := c.ServerCertificate()(nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := c.TaintAuthority(ctx, kind, first.AuthorityID); err != nil {
				t.Fatal(err)
			}
			t.Run("a tainted one is in the bundle as such", func(t *testing.T) {
				if there, tainted := published(store.held(), first); !there || !tainted {
					t.Errorf("there %t, tainted %t", there, tainted)
				}
				if _, _, err := c.TaintAuthority(ctx, kind, first.AuthorityID); !errors.Is(err, ErrTainted) {
					t.Errorf("twice: %v", err)
				}
			})
			if kind == KindX509 {
				t.Run("the server's own SVID is replaced", func(t *testing.T) {
					now, err := c.ServerCertificate()(nil)
					if err != nil || now == server {
						t.Fatalf("the same: %t, %v", now == server, err)
					}
					if err := now.Leaf.CheckSignatureFrom(c.current(KindX509).cert); err != nil {
						t.Error(err)
					}
				})
			}

			if _, _, err := c.RevokeAuthority(ctx, kind, first.AuthorityID); err != nil {
				t.Fatal(err)
			}
			gone := func(t *testing.T) {
				t.Helper()
				if there, _ := published(store.held(), first); there {
					t.Error("the bundle names it")
				}
				if kind == KindX509 {
					if err := verify(store.held(), held.chain, epoch); err == nil {
						t.Error("what it signed verifies")
					}
					if err := verify(store.held(), fresh.chain, epoch); err != nil {
						t.Errorf("what its successor signed: %v", err)
					}
				}
			}
			t.Run("a revoked one is in no bundle, nor is it after an append and a restart", func(t *testing.T) {
				gone(t)
				line := first
				_, _, err := store.UpdateBundle(ctx, testTD, func(b *identity.Bundle) error {
					a, err := decode(line, nil, testTD)
					if err != nil {
						return err
					}
					if kind == KindX509 {
						b.X509 = append(b.X509, identity.X509Authority{Certificate: a.cert})
					} else {
						b.JWT = append(b.JWT, identity.JWTAuthority{KeyID: line.AuthorityID, Key: a.public, ExpiresAt: line.NotAfter})
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				if err := c.step(ctx); err != nil {
					t.Fatal(err)
				}
				gone(t)
				again, err := Open(ctx, c.keys, store, testTD, c.cfg)
				if err != nil {
					t.Fatal(err)
				}
				gone(t)
				if line := again.lines[first.AuthorityID].line; line.State != StateRevoked {
					t.Errorf("it is %s", line.State)
				}
				if _, _, err := c.RevokeAuthority(ctx, kind, first.AuthorityID); !errors.Is(err, ErrUnknownAuthority) {
					t.Errorf("twice: %v", err)
				}
			})
		})
	}

	t.Run("a step that could not be published is published by the next turn", func(t *testing.T) {
		c, store := open(t, Config{})
		ctx := t.Context()
		first := lineIn(t, c, KindX509, StateActive)
		broken := func(op string) error {
			if op == "write bundle" {
				return errDisk
			}
			return nil
		}
		hook := func(f func(string) error) {
			store.mu.Lock()
			defer store.mu.Unlock()
			store.before = f
		}
		hook(broken)
		if _, _, err := c.PrepareAuthority(ctx, KindX509); !errors.Is(err, errDisk) {
			t.Fatal(err)
		}
		second := lineIn(t, c, KindX509, StatePrepared)
		if _, err := c.ActivateAuthority(ctx, KindX509, second.AuthorityID); !errors.Is(err, errDisk) {
			t.Fatalf("one that no verifier knows signs: %v", err)
		}
		hook(nil)
		if err := c.step(ctx); err != nil {
			t.Fatal(err)
		}
		if there, _ := published(store.held(), second); !there {
			t.Error("prepared and not published")
		}
		if _, err := c.ActivateAuthority(ctx, KindX509, second.AuthorityID); err != nil {
			t.Fatal(err)
		}
		for _, step := range []struct {
			name string
			do   func() error
			want bool
		}{
			{"taint", func() error { _, _, err := c.TaintAuthority(ctx, KindX509, first.AuthorityID); return err }, true},
			{"revoke", func() error { _, _, err := c.RevokeAuthority(ctx, KindX509, first.AuthorityID); return err }, false},
		} {
			hook(broken)
			if err := step.do(); !errors.Is(err, errDisk) {
				t.Fatalf("%s: %v", step.name, err)
			}
			hook(nil)
			if err := c.step(ctx); err != nil {
				t.Fatal(err)
			}
			if there, tainted := published(store.held(), first); there != step.want || tainted != step.want {
				t.Errorf("%s: there %t, tainted %t", step.name, there, tainted)
			}
		}
	})

	t.Run("there is an end to them", func(t *testing.T) {
		c, store := open(t, Config{})
		for n := 1; n < maxLive; n++ {
			next, _, err := c.PrepareAuthority(t.Context(), KindJWT)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.ActivateAuthority(t.Context(), KindJWT, next.AuthorityID); err != nil {
				t.Fatal(err)
			}
		}
		if _, _, err := c.PrepareAuthority(t.Context(), KindJWT); !errors.Is(err, ErrManyAuthorities) {
			t.Errorf("got %v", err)
		}
		if n := len(store.held().JWT); n != maxLive {
			t.Errorf("%d keys", n)
		}
	})

	t.Run("a journal that cannot be written leaves all as it was", func(t *testing.T) {
		c, store := open(t, Config{})
		store.before = func(op string) error {
			if op == "write journal" {
				return errDisk
			}
			return nil
		}
		if _, _, err := c.PrepareAuthority(t.Context(), KindX509); !errors.Is(err, errDisk) {
			t.Fatal(err)
		}
		if n := len(store.held().X509); n != 1 {
			t.Errorf("%d authorities in the bundle", n)
		}
	})
}

func TestActivationWaitsForAgents(t *testing.T) {
	at := clock{now: epoch}
	missing, asked := 0, kv.Rev(0)
	c, _ := open(t, Config{Now: at.Now, Behind: func(rev kv.Rev) int { asked = rev; return missing }})
	active := func() string { return lineIn(t, c, KindX509, StateActive).AuthorityID }
	first := active()
	missing = 1
	at.pass(12 * time.Hour)
	if err := c.step(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := lineIn(t, c, KindX509, StatePrepared).AuthorityID
	at.pass(8 * time.Hour) // now it would be time
	look := func(t *testing.T, want string) {
		t.Helper()
		if err := c.step(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := active(); got != want {
			t.Errorf("active is %s, want %s", got, want)
		}
	}
	t.Run("one that a connected agent does not have yet waits", func(t *testing.T) {
		look(t, first)
		if asked == 0 {
			t.Error("nobody was asked about the bundle's revision")
		}
		at.pass(4 * time.Minute)
		look(t, first)
	})
	t.Run("it takes over when all have it", func(t *testing.T) {
		missing = 0
		look(t, second)
	})
	t.Run("it waits five minutes at most", func(t *testing.T) {
		missing = 1
		at.pass(12 * time.Hour)
		look(t, second)
		third := lineIn(t, c, KindX509, StatePrepared).AuthorityID
		at.pass(time.Minute) // more than the grace of one that was prepared late
		look(t, second)
		at.pass(5 * time.Minute)
		look(t, third)
	})
}

func TestAnOperatorsActivationWaitsALittle(t *testing.T) {
	var asked atomic.Int32
	c, _ := open(t, Config{Behind: func(kv.Rev) int { return int(max(0, 3-asked.Add(1))) }})
	next, _, err := c.PrepareAuthority(t.Context(), KindX509)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ActivateAuthority(t.Context(), KindX509, next.AuthorityID); err != nil {
		t.Fatal(err)
	}
	if n := asked.Load(); n < 3 {
		t.Errorf("agents were looked at %d times", n)
	}
}
