package unixsocket

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// errPassedOver is the error of a prepared socket that another took the place of.
var errPassedOver = errors.New("another successor has taken its place")

// successor is where the socket of the process that is to be the next waits beside the one of the last.
func successor(path string) string { return path + ".next" }

// Prepare makes a socket that listens beside its place, for a process that waits for another one's end. The
// other puts it in place with HandOver as the last thing it does before it lets go of its callers: they find a
// socket that takes them at any moment, and wait in its queue until they are accepted. A client that is refused
// once may take a second or more to try again.
//
// There is none where systemd holds the socket: that has a queue of its own.
func Prepare(path string, mode, dirMode os.FileMode) (*Socket, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("prepare socket: %w", err)
	}
	if isInherited(path) {
		return nil, nil // there is none
	}
	if err := makeDir(filepath.Dir(path), dirMode); err != nil {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	return bind(path, successor(path), mode)
}

// Install puts a prepared socket in place if HandOver has not.
func (s *Socket) Install() error {
	if s.InPlace() {
		return nil
	}
	next := successor(s.path)
	if now, err := identityOf(next); err != nil || now != s.ino {
		return fmt.Errorf("put socket in place at %s: %w", s.path, errPassedOver)
	}
	if err := vacant(s.path, os.Getpid()); err != nil {
		return err
	}
	if err := os.Rename(next, s.path); err != nil {
		return fmt.Errorf("put socket in place at %s: %w", s.path, err)
	}
	return nil
}

// Withdraw ends a prepared socket that is not to be used.
func (s *Socket) Withdraw() {
	next := successor(s.path)
	if now, err := identityOf(next); err == nil && now == s.ino {
		_ = os.Remove(next) // a dead one is in nobody's way
	}
	_ = s.Close() // nobody was accepted
}

// HandOver puts the socket of a process that waits for this one's end in place, and reports whether there was
// one.
func HandOver(path string) (bool, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return false, fmt.Errorf("hand over socket: %w", err)
	}
	next := successor(path)
	if st, err := os.Lstat(next); err != nil || st.Mode().Type() != os.ModeSocket {
		return false, nil //nolint:nilerr // there is no successor
	}
	probe, err := net.DialTimeout("unix", next, time.Second)
	if err != nil {
		return false, nil //nolint:nilerr // it has ended
	}
	_ = probe.Close() // only asked whether anybody listens
	if err := os.Rename(next, path); err != nil {
		return false, fmt.Errorf("hand over socket: %w", err)
	}
	return true, nil
}
