package files

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// errWrite says that a file could not be written.
var errWrite = errors.New("cannot write")

// file is what is to be on disk.
type file struct {
	name    string
	content []byte
	mode    fs.FileMode
}

// maxFile bounds what is read back to compare; nothing that is written is larger.
const maxFile = 64 << 20

// makeDir makes the directory and those above it so that readers of other users get in, whatever the
// process's umask says: the files have modes of their own.
func makeDir(path string) error {
	if info, err := os.Stat(path); err == nil {
		if !info.IsDir() {
			return fmt.Errorf("make directory for files: %s is a file", path)
		}
		return nil
	}
	if parent := filepath.Dir(path); parent != path {
		if err := makeDir(parent); err != nil {
			return err
		}
	}
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = os.Chmod(path, 0o755) //nolint:gosec // see above
	}
	if err != nil {
		return fmt.Errorf("make directory for files: %w", err)
	}
	return nil
}

// put writes those of the files that are not so on disk, in their order, and reports whether there were
// any. The directory is opened once, so that nobody who may write above it moves the files elsewhere
// meanwhile, and no link in it leads out of it.
func (k *Keeper) put(list []file) (changed bool, err error) {
	root, err := os.OpenRoot(k.cfg.Dir)
	if err != nil {
		return false, fmt.Errorf("%w: %w", errWrite, err)
	}
	defer func() { _ = root.Close() }()
	for _, f := range list {
		if k.same(root, f) {
			continue
		}
		if err := k.replace(root, f); err != nil {
			return changed, fmt.Errorf("%w %s: %w", errWrite, f.name, err)
		}
		changed = true
	}
	if changed {
		if err := syncDir(root); err != nil {
			return changed, fmt.Errorf("%w: %w", errWrite, err)
		}
	}
	return changed, nil
}

// same reports whether the file is as it is to be: content, mode and owner.
func (k *Keeper) same(root *os.Root, f file) bool {
	info, err := root.Lstat(f.name)
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != f.mode || info.Size() != int64(len(f.content)) || info.Size() > maxFile {
		return false
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok ||
		k.cfg.Owner != nil && int(stat.Uid) != *k.cfg.Owner || k.cfg.Group != nil && int(stat.Gid) != *k.cfg.Group {
		return false
	}
	in, err := root.Open(f.name)
	if err != nil {
		return false
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxFile))
	return err == nil && bytes.Equal(text, f.content)
}

// replace puts the file in the place of whatever is there. A reader sees the old one or the new one, also
// after a crash.
func (k *Keeper) replace(root *os.Root, f file) (err error) {
	temp := "." + f.name + ".new"
	if err := root.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a run that ended here
		return err
	}
	// Nobody but this process can open it before it has its owner.
	out, err := root.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.Remove(temp)
		}
	}()
	_, err = out.Write(f.content)
	if err == nil && (k.cfg.Owner != nil || k.cfg.Group != nil) {
		err = out.Chown(orAsIs(k.cfg.Owner), orAsIs(k.cfg.Group))
	}
	if err == nil {
		err = out.Chmod(f.mode)
	}
	if err == nil {
		err = out.Sync()
	}
	if closed := out.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	return root.Rename(temp, f.name)
}

func orAsIs(id *int) int {
	if id == nil {
		return -1
	}
	return *id
}

// remove removes those of the files that are there and reports whether there were any.
func (k *Keeper) remove(names ...string) (changed bool, err error) {
	root, err := os.OpenRoot(k.cfg.Dir)
	if err != nil {
		return false, fmt.Errorf("%w: %w", errWrite, err)
	}
	defer func() { _ = root.Close() }()
	for _, name := range names {
		if name == "" {
			continue
		}
		switch err := root.Remove(name); {
		case err == nil:
			changed = true
		case !errors.Is(err, fs.ErrNotExist):
			return changed, fmt.Errorf("%w: remove %s: %w", errWrite, name, err)
		}
	}
	if changed {
		if err := syncDir(root); err != nil {
			return changed, fmt.Errorf("%w: %w", errWrite, err)
		}
	}
	return changed, nil
}

// there reports whether one of the files is on disk.
func (k *Keeper) there(names ...string) bool {
	root, err := os.OpenRoot(k.cfg.Dir)
	if err != nil {
		return false
	}
	defer func() { _ = root.Close() }()
	for _, name := range names {
		if name == "" {
			continue
		}
		if _, err := root.Lstat(name); err == nil {
			return true
		}
	}
	return false
}

func syncDir(root *os.Root) error {
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// onDisk returns the first certificate of a file.
func (k *Keeper) onDisk(name string) (*x509.Certificate, bool) {
	root, err := os.OpenRoot(k.cfg.Dir)
	if err != nil {
		return nil, false
	}
	defer func() { _ = root.Close() }()
	in, err := root.Open(name)
	if err != nil {
		return nil, false
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxFile))
	if err != nil {
		return nil, false
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, false
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	return cert, err == nil
}
