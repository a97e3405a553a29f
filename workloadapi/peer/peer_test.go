package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// TestMain lets the test binary play the processes at the other end.
func TestMain(m *testing.M) {
	switch os.Getenv("PEER_ROLE") {
	case "":
		os.Exit(m.Run())
	case "caller": // connects, says so, stays until its standard input ends
		c, err := net.Dial("unix", os.Getenv("PEER_SOCKET"))
		exitOn(err)
		fmt.Println("connected")
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = c
	case "heir": // connects, leaves the connection to a child that outlives it, and exits
		c, err := net.Dial("unix", os.Getenv("PEER_SOCKET"))
		exitOn(err)
		f, err := c.(*net.UnixConn).File()
		exitOn(err)
		child := exec.Command("/proc/self/exe")
		child.Env = append(os.Environ(), "PEER_ROLE=sleeper")
		child.ExtraFiles = []*os.File{f}
		child.Stdin = os.Stdin
		exitOn(child.Start())
		fmt.Println("connected", child.Process.Pid)
		bufio.NewReader(os.Stdin).ReadString('\n')
	case "sleeper": // holds what it was given until the connection ends
		f := os.NewFile(3, "connection")
		_, _ = f.Read(make([]byte, 1))
	case "stranger": // is in a PID namespace of its own and cannot see who connects
		tr, err := Open(Config{})
		exitOn(err)
		s, err := unixsocket.Listen(os.Getenv("PEER_SOCKET"), 0o777, 0o755)
		exitOn(err)
		fmt.Println("listening")
		c, err := s.AcceptUnix()
		exitOn(err)
		_, err = tr.identify(c, nil)
		fmt.Println(errors.Is(err, ErrInvisible))
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

// modes are the three ways to pin a process.
var modes = []struct {
	name              string
	noPeer, noPidfd   bool
	reuseIsImpossible bool
}{
	{name: "SO_PEERPIDFD", reuseIsImpossible: true},
	{name: "pidfd_open", noPeer: true},
	{name: "proc directory", noPeer: true, noPidfd: true},
}

type harness struct {
	tracker *Tracker
	socket  *unixsocket.Socket
	listen  net.Listener
}

func newHarness(t *testing.T, noPeer, noPidfd bool) *harness {
	t.Helper()
	tr, err := Open(Config{})
	if err != nil {
		t.Fatal(err)
	}
	tr.noPeerPidfd, tr.noPidfd = noPeer, noPidfd
	s, err := unixsocket.Listen(filepath.Join(shortDir(t), "s"), 0o777, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tr.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("tracker: %v", err)
		}
		_ = s.Close()
		tr.Close()
	})
	return &harness{tracker: tr, socket: s, listen: tr.Listener(s.UnixListener, nil)}
}

// shortDir is a temporary directory that users other than root can enter.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer") //nolint:usetesting // t.TempDir is closed to other users and too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (h *harness) accept(t *testing.T) (*conn, *Peer) {
	t.Helper()
	c, err := h.listen.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*conn), c.(*conn).peer
}

type child struct {
	*exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

func start(t *testing.T, role, path string, attr *syscall.SysProcAttr) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "PEER_ROLE="+role, "PEER_SOCKET="+path,
		"GORACE=atexit_sleep_ms=0") // or each child of a race-checked binary takes a second to exit
	cmd.SysProcAttr = attr
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
	c := &child{Cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout)}
	t.Cleanup(func() { _ = c.stdin.Close(); _ = c.Process.Kill(); _ = c.Wait() })
	return c
}

func (c *child) line(t *testing.T) string {
	t.Helper()
	s, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("child said %q: %v", s, err)
	}
	return strings.TrimSpace(s)
}

func waitDone(t *testing.T, p *Peer) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(time.Minute):
		t.Fatal("nobody noticed the exit")
	}
}

