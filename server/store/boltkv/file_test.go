package boltkv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/assay-id/assay/server/store/kv"
)

func put(t testing.TB, s *Store, key, value string) kv.Rev {
	t.Helper()
	rev, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(key, []byte(value))}})
	if err != nil {
		t.Fatalf("commit: %v", err)
	}
	return rev
}

func count(t testing.TB, s *Store) int {
	t.Helper()
	items, _, err := s.Range(t.Context(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	return len(items)
}

func TestPermissions(t *testing.T) {
	t.Run("file and directory are made for the owner only", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "data", "store.db")
		open(t, path)
		for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
			if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %v, %v", name, info.Mode(), err)
			}
		}
	})
	t.Run("a file that others may read is closed to them", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		_ = open(t, path).Close()
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		open(t, path)
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
	})
	t.Run("a directory that everybody may write is refused", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		_, err := Open(filepath.Join(dir, "store.db"), Config{})
		if err == nil || !strings.Contains(err.Error(), "can be written by everybody") || !strings.Contains(err.Error(), dir) {
			t.Error(err)
		}
	})
	t.Run("a symbolic link, a directory and a pipe are refused", func(t *testing.T) {
		dir := t.TempDir()
		link, sub := filepath.Join(dir, "link"), filepath.Join(dir, "sub")
		if err := os.Symlink(filepath.Join(dir, "target"), link); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		pipe := filepath.Join(dir, "pipe")
		if err := syscall.Mkfifo(pipe, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{link, sub, pipe} {
			if _, err := Open(path, Config{}); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("%s: %v", path, err)
			}
		}
	})
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	first := open(t, path)
	put(t, first, "a", "1")
	t.Run("a second server is refused in one sentence that names the file", func(t *testing.T) {
		_, err := Open(path, Config{LockTimeout: time.Millisecond})
		if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "another assay-server is using "+path) {
			t.Error(err)
		}
		put(t, first, "b", "1") // and does the first no harm
	})
	t.Run("a second server waits for the first to go", func(t *testing.T) {
		var group sync.WaitGroup
		group.Go(func() {
			second, err := Open(path, Config{LockTimeout: time.Minute})
			if err != nil {
				t.Error(err)
				return
			}
			if n := count(t, second); n != 2 {
				t.Errorf("%d items", n)
			}
			if err := second.Close(); err != nil {
				t.Error(err)
			}
		})
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		group.Wait()
	})
}

func TestReplaced(t *testing.T) {
	t.Run("a file that is replaced while somebody waits for it is not mistaken for the new one", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		for _, p := range []string{path, path + ".new"} {
			if err := open(t, p).Close(); err != nil {
				t.Fatal(err)
			}
		}
		unlock, err := Lock(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Lock(path); !errors.Is(err, ErrLocked) {
			t.Errorf("locked twice: %v", err)
		}
		waiting := make(chan struct{})
		var group sync.WaitGroup
		group.Go(func() {
			close(waiting)
			s, err := Open(path, Config{LockTimeout: time.Minute})
			if err == nil {
				// It came to open the file after the other took its place.
				if s.ID() == "" {
					t.Error("no identity")
				}
				_ = s.Close()
			} else if !strings.Contains(err.Error(), "was replaced") {
				t.Error(err)
			}
		})
		<-waiting
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		if err := unlock(); err != nil {
			t.Fatal(err)
		}
		group.Wait()
	})
}

