// Package durable puts small files on the disk of the server: keys, lists, what a plugin has. A crash at any moment
// leaves the old content or the new one, whole, and what was answered for is there afterwards.
//
// It is for files that are written now and then and read as a whole. The store has ways of its own.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Replace gives the file at path other content and the permissions of mode, and returns when both are on the disk.
// Until then the content is in a file beside it that only the owner may read, with ".tmp" behind its name. Two at a
// time for one path are the caller's to prevent.
func Replace(path string, mode fs.FileMode, content []byte) (err error) {
	temp := path + ".tmp"
	// A crash may have left one; O_EXCL below then says that nothing else put a link there.
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale file: %w", err)
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temp)
		}
	}()
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir returns when the names in a directory are on the disk: what was renamed into it, or made in it.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", path, err)
	}
	return nil
}
