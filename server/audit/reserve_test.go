package audit

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// disk makes a small one of its own.
func disk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		if os.Getenv("REQUIRE_REAL") != "" && os.Getuid() == 0 {
			t.Fatal(err)
		}
		t.Skipf("SKIPPED: a small disk needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func fillDisk(t *testing.T, dir string) {
	t.Helper()
	file, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for size := 1 << 20; size > 0; {
		if _, err := file.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

func TestReserve(t *testing.T) {
	line := Line{Event: "svid.x509.new", Outcome: Allow, SPIFFEID: "spiffe://example.org/" + strings.Repeat("x", 400)}

	t.Run("on a full disk thousands of lines still find room, and then there is an error", func(t *testing.T) {
		dir := disk(t, "16m")
		l, err := Open(filepath.Join(dir, "audit.log"), Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		fillDisk(t, dir)
		n := 0
		for ; n < 100_000; n++ {
			if err := l.Write(line); err != nil {
				break
			}
		}
		if n < 10_000 || n == 100_000 {
			t.Errorf("%d lines found room", n)
		}
		if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
			t.Fatal(err)
		}
		if err := l.Write(line); err != nil {
			t.Errorf("there is room again: %v", err)
		}
		fillDisk(t, dir)
		for range 1000 { // and a reserve
			if err := l.Write(line); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("it is topped up while there is room", func(t *testing.T) {
		dir := disk(t, "64m")
		l, err := Open(filepath.Join(dir, "audit.log"), Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for range 40_000 {
			if err := l.Write(line); err != nil {
				t.Fatal(err)
			}
		}
		fillDisk(t, dir)
		for range 5_000 {
			if err := l.Write(line); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("a closed and a rotated file take no more room than their lines", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		l, err := Open(path, Config{})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Write(line); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path, path+".1"); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
		if err := l.Write(line); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{path, path + ".1"} {
			var st syscall.Stat_t
			if err := syscall.Stat(p, &st); err != nil {
				t.Fatal(err)
			}
			if room := st.Blocks * 512; room > 64<<10 || st.Size < 400 {
				t.Errorf("%s: %d bytes take %d", p, st.Size, room)
			}
		}
	})
}
