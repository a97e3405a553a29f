package workload_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/assay-id/assay/attestor/unix"
	"github.com/assay-id/assay/test/lab"
)

// Containers run their programs out of an overlay, where a file is in a layer below until it is changed.
func TestExecutableInAnOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		lab.Missing(t, "an overlay of the test's own", errors.New("mounting one needs root"))
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// An overlay cannot be the upper layer of another, which the machine's own root may be.
	if err := syscall.Mount("layers", dir, "tmpfs", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	for _, name := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	lower, merged := filepath.Join(dir, "lower", "app"), filepath.Join(dir, "merged", "app")
	if err := os.WriteFile(lower, text, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("merged", filepath.Join(dir, "merged"), "overlay", 0,
		"lowerdir="+filepath.Join(dir, "lower")+",upperdir="+filepath.Join(dir, "upper")+",workdir="+filepath.Join(dir, "work")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(filepath.Join(dir, "merged"), syscall.MNT_DETACH) })
	sum := hashOf(t, lower)
	w := open(t, unix.Config{DiscoverWorkloadPath: true})
	first := start(t, merged, nil)
	has(t, attest(t, w, first), "unix:path:"+merged, "unix:sha256:"+sum)

	t.Run("a program that is copied up unchanged stays the same", func(t *testing.T) {
		if err := os.Chmod(merged, 0o700); err != nil {
			t.Fatal(err)
		}
		has(t, attest(t, w, first), "unix:sha256:"+sum)
		has(t, attest(t, w, start(t, merged, nil)), "unix:path:"+merged, "unix:sha256:"+sum)
	})
	t.Run("one that is replaced in the upper layer is another, and what runs is what it was", func(t *testing.T) {
		fresh := filepath.Join(dir, "merged", "fresh")
		if err := os.WriteFile(fresh, append(text, "more"...), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(fresh, merged); err != nil {
			t.Fatal(err)
		}
		now := hashOf(t, merged)
		if now == sum {
			t.Fatal("it was not replaced")
		}
		has(t, attest(t, w, start(t, merged, nil)), "unix:path:"+merged, "unix:sha256:"+now)
		set := attest(t, w, first)
		has(t, set, "unix:sha256:"+sum)
		hasNone(t, set, "unix:path:")
	})
}
