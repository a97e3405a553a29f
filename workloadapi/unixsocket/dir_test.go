package unixsocket_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// A daemon that keeps its files to itself runs with a narrow umask, and its public socket must be
// reached by everybody all the same.
func TestDirectoriesOfASocketDoNotMindTheUmask(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	base := t.TempDir()
	public, err := unixsocket.Listen(filepath.Join(base, "run", "agent", "public", "api.sock"), 0o777, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	defer public.Close()
	private, err := unixsocket.Listen(filepath.Join(base, "run", "agent", "private", "admin.sock"), 0o600, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	defer private.Close()
	for path, want := range map[string]os.FileMode{
		"run":                          0o755,
		"run/agent":                    0o755,
		"run/agent/public":             0o755,
		"run/agent/public/api.sock":    0o777,
		"run/agent/private":            0o700,
		"run/agent/private/admin.sock": 0o600,
	} {
		info, err := os.Stat(filepath.Join(base, path))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
}
