package backup

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
)

func TestRestore(t *testing.T) {
	// copied returns a state that went on after a snapshot was made.
	copied := func(t *testing.T) (*state, Snapshot, string) {
		t.Helper()
		s := newState(t, t.TempDir())
		s.create(t, 3)
		made := take(t, s.snapshots(t, Config{}))
		s.create(t, 2)
		id := s.store.ID()
		s.close(t)
		return s, made, id
	}
	t.Run("the copy takes the place of the store with another identity, and the store is kept", func(t *testing.T) {
		s, made, id := copied(t)
		before, err := os.ReadFile(s.Place.store())
		if err != nil {
			t.Fatal(err)
		}
		done, err := Restore(t.Context(), Restoring{From: made.Path, DataDir: s.DataDir, Force: true, TrustDomain: domain, Now: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		if kept, err := os.ReadFile(done.Aside); err != nil || !bytes.Equal(kept, before) {
			t.Errorf("kept %s: %v", done.Aside, err)
		}
		store, err := boltkv.Open(s.Place.store(), boltkv.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		if store.ID() == id || done.Records.Entries != 3 {
			t.Errorf("identity %s, %d entries", store.ID(), done.Records.Entries)
		}
	})
	t.Run("twice in a second, and both are kept", func(t *testing.T) {
		s, made, _ := copied(t)
		now := time.Now()
		names := map[string]bool{}
		for range 3 {
			done, err := Restore(t.Context(), Restoring{From: made.Path, DataDir: s.DataDir, Force: true, Now: now})
			if err != nil {
				t.Fatal(err)
			}
			names[done.Aside] = true
		}
		if len(names) != 3 {
			t.Errorf("%v", names)
		}
	})
	t.Run("without force a store stays", func(t *testing.T) {
		s, made, _ := copied(t)
		before := tree(t, s.DataDir)
		_, err := Restore(t.Context(), Restoring{From: made.Path, DataDir: s.DataDir, Now: time.Now()})
		if !errors.Is(err, ErrExists) || tree(t, s.DataDir) != before {
			t.Error(err)
		}
	})
	t.Run("an empty file is no store to keep", func(t *testing.T) {
		s, made, _ := copied(t)
		if err := os.Truncate(s.Place.store(), 0); err != nil {
			t.Fatal(err)
		}
		done, err := Restore(t.Context(), Restoring{From: made.Path, DataDir: s.DataDir, Now: time.Now()})
		if err != nil || done.Aside != "" {
			t.Errorf("%+v, %v", done, err)
		}
	})
	t.Run("under a running server nothing is restored", func(t *testing.T) {
		s, made, _ := copied(t)
		store, err := boltkv.Open(s.Place.store(), boltkv.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		if _, err := Restore(t.Context(), Restoring{From: made.Path, DataDir: s.DataDir, Force: true, Now: time.Now()}); !errors.Is(err, boltkv.ErrLocked) {
			t.Error(err)
		}
	})
	for _, c := range []struct {
		name string
		spoil
	}{
		{"cut short", func(t *testing.T, path string) {
			t.Helper()
			if err := os.Truncate(path, 8192); err != nil {
				t.Fatal(err)
			}
		}},
		{"overwritten", func(t *testing.T, path string) { t.Helper(); wreck(t, path) }},
		{"empty", func(t *testing.T, path string) {
			t.Helper()
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		}},
		{"missing", func(t *testing.T, path string) {
			t.Helper()
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
		{"of records that make no sense", func(t *testing.T, path string) {
			t.Helper()
			store, err := boltkv.Open(path, boltkv.Config{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = store.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("q", nil)}})
			if err = errors.Join(err, store.Close()); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run("a copy that is "+c.name+" is refused and changes nothing", func(t *testing.T) {
			s, made, _ := copied(t)
			c.spoil(t, made.Path)
			before := tree(t, s.DataDir)
			_, err := Restore(t.Context(), Restoring{From: made.Path, DataDir: s.DataDir, Force: true, Now: time.Now()})
			if err == nil || !strings.Contains(err.Error(), made.Path) {
				t.Errorf("got %v", err)
			}
			if tree(t, s.DataDir) != before {
				t.Error("something changed")
			}
		})
	}
	t.Run("a copy of another trust domain is refused", func(t *testing.T) {
		s, made, _ := copied(t)
		_, err := Restore(t.Context(), Restoring{
			From: made.Path, DataDir: s.DataDir, Force: true, Now: time.Now(),
			TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"),
		})
		if err == nil || !strings.Contains(err.Error(), `belongs to trust domain "example.org", not "other.org"`) {
			t.Errorf("got %v", err)
		}
	})
}

type spoil func(t *testing.T, path string)
