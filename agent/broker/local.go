package broker

import (
	"errors"
	"net"

	"golang.org/x/sys/unix"
)

// locals accepts callers of a Unix socket and asks the kernel who they are, for the audit line of those that do not get
// through the handshake; those that do are known by their SVID.
type locals struct{ *net.UnixListener }

// local is where a caller of the socket is.
type local struct {
	net.Addr
	cred *unix.Ucred
}

type localConn struct {
	net.Conn
	from *local
}

// RemoteAddr returns who is at the other end.
func (c *localConn) RemoteAddr() net.Addr { return c.from }

// Accept implements net.Listener.
func (l locals) Accept() (net.Conn, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	cred, err := credentialsOf(conn)
	if err != nil {
		cred = &unix.Ucred{} // it is not let in for it, and not refused
	}
	return &localConn{conn, &local{conn.RemoteAddr(), cred}}, nil
}

func credentialsOf(conn *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var asked error
	err = raw.Control(func(fd uintptr) { cred, asked = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(err, asked)
}

// isUnix reports whether a caller is at the socket, and so on this node.
func isUnix(a net.Addr) bool {
	_, ok := a.(*local)
	return ok
}
