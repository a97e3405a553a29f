package boltkv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/assay-id/assay/server/store/kv"
)

// groups returns how many groups of commits reached the disk.
func groups(t testing.TB, registry *prometheus.Registry) int {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "assay_store_group_commits" {
			return int(f.GetMetric()[0].GetHistogram().GetSampleCount())
		}
	}
	return 0
}

// waiting returns when n commits wait for the next group.
func waiting(s *Store, n int) {
	for {
		s.mu.Lock()
		queued := len(s.queue)
		s.mu.Unlock()
		if queued == n {
			return
		}
		runtime.Gosched()
	}
}

// leads returns when a group is being written.
func leads(s *Store) {
	for {
		s.mu.Lock()
		underway := s.leading && len(s.queue) == 0
		s.mu.Unlock()
		if underway {
			return
		}
		runtime.Gosched()
	}
}

func TestGroupCommit(t *testing.T) {
	t.Run("commits that wait share one write to the disk, and each keeps its own outcome", func(t *testing.T) {
		registry := prometheus.NewRegistry()
		s, err := Open(filepath.Join(t.TempDir(), "store.db"), Config{Metrics: registry})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		var group sync.WaitGroup
		s.writing.Lock() // a slow disk
		group.Go(func() { put(t, s, "first", "1") })
		leads(s)
		var won, lost atomic.Int32
		for i := range 50 {
			group.Go(func() {
				_, err := s.Commit(t.Context(), kv.Txn{
					If:  []kv.Cond{{Key: fmt.Sprintf("k/%d", i/2)}}, // every two are rivals
					Ops: []kv.Op{kv.Put(fmt.Sprintf("k/%d", i/2), nil)},
				})
				switch {
				case err == nil:
					won.Add(1)
				case errors.Is(err, kv.ErrConflict):
					lost.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		waiting(s, 50)
		s.writing.Unlock()
		group.Wait()
		if won.Load() != 25 || lost.Load() != 25 || groups(t, registry) != 2 {
			t.Errorf("%d won, %d lost, %d groups", won.Load(), lost.Load(), groups(t, registry))
		}
		if rev, err := s.Rev(t.Context()); rev != 26 || err != nil {
			t.Errorf("revision %d, %v", rev, err)
		}
	})
	t.Run("who gives up before their group is formed has written nothing; later the outcome is awaited", func(t *testing.T) {
		s := open(t, filepath.Join(t.TempDir(), "store.db"))
		var group sync.WaitGroup
		s.writing.Lock()
		ctx, cancel := context.WithCancel(t.Context())
		group.Go(func() {
			if rev, err := s.Commit(ctx, kv.Txn{Ops: []kv.Op{kv.Put("underway", nil)}}); err != nil || rev != 1 {
				t.Errorf("underway: %d, %v", rev, err)
			}
		})
		leads(s)
		group.Go(func() {
			if _, err := s.Commit(ctx, kv.Txn{Ops: []kv.Op{kv.Put("waiting", nil)}}); !errors.Is(err, context.Canceled) {
				t.Errorf("waiting: %v", err)
			}
		})
		waiting(s, 1)
		cancel()
		waiting(s, 0)
		group.Go(func() { put(t, s, "next", "1") })
		waiting(s, 1)
		s.writing.Unlock()
		group.Wait()
		if n := count(t, s); n != 2 {
			t.Errorf("%d items", n)
		}
	})
}

func TestBreakdown(t *testing.T) {
	t.Run("a panic inside of the file is an error, and the store is not used any more", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		s := open(t, path)
		put(t, s, "a", "1")
		err := s.guard(func() error { panic("page 7 already freed") })
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "page 7") {
			t.Error(err)
		}
		if _, err := s.Rev(t.Context()); !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
		if _, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("b", nil)}}); !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
		if err := s.Watch(t.Context(), "", 1, nil); !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if n := count(t, open(t, path)); n != 1 {
			t.Errorf("%d items", n)
		}
	})
	t.Run("a read error of the mapped file is an error", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		s := open(t, path)
		for i := range 1000 {
			put(t, s, fmt.Sprintf("k/%d", i), strings.Repeat("v", 200))
		}
		if err := os.Truncate(path, 16384); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Range(t.Context(), "", "", 0); !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
	})
	t.Run("after a write whose fate is unknown nothing is served that could be taken back", func(t *testing.T) {
		s := open(t, filepath.Join(t.TempDir(), "store.db"))
		put(t, s, "a", "1")
		var group sync.WaitGroup
		group.Go(func() {
			if err := s.Watch(t.Context(), "", 1, nil); err == nil || !strings.Contains(err.Error(), "restart") {
				t.Errorf("watch: %v", err)
			}
		})
		// As if the last commit's fsync had failed after its meta page was written.
		s.mu.Lock()
		s.durable--
		s.mu.Unlock()
		if err := s.settle(errors.New("input/output error")); !strings.Contains(err.Error(), "restart the server") {
			t.Error(err)
		}
		if _, _, err := s.Range(t.Context(), "", "", 0); err == nil {
			t.Error("it was served")
		}
		group.Wait()
	})
	t.Run("nobody sees a commit before its last fsync", func(t *testing.T) {
		s := open(t, filepath.Join(t.TempDir(), "store.db"))
		put(t, s, "a", "1")
		s.mu.Lock()
		s.durable-- // the meta page of revision 1 is written, its fsync under way
		s.mu.Unlock()
		read, watched := make(chan kv.Rev, 1), make(chan kv.Rev, 1)
		var group sync.WaitGroup
		group.Go(func() {
			rev, err := s.Rev(t.Context())
			if err != nil {
				t.Error(err)
			}
			read <- rev
		})
		group.Go(func() {
			_ = s.Watch(t.Context(), "", 0, func(c kv.Change) error { watched <- c.Rev; return errors.New("stop") })
		})
		for range 1000 {
			runtime.Gosched()
		}
		select {
		case <-read:
			t.Error("a reader saw it")
		case <-watched:
			t.Error("a watcher saw it")
		default:
		}
		s.mu.Lock()
		s.durable++
		s.mu.Unlock()
		s.broadcast()
		if a, b := <-read, <-watched; a != 1 || b != 1 {
			t.Errorf("read %d, watched %d", a, b)
		}
		group.Wait()
	})
}

