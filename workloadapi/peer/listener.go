package peer

import (
	"context"
	"errors"
	"net"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"

	"github.com/assay-id/assay/attestor"
)

// Admit decides whether one more connection of a process is served. leave is called once when the
// connection is closed; an error refuses it and is logged.
type Admit func(attestor.Process) (leave func(), err error)

// Listener wraps a Unix listener: each connection that Accept returns is pinned to its process.
// Connections whose process cannot be identified, or that admit (which may be nil) refuses, are
// closed without a word and never seen by the caller.
func (t *Tracker) Listener(l *net.UnixListener, admit Admit) net.Listener {
	return &listener{UnixListener: l, tracker: t, admit: admit}
}

type listener struct {
	*net.UnixListener
	tracker *Tracker
	admit   Admit
}

// Accept waits for the next connection whose process could be identified.
func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.AcceptUnix()
		if starved(err) {
			l.tracker.refuse("descriptors", err)
		}
		if err != nil {
			return nil, err
		}
		c, err := l.pin(raw)
		if err == nil {
			return c, nil
		}
		reason := "limit"
		switch {
		case starved(err):
			reason = "descriptors"
		case errors.Is(err, ErrDead):
			reason = "dead"
		case errors.Is(err, ErrInvisible):
			reason = "pid_namespace"
		case c == nil:
			reason = "unidentified"
		}
		l.tracker.refuse(reason, err)
		if c != nil {
			_ = c.Close()
		}
		_ = raw.Close()
	}
}

// starved reports whether it is for want of a file descriptor, of which each connection takes two.
func starved(err error) bool { return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) }

// pin returns the pinned connection. With both a connection and an error, admit refused it.
func (l *listener) pin(raw *net.UnixConn) (*conn, error) {
	c := &conn{Conn: raw}
	p, err := l.tracker.identify(raw, func() { _ = raw.Close() })
	if err != nil {
		return nil, err
	}
	c.peer = p
	if l.admit == nil {
		return c, nil
	}
	c.leave, err = l.admit(p.Process)
	return c, err
}

// conn is a connection with the pin of its process; Close gives both back.
type conn struct {
	net.Conn
	peer  *Peer
	leave func()
	once  sync.Once
}

// Close closes the connection and releases the pin.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.peer.Release()
		if c.leave != nil {
			c.leave()
		}
	})
	return err
}

// Credentials returns gRPC transport credentials for servers whose listener is Tracker.Listener.
func Credentials() credentials.TransportCredentials { return unixCredentials{} }

type unixCredentials struct{}

// ServerHandshake takes the process that Accept pinned; nothing crosses the wire.
func (unixCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errors.New("identify peer: not a connection of a peer listener")
	}
	// A Unix socket never leaves the kernel, which is what gRPC's own local credentials claim too.
	level := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	return c, AuthInfo{CommonAuthInfo: level, Peer: c.peer}, nil
}

// ClientHandshake always fails: these credentials are for servers.
func (unixCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("identify peer: credentials are for servers only")
}

// Info describes the credentials to gRPC.
func (unixCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

// Clone returns the same credentials: they hold nothing.
func (c unixCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName does nothing: a Unix socket has no server name.
func (unixCredentials) OverrideServerName(string) error { return nil }
