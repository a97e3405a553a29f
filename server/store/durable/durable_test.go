package durable

import (
	"os"
	"path/filepath"
	"testing"
)

func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	only := func(t *testing.T, content string, mode os.FileMode) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Errorf("%q, %v, want %q", got, err, content)
		}
		if info, err := os.Lstat(path); err != nil || info.Mode() != mode {
			t.Errorf("%v, %v, want %v", info.Mode(), err, mode)
		}
		if _, err := os.Lstat(path + ".tmp"); !os.IsNotExist(err) {
			t.Errorf("a file is left over: %v", err)
		}
	}
	t.Run("a file that is not there", func(t *testing.T) {
		if err := Replace(path, 0o600, []byte("one")); err != nil {
			t.Fatal(err)
		}
		only(t, "one", 0o600)
	})
	t.Run("one that is, and its mode", func(t *testing.T) {
		if err := Replace(path, 0o644, []byte("two")); err != nil {
			t.Fatal(err)
		}
		only(t, "two", 0o644)
	})
	t.Run("what a crash left is no obstacle, and a link in its place leads nowhere", func(t *testing.T) {
		other := filepath.Join(t.TempDir(), "other")
		if err := os.WriteFile(other, []byte("untouched"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(other, path+".tmp"); err != nil {
			t.Fatal(err)
		}
		if err := Replace(path, 0o600, []byte("three")); err != nil {
			t.Fatal(err)
		}
		only(t, "three", 0o600)
		if got, err := os.ReadFile(other); err != nil || string(got) != "untouched" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("what cannot be written leaves nothing behind", func(t *testing.T) {
		folder := filepath.Join(t.TempDir(), "folder")
		if err := os.MkdirAll(filepath.Join(folder, "full"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := Replace(folder, 0o600, []byte("four")); err == nil {
			t.Error("a folder was replaced")
		}
		if _, err := os.Lstat(folder + ".tmp"); !os.IsNotExist(err) {
			t.Errorf("a file is left over: %v", err)
		}
		if err := Replace(filepath.Join(folder, "none", "file"), 0o600, nil); err == nil {
			t.Error("there is no such folder")
		}
	})
}
