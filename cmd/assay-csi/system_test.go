package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/test/lab"
)

const ownMounts = "ASSAY_CSI_OWN_MOUNTS"

// TestSystem runs itself again where mounts are its own.
func TestSystem(t *testing.T) {
	if os.Getenv(ownMounts) != "" {
		withOwnMounts(t)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestSystem$", "-test.v")
	cmd.Env = append(os.Environ(), ownMounts+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) {
		lab.Missing(t, "the right to mount", err)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: TestSystem") {
		t.Errorf("%v:\n%s", err, out)
	}
}

func withOwnMounts(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, `a target\with signs`)
	for _, d := range []string{source, target} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write := func() error { return os.WriteFile(filepath.Join(target, "x"), []byte("x"), 0o600) }
	if err := write(); err != nil {
		t.Fatal(err)
	}
	is := func(want bool) {
		t.Helper()
		if mounted, err := (system{}).mounted(target); mounted != want || err != nil {
			t.Errorf("it is mounted: %t, %v", mounted, err)
		}
	}
	is(false)
	if err := (system{}).mount(source, target); err != nil {
		t.Fatal(err)
	}
	is(true)
	if err := write(); !errors.Is(err, syscall.EROFS) {
		t.Errorf("what is mounted can be written to: %v", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(target, &fs); err != nil {
		t.Fatal(err)
	}
	for flag, name := range map[int64]string{unix.ST_RDONLY: "ro", unix.ST_NOSUID: "nosuid", unix.ST_NODEV: "nodev", unix.ST_NOEXEC: "noexec"} {
		if fs.Flags&flag == 0 {
			t.Errorf("it is mounted without %s", name)
		}
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if err := (system{}).unmount(link); err == nil {
		t.Error("what a link leads to is unmounted")
	}
	is(true)
	if err := (system{}).unmount(target); err != nil {
		t.Error(err)
	}
	is(false)
	if err := write(); err != nil {
		t.Errorf("what was below is not back: %v", err)
	}
}
