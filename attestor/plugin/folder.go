package plugin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// folderPrefix is how the folders of plugins' sockets are named, in the directory for temporary files.
const folderPrefix = "assay-plugin-"

// folder is where a program has its sockets. It is locked for as long as it is of use, so that what an agent or
// server left behind that was killed is known from what is in use, whatever process or container uses it.
type folder struct {
	path string
	lock *os.File // the folder itself
}

// errTaken says that somebody else holds a folder, or has taken it away.
var errTaken = errors.New("the folder is somebody else's")

// newFolder makes a folder in dir, and removes those there that nobody uses any more.
func newFolder(dir string) (*folder, error) {
	sweep(dir)
	for range 10 { // whoever sweeps may take one before it is locked
		path, err := os.MkdirTemp(dir, folderPrefix)
		if err != nil {
			return nil, err
		}
		f, err := lockFolder(path)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, errTaken) {
			return nil, errors.Join(err, os.Remove(path))
		}
	}
	return nil, fmt.Errorf("make a folder in %s: %w", dir, errTaken)
}

// lockFolder takes the folder of that name, if it is our user's and nobody has it.
func lockFolder(path string) (*folder, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, errTaken
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := &folder{path: path, lock: os.NewFile(uintptr(fd), path)}
	if err := f.take(fd); err != nil {
		return nil, errors.Join(err, f.lock.Close())
	}
	return f, nil
}

func (f *folder) take(fd int) error {
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%w: %w", errTaken, err)
	}
	var held, named unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &held), unix.Lstat(f.path, &named)); err != nil {
		return fmt.Errorf("%w: %w", errTaken, err)
	}
	if held.Dev != named.Dev || held.Ino != named.Ino || int(held.Uid) != os.Geteuid() || held.Mode&0o777 != 0o700 {
		return errTaken
	}
	return nil
}

// remove ends the use of the folder. The lock goes last: nobody finds it unlocked and not yet empty.
func (f *folder) remove() error {
	err := os.RemoveAll(f.path)
	return errors.Join(err, f.lock.Close())
}

// sweep removes the folders in dir that are our user's and that nobody uses any more. What cannot be removed stays.
func sweep(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if !entry.IsDir() || !strings.HasPrefix(entry.Name(), folderPrefix) {
			continue
		}
		if f, err := lockFolder(filepath.Join(dir, entry.Name())); err == nil {
			_ = f.remove()
		}
	}
}
