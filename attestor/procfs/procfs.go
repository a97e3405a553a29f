// Package procfs reads what the kernel tells of a process, for attestors.
//
// Why it is so: every call of a workload costs some of these reads. The os package asks the kernel for more than
// the text: it tries to have it polled, and reads in small steps.
package procfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// first is how much is read at once: most files of a process are shorter.
const first = 4096

var buffers = sync.Pool{New: func() any { b := make([]byte, first); return &b }}

// Read returns the text of a process's file; proc is where procfs is mounted. A process that is gone is
// os.ErrNotExist; a text of more than limit bytes is an error.
func Read(proc string, pid int, name string, limit int) (string, error) {
	path := filepath.Join(proc, strconv.Itoa(pid), name)
	fd, err := retried(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }() // it was only read
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	text, n := *pooled, 0
	for {
		if n == len(text) {
			text = append(text, make([]byte, len(text))...)
		}
		got, err := retried(func() (int, error) { return unix.Read(fd, text[n:]) })
		switch {
		case errors.Is(err, unix.ESRCH): // what procfs says when the process ended after the open
			return "", fmt.Errorf("read %s: %w: %w", path, os.ErrNotExist, err)
		case err != nil:
			return "", &os.PathError{Op: "read", Path: path, Err: err}
		case got == 0:
			return string(text[:n]), nil
		}
		if n += got; n > limit {
			return "", fmt.Errorf("%s is larger than %d bytes", path, limit)
		}
	}
}

// retried does again what a signal interrupted.
func retried(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
