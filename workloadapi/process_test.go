package workloadapi_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
)

type child struct {
	*exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
}

func (w *world) workload(t testing.TB, attr *syscall.SysProcAttr, env ...string) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), "WORKLOAD_SOCKET="+w.socket, "GORACE=atexit_sleep_ms=0"), env...)
	cmd.SysProcAttr = attr
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
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return &child{Cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout)}
}

func (c *child) line(t testing.TB) string {
	t.Helper()
	text, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("workload said %q: %v", text, err)
	}
	return strings.TrimSpace(text)
}

func TestProcesses(t *testing.T) {
	t.Run("each process gets its own identity", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("needs root to be somebody else")
		}
		w := serve(t, workloadapi.Config{Hold: -1}, newFake(byUID))
		w.put("/nobody", "unix:uid:65534")
		w.put("/root", "unix:uid:0")
		other := w.workload(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
		if got := other.line(t); got != "spiffe://example.org/nobody" {
			t.Errorf("another user got %s", got)
		}
		own := w.workload(t, nil)
		if got := own.line(t); got != "spiffe://example.org/root" {
			t.Errorf("root got %s", got)
		}
		stranger := w.workload(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 4711}})
		if got := stranger.line(t); got != "PermissionDenied no identity issued" {
			t.Errorf("a stranger got %s", got)
		}
		l := w.audit.wait(t, func(l workloadapi.Line) bool { return l.UID == 65534 && l.Outcome == "allow" })
		if l.PID != other.Process.Pid || !slices.Equal(l.SPIFFEIDs, []string{"spiffe://example.org/nobody"}) || l.Rev == 0 ||
			len(l.EntryIDs) != 1 || len(l.Types) != 1 || l.Facts == "" || l.Selectors != nil {
			t.Errorf("audited as %+v", l)
		}
	})
	t.Run("a process that dies during attestation gets no answer", func(t *testing.T) {
		begun, release := make(chan int, 1), make(chan struct{})
		w := serve(t, workloadapi.Config{}, newFake(func(_ context.Context, p attestor.Process) ([]attestor.Selector, error) {
			begun <- p.PID
			<-release
			return selectors("a:b"), nil
		}))
		w.put("/dead", "a:b")
		ch := w.workload(t, nil)
		if pid := <-begun; pid != ch.Process.Pid {
			t.Fatalf("attested %d", pid)
		}
		_ = ch.Process.Kill() // a zombie is as dead
		if err := unix.Waitid(unix.P_PID, ch.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
			t.Fatal(err)
		}
		close(release)
		w.stop()
		w.audit.mu.Lock()
		defer w.audit.mu.Unlock()
		for _, l := range w.audit.lines {
			if l.Outcome == "allow" {
				t.Errorf("an identity was handed out: %+v", l)
			}
		}
		if n := w.src.Made(); n != 0 {
			t.Errorf("an SVID was made %d times", n)
		}
	})
	t.Run("a stream ends with its process", func(t *testing.T) {
		w := serve(t, workloadapi.Config{}, newFake(byUID))
		ch := w.workload(t, nil)
		w.put("/child", fmt.Sprintf("unix:pid:%d", ch.Process.Pid))
		if got := ch.line(t); got != "spiffe://example.org/child" {
			t.Fatal(got)
		}
		made := w.src.Made()
		_ = ch.Process.Kill()
		_ = ch.Wait()
		w.stop()
		if w.src.Made() != made {
			t.Error("something was made for a dead process")
		}
	})
}
