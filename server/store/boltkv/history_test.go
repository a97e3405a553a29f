package boltkv_test

import (
	"path/filepath"
	"testing"

	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/store/kvtest"
)

// FuzzHistory plays histories of commits, conditions, compactions and restarts.
func FuzzHistory(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 0, 1, 5, 0, 3, 1, 0, 0, 0, 1, 2, 0, 0, 4, 9, 0, 2, 1, 1, 1, 0, 2})
	f.Add([]byte("a history of some words is as good as any other, and reaches some depth"))
	all := make([]byte, 0, 512)
	for i := range 512 {
		all = append(all, byte(i*37+i/7))
	}
	f.Add(all)
	f.Fuzz(func(t *testing.T, history []byte) {
		path := filepath.Join(t.TempDir(), "store.db")
		kvtest.History(t, func(t *testing.T) kv.Store {
			t.Helper()
			s, err := boltkv.Open(path, boltkv.Config{})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}, history)
	})
}
