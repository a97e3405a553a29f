package keep_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	agentID = spiffeid.RequireFromPath(td, "/spire/agent/x/y")
)

func certificate(t *testing.T, id spiffeid.ID, ca bool) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{id.URL()}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: ca,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// open opens dir as a new process would.
func open(t *testing.T, dir string) (*keep.Keep, *logtest.Hook) {
	t.Helper()
	keys, err := keep.DiskKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	log, hook := logtest.NewNullLogger()
	k, err := keep.Open(dir, keys, log)
	if err != nil {
		t.Fatal(err)
	}
	return k, hook
}

// flush writes what is due, as a stopping agent does.
func flush(t *testing.T, k *keep.Keep) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

func fill(t *testing.T, k *keep.Keep) (*keep.Own, *identity.Bundle, *keep.Picture, keep.SVID) {
	t.Helper()
	cert, key := certificate(t, agentID, false)
	own := &keep.Own{Chain: []*x509.Certificate{cert}, Key: key, Reattestable: true}
	if err := k.SaveOwn(own); err != nil {
		t.Fatal(err)
	}
	ca, jwtKey := certificate(t, td.ID(), true)
	bundle := &identity.Bundle{
		TrustDomain: td, Sequence: 4, X509: []identity.X509Authority{{Certificate: ca, Tainted: true}},
		JWT: []identity.JWTAuthority{{KeyID: "k", Key: jwtKey.Public()}},
	}
	if err := k.SaveBundle(bundle); err != nil {
		t.Fatal(err)
	}
	e := &identity.Entry{
		ID: "e1", SPIFFEID: spiffeid.RequireFromPath(td, "/w"), Revision: 3, Hint: "h", CreatedAt: time.Unix(99, 0).UTC(),
		Selectors: attestor.NewSet(attestor.Selector{Type: "unix", Value: "uid:1"}),
	}
	picture := &keep.Picture{
		StoreID: "store", Rev: 12, Entries: []*identity.Entry{e}, Bundles: []*identity.Bundle{bundle}, HeardAt: time.Unix(1234, 0),
		Verdicts: []*identity.Verdict{{
			Digest: "sha256:" + strings.Repeat("a", 64), Seq: 7, NotAfter: time.Unix(99, 0).UTC(),
			Selectors: attestor.NewSet(attestor.Selector{Type: "scan", Value: "policy:prod"}),
			Policies:  []identity.PolicyVerdict{{Policy: "prod", Status: "pass", Summary: "nothing found"}},
		}},
	}
	k.SavePicture(picture)
	leaf, leafKey := certificate(t, e.SPIFFEID, false)
	der, err := x509.MarshalPKCS8PrivateKey(leafKey)
	if err != nil {
		t.Fatal(err)
	}
	svid := keep.SVID{
		SVID: &identity.X509SVID{
			EntryID: "e1", ID: e.SPIFFEID, Chain: [][]byte{leaf.Raw}, Key: leafKey, KeyDER: der,
			NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Hint: "h",
		},
		EntryRevision: 3, EntryCreatedAt: time.Unix(99, 0).UTC(),
	}
	k.SaveSVIDs(func() []keep.SVID { return []keep.SVID{svid} })
	flush(t, k)
	return own, bundle, picture, svid
}

func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	k, _ := open(t, dir)
	own, bundle, picture, svid := fill(t, k)

	k, hook := open(t, dir)
	t.Run("the agent's SVID", func(t *testing.T) {
		got := k.Own()
		if got == nil || !got.Chain[0].Equal(own.Chain[0]) || !own.Key.(*ecdsa.PrivateKey).Equal(got.Key) || !got.Reattestable {
			t.Fatalf("got %+v", got)
		}
	})
	t.Run("the bundle", func(t *testing.T) {
		got := k.Bundle()
		if got == nil || got.Sequence != bundle.Sequence || !got.X509[0].Tainted || got.JWT[0].KeyID != "k" {
			t.Fatalf("got %+v", got)
		}
	})
	t.Run("the picture", func(t *testing.T) {
		got := k.Picture()
		if got == nil || got.StoreID != "store" || got.Rev != 12 || len(got.Bundles) != 1 {
			t.Fatalf("got %+v", got)
		}
		same := cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })
		sets := cmp.Comparer(func(a, b attestor.Set) bool { return a.Equal(b) })
		if diff := cmp.Diff(picture.Entries, got.Entries, same, sets); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(picture.Verdicts, got.Verdicts, sets); diff != "" || !got.HeardAt.Equal(picture.HeardAt) {
			t.Error(diff, got.HeardAt)
		}
	})
	t.Run("the workloads' SVIDs", func(t *testing.T) {
		got := k.SVIDs()
		if len(got) != 1 || !bytes.Equal(got[0].SVID.Chain[0], svid.SVID.Chain[0]) || got[0].EntryRevision != 3 ||
			!got[0].EntryCreatedAt.Equal(svid.EntryCreatedAt) || got[0].SVID.ID != svid.SVID.ID || got[0].SVID.Hint != "h" {
			t.Fatalf("got %+v", got)
		}
	})
	if len(hook.AllEntries()) != 0 {
		t.Errorf("said %v", hook.LastEntry())
	}
}

func TestFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	k, _ := open(t, dir)
	_, _, _, svid := fill(t, k)
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("are for their owner only, and nothing temporary is left", func(t *testing.T) {
		if len(files) != 5 {
			t.Errorf("files: %v", files)
		}
		for _, f := range files {
			info, err := f.Info()
			if err != nil || info.Mode().Perm() != 0o600 || strings.HasPrefix(f.Name(), ".") {
				t.Errorf("%s: %v %v", f.Name(), info.Mode(), err)
			}
		}
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("directory: %v %v", info.Mode(), err)
		}
	})
	t.Run("do not show what is in them", func(t *testing.T) {
		for _, f := range files {
			raw, err := os.ReadFile(filepath.Join(dir, f.Name()))
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(raw, svid.SVID.KeyDER) || bytes.Contains(raw, []byte("example.org")) {
				t.Errorf("%s is readable", f.Name())
			}
		}
	})
}

func TestDamage(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"a flipped bit":     func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"a cut file":        func(b []byte) []byte { return b[:len(b)/2] },
		"an empty file":     func([]byte) []byte { return nil },
		"a foreign file":    func([]byte) []byte { return []byte("hello, this is some text that is long enough to be sealed") },
		"a newer version":   func(b []byte) []byte { b[8] = 9; return b },
		"a cut header":      func(b []byte) []byte { return b[:9] },
		"appended bytes":    func(b []byte) []byte { return append(b, 0) },
		"a shortened nonce": func(b []byte) []byte { return append(b[:10], b[11:]...) },
	} {
		for _, file := range []string{"own.sealed", "bundle.sealed", "picture.sealed", "svids.sealed"} {
			t.Run(name+" in "+file+" is named and starts afresh", func(t *testing.T) {
				dir := t.TempDir()
				k, _ := open(t, dir)
				fill(t, k)
				path := filepath.Join(dir, file)
				raw, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, damage(raw), 0o600); err != nil {
					t.Fatal(err)
				}
				k, hook := open(t, dir)
				found := map[string]bool{
					"own.sealed": k.Own() != nil, "bundle.sealed": k.Bundle() != nil,
					"picture.sealed": k.Picture() != nil, "svids.sealed": k.SVIDs() != nil,
				}
				for f, there := range found {
					if there == (f == file) {
						t.Errorf("%s: there is %v", f, there)
					}
				}
				last := hook.LastEntry()
				if len(hook.AllEntries()) != 1 || last.Level != logrus.ErrorLevel || last.Data["file"] != path {
					t.Errorf("said %v", hook.AllEntries())
				}
				if _, err := os.Stat(path + ".bad"); err != nil {
					t.Errorf("was not put aside: %v", err)
				}
				fill(t, k)
			})
		}
	}
	t.Run("one file in the place of another", func(t *testing.T) {
		dir := t.TempDir()
		k, _ := open(t, dir)
		fill(t, k)
		raw, err := os.ReadFile(filepath.Join(dir, "svids.sealed"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "picture.sealed"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if k.Picture() != nil {
			t.Error("was taken")
		}
	})
	t.Run("files under another key", func(t *testing.T) {
		dir := t.TempDir()
		k, _ := open(t, dir)
		fill(t, k)
		if err := os.Remove(filepath.Join(dir, "agent-keys.json")); err != nil {
			t.Fatal(err)
		}
		k, hook := open(t, dir)
		if k.Own() != nil || len(hook.AllEntries()) != 1 {
			t.Errorf("said %v", hook.AllEntries())
		}
	})
}

func TestKeys(t *testing.T) {
	for name, content := range map[string]string{
		"no bytes":    "",
		"no JSON":     "x",
		"half of it":  `{"version":1,"seal":"AAAAAAAAAAAAAAAAAAAAAAAA`,
		"a short key": `{"version":1,"seal":"AAAA"}`,
	} {
		t.Run("a key store with "+name+" is put aside and replaced, loudly", func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "agent-keys.json")
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			keys, err := keep.DiskKeys(dir)
			if err != nil {
				t.Fatal(err)
			}
			log, hook := logtest.NewNullLogger()
			k, err := keep.Open(dir, keys, log)
			if err != nil {
				t.Fatal(err)
			}
			if err := k.Lost(); err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "AAAA") {
				t.Errorf("lost: %v", err)
			}
			if e := hook.LastEntry(); e == nil || e.Level != logrus.ErrorLevel {
				t.Errorf("logged %v", e)
			}
			if aside, err := os.ReadFile(path + ".bad"); err != nil || string(aside) != content {
				t.Errorf("aside: %q, %v", aside, err)
			}
			fill(t, k) // and the new one does
			if keys, err = keep.DiskKeys(dir); err != nil {
				t.Fatal(err)
			}
			if k, err = keep.Open(dir, keys, log); err != nil || k.Own() == nil || k.Lost() != nil {
				t.Errorf("not as it was left: %v, %v", err, k.Lost())
			}
		})
	}
	t.Run("a key store of a newer agent, or one that cannot be read, is an error that names it", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "agent-keys.json")
		if err := os.WriteFile(path, []byte(`{"version":2,"seal":"AAAA"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := keep.DiskKeys(dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v", err)
		}
		if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
			t.Fatal(err)
		}
		if _, err := keep.DiskKeys(dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("keys in memory leave nothing on disk", func(t *testing.T) {
		dir := t.TempDir()
		log, _ := logtest.NewNullLogger()
		k, err := keep.Open(dir, keep.MemoryKeys(), log)
		if err != nil {
			t.Fatal(err)
		}
		fill(t, k)
		files, err := os.ReadDir(dir)
		if err != nil || len(files) != 0 {
			t.Errorf("files: %v %v", files, err)
		}
	})
}

// TestNoRoom has something else be where a file belongs, as a full disk would: what is to be kept gets there by
// itself when it can, as it is by then, and the log is not filled meanwhile.
func TestNoRoom(t *testing.T) {
	dir := t.TempDir()
	k, _ := open(t, dir)
	_, _, picture, _ := fill(t, k)
	path := filepath.Join(dir, "picture.sealed")
	if err := errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		k, hook := open(t, dir)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = k.Run(ctx) }()
		for range 40 {
			next := *picture
			next.Rev++
			picture = &next
			k.SavePicture(picture)
			time.Sleep(time.Second)
		}
		if said := hook.AllEntries(); len(said) != 1 || !strings.Contains(said[0].Message, "cannot be kept") || said[0].Level != logrus.WarnLevel {
			t.Errorf("of 40 attempts it said %v", said)
		}
		time.Sleep(11 * time.Minute) // it tries again, and reminds
		if said := hook.AllEntries(); len(said) != 2 || said[1].Data["unsaid"].(int) < 60 {
			t.Errorf("in ten minutes more it said %v", said)
		}
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		if said := hook.AllEntries(); len(said) != 3 || !strings.Contains(said[2].Message, "kept on disk again") {
			t.Errorf("in the end it said %v", said)
		}
		time.Sleep(time.Hour)
		if said := hook.AllEntries(); len(said) != 3 {
			t.Errorf("it goes on with %v", said[3:])
		}
		cancel()
		<-done
	})
	k, _ = open(t, dir)
	if got := k.Picture(); got == nil || got.Rev != 52 {
		t.Errorf("what is kept is %+v", got)
	}
}

func TestWipe(t *testing.T) {
	dir := t.TempDir()
	k, _ := open(t, dir)
	fill(t, k)
	if err := k.Wipe(); err != nil {
		t.Fatal(err)
	}
	k, hook := open(t, dir)
	if k.Own() != nil || k.Bundle() != nil || k.Picture() != nil || k.SVIDs() != nil || len(hook.AllEntries()) != 0 {
		t.Errorf("something is left; said %v", hook.AllEntries())
	}
	if err := k.DropOwn(); err != nil {
		t.Errorf("dropping what is not there: %v", err)
	}
}

// FuzzFile feeds foreign bytes to every reader: nothing of it may be believed, or crash.
func FuzzFile(f *testing.F) {
	f.Add([]byte("ASSAYKEP\x01"))
	f.Add([]byte("ASSAYKEP\x01aaaaaaaaaaaabbbbbbbbbbbbbbbb"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		k, _ := open(t, dir)
		for _, file := range []string{"own.sealed", "bundle.sealed", "picture.sealed", "svids.sealed"} {
			if err := os.WriteFile(filepath.Join(dir, file), raw, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if k.Own() != nil || k.Bundle() != nil || k.Picture() != nil || k.SVIDs() != nil {
			t.Error("foreign bytes were believed")
		}
	})
}