func TestPeer(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			t.Run("a caller is known by its PID and user, and is alive", func(t *testing.T) {
				h := newHarness(t, mode.noPeer, mode.noPidfd)
				ch := start(t, "caller", h.socket.Path(), nil)
				_, p := h.accept(t)
				want := attestor.Process{PID: ch.Process.Pid, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Proc: "/proc"}
				if p.Process != want {
					t.Errorf("got %+v, want %+v", p.Process, want)
				}
				if !p.Alive() {
					t.Error("it is said to be dead")
				}
				if p.pin.pidfd == mode.noPidfd {
					t.Errorf("pinned by a pidfd: %v", p.pin.pidfd)
				}
			})
			t.Run("a killed caller is dead before it is reaped, and its connection is closed", func(t *testing.T) {
				h := newHarness(t, mode.noPeer, mode.noPidfd)
				ch := start(t, "caller", h.socket.Path(), nil)
				c, p := h.accept(t)
				_ = ch.Process.Kill() // nobody waits for it: it stays a zombie
				waitDone(t, p)
				if p.Alive() {
					t.Error("a zombie is said to be alive")
				}
				if _, err := c.Read(make([]byte, 1)); err == nil {
					t.Error("the connection is still open")
				}
			})
			t.Run("a child that inherits the connection is cut off when the caller exits", func(t *testing.T) {
				h := newHarness(t, mode.noPeer, mode.noPidfd)
				ch := start(t, "heir", h.socket.Path(), nil)
				c, p := h.accept(t)
				said := strings.Fields(ch.line(t))
				heir, err := strconv.Atoi(said[1])
				if err != nil {
					t.Fatal(err)
				}
				pinned, err := h.tracker.Pin(heir)
				if err != nil {
					t.Fatal(err)
				}
				defer pinned.Release()
				if _, err := ch.stdin.Write([]byte("go\n")); err != nil {
					t.Fatal(err)
				}
				waitDone(t, p)
				if _, err := c.Read(make([]byte, 1)); err == nil {
					t.Error("the connection is still open")
				}
				waitDone(t, pinned) // it sees the end of the connection and leaves
			})
			t.Run("a process that got the caller's PID is never taken for it", func(t *testing.T) {
				h := newHarness(t, mode.noPeer, mode.noPidfd)
				ch := start(t, "caller", h.socket.Path(), nil)
				_, p := h.accept(t)
				_ = ch.Process.Kill()
				_ = ch.Wait()
				spawn(t, p.PID)
				if p.Alive() {
					t.Error("the other process passes for the caller")
				}
				waitDone(t, p)
			})
			t.Run("a caller that died before anybody accepted is refused", func(t *testing.T) {
				h := newHarness(t, mode.noPeer, mode.noPidfd)
				ch := start(t, "caller", h.socket.Path(), nil)
				ch.line(t)
				_ = ch.Process.Kill()
				_ = ch.Wait()
				if mode.reuseIsImpossible {
					spawn(t, ch.Process.Pid) // must not make a difference
				}
				c, err := h.socket.AcceptUnix()
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				p, err := h.tracker.identify(c, nil)
				if err == nil {
					defer p.Release()
					if p.Alive() {
						t.Error("a dead caller is alive")
					}
				} else if !errors.Is(err, ErrDead) {
					t.Error(err)
				}
			})
			t.Run("thousands of short-lived callers leave no descriptor behind", func(t *testing.T) {
				h := newHarness(t, mode.noPeer, mode.noPidfd)
				before := descriptors(t)
				const rounds, callers = 40, 50
				for range rounds {
					var wg sync.WaitGroup
					for range callers {
						wg.Go(func() {
							c, err := net.Dial("unix", h.socket.Path())
							if err == nil {
								_ = c.Close()
							}
						})
					}
					for range callers {
						c, err := h.listen.Accept()
						if err != nil {
							t.Fatal(err)
						}
						_ = c.Close()
						_ = c.Close() // twice does no harm
					}
					wg.Wait()
				}
				for range 5 { // and some that die themselves
					ch := start(t, "caller", h.socket.Path(), nil)
					c, p := h.accept(t)
					_ = ch.stdin.Close()
					_ = ch.Wait()
					waitDone(t, p)
					_ = c.Close()
				}
				if after := descriptors(t); after > before+3 {
					t.Errorf("%d descriptors before, %d after", before, after)
				}
				h.tracker.mu.Lock()
				defer h.tracker.mu.Unlock()
				if len(h.tracker.peers) != 0 || h.tracker.slow != 0 {
					t.Errorf("%d peers on the books, %d without pidfd", len(h.tracker.peers), h.tracker.slow)
				}
			})
		})
	}
}

