package dial

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// deaf is a listener whose queue is full: the kernel drops whoever asks for a connection, as a packet filter does.
type deaf struct {
	address string
	fd      int
	waiting []net.Conn
}

func newDeaf(t *testing.T) *deaf {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	d := &deaf{fd: fd, address: (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: name.(*unix.SockaddrInet4).Port}).String()}
	for misses := 0; len(d.waiting) < 10; {
		conn, err := net.DialTimeout("tcp", d.address, 200*time.Millisecond)
		if err != nil {
			if misses++; misses == 3 { // one may be this machine's, which has much to do
				return d
			}
			continue
		}
		t.Cleanup(func() { _ = conn.Close() })
		d.waiting = append(d.waiting, conn)
	}
	t.Fatal("its queue is never full")
	return nil
}

// hear makes room in the queue.
func (d *deaf) hear(t *testing.T) {
	t.Helper()
	for range d.waiting {
		fd, _, err := unix.Accept(d.fd)
		if err != nil {
			t.Error(err)
			return
		}
		_ = unix.Close(fd)
	}
}

func TestDial(t *testing.T) {
	t.Run("an attempt that the network lost is joined by others, and the first answered is taken", func(t *testing.T) {
		server := newDeaf(t)
		var begun atomic.Int32
		ended := make(chan struct{}, 2)
		d := dialer{pauses: []time.Duration{10 * time.Millisecond, time.Millisecond}, connect: func(ctx context.Context, address string) (net.Conn, error) {
			n := begun.Add(1)
			if n == 3 {
				server.hear(t)
			}
			if n < 3 { // what the kernel would do for them comes too late
				<-ctx.Done()
				ended <- struct{}{}
				return nil, ctx.Err()
			}
			return connect(ctx, address)
		}}
		conn, err := d.dial(t.Context(), server.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if begun.Load() < 3 {
			t.Errorf("%d attempts", begun.Load())
		}
		<-ended // or the test ends by its own patience
		<-ended
	})
	t.Run("who is answered later is hung up on", func(t *testing.T) {
		hungUp := make(chan struct{}, 2)
		both := make(chan struct{})
		var begun atomic.Int32
		d := dialer{pauses: []time.Duration{time.Millisecond, time.Hour}, connect: func(context.Context, string) (net.Conn, error) {
			if begun.Add(1) == 2 {
				close(both)
			}
			<-both
			ours, _ := net.Pipe()
			return told{ours, hungUp}, nil
		}}
		conn, err := d.dial(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		<-hungUp // or the test ends by its own patience
		_ = conn.Close()
		<-hungUp
	})
	t.Run("a refusal is told at once", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address := l.Addr().String()
		_ = l.Close()
		d := dialer{pauses: []time.Duration{time.Hour}, connect: connect}
		if _, err := d.dial(t.Context(), address); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("who does not answer is named when patience ends", func(t *testing.T) {
		server := newDeaf(t)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		d := dialer{pauses: []time.Duration{time.Millisecond, time.Hour}, connect: connect}
		_, err := d.dial(ctx, server.address)
		if !errors.Is(err, context.DeadlineExceeded) && !strings.Contains(err.Error(), "i/o timeout") || !strings.Contains(err.Error(), server.address) {
			t.Errorf("got %v", err)
		}
	})
}

// told is a connection that tells of its end.
type told struct {
	net.Conn
	closed chan<- struct{}
}

func (c told) Close() error {
	c.closed <- struct{}{}
	return c.Conn.Close()
}

func TestCertificateRefused(t *testing.T) {
	for text, want := range map[string]bool{
		`connection error: desc = "error reading server preface: remote error: tls: bad certificate"`:                                         true,
		`connection error: desc = "transport: authentication handshake failed: remote error: tls: unknown certificate authority"`:             true,
		`connection error: desc = "error reading server preface: remote error: tls: expired certificate"`:                                     true,
		`connection error: desc = "transport: authentication handshake failed: remote error: tls: no application protocol"`:                   false,
		`connection error: desc = "transport: authentication handshake failed: verify server: x509: certificate signed by unknown authority"`: false,
		`connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.1:8081: connect: connection refused"`:                      false,
	} {
		if got := CertificateRefused(fmt.Errorf("follow the feed: %w", status.Error(codes.Unavailable, text))); got != want {
			t.Errorf("%s: %v", text, got)
		}
		if CertificateRefused(status.Error(codes.Unknown, text)) {
			t.Errorf("a server may say %s", text)
		}
	}
	t.Run("as a server says it", func(t *testing.T) {
		server, client := httptest.NewUnstartedServer(nil), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
		server.EnableHTTP2 = true
		server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, VerifyConnection: func(tls.ConnectionState) error { return errors.New("unknown") }}
		server.StartTLS()
		defer server.Close()
		conn, err := Server(server.Listener.Addr().String(), client)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// What was sent meanwhile may overtake the alert, as a reset.
		for err = nil; !CertificateRefused(err); {
			if err = conn.Invoke(t.Context(), "/a/b", &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unavailable {
				t.Fatalf("got %v", err)
			}
		}
	})
}
