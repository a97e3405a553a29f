package plugin

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestFolders(t *testing.T) {
	dir := t.TempDir()
	mkdir := func(name string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.Mkdir(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	there := func(path string, want bool) {
		t.Helper()
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", path, err == nil, want)
		}
	}
	used, err := newFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	left := mkdir("assay-plugin-left", 0o700)
	if err := os.WriteFile(filepath.Join(left, "host"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open, other, elsewhere := mkdir("assay-plugin-open", 0o755), mkdir("other", 0o700), t.TempDir()
	link, file := filepath.Join(dir, "assay-plugin-link"), filepath.Join(dir, "assay-plugin-file")
	if err := os.Symlink(elsewhere, link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	next, err := newFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("what was left behind is removed", func(*testing.T) { there(left, false) })
	t.Run("what is in use stays", func(*testing.T) { there(used.path, true); there(next.path, true) })
	t.Run("what is no such folder of ours stays", func(*testing.T) {
		for _, path := range []string{open, other, link, elsewhere, file} {
			there(path, true)
		}
	})
	t.Run("one that is somebody else's stays", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("needs root to give a folder away")
		}
		theirs := mkdir("assay-plugin-theirs", 0o700)
		if err := os.Chown(theirs, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		sweep(dir)
		there(theirs, true)
	})
	t.Run("when it ends, its own is gone", func(t *testing.T) {
		if err := used.remove(); err != nil {
			t.Error(err)
		}
		there(used.path, false)
	})
	t.Run("whoever sweeps takes no folder that is being made", func(t *testing.T) {
		var making sync.WaitGroup
		for range 8 {
			making.Go(func() {
				for range 50 {
					f, err := newFolder(dir)
					if err != nil {
						t.Error(err)
						return
					}
					there(f.path, true)
					if err := f.remove(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		making.Wait()
	})
}
