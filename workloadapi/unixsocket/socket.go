// Package unixsocket opens the Unix sockets that a daemon serves: where clients look for one there is one that
// accepts them or none, at any moment, whoever was killed there before, whoever takes over from whom, and whether
// systemd opened it or the daemon. Who connects is not its business: see peer.
package unixsocket

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is what fits in sockaddr_un with its closing zero.
const maxSocketPath = 107

// Socket is a Unix socket file that this process listens on.
type Socket struct {
	*net.UnixListener
	path string
	ino  fileID
}

type fileID struct{ dev, ino uint64 }

// Listen makes the socket with the given mode and puts it in place in one step: it is bound and
// opened up under a hidden name beside its place and renamed over whatever dead socket is there, so
// that clients find a socket which accepts them or none, at any moment. A missing directory is made
// with mode dirMode; one that exists is left as it is. A file that is no socket is refused, and so
// is a socket on which another process still listens; this process may replace its own.
//
// A socket on that path that systemd opened for this process is taken as it is.
func Listen(path string, mode, dirMode os.FileMode) (*Socket, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if l := takeInherited(path); l != nil {
		ino, err := identityOf(path)
		if err != nil {
			_ = l.Close()
			return nil, fmt.Errorf("take over the socket %s from systemd: %w; restart the socket unit", path, err)
		}
		return &Socket{UnixListener: l, path: path, ino: ino}, nil
	}
	if err := makeDir(filepath.Dir(path), dirMode); err != nil {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	if err := vacant(path, os.Getpid()); err != nil {
		return nil, err
	}
	return bind(path, path, mode)
}

// bind makes the socket that is to be at path, and puts it at place for now.
func bind(path, place string, mode os.FileMode) (*Socket, error) {
	hidden := filepath.Join(filepath.Dir(path), "."+randomName())
	if longest := max(len(place), len(hidden)); longest > maxSocketPath {
		return nil, fmt.Errorf("listen on %s: path is %d bytes long, Unix sockets allow %d", place, longest, maxSocketPath)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: hidden, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // the name it was bound to is gone by then, and the new one may be another's
	s := &Socket{UnixListener: l, path: path}
	if err = os.Chmod(hidden, mode); err == nil { //nolint:gosec // the path is the operator's
		s.ino, err = identityOf(hidden)
	}
	if err == nil {
		err = os.Rename(hidden, place) //nolint:gosec // the path is the operator's
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(hidden) //nolint:gosec // the path is the operator's
		return nil, fmt.Errorf("put socket in place at %s: %w", place, err)
	}
	return s, nil
}

// Path returns where the socket is.
func (s *Socket) Path() string { return s.path }

// InPlace reports whether clients that open the path reach this socket. Cleaners of temporary
// directories remove sockets whose file times look old, and a second agent may have moved in.
func (s *Socket) InPlace() bool {
	now, err := identityOf(s.path)
	return err == nil && now == s.ino
}

// Close stops listening and leaves the file: clients that come back, and containers that the socket is
// mounted into, find it at its place while the agent is restarted, and the next Listen puts another
// there in one step. Until then whoever connects is refused.
func (s *Socket) Close() error { return s.UnixListener.Close() }

// makeDir makes the directory with the given mode, and what is missing above it so that everybody can
// pass: workloads of other users must reach the socket. Modes hold whatever the umask is.
func makeDir(dir string, mode os.FileMode) error {
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, os.ErrNotExist) { //nolint:gosec // the path is the operator's
		return err
	}
	if err := makeDir(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, mode); errors.Is(err, os.ErrExist) { //nolint:gosec // the path is the operator's
		return nil // somebody else made it meanwhile, and chose its mode
	} else if err != nil {
		return err
	}
	return os.Chmod(dir, mode) //nolint:gosec // the path is the operator's
}

// ErrInUse is the error of a socket on which another process listens.
var ErrInUse = errors.New("in use")

// Vacant says why a daemon that starts cannot have the path, or nil. The error is ErrInUse if anybody listens
// there.
func Vacant(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if isInherited(path) {
		return nil
	}
	return vacant(path, nobody)
}

// nobody is no process.
const nobody = 0

// vacant says why a socket cannot be put at the path, or nil. One of the process may is in nobody's way.
func vacant(path string, may int) error {
	st, err := os.Lstat(path) //nolint:gosec // the path is the operator's
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("listen on %s: there is a file which is not a socket; remove it, or name another path", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second) //nolint:gosec // the path is the operator's
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
		return nil // nobody listens: left behind by a process that was killed
	}
	if err != nil { // no permission, a full backlog: somebody may be there
		return fmt.Errorf("listen on %s: cannot tell whether the socket is in use: %w", path, err)
	}
	defer func() { _ = c.Close() }()
	pid, err := listenerPID(c)
	if err != nil {
		return fmt.Errorf("listen on %s: read credentials of who listens: %w", path, err)
	}
	if pid == may {
		return nil
	}
	return fmt.Errorf("listen on %s: %w: process %d already listens there; end it, or name another path", path, ErrInUse, pid)
}

// Exposed says which directory above a socket somebody else could put another socket in, so that callers would reach
// him; empty: none. A sticky one, as /tmp, lets nobody take what is not his.
func Exposed(path string) string {
	path, err := filepath.Abs(path)
	if err != nil {
		return ""
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err == nil {
			st, ok := info.Sys().(*syscall.Stat_t)
			switch {
			case ok && st.Uid != 0 && int(st.Uid) != os.Geteuid():
				return fmt.Sprintf("%s belongs to user %d: give it to root, or to the user this runs as", dir, st.Uid)
			case info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0:
				return fmt.Sprintf("%s can be written by everybody (mode %#o): run chmod o-w %s", dir, info.Mode().Perm(), dir)
			}
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}

func listenerPID(c net.Conn) (int, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a Unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return int(cred.Pid), nil
}

func identityOf(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileID{}, err
	}
	return fileID{dev: uint64(st.Dev), ino: st.Ino}, nil //nolint:unconvert,nolintlint // Dev has another type on some architectures
}

func randomName() string {
	var b [3]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
