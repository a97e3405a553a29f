package procfs_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor/procfs"
)

func TestRead(t *testing.T) {
	proc := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(proc, "7"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, "7", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for why, text := range map[string]string{
		"nothing": "", "a line": "0::/x\n", "what just fits": strings.Repeat("x", 4096), "more than one read": strings.Repeat("y", 9000),
	} {
		t.Run(why, func(t *testing.T) {
			write("status", text)
			if got, err := procfs.Read(proc, 7, "status", 9000); err != nil || got != text {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
	t.Run("a text above the limit is refused", func(t *testing.T) {
		write("status", strings.Repeat("z", 101))
		if _, err := procfs.Read(proc, 7, "status", 100); err == nil || !strings.Contains(err.Error(), "larger than 100 bytes") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("a process that is gone is no such file", func(t *testing.T) {
		if _, err := procfs.Read(proc, 8, "status", 100); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
		ended := exec.Command("true")
		if err := ended.Run(); err != nil {
			t.Fatal(err)
		}
		if _, err := procfs.Read("/proc", ended.Process.Pid, "cgroup", 4096); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("what cannot be read is an error", func(t *testing.T) {
		if err := os.Mkdir(filepath.Join(proc, "7", "cgroup"), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := procfs.Read(proc, 7, "cgroup", 100); err == nil || errors.Is(err, os.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("the kernel's own", func(t *testing.T) {
		text, err := procfs.Read("/proc", os.Getpid(), "status", 1<<20)
		if err != nil || !strings.Contains(text, "\nGroups:") {
			t.Errorf("got %q, %v", text, err)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := procfs.Read("/proc", os.Getpid(), "status", 1<<20); err != nil {
			b.Fatal(err)
		}
	}
}
