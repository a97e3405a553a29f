package unixsocket

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	switch path := os.Getenv("SOCKET_PATH"); os.Getenv("SOCKET_ROLE") {
	case "":
		os.Exit(m.Run())
	case "inheritor": // is started by systemd with its socket
		os.Exit(inheritAndServe(path))
	case "stranger": // listens, says so, stays until its standard input ends
		if _, err := Listen(path, 0o777, 0o755); err != nil {
			println(err.Error())
			os.Exit(1)
		}
		fmt.Println("listening")
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
}

// listenElsewhere has another process listen at the path until the test ends.
func listenElsewhere(t *testing.T, path string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SOCKET_ROLE=stranger", "SOCKET_PATH="+path, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Wait() })
	if said, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatalf("it said %q: %v", said, err)
	}
}

// full listens at the path without accepting anybody, until nobody more can connect.
func full(t *testing.T, path string) fileID {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		c, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			break
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	id, err := identityOf(path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// shortDir is a temporary directory whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sock") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestListen(t *testing.T) {
	t.Run("mode and directory are as asked whatever the umask", func(t *testing.T) {
		old := unix.Umask(0o077)
		defer unix.Umask(old)
		dir := filepath.Join(shortDir(t), "deep", "public")
		s, err := Listen(filepath.Join(dir, "api.sock"), 0o777, 0o755)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for path, want := range map[string]os.FileMode{dir: 0o755, s.Path(): 0o777} {
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if st.Mode().Perm() != want {
				t.Errorf("%s: mode %o, want %o", path, st.Mode().Perm(), want)
			}
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) != 1 {
			t.Errorf("left over: %v, %v", left, err)
		}
	})
	t.Run("a dead socket is replaced", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		_ = l.Close()
		s, err := Listen(path, 0o777, 0o755)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if c, err := net.Dial("unix", path); err != nil {
			t.Error(err)
		} else {
			_ = c.Close()
		}
	})
	t.Run("a file that is no socket is left alone", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Listen(path, 0o777, 0o755); err == nil || !strings.Contains(err.Error(), "not a socket") {
			t.Errorf("got %v", err)
		}
		if text, _ := os.ReadFile(path); string(text) != "precious" {
			t.Error("it is gone")
		}
	})
	t.Run("a socket another process listens on is left alone", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		listenElsewhere(t, path)
		if _, err := Listen(path, 0o777, 0o755); err == nil || !strings.Contains(err.Error(), "already listens") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a socket whose queue is full is left alone", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		busy := full(t, path)
		if _, err := Listen(path, 0o777, 0o755); err == nil || !strings.Contains(err.Error(), "cannot tell whether the socket is in use") {
			t.Errorf("got %v", err)
		}
		if now, err := identityOf(path); err != nil || now != busy {
			t.Errorf("another socket is there: %v", err)
		}
	})
	t.Run("the own socket is replaced without a gap", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		var sockets []*Socket
		defer func() {
			for _, s := range sockets {
				_ = s.Close()
			}
		}()
		for range 20 {
			s, err := Listen(path, 0o777, 0o755)
			if err != nil {
				t.Fatal(err)
			}
			sockets = append(sockets, s)
			if len(sockets) > 1 {
				old := sockets[len(sockets)-2]
				if old.InPlace() {
					t.Fatal("the old socket is still in place")
				}
				_ = old.Close() // must not remove the new one
			}
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			_ = c.Close()
		}
	})
	t.Run("closing leaves the file, and the next takes its place", func(t *testing.T) {
		s, err := Listen(filepath.Join(shortDir(t), "s"), 0o777, 0o755)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
		if _, err := net.Dial("unix", s.Path()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("dial after close: %v", err)
		}
		next, err := Listen(s.Path(), 0o777, 0o755)
		if err != nil {
			t.Fatal(err)
		}
		defer next.Close()
		if s.InPlace() || !next.InPlace() {
			t.Error("the old one is still in place")
		}
	})
	t.Run("a path that does not fit is named with its limit", func(t *testing.T) {
		_, err := Listen(filepath.Join(shortDir(t), strings.Repeat("x", 120)), 0o777, 0o755)
		if err == nil || !strings.Contains(err.Error(), "107") {
			t.Errorf("got %v", err)
		}
	})
}

func TestVacant(t *testing.T) {
	s, err := Listen(filepath.Join(shortDir(t), "s"), 0o777, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if err := Vacant(s.Path()); !errors.Is(err, ErrInUse) {
		t.Errorf("one that this process has: %v", err)
	}
	_ = s.Close()
	if err := Vacant(s.Path()); err != nil {
		t.Errorf("one that was closed: %v", err)
	}
}

func TestExposed(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "not", "yet", "api.sock")
	if who := Exposed(path); who != "" {
		t.Errorf("a directory of one's own: %s", who)
	}
	for _, c := range []struct {
		name string
		mode os.FileMode
		want string
	}{
		{"everybody's", 0o777, "can be written by everybody (mode 0777): run chmod o-w " + dir},
		{"everybody's, where nobody takes what is another's", 0o777 | os.ModeSticky, ""},
		{"the group's", 0o770, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.Chmod(dir, c.mode); err != nil {
				t.Fatal(err)
			}
			if who := Exposed(path); !strings.HasSuffix(who, c.want) || (who == "") != (c.want == "") {
				t.Errorf("got %q, want %q", who, c.want)
			}
		})
	}
	t.Run("another user's", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("only root can give it away")
		}
		if err := os.Chown(dir, 4711, 4711); err != nil {
			t.Fatal(err)
		}
		if who := Exposed(path); !strings.Contains(who, "belongs to user 4711") {
			t.Errorf("got %q", who)
		}
	})
}
