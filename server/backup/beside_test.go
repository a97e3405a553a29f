package backup

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
)

// busy is a store that others write to before it is copied.
type busy struct {
	*boltkv.Store
	before func()
}

func (s busy) Backup(ctx context.Context, w io.Writer) (kv.Rev, error) {
	s.before()
	return s.Store.Backup(ctx, w)
}

// meanwhile is a context in which something happens while it is worked under.
type meanwhile struct {
	context.Context //nolint:containedctx // it is one
	once            *sync.Once
	then            func()
}

func (m meanwhile) Err() error {
	m.once.Do(m.then)
	return m.Context.Err()
}

func TestBesideOthers(t *testing.T) {
	t.Run("a snapshot has the revision of what is in it, and no other is made of the same", func(t *testing.T) {
		s := newState(t, t.TempDir())
		snaps := s.snapshots(t, Config{})
		snaps.store = busy{s.store, func() { s.create(t, 1) }}
		made := take(t, snaps)
		if rev, err := s.store.Rev(t.Context()); made.Rev != rev || err != nil {
			t.Errorf("the snapshot says %d, in it is %d: %v", made.Rev, rev, err)
		}
		if again, err := snaps.take(t.Context(), false); again != made || err != nil {
			t.Errorf("made %+v again: %v", again, err)
		}
	})
	t.Run("a snapshot that was removed since it was listed is not damaged", func(t *testing.T) {
		s := newState(t, t.TempDir())
		snaps := s.snapshots(t, Config{})
		take(t, snaps)
		take(t, snaps)
		all := list(t, s.Place.snapshots())
		if err := os.Remove(all[1].Path); err != nil {
			t.Fatal(err)
		}
		if left := Verify(all); len(left) != 1 || left[0] != all[0] {
			t.Errorf("%+v", left)
		}
	})
	t.Run("the store of a server that starts at the same time is not missed", func(t *testing.T) {
		p := Place{DataDir: t.TempDir()}
		lstat := func(path string) (fs.FileInfo, error) {
			info, err := os.Lstat(path)
			for _, made := range []string{p.store(), p.keys()} {
				if err := os.WriteFile(made, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			return info, err
		}
		if err := missing(p, lstat); err != nil {
			t.Error(err)
		}
	})
	t.Run("the store that a server makes while a copy is read is not replaced", func(t *testing.T) {
		from := newState(t, t.TempDir())
		made := take(t, from.snapshots(t, Config{}))
		dir := t.TempDir()
		var server *boltkv.Store
		ctx := meanwhile{t.Context(), new(sync.Once), func() {
			var err error
			if server, err = boltkv.Open(filepath.Join(dir, StoreFile), boltkv.Config{}); err != nil {
				t.Fatal(err)
			}
		}}
		_, err := Restore(ctx, Restoring{From: made.Path, DataDir: dir, Now: time.Now()})
		if !errors.Is(err, ErrExists) {
			t.Errorf("got %v", err)
		}
		id := server.ID()
		if err := server.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := boltkv.Open(filepath.Join(dir, StoreFile), boltkv.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if again.ID() != id {
			t.Error("another store is in its place")
		}
	})
}
