package boltkv

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/assay-id/assay/server/store/kv"
)

// resident returns how many kilobytes of the file count as the process's memory.
func resident(t *testing.T, path string) int {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Skipf("NOT TESTED: what a map takes of the memory can be read on Linux only: %v", err)
	}
	total, ours := 0, false
	for line := range strings.Lines(string(smaps)) {
		fields := strings.Fields(line)
		switch {
		case strings.Contains(fields[0], "-"):
			ours = fields[len(fields)-1] == path
		case ours && fields[0] == "Rss:":
			n, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			total += n
		}
	}
	return total
}

func TestResident(t *testing.T) {
	t.Run("a store that was written, read and opened does not count as memory", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		s := open(t, path)
		for i := range 120 {
			var ops []kv.Op
			for j := range 50 {
				ops = append(ops, kv.Put(fmt.Sprintf("k/%d/%d", j, i), make([]byte, 10_000)))
			}
			if _, err := s.Commit(t.Context(), kv.Txn{Ops: ops}); err != nil {
				t.Fatal(err)
			}
		}
		const limit = 48 << 10 // of about 140 MB
		if n := resident(t, path); n > limit {
			t.Errorf("%d kB are resident after writing", n)
		}
		if n := count(t, s); n != 6000 {
			t.Errorf("%d items", n)
		}
		if n := resident(t, path); n > limit {
			t.Errorf("%d kB are resident after reading", n)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, path)
		if n := resident(t, path); n > limit {
			t.Errorf("%d kB are resident after opening", n)
		}
		if n := count(t, s); n != 6000 {
			t.Errorf("%d items", n)
		}
	})
}
