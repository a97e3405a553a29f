package unixsocket

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// firstInherited is the first file descriptor that systemd hands over, see sd_listen_fds(3).
const firstInherited = 3

// maxInherited is more sockets than any unit of ours has.
const maxInherited = 64

var (
	inheritedOnce sync.Once
	inheritedMu   sync.Mutex                         // guards inherited
	inherited     = map[string][]*net.UnixListener{} // by the path they are bound to
)

// takeInherited returns the listener on the path that systemd opened for this process, once; nil if
// there is none. Such a socket is there before and after the process: who connects meanwhile waits in
// its queue instead of being refused, and is pinned when it is accepted, by the credentials it had when
// it connected.
func takeInherited(path string) *net.UnixListener {
	inheritedOnce.Do(inherit)
	inheritedMu.Lock()
	defer inheritedMu.Unlock()
	for name, all := range inherited {
		if len(all) > 0 && samePlace(name, path) {
			inherited[name] = all[1:]
			return all[0]
		}
	}
	return nil
}

// isInherited reports whether takeInherited would return a listener.
func isInherited(path string) bool {
	inheritedOnce.Do(inherit)
	inheritedMu.Lock()
	defer inheritedMu.Unlock()
	for name, all := range inherited {
		if len(all) > 0 && samePlace(name, path) {
			return true
		}
	}
	return false
}

// inherit fills inherited.
func inherit() {
	listeners := fromEnvironment(os.Getpid(), os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), firstInherited)
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name) // not for children
	}
	for _, l := range listeners {
		name := l.Addr().String()
		inherited[name] = append(inherited[name], l)
	}
}

// samePlace compares two paths, of which one may lead through a link, as /var/run does.
func samePlace(a, b string) bool {
	if a == b {
		return true
	}
	dirA, errA := filepath.EvalSymlinks(filepath.Dir(a))
	dirB, errB := filepath.EvalSymlinks(filepath.Dir(b))
	return errA == nil && errB == nil && filepath.Join(dirA, filepath.Base(a)) == filepath.Join(dirB, filepath.Base(b))
}

// fromEnvironment takes over the listening Unix stream sockets among the descriptors that are meant for
// this process.
func fromEnvironment(self int, pid, count string, first int) []*net.UnixListener {
	if pid != strconv.Itoa(self) {
		return nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 1 || n > maxInherited {
		return nil
	}
	var listeners []*net.UnixListener
	for fd := first; fd < first+n; fd++ {
		unix.CloseOnExec(fd)
		if listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listening != 1 {
			continue
		}
		file := os.NewFile(uintptr(fd), fmt.Sprintf("inherited %d", fd))
		made, err := net.FileListener(file) // which works on a copy of the descriptor
		_ = file.Close()
		if err != nil {
			continue
		}
		l, ok := made.(*net.UnixListener)
		if !ok {
			_ = made.Close()
			continue
		}
		l.SetUnlinkOnClose(false) // the file is systemd's
		listeners = append(listeners, l)
	}
	return listeners
}