func TestBackupAndRestore(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "store.db"))
	for i := range 200 {
		put(t, s, fmt.Sprintf("k/%d", i), strings.Repeat("v", 500))
	}
	var backup bytes.Buffer
	// Half way through, others write.
	pipe, w := io.Pipe()
	var group sync.WaitGroup
	group.Go(func() {
		rev, err := s.Backup(context.Background(), w)
		if rev != 200 {
			t.Errorf("the copy is said to have revision %d", rev)
		}
		w.CloseWithError(err)
	})
	if _, err := io.CopyN(&backup, pipe, 10_000); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		put(t, s, fmt.Sprintf("later/%d", i), strings.Repeat("v", 500))
	}
	if _, err := io.Copy(&backup, pipe); err != nil {
		t.Fatal(err)
	}
	group.Wait()

	path := filepath.Join(dir, "restored", "store.db")
	t.Run("a restored store has the items and revision, and a new identity", func(t *testing.T) {
		if err := Restore(path, bytes.NewReader(backup.Bytes())); err != nil {
			t.Fatal(err)
		}
		r := open(t, path)
		if rev, err := r.Rev(t.Context()); rev != 200 || count(t, r) != 200 || err != nil {
			t.Errorf("revision %d, %d items, %v", rev, count(t, r), err)
		}
		if r.ID() == s.ID() || r.ID() == "" {
			t.Errorf("identity %q, was %q", r.ID(), s.ID())
		}
		id := r.ID()
		put(t, r, "new", "1")
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if again := open(t, path); again.ID() != id {
			t.Error("the identity changed when it was opened again")
		}
		if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
			t.Errorf("left over: %v, %v", entries, err)
		}
	})
	t.Run("nothing is overwritten", func(t *testing.T) {
		if err := Restore(path, bytes.NewReader(backup.Bytes())); err == nil {
			t.Error("it was")
		}
	})
	t.Run("half a backup, an empty one or noise is refused and leaves nothing", func(t *testing.T) {
		dir := t.TempDir()
		for _, b := range [][]byte{nil, backup.Bytes()[:backup.Len()/2], bytes.Repeat([]byte("x"), 1<<16)} {
			if err := Restore(filepath.Join(dir, "store.db"), bytes.NewReader(b)); err == nil {
				t.Errorf("%d bytes were accepted", len(b))
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
			t.Errorf("left over: %v, %v", entries, err)
		}
	})
}

// sample returns the bytes of a store with branch pages, overflow pages and free pages.
func sample(t testing.TB) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store.db")
	s := open(t, path)
	for i := range 30 {
		var ops []kv.Op
		for j := range 40 {
			ops = append(ops, kv.Put(fmt.Sprintf("key/%02d/%02d", i, j), bytes.Repeat([]byte{byte(i)}, 100)))
		}
		if _, err := s.Commit(t.Context(), kv.Txn{Ops: ops}); err != nil {
			t.Fatal(err)
		}
	}
	put(t, s, "big", strings.Repeat("B", 20_000))
	if err := s.Compact(t.Context(), 5); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// bbolt makes the file larger than it needs to be.
	c := &checker{file: bytes.NewReader(b), size: int64(len(b))}
	if _, err := c.meta(); err != nil {
		t.Fatal(err)
	}
	return b[:int64(c.pages)*c.pageSize]
}

func openBytes(t testing.TB, b []byte) (string, *Store, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store.db")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(path, Config{})
	return path, s, err
}

