package records

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

func certificate(t testing.TB) (*x509.Certificate, *ecdsa.PublicKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: noon, NotAfter: noon.Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, &key.PublicKey
}

func TestBundles(t *testing.T) {
	t.Run("a bundle is made on first use and numbers its changes", func(t *testing.T) {
		r, _ := open(t)
		ctx := t.Context()
		if _, err := r.Bundle(ctx, domain); !errors.Is(err, ErrNotFound) {
			t.Errorf("missing bundle: %v", err)
		}
		cert, key := certificate(t)
		for want := uint64(1); want <= 2; want++ {
			b, _, err := r.UpdateBundle(ctx, domain, func(b *identity.Bundle) error {
				b.Sequence = 77
				if want == 1 {
					b.X509 = append(b.X509, identity.X509Authority{Certificate: cert})
				} else {
					b.JWT = append(b.JWT, identity.JWTAuthority{KeyID: "k", Key: key, ExpiresAt: noon})
				}
				return nil
			})
			if err != nil || b.Sequence != want || b.TrustDomain != domain {
				t.Fatalf("%+v, %v", b, err)
			}
		}
		before, err := r.store.Rev(ctx)
		if err != nil {
			t.Fatal(err)
		}
		b, rev, err := r.UpdateBundle(ctx, domain, func(*identity.Bundle) error { return nil })
		if err != nil || rev != before || b.Sequence != 2 || len(b.X509) != 1 || len(b.JWT) != 1 {
			t.Errorf("an update without a change: %+v at %d (before: %d), %v", b, rev, before, err)
		}
	})
	t.Run("50 at once lose no update", func(t *testing.T) {
		r, _ := open(t)
		_, key := certificate(t)
		var group sync.WaitGroup
		for i := range 50 {
			group.Go(func() {
				_, _, err := r.UpdateBundle(t.Context(), domain, func(b *identity.Bundle) error {
					b.JWT = append(b.JWT, identity.JWTAuthority{KeyID: fmt.Sprint(i), Key: key})
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		b, err := r.Bundle(t.Context(), domain)
		if err != nil || b.Sequence != 50 || len(b.JWT) != 50 {
			t.Errorf("%+v, %v", b, err)
		}
	})
	t.Run("the own bundle cannot be deleted; another one comes back with a new number", func(t *testing.T) {
		r, _ := open(t)
		ctx := t.Context()
		if _, err := r.DeleteBundle(ctx, domain); err == nil {
			t.Error("it was deleted")
		}
		if _, err := r.DeleteBundle(ctx, other); !errors.Is(err, ErrNotFound) {
			t.Errorf("missing bundle: %v", err)
		}
		var last uint64
		for range 3 {
			for range 2 {
				b, _, err := r.UpdateBundle(ctx, other, func(b *identity.Bundle) error { b.RefreshHint += time.Second; return nil })
				if err != nil || b.Sequence <= last {
					t.Fatalf("sequence %d after %d, %v", b.Sequence, last, err)
				}
				last = b.Sequence
			}
			if _, err := r.DeleteBundle(ctx, other); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestJournal(t *testing.T) {
	r, _ := open(t)
	ctx := t.Context()
	a := Journal{Kind: "x509", AuthorityID: "a", State: "active", KeyID: "k", Certificate: []byte{1}, PublicKey: []byte{2}, NotBefore: noon, NotAfter: noon.Add(time.Hour), CreatedAt: noon, ActivatedAt: noon}
	b := Journal{Kind: "jwt", AuthorityID: "b", State: "prepared", KeyID: "l", PublicKey: []byte{3}, CreatedAt: noon}
	if err := r.PutJournal(ctx, []Journal{b, a}, []string{"none", "a", ""}); err != nil {
		t.Fatal(err)
	}
	got, err := r.Journal(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Journal{a, b}, got); diff != "" {
		t.Errorf("journal (-put +got):\n%s", diff)
	}
	b.State = "active"
	if err := r.PutJournal(ctx, []Journal{b}, []string{"a", "a"}); err != nil {
		t.Fatal(err)
	}
	if got, err = r.Journal(ctx); err != nil || len(got) != 1 || got[0].State != "active" {
		t.Errorf("journal %+v, %v", got, err)
	}
	if err := r.PutJournal(ctx, nil, nil); err != nil {
		t.Error(err)
	}
	if err := r.PutJournal(ctx, []Journal{{}}, nil); err == nil {
		t.Error("an authority without ID was accepted")
	}
}

// state is a picture that is kept up to date by Follow.
type state struct {
	entries map[string]*identity.Entry
	nodes   map[spiffeid.ID]*Node
	bundles map[spiffeid.TrustDomain]*identity.Bundle
}

func stateOf(s *Snapshot) state {
	st := state{map[string]*identity.Entry{}, map[spiffeid.ID]*Node{}, map[spiffeid.TrustDomain]*identity.Bundle{}}
	for _, e := range s.Entries {
		st.entries[e.ID] = e
	}
	for _, n := range s.Nodes {
		st.nodes[n.ID] = n
	}
	for _, b := range s.Bundles {
		st.bundles[b.TrustDomain] = b
	}
	return st
}

func (st state) apply(c Change) {
	for _, e := range c.Entries {
		if st.entries[e.ID] = e.Entry; e.Entry == nil {
			delete(st.entries, e.ID)
		}
	}
	for _, n := range c.Nodes {
		if st.nodes[n.ID] = n.Node; n.Node == nil {
			delete(st.nodes, n.ID)
		}
	}
	for _, b := range c.Bundles {
		if st.bundles[b.TrustDomain] = b.Bundle; b.Bundle == nil {
			delete(st.bundles, b.TrustDomain)
		}
	}
}

func TestSnapshotAndFollow(t *testing.T) {
	t.Run("what is followed from a snapshot ends up as the next snapshot", func(t *testing.T) {
		r, _ := open(t)
		ctx := t.Context()
		for i := range 20 {
			create(t, r, entry(fmt.Sprint(i), "a:1"))
		}
		admit(t, r, agent("join_token/0"))
		first, err := r.Snapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for w := range 4 {
			group.Go(func() {
				for i := range 5 {
					e := first.Entries[w*5+i]
					if _, _, err := r.UpdateEntry(ctx, e.ID, func(e *identity.Entry) error { e.Hint = "x"; return nil }); err != nil {
						t.Error(err)
					}
					create(t, r, entry(fmt.Sprintf("new/%d/%d", w, i), "a:1"))
					if i%2 == 0 {
						if _, _, err := r.DeleteEntries(ctx, []string{e.ID}); err != nil {
							t.Error(err)
						}
					}
				}
				admit(t, r, agent(fmt.Sprintf("join_token/x%d", w)))
				td := spiffeid.RequireTrustDomainFromString(fmt.Sprintf("td%d", w))
				if _, _, err := r.UpdateBundle(ctx, td, func(*identity.Bundle) error { return nil }); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if _, err := r.DeleteNode(ctx, agent("join_token/0")); err != nil {
			t.Fatal(err)
		}
		if _, err := r.DeleteBundle(ctx, spiffeid.RequireTrustDomainFromString("td0")); err != nil {
			t.Fatal(err)
		}
		last, err := r.Snapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		st, stop := stateOf(first), errors.New("stop")
		rev := first.Rev
		err = r.Follow(ctx, first.Rev, func(c Change) error {
			if c.Rev <= rev || len(c.Entries)+len(c.Nodes)+len(c.Bundles) == 0 {
				t.Errorf("change %+v after %d", c, rev)
			}
			rev = c.Rev
			st.apply(c)
			if c.Rev == last.Rev {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) {
			t.Fatal(err)
		}
		if diff := cmp.Diff(stateOf(last), st, equal, cmp.AllowUnexported(state{})); diff != "" {
			t.Errorf("followed state differs (-snapshot +followed):\n%s", diff)
		}
	})
	t.Run("tokens, journal and indexes are no changes of the picture", func(t *testing.T) {
		r, _ := open(t)
		ctx := t.Context()
		if err := r.CreateToken(ctx, "secret", noon); err != nil {
			t.Fatal(err)
		}
		if err := r.PutJournal(ctx, []Journal{{AuthorityID: "a"}}, nil); err != nil {
			t.Fatal(err)
		}
		e := create(t, r, entry("a", "a:1"))
		stop := errors.New("stop")
		err := r.Follow(ctx, 0, func(c Change) error {
			if len(c.Entries) != 1 || c.Entries[0].ID != e.ID {
				t.Errorf("change %+v", c)
			}
			return stop
		})
		if !errors.Is(err, stop) {
			t.Error(err)
		}
	})
	t.Run("a reader that cannot go on is told so", func(t *testing.T) {
		r, _ := open(t)
		err := r.Follow(t.Context(), 99, func(Change) error { return nil })
		if !errors.Is(err, kv.ErrCompacted) {
			t.Error(err)
		}
	})
	t.Run("a damaged record is named", func(t *testing.T) {
		store := openStore(t)
		r, err := Open(t.Context(), store, domain, Config{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("p/e/broken", []byte{1, 0xff})}}); err != nil {
			t.Fatal(err)
		}
		_, err = r.Snapshot(t.Context())
		if !errors.Is(err, ErrDamaged) || !bytes.Contains([]byte(err.Error()), []byte("p/e/broken")) {
			t.Error(err)
		}
	})
}

func TestRun(t *testing.T) {
	t.Run("an expired entry is gone after a minute, and Run ends with its context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			store := openStore(t)
			r, err := Open(t.Context(), store, domain, Config{})
			if err != nil {
				t.Fatal(err)
			}
			e := entry("a", "a:1")
			e.ExpiresAt = time.Now().Add(90 * time.Second)
			e = create(t, r, e)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- r.Run(ctx) }()
			<-time.After(100 * time.Second)
			if _, err := r.Entry(t.Context(), e.ID); err != nil {
				t.Errorf("too early: %v", err)
			}
			<-time.After(30 * time.Second)
			if _, err := r.Entry(t.Context(), e.ID); !errors.Is(err, ErrNotFound) {
				t.Errorf("too late: %v", err)
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	})
	// ahead starts Run over an entry that expires in an hour, and returns a way to set the clock.
	ahead := func(t *testing.T) (r *Records, e *identity.Entry, set func(time.Duration)) {
		t.Helper()
		var offset atomic.Int64
		now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
		r, err := Open(t.Context(), openStore(t), domain, Config{Now: now})
		if err != nil {
			t.Fatal(err)
		}
		e = entry("a", "a:1")
		e.ExpiresAt = time.Now().Add(time.Hour)
		e = create(t, r, e)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		return r, e, func(d time.Duration) { offset.Store(int64(d)) }
	}
	t.Run("a clock that is set a day ahead and back within minutes deletes nothing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, e, set := ahead(t)
			<-time.After(90 * time.Second)
			set(24 * time.Hour)
			<-time.After(10 * time.Minute)
			set(0)
			<-time.After(10 * time.Minute)
			if _, err := r.Entry(t.Context(), e.ID); err != nil {
				t.Errorf("it was deleted: %v", err)
			}
			<-time.After(40 * time.Minute)
			if _, err := r.Entry(t.Context(), e.ID); !errors.Is(err, ErrNotFound) {
				t.Errorf("its time is over now: %v", err)
			}
		})
	})
	t.Run("a clock that stays ahead is believed after a while", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, e, set := ahead(t)
			<-time.After(90 * time.Second)
			set(24 * time.Hour)
			<-time.After(18 * time.Minute)
			if _, err := r.Entry(t.Context(), e.ID); !errors.Is(err, ErrNotFound) {
				t.Errorf("still there: %v", err)
			}
		})
	})
}
