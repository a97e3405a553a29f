package boltkv

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestInspectBesideOthers(t *testing.T) {
	t.Run("a file that grew until the server let go of it is whole", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			whole := sample(t)
			path := filepath.Join(t.TempDir(), "store.db")
			write := func(b []byte) error { return os.WriteFile(path, b, 0o600) }
			if err := write(whole[:len(whole)/2]); err != nil {
				t.Fatal(err)
			}
			unlock, err := Lock(path) // as a server does
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() {
				damages, err := Inspect(path)
				done <- errors.Join(append(damages, err)...)
			}()
			synctest.Wait() // it has the file open and waits for the lock
			if err := errors.Join(write(whole), unlock()); err != nil {
				t.Error(err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("two may read the same copy at once", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		if err := open(t, path).Close(); err != nil {
			t.Fatal(err)
		}
		other, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := lock(other, syscall.LOCK_SH, time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if damages, err := Inspect(path); len(damages) > 0 || err != nil {
			t.Errorf("%v, %v", damages, err)
		}
	})
}

// atEnd reads a copy and calls then at its end.
type atEnd struct {
	io.Reader
	then func()
}

func (r *atEnd) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if errors.Is(err, io.EOF) {
		r.then()
	}
	return n, err
}

func TestRestoreBesideAServer(t *testing.T) {
	whole := sample(t)
	path := filepath.Join(t.TempDir(), "store.db")
	var s *Store
	err := Restore(path, &atEnd{Reader: bytes.NewReader(whole), then: func() { s = open(t, path) }})
	if !errors.Is(err, os.ErrExist) {
		t.Errorf("a store that a server made meanwhile is replaced: %v", err)
	}
	put(t, s, "k", "v")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := count(t, open(t, path)); n != 1 {
		t.Errorf("%d items at %s, want the one that the server wrote", n, path)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("left over: %v, %v", left, err)
	}
}