func TestDamage(t *testing.T) {
	whole := sample(t)
	t.Run("the undamaged file opens", func(t *testing.T) {
		_, s, err := openBytes(t, whole)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if n := count(t, s); n != 1201 {
			t.Errorf("%d items", n)
		}
	})
	for name, damage := range map[string]func([]byte) []byte{
		"cut short by half":      func(b []byte) []byte { return b[:len(b)/2] },
		"cut after the metas":    func(b []byte) []byte { return b[:8192] },
		"only some bytes":        func(b []byte) []byte { return b[:100] },
		"both meta pages zeroed": func(b []byte) []byte { clear(b[:8192]); return b },
		"data pages zeroed":      func(b []byte) []byte { clear(b[8192:]); return b },
		"no bytes":               func([]byte) []byte { return nil },
		"text":                   func([]byte) []byte { return bytes.Repeat([]byte("hello "), 10_000) },
		"a value changed":        func(b []byte) []byte { return flip(b, bytes.Repeat([]byte{7}, 100)) },
		"a big value changed":    func(b []byte) []byte { return flip(b, bytes.Repeat([]byte{'B'}, 5000)) },
	} {
		t.Run("a file with "+name+" is refused by name, with the lock let go", func(t *testing.T) {
			path, s, err := openBytes(t, damage(bytes.Clone(whole)))
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) {
				t.Errorf("store %v, error %v", s, err)
			}
			if _, err := Open(path, Config{LockTimeout: time.Millisecond}); errors.Is(err, ErrLocked) {
				t.Error("the file is still locked")
			}
		})
	}
	t.Run("an inspection finds all of the damage, says what is lost, and changes nothing", func(t *testing.T) {
		b := flip(bytes.Clone(whole), bytes.Repeat([]byte{7}, 100))
		zeroed := clearLeaf(t, b, "key/20/")
		path := filepath.Join(t.TempDir(), "store.db")
		if err := os.WriteFile(path, b, 0o400); err != nil {
			t.Fatal(err)
		}
		damages, err := Inspect(path)
		if err != nil {
			t.Fatal(err)
		}
		text := errors.Join(damages...).Error()
		if !strings.Contains(text, `item "key/07/`) || !strings.Contains(text, fmt.Sprintf("page %d", zeroed)) ||
			!strings.Contains(text, `items from "key/`) || len(damages) < 3 {
			t.Errorf("found:\n%s", text)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, b) {
			t.Errorf("the file was changed: %v", err)
		}
	})
	t.Run("an inspection of a whole file finds nothing, and waits for no server", func(t *testing.T) {
		path, s, err := openBytes(t, bytes.Clone(whole))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Inspect(path); !errors.Is(err, ErrLocked) {
			t.Errorf("in use: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if damages, err := Inspect(path); len(damages) > 0 || err != nil {
			t.Errorf("%v, %v", damages, err)
		}
	})
	t.Run("a file of another program is refused", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		db, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("theirs")); return err })
		if err = errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path, Config{}); err == nil || !strings.Contains(err.Error(), "another program") {
			t.Error(err)
		}
	})
	t.Run("a file of a newer version is refused", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		s := open(t, path)
		err := s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(formatKey, []byte{format + 1}) })
		if err = errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path, Config{}); err == nil || !strings.Contains(err.Error(), "newer") {
			t.Error(err)
		}
	})
	t.Run("one newest meta page torn by a power cut is no damage", func(t *testing.T) {
		newest := 0
		if order.Uint64(whole[4096+16+48:]) > order.Uint64(whole[16+48:]) {
			newest = 4096
		}
		b := bytes.Clone(whole)
		clear(b[newest+40 : newest+80])
		// The last transaction did not write over pages that the one before it left in use.
		_, s, err := openBytes(t, b)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
	})
	t.Run("random damage is found or harmless, never a crash", func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		found := 0
		for range 80 {
			b := bytes.Clone(whole)
			for range 1 + random.IntN(4) {
				at := random.IntN(len(b))
				if random.IntN(2) == 0 { // aim at a page header or its elements
					at = at&^4095 + random.IntN(64)
				}
				b[at] ^= byte(1 + random.IntN(255))
			}
			_, s, err := openBytes(t, b)
			if err != nil {
				// The format number or the name of a bucket may have been hit.
				if !errors.Is(err, ErrDamaged) && !strings.Contains(err.Error(), "newer") && !strings.Contains(err.Error(), "another program") {
					t.Errorf("error is %v", err)
				}
				found++
				continue
			}
			if n := count(t, s); n != 1201 {
				t.Errorf("%d items were silently accepted", n)
			}
			_ = s.Close()
		}
		if found == 0 {
			t.Error("nothing was found")
		}
	})
}

// flip changes one bit in the middle of each place that holds the pattern: the first may be on a page
// that is free by now.
func flip(b, pattern []byte) []byte {
	found := false
	for at := 0; ; {
		next := bytes.Index(b[at:], pattern)
		if next < 0 {
			break
		}
		b[at+next+len(pattern)/2] ^= 4
		at, found = at+next+len(pattern), true
	}
	if !found {
		panic("pattern is not in the file")
	}
	return b
}

