package attestor

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReadFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte("four"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := ReadFile(path, 4); err != nil || string(text) != "four" {
		t.Errorf("a file of the limit's size: %q, %v", text, err)
	}
	if text, err := ReadFile(path, 3); err == nil || text != nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a larger one: %q, %v", text, err)
	}
	if _, err := ReadFile(path+"s", 4); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("one that is not there: %v", err)
	}
}