// fill writes until there is no room, and returns the keys that were acknowledged.
func fill(t *testing.T, s *Store) map[string]bool {
	t.Helper()
	written := map[string]bool{}
	for i := 0; ; i++ {
		key := fmt.Sprintf("k/%05d", i)
		_, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(key, make([]byte, 10_000))}})
		if err == nil {
			written[key] = true
			continue
		}
		if !errors.Is(err, kv.ErrFull) {
			t.Fatalf("commit %d: %v", i, err)
		}
		return written
	}
}

// has checks that the store has exactly the keys.
func has(t *testing.T, s *Store, want map[string]bool) {
	t.Helper()
	items, rev, err := s.Range(t.Context(), "k/", "k0", 0)
	if err != nil || len(items) != len(want) || int(rev) != len(want) {
		t.Fatalf("%d items at revision %d, want %d, %v", len(items), rev, len(want), err)
	}
	for _, it := range items {
		if !want[it.Key] {
			t.Errorf("%s was not acknowledged", it.Key)
		}
	}
}

func TestFull(t *testing.T) {
	t.Run("a file at its limit is full, readable, and takes writes again when there is room in it", func(t *testing.T) {
		s, err := Open(filepath.Join(t.TempDir(), "store.db"), Config{MaxBytes: 20 << 20})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		written := fill(t, s)
		has(t, s, written)
		for range 3 { // and it stays so
			if _, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put("x", make([]byte, 1<<19))}}); !errors.Is(err, kv.ErrFull) {
				t.Errorf("commit: %v", err)
			}
		}
		rev, err := s.Rev(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Compact(t.Context(), rev); err != nil {
			t.Fatalf("compact: %v", err)
		}
		for range 3 { // what a transaction freed is free for the one after the next
			put(t, s, "y", "1")
		}
		put(t, s, "x", strings.Repeat("x", 10_000))
	})
	t.Run("a full disk is survived, and forgotten when there is room again", func(t *testing.T) {
		dir := t.TempDir()
		mount(t, dir, "4m")
		ballast := filepath.Join(dir, "ballast")
		if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "store.db")
		s := open(t, path)
		written := fill(t, s)
		if len(written) == 0 {
			t.Fatal("nothing fitted")
		}
		has(t, s, written)
		// Many at once: all are told the same, none is half written.
		var group sync.WaitGroup
		for i := range 20 {
			group.Go(func() {
				_, err := s.Commit(t.Context(), kv.Txn{Ops: []kv.Op{kv.Put(fmt.Sprintf("k/x%d", i), make([]byte, 200_000))}})
				if !errors.Is(err, kv.ErrFull) {
					t.Errorf("commit: %v", err)
				}
			})
		}
		group.Wait()
		has(t, s, written)
		if got := len(watchAll(t, s, len(written))); got != len(written) {
			t.Errorf("watched %d changes", got)
		}
		if err := s.Room(); !errors.Is(err, kv.ErrFull) {
			t.Errorf("room: %v", err)
		}
		has(t, s, written) // trying wrote nothing that counts
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		for s.Room() != nil { // nobody writes, and all the same it comes to know
			runtime.Gosched()
		}
		has(t, s, written)
		key := "k/after"
		put(t, s, key, strings.Repeat("v", 10_000))
		written[key] = true
		has(t, s, written)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		has(t, open(t, path), written)
	})
	t.Run("a disk that is full at the start is named", func(t *testing.T) {
		dir := t.TempDir()
		mount(t, dir, "64k")
		if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 60<<10), 0o600); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "store.db")
		if _, err := Open(path, Config{}); !errors.Is(err, kv.ErrFull) || !strings.Contains(err.Error(), path) {
			t.Error(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
			t.Errorf("left over: %v, %v", left, err)
		}
		if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
			t.Fatal(err)
		}
		open(t, path)
	})
}

