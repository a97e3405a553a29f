package issue_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/issue"
	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

func newView() *view.View { return view.New(nil) }

func (w *world) jwt(audience ...string) *identity.JWTSVID {
	w.t.Helper()
	svids, _, err := w.issuer.JWT(w.t.Context(), set("a:1"), audience, spiffeid.ID{})
	if err != nil || len(svids) != 1 {
		w.t.Fatalf("got %v %v", svids, err)
	}
	return svids[0]
}

func TestJWT(t *testing.T) {
	t.Run("one for each matching entry, or for the one asked for", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			e := entry("e", 1, "a:1")
			e.Hint = "h"
			w.put(e, entry("f", 9, "a:1"), entry("g", 9, "a:2"))
			all, _, err := w.issuer.JWT(w.t.Context(), set("a:1"), []string{"x"}, spiffeid.ID{})
			if err != nil || len(all) != 2 || all[0].EntryID != "f" || all[1].Hint != "h" {
				t.Fatalf("got %+v %v", all, err)
			}
			one, _, err := w.issuer.JWT(w.t.Context(), set("a:1"), []string{"x"}, e.SPIFFEID)
			if err != nil || len(one) != 1 || one[0] != all[1] {
				t.Fatalf("got %+v %v", one, err)
			}
			none, changed, err := w.issuer.JWT(w.t.Context(), set("a:3"), []string{"x"}, spiffeid.ID{})
			if err != nil || len(none) != 0 {
				t.Fatalf("got %+v %v", none, err)
			}
			w.put(entry("new", 1, "a:3"))
			<-changed
		})
	})
	t.Run("the same audiences in any order are one token, others another", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			if w.jwt("x", "y") != w.jwt("y", "x", "x") {
				t.Error("two tokens for one set")
			}
			if w.jwt("x") == w.jwt("x", "y") || w.jwt("x,y") == w.jwt("x", "y") {
				t.Error("one token for two sets")
			}
		})
	})
	t.Run("callers at once share one signature", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			done := make(chan *identity.JWTSVID, 100)
			for range 100 {
				go func() { done <- w.jwt("x") }()
			}
			for range 100 {
				<-done
			}
			if _, n := w.signer.count(); n != 1 {
				t.Errorf("signed %d times", n)
			}
		})
	})
	t.Run("a token that turns out to be for one use is handed out once, and the next ones too", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			w.signer.jti = true
			seen := map[string]bool{}
			for range 5 {
				seen[w.jwt("x").Token] = true
			}
			if _, held := w.issuer.Counts(); len(seen) != 5 || held != 0 {
				t.Errorf("5 calls got %d tokens, and %d are held", len(seen), held)
			}
			// From the second on, callers at once do not share one either.
			tokens := make(chan string, 10)
			for range 10 {
				go func() { tokens <- w.jwt("x").Token }()
			}
			for range 10 {
				seen[<-tokens] = true
			}
			if len(seen) != 15 {
				t.Errorf("15 calls got %d tokens", len(seen))
			}
		})
	})
	t.Run("a token in use is renewed ahead, one that is not is dropped", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			for range 200 { // 100 minutes
				w.jwt("x")
				pass(30 * time.Second)
			}
			_, n := w.signer.count()
			if n < 30 || n > 60 {
				t.Errorf("signed %d times in 100 minutes", n)
			}
			pass(time.Hour)
			if _, after := w.signer.count(); after > n+2 {
				t.Errorf("signed %d times for nobody", after-n)
			}
			if _, held := w.issuer.Counts(); held != 0 {
				t.Errorf("%d held", held)
			}
		})
	})
	t.Run("a renewed token is there before anybody waits for it", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			w.jwt("x")
			w.signer.set(func() { w.signer.delay = 10 * time.Second })
			w.jwt("x")
			pass(3*time.Minute + 10*time.Second)
			began := time.Now()
			w.jwt("x")
			if time.Since(began) > 0 {
				t.Errorf("waited %v", time.Since(began))
			}
		})
	})
	t.Run("while the server is away a valid token is served, an expired one never", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			first := w.jwt("x")
			w.signer.set(func() { w.signer.err = errAway })
			pass(4 * time.Minute)
			if w.jwt("x") != first {
				t.Error("another token")
			}
			pass(time.Minute)
			if _, _, err := w.issuer.JWT(w.t.Context(), set("a:1"), []string{"x"}, spiffeid.ID{}); !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
		})
	})
	t.Run("a token with a jti is for one use", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			e := entry("e", 1, "a:1")
			e.JTI = true
			w.put(e)
			first := w.jwt("x")
			if w.jwt("x").Token == first.Token {
				t.Error("used twice")
			}
			if _, held := w.issuer.Counts(); held != 0 {
				t.Errorf("%d held", held)
			}
		})
	})
	for name, change := range map[string]func(w *world){
		"entry was changed": func(w *world) {
			e := entry("e", 1, "a:1")
			e.Revision = 1
			w.put(e)
		},
		"entry was deleted and made again": func(w *world) {
			w.delete("e")
			w.put(entry("e", 0, "a:1"))
		},
		"key was tainted": func(w *world) {
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence, w.bundle.JWT = 2, []identity.JWTAuthority{{KeyID: "k1", Tainted: true}}
			w.apply()
		},
		"key was revoked": func(w *world) {
			w.signer.set(func() { w.signer.jwtKey = "k2" })
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence, w.bundle.JWT = 2, []identity.JWTAuthority{{KeyID: "k2"}}
			w.apply()
		},
	} {
		t.Run("a token whose "+name+" is not given again", func(t *testing.T) {
			bubble(t, issue.Config{}, func(w *world) {
				w.put(entry("e", 1, "a:1"))
				first := w.jwt("x")
				change(w)
				if w.jwt("x").Token == first.Token {
					t.Error("it is")
				}
			})
		})
	}
	t.Run("a server that signs with a tainted key gets another chance, and nothing of it is kept", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence, w.bundle.JWT = 2, []identity.JWTAuthority{{KeyID: "k1", Tainted: true}, {KeyID: "k2"}}
			w.apply()
			first := w.jwt("x")
			if _, signed := w.signer.count(); signed != 2 {
				t.Errorf("signed %d times", signed)
			}
			w.signer.set(func() { w.signer.jwtKey = "k2" })
			if w.jwt("x").Token == first.Token {
				t.Error("the token was kept")
			}
		})
	})
	t.Run("a token that a revoked key signed is not given at all", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			w.bundle = w.bundle.Clone()
			w.bundle.Sequence, w.bundle.JWT = 2, []identity.JWTAuthority{{KeyID: "k2"}}
			w.apply()
			if svids, _, err := w.issuer.JWT(w.t.Context(), set("a:1"), []string{"x"}, spiffeid.ID{}); !errors.Is(err, identity.ErrUnavailable) {
				t.Errorf("got %v, %v", svids, err)
			}
		})
	})
	t.Run("the cache holds no more than its size, those used last", func(t *testing.T) {
		bubble(t, issue.Config{JWTSize: 3}, func(w *world) {
			w.put(entry("e", 1, "a:1"))
			for n := range 3 {
				w.jwt(fmt.Sprint(n))
			}
			zero := w.jwt("0")
			w.jwt("3")
			if _, held := w.issuer.Counts(); held != 3 {
				t.Errorf("%d held", held)
			}
			if w.jwt("0") != zero {
				t.Error("the one used last went")
			}
		})
	})
	t.Run("a token for another ID than the entry's is refused", func(t *testing.T) {
		bubble(t, issue.Config{}, func(w *world) {
			e := entry("e", 1, "a:1")
			e.SPIFFEID = spiffeid.RequireFromPath(td, "/other")
			w.put(e)
			if svids, _, err := w.issuer.JWT(w.t.Context(), set("a:1"), []string{"x"}, spiffeid.ID{}); err == nil {
				t.Errorf("got %v", svids)
			}
		})
	})
}