// FuzzCheckFile looks for bytes that make the check panic or run away.
func FuzzCheckFile(f *testing.F) {
	path := filepath.Join(f.TempDir(), "store.db")
	s := open(f, path)
	put(f, s, "a", "1")
	_ = s.Close()
	b, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:32<<10])
	f.Fuzz(func(t *testing.T, b []byte) {
		err := checkFile(bytes.NewReader(b), int64(len(b)))
		if err == nil && len(b) < 4096 {
			t.Error("a file of less than a page is whole")
		}
	})
}

func FuzzDecodeLog(f *testing.F) {
	f.Add(uint64(7), encodeLog(7, []kv.Op{kv.Put("a", []byte("1")), kv.Del("b"), kv.Put("", nil)}))
	f.Fuzz(func(t *testing.T, rev uint64, b []byte) {
		for _, b := range [][]byte{b, order32(logSum(kv.Rev(rev), b), b)} { // as it is, and with a right checksum
			var ops []kv.Op
			err := decodeLog(kv.Rev(rev), b, func(k, v []byte, del bool) {
				ops = append(ops, kv.Op{Key: string(k), Value: v, Delete: del})
			})
			if err != nil {
				continue
			}
			n := 0
			err = decodeLog(kv.Rev(rev), encodeLog(kv.Rev(rev), ops), func(k, v []byte, del bool) {
				if ops[n].Key != string(k) || !bytes.Equal(ops[n].Value, v) || ops[n].Delete != del {
					t.Errorf("operation %d differs", n)
				}
				n++
			})
			if err != nil || n != len(ops) {
				t.Errorf("%d of %d operations, %v", n, len(ops), err)
			}
		}
	})
}

func order32(sum uint32, b []byte) []byte {
	return append(bytes.Clone(b), byte(sum>>24), byte(sum>>16), byte(sum>>8), byte(sum))
}

// clearLeaf overwrites with zeros the live leaf page that begins with a key of the prefix, and returns
// its number.
func clearLeaf(t *testing.T, b []byte, prefix string) int {
	t.Helper()
	c := &checker{file: bytes.NewReader(b), size: int64(len(b)), limit: maxDamages}
	c.walk()
	for id := 2; id < len(c.seen); id++ {
		page := b[id*int(c.pageSize) : (id+1)*int(c.pageSize)]
		if c.seen[id] && order.Uint16(page[8:]) == flagLeaf && bytes.Contains(page, []byte(prefix)) && !bytes.Contains(page, []byte("key/07/")) {
			clear(page)
			return id
		}
	}
	t.Fatal("no such page")
	return 0
}

func TestReadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	s := open(t, path)
	put(t, s, "a", "1")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("a store that is opened for reading can be read, and nothing about its file changes", func(t *testing.T) {
		r, err := Open(path, Config{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if n := count(t, r); n != 1 || r.ID() != s.ID() {
			t.Errorf("%d items, identity %q", n, r.ID())
		}
		if _, err := r.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("b", nil)}}); !errors.Is(err, ErrReadOnly) {
			t.Errorf("commit: %v", err)
		}
		if err := r.Compact(t.Context(), 1); !errors.Is(err, ErrReadOnly) {
			t.Errorf("compact: %v", err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		after, err := os.ReadFile(path)
		info, statErr := os.Stat(path)
		if err != nil || statErr != nil || !bytes.Equal(before, after) || info.Mode().Perm() != 0o444 {
			t.Errorf("changed: %v, %v, mode %v", err, statErr, info.Mode())
		}
	})
	t.Run("one that is not there is not made", func(t *testing.T) {
		none := filepath.Join(t.TempDir(), "none", "store.db")
		if _, err := Open(none, Config{ReadOnly: true}); !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Dir(none)); err == nil {
			t.Error("its folder was made")
		}
	})
}