func watchAll(t *testing.T, s *Store, n int) []kv.Change {
	t.Helper()
	var list []kv.Change
	stop := errors.New("stop")
	err := s.Watch(t.Context(), "", 0, func(c kv.Change) error {
		if list = append(list, c); len(list) == n {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) {
		t.Error(err)
	}
	return list
}

// mount puts a small file system of its own at dir.
func mount(t *testing.T, dir, size string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: a full disk needs a mounted tmpfs, and that needs root")
	}
	out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size+",mode=0700", "tmpfs", dir).CombinedOutput()
	if err != nil {
		t.Skipf("NOT TESTED: a full disk needs a mounted tmpfs: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
}

// BenchmarkCommit measures commits of one small key by a number of concurrent writers.
func BenchmarkCommit(b *testing.B) {
	for _, writers := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			registry := prometheus.NewRegistry()
			s, err := Open(filepath.Join(b.TempDir(), "store.db"), Config{Metrics: registry})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			var next atomic.Int64
			var group sync.WaitGroup
			b.ResetTimer()
			for range writers {
				group.Go(func() {
					for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
						t := kv.Txn{Ops: []kv.Op{kv.Put(fmt.Sprintf("k/%d", n%10_000), make([]byte, 200))}}
						if _, err := s.Commit(context.Background(), t); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			group.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
			b.ReportMetric(float64(b.N)/float64(max(groups(b, registry), 1)), "commits/fsync")
		})
	}
}
