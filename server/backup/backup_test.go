package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

var domain = spiffeid.RequireTrustDomainFromString("example.org")

// state is a data directory with a store, keys and authorities.
type state struct {
	Place
	store *boltkv.Store
	rec   *records.Records
}

// newState makes one and leaves it open until close is called or the test ends.
func newState(t *testing.T, dir string) *state {
	t.Helper()
	s := &state{Place: Place{DataDir: dir}}
	var err error
	if s.store, err = boltkv.Open(filepath.Join(dir, StoreFile), boltkv.Config{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.store.Close() })
	if s.rec, err = records.Open(t.Context(), s.store, domain, records.Config{}); err != nil {
		t.Fatal(err)
	}
	disk, err := keys.OpenDisk(filepath.Join(dir, "keys.json"), logrus.New())
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if _, err := ca.Open(t.Context(), disk, s.rec, domain, ca.Config{}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *state) create(t *testing.T, n int) {
	t.Helper()
	var batch []*identity.Entry
	for i := range n {
		batch = append(batch, &identity.Entry{
			SPIFFEID: spiffeid.RequireFromPathf(domain, "/e/%d/%d", time.Now().UnixNano(), i),
			ParentID: spiffeid.RequireFromPath(domain, "/node"), Selectors: attestor.NewSet(attestor.Selector{Type: "unix", Value: "uid:1"}),
		})
	}
	results, _, err := s.rec.CreateEntries(t.Context(), batch)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
}

func (s *state) close(t *testing.T) {
	t.Helper()
	if err := s.store.Close(); err != nil {
		t.Fatal(err)
	}
}

func (s *state) snapshots(t *testing.T, cfg Config) *Snapshots {
	t.Helper()
	made, err := New(s.store, s.Place.snapshots(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func take(t *testing.T, s *Snapshots) Snapshot {
	t.Helper()
	made, err := s.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// wreck overwrites the middle of a file.
func wreck(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 3 * 4096; at+4096 <= len(b); at += 4096 {
		copy(b[at:], bytes.Repeat([]byte{0x5a}, 4096))
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func list(t *testing.T, dir string) []Snapshot {
	t.Helper()
	all, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestSnapshots(t *testing.T) {
	t.Run("a snapshot is a whole store of its own, its owner's alone", func(t *testing.T) {
		s := newState(t, t.TempDir())
		s.create(t, 10)
		made := take(t, s.snapshots(t, Config{}))
		info, err := os.Stat(made.Path)
		if err != nil || info.Mode().Perm() != 0o600 || info.Size() != made.Size {
			t.Errorf("%v, %v", info, err)
		}
		all := list(t, s.Place.snapshots())
		all = Verify(all)
		if len(all) != 1 || all[0] != made {
			t.Errorf("%+v, want %+v", all, made)
		}
	})
	t.Run("the newest are kept, in order, also when the clock was set back", func(t *testing.T) {
		s := newState(t, t.TempDir())
		var now atomic.Int64
		now.Store(1_800_000_000)
		snaps := s.snapshots(t, Config{Keep: 3, Now: func() time.Time { return time.Unix(now.Load(), 0) }})
		var made []string
		for i := range 6 {
			s.create(t, 1)
			made = append(made, take(t, snaps).Path)
			now.Add(3600)
			if i == 3 {
				now.Add(-100_000)
			}
		}
		all := list(t, s.Place.snapshots())
		if len(all) != 3 || all[0].Path != made[5] || all[1].Path != made[4] || all[2].Path != made[3] {
			t.Errorf("made %v, kept %v", made, all)
		}
	})
	t.Run("what a killed server left half done is no snapshot, and goes", func(t *testing.T) {
		s := newState(t, t.TempDir())
		half := filepath.Join(s.Place.snapshots(), hidden+"1")
		if err := os.MkdirAll(s.Place.snapshots(), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{half, filepath.Join(s.Place.snapshots(), "notes.txt"), filepath.Join(s.Place.snapshots(), "store-99999999T999999Z-r0000000001-ab.db")} {
			if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if all := list(t, s.Place.snapshots()); len(all) != 0 {
			t.Errorf("%v", all)
		}
		take(t, s.snapshots(t, Config{}))
		if _, err := os.Stat(half); err == nil {
			t.Error("it is still there")
		}
	})
	t.Run("a store that is damaged makes no snapshot, loudly, and the good ones stay", func(t *testing.T) {
		s := newState(t, t.TempDir())
		s.create(t, 200)
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		reg := prometheus.NewRegistry()
		snaps := s.snapshots(t, Config{Keep: 1, Log: log, Metrics: reg})
		good := take(t, snaps)
		snaps.store = torn{s.store}
		if _, err := snaps.Take(t.Context()); !errors.Is(err, boltkv.ErrDamaged) {
			t.Errorf("got %v", err)
		}
		if all := list(t, s.Place.snapshots()); len(all) != 1 || all[0] != good {
			t.Errorf("%v", all)
		}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() != "assay_server_snapshots_total" {
				continue
			}
			counted := map[string]float64{}
			for _, m := range f.GetMetric() {
				counted[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
			if counted["ok"] != 1 || counted["damaged"] != 1 || counted["failed"] != 0 {
				t.Errorf("counted %v", counted)
			}
		}
	})
	t.Run("a disk with too little room makes none", func(t *testing.T) {
		s := newState(t, t.TempDir())
		snaps := s.snapshots(t, Config{})
		snaps.store = huge{s.store}
		if _, err := snaps.Take(t.Context()); !errors.Is(err, ErrNoRoom) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a store that cannot be copied leaves nothing behind", func(t *testing.T) {
		s := newState(t, t.TempDir())
		snaps := s.snapshots(t, Config{})
		s.close(t)
		if _, err := snaps.Take(t.Context()); !errors.Is(err, kv.ErrClosed) {
			t.Errorf("got %v", err)
		}
		if left, _ := os.ReadDir(s.Place.snapshots()); len(left) != 0 {
			t.Errorf("left %v", left)
		}
	})
}

// torn is a store whose copies are damaged, as they are when its file is.
type torn struct{ *boltkv.Store }

func (s torn) Backup(ctx context.Context, w io.Writer) (kv.Rev, error) {
	var b bytes.Buffer
	rev, err := s.Store.Backup(ctx, &b)
	if err == nil {
		_, err = w.Write(b.Bytes()[:b.Len()-4096])
	}
	return rev, err
}

// huge is a store that no disk has room for.
type huge struct{ *boltkv.Store }

func (huge) Size() (int64, error) { return 1 << 60, nil }

func TestRun(t *testing.T) {
	t.Run("there is one at once, then one an interval if something changed, and a failed one is tried again soon", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newState(t, t.TempDir())
			snaps := s.snapshots(t, Config{Interval: time.Hour})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- snaps.Run(ctx) }()
			count := func(after time.Duration, want int) {
				t.Helper()
				<-time.After(after)
				if n := len(list(t, s.Place.snapshots())); n != want {
					t.Errorf("%d snapshots, want %d", n, want)
				}
			}
			count(time.Second, 1)
			count(3*time.Hour, 1) // nothing changed
			s.create(t, 1)
			count(50*time.Minute, 1)
			count(15*time.Minute, 2)
			s.create(t, 1)
			if err := os.Rename(s.Place.snapshots(), s.Place.snapshots()+".away"); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(s.Place.snapshots(), nil, 0o600); err != nil { // no folder can be there
				t.Fatal(err)
			}
			<-time.After(time.Hour)
			if err := errors.Join(os.Remove(s.Place.snapshots()), os.Rename(s.Place.snapshots()+".away", s.Place.snapshots())); err != nil {
				t.Fatal(err)
			}
			count(2*time.Minute, 3)
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("after a restart the interval goes on, and a restored store gets one of its own at once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newState(t, t.TempDir())
			snaps := s.snapshots(t, Config{Interval: time.Hour})
			take(t, snaps)
			<-time.After(20 * time.Minute)
			if wait := snaps.firstWait(); wait != 40*time.Minute {
				t.Errorf("waits %s", wait)
			}
			snaps.store = other{s.store}
			if wait := snaps.firstWait(); wait != 0 {
				t.Errorf("waits %s", wait)
			}
		})
	})
	t.Run("without an interval there is none", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newState(t, t.TempDir())
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Hour)
			defer cancel()
			if err := s.snapshots(t, Config{}).Run(ctx); err != nil || len(list(t, s.Place.snapshots())) != 0 {
				t.Error(err)
			}
		})
	})
}

// other is the same store with another identity.
type other struct{ *boltkv.Store }

func (other) ID() string { return "0123456789abcdef" }

func check(t *testing.T, p Place) (*Report, string) {
	t.Helper()
	r, err := Check(t.Context(), p, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, part := range r.Parts {
		fmt.Fprintln(&text, part.Name, part.Wrong, part.Advice)
	}
	return r, text.String()
}

func TestCheck(t *testing.T) {
	t.Run("a whole data directory is one, and is left as it is", func(t *testing.T) {
		s := newState(t, t.TempDir())
		s.create(t, 5)
		take(t, s.snapshots(t, Config{}))
		if _, err := Check(t.Context(), s.Place, time.Now()); !errors.Is(err, boltkv.ErrLocked) {
			t.Errorf("in use: %v", err)
		}
		s.close(t)
		before := tree(t, s.DataDir)
		r, text := check(t, s.Place)
		if !r.OK() || len(r.Parts) != 3 || len(r.Snapshots) != 1 || r.Snapshots[0].Damage != nil {
			t.Errorf("%+v\n%s", r, text)
		}
		if after := tree(t, s.DataDir); after != before {
			t.Errorf("was\n%s\nis\n%s", before, after)
		}
	})
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, s *state)
		want   string
	}{
		{"pages that were overwritten", func(t *testing.T, s *state) { t.Helper(); wreck(t, s.Place.store()) }, "restore -from"},
		{"a file that was cut short", func(t *testing.T, s *state) {
			t.Helper()
			if err := os.Truncate(s.Place.store(), 4096); err != nil {
				t.Fatal(err)
			}
		}, "restore -from"},
		{"a file that is empty", func(t *testing.T, s *state) {
			t.Helper()
			if err := os.Truncate(s.Place.store(), 0); err != nil {
				t.Fatal(err)
			}
		}, "the file is empty"},
		{"a file that is gone", func(t *testing.T, s *state) {
			t.Helper()
			if err := os.Remove(s.Place.store()); err != nil {
				t.Fatal(err)
			}
		}, "is missing, but"},
		{"a record that cannot be read", func(t *testing.T, s *state) {
			t.Helper()
			store, err := boltkv.Open(s.Place.store(), boltkv.Config{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("p/e/x", []byte{9})}})
			if err = errors.Join(err, store.Close()); err != nil {
				t.Fatal(err)
			}
		}, "p/e/x: it cannot be read"},
		{"lost keys", func(t *testing.T, s *state) {
			t.Helper()
			if err := errors.Join(os.Remove(s.keys()), os.Remove(s.keys()+".prev")); err != nil {
				t.Fatal(err)
			}
		}, "new_authority_on_lost_key"},
		{"a lost key file whose twin is there", func(t *testing.T, s *state) {
			t.Helper()
			if err := os.Remove(s.keys()); err != nil {
				t.Fatal(err)
			}
		}, "takes its place at the next start"},
	} {
		t.Run(c.name+" is told of with what to do", func(t *testing.T) {
			s := newState(t, t.TempDir())
			s.create(t, 200)
			take(t, s.snapshots(t, Config{}))
			s.close(t)
			c.damage(t, s)
			if r, text := check(t, s.Place); r.OK() || !strings.Contains(text, c.want) {
				t.Errorf("want %q in\n%s", c.want, text)
			}
		})
	}
	t.Run("the newest snapshot that is good is named, not the newest", func(t *testing.T) {
		s := newState(t, t.TempDir())
		s.create(t, 200)
		snaps := s.snapshots(t, Config{})
		good := take(t, snaps)
		s.create(t, 200)
		bad := take(t, snaps)
		s.close(t)
		wreck(t, bad.Path)
		wreck(t, s.Place.store())
		r, text := check(t, s.Place)
		if r.Snapshots[0].Damage == nil || r.Snapshots[1].Damage != nil || !strings.Contains(text, good.Path) || strings.Contains(text, bad.Path) {
			t.Errorf("%s", text)
		}
		err := Explain(s.Place, fmt.Errorf("open: %w", boltkv.ErrDamaged))
		if !errors.Is(err, boltkv.ErrDamaged) || !strings.Contains(err.Error(), "restore -from "+good.Path+" -dataDir "+s.DataDir+" -force") {
			t.Error(err)
		}
		wreck(t, good.Path)
		if err := Explain(s.Place, boltkv.ErrDamaged); !strings.Contains(err.Error(), "there is no good snapshot") {
			t.Error(err)
		}
		if err := Explain(s.Place, io.EOF); err != io.EOF { //nolint:errorlint // as it is
			t.Error(err)
		}
	})
	t.Run("with keys in memory there is no key file to miss", func(t *testing.T) {
		s := newState(t, t.TempDir())
		s.close(t)
		if err := errors.Join(os.Remove(s.keys()), os.Remove(s.keys()+".prev")); err != nil {
			t.Fatal(err)
		}
		s.KeysInMemory = true
		if r, text := check(t, s.Place); !r.OK() {
			t.Error(text)
		}
	})
	t.Run("a first start misses nothing", func(t *testing.T) {
		if err := Missing(Place{DataDir: t.TempDir()}); err != nil {
			t.Error(err)
		}
	})
}

// tree returns what is in a directory, contents and all.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		fmt.Fprintf(&out, "%s %s %x\n", path, info.Mode(), sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}
