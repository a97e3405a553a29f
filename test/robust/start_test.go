package robust

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

// TestStart checks that a server which cannot start says the true reason in one sentence, and leaves
// alone what is there.
func TestStart(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	conn := dial(t, s)
	h.mustCreate(t, conn, newEntry("/node", "/one"))

	t.Run("a second server on one folder", func(t *testing.T) {
		second := newSite(t)
		second.DataDir = s.ServerData()
		refused(t, second, "store is in use", "another assay-server is using "+filepath.Join(s.ServerData(), "store.db"))
	})
	t.Run("its port is in use", func(t *testing.T) {
		second := newSite(t)
		second.Port = s.Port
		refused(t, second, fmt.Sprintf("127.0.0.1:%d", s.Port), "address already in use")
	})
	t.Run("a probe's port is in use", func(t *testing.T) {
		second := newSite(t)
		second.ServerBlocks = fmt.Sprintf("node_attestor \"join_token\" {}\nhealth_checks {\n  listener_enabled = true\n  bind_port = %d\n}", s.Port)
		refused(t, second, fmt.Sprintf("127.0.0.1:%d", s.Port), "health_checks", "in use by another process")
	})
	t.Run("another server listens on its socket", func(t *testing.T) {
		second := newSite(t)
		if err := os.Remove(second.Dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(second.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Dir(filepath.Dir(s.ServerSocket())), filepath.Join(second.Dir, "server")); err != nil {
			t.Fatal(err)
		}
		second.DataDir = filepath.Join(second.Dir, "data")
		refused(t, second, second.ServerSocket(), "already listens there")
	})
	t.Run("and the one that runs does not notice", func(t *testing.T) {
		h.mustCreate(t, conn, newEntry("/node", "/two"))
		h.check(t, conn)
	})
}

// TestReadOnly starts a server on a disk that was mounted read only.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	root(t, "a disk of one's own")
	s := newSite(t)
	mount(t, s, "128m")
	h := newHistory()
	start(t, s)
	h.mustCreate(t, dial(t, s), newEntry("/node", "/one"))
	stop(t, s)
	if err := syscall.Mount("", s.DataDir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	refused(t, s, s.DataDir, "read-only file system")
	mustCheck(t, s) // reading is all it takes
	if err := syscall.Mount("", s.DataDir, "", syscall.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	start(t, s)
	h.check(t, dial(t, s))
}

// TestNoPermission starts a server in a folder that it may read and not write.
func TestNoPermission(t *testing.T) {
	t.Parallel()
	root(t, "another user")
	s := newSite(t)
	s.ServerAs = &syscall.Credential{Uid: 65534, Gid: 65534}
	if err := os.Chown(s.Dir, 65534, 65534); err != nil { // for the socket's folder
		t.Fatal(err)
	}
	h := newHistory()
	start(t, s)
	h.mustCreate(t, dial(t, s), newEntry("/node", "/one"))
	stop(t, s)
	chown := func(uid int) {
		t.Helper()
		for _, path := range []string{s.ServerData(), filepath.Join(s.ServerData(), "store.db")} {
			if err := os.Chown(path, uid, uid); err != nil {
				t.Fatal(err)
			}
		}
	}
	chown(0)
	chmod(t, s.ServerData(), 0o755)
	chmod(t, filepath.Join(s.ServerData(), "store.db"), 0o644)
	refused(t, s, s.ServerData(), "permission denied")
	chown(65534)
	chmod(t, s.ServerData(), 0o700)
	chmod(t, filepath.Join(s.ServerData(), "store.db"), 0o600)
	start(t, s)
	h.check(t, dial(t, s))
}

// mount gives the server's data folder a disk of its own of that size.
func mount(t *testing.T, s *site.Site, size string) {
	t.Helper()
	s.DataDir = filepath.Join(s.Dir, "disk")
	if err := os.Mkdir(s.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", s.DataDir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if server := s.Server(); server != nil {
			server.Kill()
		}
		if err := syscall.Unmount(s.DataDir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func freePort(t *testing.T) int {
	t.Helper()
	n, err := port.Free()
	if err != nil {
		t.Fatal(err)
	}
	return n
}
