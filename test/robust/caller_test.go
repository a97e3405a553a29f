package robust

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

// connectVariable makes the test binary a process that connects to the socket it names, gives the
// connection away through its standard output, and ends.
const connectVariable = "ROBUST_CONNECT"

func TestMain(m *testing.M) {
	if socket := os.Getenv(connectVariable); socket != "" {
		if err := connectAndGiveAway(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func connectAndGiveAway(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	file, err := conn.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(1, []byte{1}, unix.UnixRights(int(file.Fd())), nil, 0); err != nil {
		return err
	}
	var ack [1]byte
	_, err = unix.Read(1, ack[:]) // until the other end has it
	return err
}

// inherited returns a connection that a process made which has ended, if the agent has not closed it, and
// the PID that the process had.
func inherited(t *testing.T, socket string, during func(net.Conn)) (net.Conn, int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	out := os.NewFile(uintptr(pair[1]), "pair")
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), connectVariable+"="+socket)
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &stderr
	if err := errors.Join(cmd.Start(), out.Close()); err != nil {
		t.Fatal(err)
	}
	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), rights, 0)
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) != 1 {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "inherited")
	conn, err := net.FileConn(file)
	if err = errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	if during != nil {
		during(conn)
	}
	if _, err := unix.Write(pair[0], []byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	return conn, cmd.Process.Pid
}

// reuse starts a process with a PID that was somebody else's.
func reuse(t *testing.T, pid int) {
	t.Helper()
	for range 200 { // others fork at the same time
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0o600); err != nil {
			lab.Missing(t, "a PID of one's choice", err)
		}
		cmd := exec.CommandContext(t.Context(), "/bin/sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		end := func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
		if cmd.Process.Pid == pid {
			t.Cleanup(end)
			return
		}
		end()
	}
	lab.Missing(t, "a PID of one's choice", errors.New("others were faster each time"))
}

// fetchOver asks for X.509-SVIDs over a connection.
func fetchOver(t *testing.T, conn net.Conn) (*workloadpb.X509SVIDResponse, error) {
	t.Helper()
	given := make(chan net.Conn, 1)
	given <- conn
	client, err := grpc.NewClient("passthrough:///given", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-given:
				return c, nil
			default:
				return nil, errors.New("there was one connection")
			}
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx := metadata.AppendToOutgoingContext(patiently(t), "workload.spiffe.io", "true")
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(client).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

// TestInherited uses the connection of a process that has ended: what it was is nobody any more, though
// whoever holds the connection now would get the same identity over one of its own.
func TestInherited(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	h := newHistory()
	start(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	h.mustCreate(t, dial(t, s), newEntry(onlyAgent(t, s), "/one"))
	newWorkload(t, a.Socket).has("/one")

	t.Run("a connection that was made before its process ended is refused", func(t *testing.T) {
		conn, _ := inherited(t, a.Socket, nil)
		if got, err := fetchOver(t, conn); err == nil {
			t.Errorf("served %d SVIDs", len(got.GetSvids()))
		}
	})
	// Nobody is faster than one who sleeps: the agent is stopped while the caller connects and dies.
	asleep := func(t *testing.T, do func()) {
		t.Helper()
		if err := a.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		do()
		if err := a.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("one that the agent accepts when its process is dead already is refused", func(t *testing.T) {
		var conn net.Conn
		asleep(t, func() { conn, _ = inherited(t, a.Socket, nil) })
		if got, err := fetchOver(t, conn); err == nil {
			t.Errorf("served %d SVIDs", len(got.GetSvids()))
		}
	})
	t.Run("and so it is when another process has got its PID by then", func(t *testing.T) {
		var conn net.Conn
		asleep(t, func() {
			var pid int
			conn, pid = inherited(t, a.Socket, nil)
			reuse(t, pid)
		})
		if got, err := fetchOver(t, conn); err == nil {
			t.Errorf("served %d SVIDs", len(got.GetSvids()))
		}
	})
	t.Run("while its process lives it is served, so it is the end that matters", func(t *testing.T) {
		conn, _ := inherited(t, a.Socket, func(conn net.Conn) {
			got, err := fetchOver(t, conn)
			if err != nil || len(got.GetSvids()) != 1 {
				t.Errorf("%v, %v", got, err)
			}
		})
		_ = conn.Close()
	})
	t.Run("and others do not notice", func(t *testing.T) {
		if _, err := client(t, a.Socket).FetchX509SVID(patiently(t)); err != nil {
			t.Error(err)
		}
	})
}