// spawn makes a process with the PID, which must be free.
func spawn(t *testing.T, pid int) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to choose a PID")
	}
	for range 200 { // others fork at the same time
		runtime.LockOSThread()
		err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0o600)
		if err != nil {
			t.Skipf("cannot choose a PID: %v", err)
		}
		cmd := exec.Command("/bin/sleep", "60")
		err = cmd.Start()
		runtime.UnlockOSThread()
		if err != nil {
			t.Fatal(err)
		}
		if cmd.Process.Pid == pid {
			t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
			return
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Skip("others were faster each time")
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestOtherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to be somebody else")
	}
	h := newHarness(t, false, false)
	ch := start(t, "caller", h.socket.Path(), &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65533}})
	_, p := h.accept(t)
	if p.PID != ch.Process.Pid || p.UID != 65534 || p.GID != 65533 {
		t.Errorf("got %+v", p.Process)
	}
}

func TestOtherPIDNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make a PID namespace")
	}
	path := filepath.Join(shortDir(t), "s")
	ch := start(t, "stranger", path, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID})
	ch.line(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := ch.line(t); got != "true" {
		t.Errorf("a caller that cannot be seen was not refused: %s", got)
	}
}

func TestAdmit(t *testing.T) {
	h := newHarness(t, false, false)
	var open atomic.Int32
	l := h.tracker.Listener(h.socket.UnixListener, func(p attestor.Process) (func(), error) {
		if open.Load() == 1 {
			return nil, errors.New("one is enough")
		}
		open.Add(1)
		return func() { open.Add(-1) }, nil
	})
	dial := func() net.Conn {
		c, err := net.Dial("unix", h.socket.Path())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	dial()
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	refused := dial()
	last := dial()
	_ = last
	got := make(chan net.Conn)
	go func() { c, _ := l.Accept(); got <- c }()
	if _, err := refused.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection over the limit read %v", err)
	}
	if _, err := last.Read(make([]byte, 1)); err == nil {
		t.Error("a second one over the limit was served")
	}
	_ = first.Close()
	dial()
	if c := <-got; c == nil {
		t.Error("a connection after one has left was refused")
	} else {
		_ = c.Close()
	}
}

func TestPin(t *testing.T) {
	h := newHarness(t, false, false)
	t.Run("a process is pinned by number", func(t *testing.T) {
		p, err := h.tracker.Pin(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if !p.Alive() || p.UID != uint32(os.Geteuid()) {
			t.Errorf("got %+v, alive %v", p.Process, p.Alive())
		}
		p.Release()
		if p.Alive() {
			t.Error("a released pin answers")
		}
	})
	t.Run("the number of a thread is no process's", func(t *testing.T) {
		var threads []int
		entries, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if id, err := strconv.Atoi(e.Name()); err == nil && id != os.Getpid() {
				threads = append(threads, id)
			}
		}
		if len(threads) == 0 {
			t.Fatal("Go has no second thread")
		}
		for _, id := range threads {
			if _, err := h.tracker.Pin(id); !errors.Is(err, ErrDead) {
				t.Errorf("thread %d: %v", id, err)
			}
		}
	})
	for _, pid := range []int{0, -1, 1 << 22} {
		t.Run(fmt.Sprintf("PID %d is refused", pid), func(t *testing.T) {
			if _, err := h.tracker.Pin(pid); err == nil {
				t.Error("it was pinned")
			}
		})
	}
}
