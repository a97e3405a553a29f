package boltkv

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// Inspect reads the whole file at path and returns everything that is damaged in it, in words for an
// operator; nothing if it is whole. It changes nothing. The error says that there was nothing to
// read: no such file, no permission, or ErrLocked because a server has it open.
func Inspect(path string) (damages []error, err error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("inspect store: %w", err)
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	// Several may read at once: a copy that a server reads back is not in use by a server.
	if err := lock(file, syscall.LOCK_SH, time.Millisecond); err != nil {
		return nil, err
	}
	info, err := file.Stat() // under the lock: until then a server may have made the file larger
	switch {
	case err != nil:
		return nil, fmt.Errorf("inspect store: %w", err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("inspect store %s: it is no regular file", path)
	}
	if info.Size() == 0 {
		return []error{errors.New("the file is empty")}, nil
	}
	return inspectFile(file, info.Size()), nil
}

// Lock keeps servers away from the file at path, which must exist, until unlock is called. It returns
// ErrLocked if one has it open.
func Lock(path string) (unlock func() error, err error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	if err := lock(file, syscall.LOCK_EX, time.Millisecond); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file.Close, nil
}
