// Package peer answers two questions about the process at the other end of a Unix socket: which
// one is it, and is it still the same one.
//
// The kernel notes who connected at the moment of connect(2), and SO_PEERCRED tells. That alone is
// a number, and numbers are used again: a process may connect, exit, and leave its PID to another
// one before anybody has looked. So each connection is pinned when it is accepted. On Linux 6.5 and
// later SO_PEERPIDFD gives a descriptor for the very process that connected. While that process
// has not exited the kernel does not give its PID to another, so whatever was read below
// /proc/<pid> before a successful Alive was read from the process that connected. That is the
// whole scheme: take the pin, attest by PID, ask Alive, and only then believe.
//
// On older kernels the pin is a pidfd opened by number (Linux 5.3), or a descriptor of /proc/<pid>.
// Both hold on to one process from then on; the instant between connect and accept stays open to a
// reused PID there, and is narrowed by demanding that the process has the user ID that connected.
//
// Why it is so:
//   - Alive polls the descriptor. Signal 0 to a zombie succeeds, so it proves nothing.
//   - One epoll instance waits for all processes to exit. A goroutine each would cost more memory
//     than the rest of a stream.
//   - When the process exits its connection is closed, whoever else still holds it. A child that
//     inherited the connection, or that it was passed to, is cut off and gets an identity of its
//     own by connecting itself. While the first process lives, an inheritor speaks in its name, as
//     with every Unix credential: descriptors are authority, and passing one on is a choice. An
//     exec keeps PID and pidfd, so what the process has become is for the next attestation to say.
//   - The pin belongs to the net.Conn that Accept returns and is released by its Close, so no path
//     through gRPC, a failed HTTP/2 preface among them, can leak a descriptor.
package peer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/assay-id/assay/attestor"
)

// Errors of identification.
var (
	// ErrDead says that the process was gone before it could be pinned.
	ErrDead = errors.New("process has exited")
	// ErrInvisible says that the process lives in a PID namespace that cannot be seen from here, so
	// that the kernel reports PID 0. Nothing can be proved of it.
	ErrInvisible = errors.New("process is in another PID namespace")
)

// Config holds what a Tracker may be given; the zero value works.
type Config struct {
	// Proc is where procfs is mounted; empty means /proc.
	Proc string
	// Log gets one line for refused connections now and then, never one each.
	Log logrus.FieldLogger
	// Metrics is where the tracker's numbers go; nil keeps them unseen.
	Metrics prometheus.Registerer
	// Now is the clock for limiting log lines.
	Now func() time.Time
}

// Peer is the process at the other end of a connection, pinned so that another process with the
// same PID is never mistaken for it.
type Peer struct {
	// Process is what attestors are asked about.
	attestor.Process

	tracker *Tracker
	id      uint64        // never used again, unlike a descriptor's number
	done    chan struct{} // closed when the process has exited

	mu       sync.Mutex // guards the three below; Tracker.mu may be taken while it is held
	pin      pin
	released bool
	close    func() // closes the connection, nil for a process that was pinned by number
}

// Alive reports whether the process that connected is still running. A zombie is not, and neither
// is a Peer whose connection is closed: nothing is known of its process any more.
func (p *Peer) Alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.released && p.pin.alive()
}

// Done is closed when the process has exited. It needs Tracker.Run, and stays open when the
// connection is closed first.
func (p *Peer) Done() <-chan struct{} { return p.done }

// Release gives the pin back. Connections do it when they are closed; only a Peer from Tracker.Pin
// needs it called.
func (p *Peer) Release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.released {
		return
	}
	p.released = true
	p.tracker.forget(p)
	_ = unix.Close(p.pin.fd)
}

// exited is called once, by Tracker.Run.
func (p *Peer) exited() {
	close(p.done)
	if p.close != nil {
		p.close()
	}
}

// pin is a descriptor that stands for one process.
type pin struct {
	fd int
	// pidfd says that fd is a pidfd; otherwise it is the directory /proc/<pid>.
	pidfd bool
}

// alive asks the descriptor, so that no reused number can answer for the process.
func (p pin) alive() bool {
	if !p.pidfd {
		st, err := statOf(p.fd)
		return err == nil && st.running()
	}
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}} //nolint:gosec // descriptors are small numbers
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		// A pidfd becomes readable when its process exits, reaped or not.
		return err == nil && n == 0
	}
}

// AuthInfo is how a Peer travels in gRPC's context.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Peer *Peer
}

// AuthType names the kind of authentication.
func (AuthInfo) AuthType() string { return "unix-peer" }

// FromContext returns the process at the other end of a gRPC call whose server uses Credentials.
func FromContext(ctx context.Context) (*Peer, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(AuthInfo)
	return info.Peer, ok && info.Peer != nil
}

// Pin pins a process of this host by its PID, for an operator who asks about it. There is no
// connection to say who it was meant to be, so a PID that was reused before the call is the
// caller's mistake to make. UID and GID are the effective ones. The caller must call Release.
func (t *Tracker) Pin(pid int) (*Peer, error) {
	pinned, err := t.open(pid)
	if err != nil {
		return nil, fmt.Errorf("pin process %d: %w", pid, err)
	}
	uid, gid, err := ids(t.proc, pid)
	if err == nil && !pinned.alive() {
		err = ErrDead
	}
	if err != nil {
		_ = unix.Close(pinned.fd)
		return nil, fmt.Errorf("read owner of process %d: %w", pid, err)
	}
	return t.track(attestor.Process{PID: pid, UID: uid, GID: gid, Proc: t.proc}, pinned, nil)
}
