package workload

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/unix"
)

func TestNames(t *testing.T) {
	t.Run("the first name of an ID counts, and lines that are none do not", func(t *testing.T) {
		byID, err := parseNames(strings.NewReader("root:x:0:0::/:/bin/sh\n# c:x:5:\n\n+::::::\nbad:x:abc:\nneg:x:-1:\ntoor:x:0:0::/:\nshort:x\nbig:x:4294967296:\nlast:x:4294967295"))
		if err != nil {
			t.Fatal(err)
		}
		if len(byID) != 2 || byID[0] != "root" || byID[4294967295] != "last" {
			t.Errorf("names are %v", byID)
		}
	})
	t.Run("a changed file is read again, a missing one still holds", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "passwd")
		n := newNames(path)
		if _, ok, err := n.of(7); ok || err == nil {
			t.Errorf("a name out of no file, %v", err)
		}
		write := func(text string) {
			t.Helper()
			if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".new", path); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range []string{"alice", "bob"} {
			write(want + ":x:7:7::/:\n")
			if name, ok, err := n.of(7); !ok || err != nil || name != want {
				t.Errorf("name is %q, %v, want %q", name, err, want)
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if name, ok, err := n.of(7); !ok || err == nil || name != "bob" {
			t.Errorf("name is %q, %v", name, err)
		}
	})
	t.Run("a line longer than the scanner's default is read", func(t *testing.T) {
		byID, err := parseNames(strings.NewReader("big:x:9:" + strings.Repeat("member,", 100_000) + "\nnext:x:10:\n"))
		if err != nil || byID[9] != "big" || byID[10] != "next" {
			t.Errorf("%d names, %v", len(byID), err)
		}
	})
}

func TestSums(t *testing.T) {
	file := func(t *testing.T, text string) *os.File {
		t.Helper()
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	id := func(t *testing.T, f *os.File) fileID {
		t.Helper()
		id, err := identify(f)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	later := func() time.Time { return time.Now().Add(time.Hour) }
	t.Run("a file left alone is hashed once", func(t *testing.T) {
		s := newSums(later)
		f := file(t, "abc")
		for range 2 {
			sum, err := s.of(t.Context(), f, id(t, f)) // the second time there is nothing left to read
			if want := "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"; err != nil || sum != want {
				t.Errorf("sum is %s, %v", sum, err)
			}
		}
	})
	t.Run("a file that was just written is not remembered", func(t *testing.T) {
		s := newSums(time.Now)
		f := file(t, "abc")
		if _, err := s.of(t.Context(), f, id(t, f)); err != nil || len(s.known) != 0 {
			t.Errorf("%d remembered, %v", len(s.known), err)
		}
	})
	t.Run("a file that changes meanwhile has no hash", func(t *testing.T) {
		s := newSums(later)
		f := file(t, "abc")
		before := id(t, f)
		if err := os.WriteFile(f.Name(), []byte("abcd"), 0o600); err != nil {
			t.Fatal(err)
		}
		if sum, err := s.of(t.Context(), f, before); err == nil {
			t.Errorf("sum is %s", sum)
		}
	})
	t.Run("memory is bounded", func(t *testing.T) {
		s := newSums(later)
		for i := range maxSums + 100 {
			s.remember(fileID{ino: uint64(i)}, "x")
		}
		if len(s.known) != maxSums {
			t.Errorf("%d remembered, want %d", len(s.known), maxSums)
		}
	})
	t.Run("those who wait for another's hash obey their own context", func(t *testing.T) {
		s := newSums(later)
		f := file(t, "abc")
		s.hashing[id(t, f)] = make(chan struct{})
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.of(gone, f, id(t, f)); !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("a hundred instances share one hash", func(t *testing.T) {
		s := newSums(later)
		path := file(t, strings.Repeat("abc", 100_000)).Name()
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				f, err := os.Open(path)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				if _, err := s.of(t.Context(), f, id(t, f)); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if len(s.known) != 1 || len(s.hashing) != 0 {
			t.Errorf("%d known, %d in work", len(s.known), len(s.hashing))
		}
	})
}

func FuzzParseGroups(f *testing.F) {
	for _, seed := range []string{"", "Groups:\n", "Groups:\t1 2 3\n", "Groups:\tx\n", "Name:\tx\nGroups: 4294967295\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, status string) {
		if groups, _ := parseGroups(status); len(groups) > maxGroups {
			t.Fatalf("%d groups", len(groups))
		}
	})
}

func TestAbstains(t *testing.T) {
	sel := func(value string) attestor.Selector { return attestor.Selector{Type: unix.Type, Value: value} }
	for _, c := range []struct {
		name   string
		config unix.Config
		want   attestor.Selector
		abides string // part of what it says; empty: somebody may show it
	}{
		{"a user", unix.Config{}, sel("uid:0"), ""},
		{"a path that nobody asks for", unix.Config{}, sel("path:/bin/sh"), "discover_workload_path"},
		{"a hash that nobody asks for", unix.Config{}, sel("sha256:00"), "discover_workload_path"},
		{"a path", unix.Config{DiscoverWorkloadPath: true}, sel("path:/bin/sh"), ""},
		{"a hash where none is made", unix.Config{DiscoverWorkloadPath: true, WorkloadSizeLimit: -1}, sel("sha256:00"), "workload_size_limit"},
		{"another type's path", unix.Config{}, attestor.Selector{Type: "docker", Value: "path:/bin/sh"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, err := open(&c.config, attestor.Needs{})
			if err != nil {
				t.Fatal(err)
			}
			if got := w.(attestor.Abstainer).Abstains(c.want); !strings.Contains(got, c.abides) || (got == "") != (c.abides == "") {
				t.Errorf("got %q, want %q in it", got, c.abides)
			}
		})
	}
}
