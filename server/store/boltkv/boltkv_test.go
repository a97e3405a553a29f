package boltkv

import (
	"path/filepath"
	"testing"

	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/store/kvtest"
)

func open(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(path, Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestStore(t *testing.T) {
	kvtest.Run(t, func(t *testing.T) kv.Store { return open(t, filepath.Join(t.TempDir(), "store.db")) })
	kvtest.RunReopen(t, func(t *testing.T) func(t *testing.T) kv.Store {
		path := filepath.Join(t.TempDir(), "store.db")
		return func(t *testing.T) kv.Store { return open(t, path) }
	})
}
