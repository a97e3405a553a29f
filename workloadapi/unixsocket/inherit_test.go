package unixsocket

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// inheritAndServe greets one caller on the inherited socket.
func inheritAndServe(path string) int {
	s, err := Listen(path, 0o777, 0o755)
	if err != nil {
		println(err.Error())
		return 1
	}
	if os.Getenv("LISTEN_FDS") != "" || !s.InPlace() {
		println("the environment is left, or the socket is not in place")
		return 1
	}
	c, err := s.Accept()
	if err != nil {
		println(err.Error())
		return 1
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		return 1
	}
	if c.Close() != nil || s.Close() != nil {
		return 1
	}
	return 0
}

func TestInherited(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	systemd, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	file, err := systemd.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("who connects while the process is away is served when it is back", func(t *testing.T) {
		for range 2 { // the second is started after the first has closed its copy
			waiting, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			// LISTEN_PID is only known once the process is there, so a shell becomes it.
			cmd := exec.CommandContext(t.Context(), "sh", "-c", `LISTEN_PID=$$ exec "$0"`, self)
			cmd.Env = append(os.Environ(), "SOCKET_ROLE=inheritor", "SOCKET_PATH="+path, "LISTEN_FDS=1", "LISTEN_FDNAMES=workloads", "GORACE=atexit_sleep_ms=0")
			cmd.ExtraFiles = []*os.File{file}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			heard := make([]byte, 16)
			n, err := waiting.Read(heard)
			if err != nil || string(heard[:n]) != "hello" {
				t.Errorf("heard %q, %v", heard[:n], err)
			}
			waiting.Close()
		}
	})
	t.Run("without the socket of systemd the path is another's", func(t *testing.T) {
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Env = append(os.Environ(), "SOCKET_ROLE=inheritor", "SOCKET_PATH="+path, "GORACE=atexit_sleep_ms=0")
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "already listens there") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("descriptors for another process, or in a number that cannot be, are left alone", func(t *testing.T) {
		for _, c := range [][2]string{{"1", "1"}, {"", ""}, {"x", "1"}, {"42", "0"}, {"42", "-1"}, {"42", "100000"}, {"42", "x"}} {
			if l := fromEnvironment(42, c[0], c[1], 1<<20); l != nil {
				t.Errorf("%q: %v", c, l)
			}
		}
	})
}
