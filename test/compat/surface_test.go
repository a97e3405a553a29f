package compat

import (
	"testing"

	"github.com/assay-id/assay/test/claims"
)

// TestSurface checks that the tests and cases which SURFACE.md names exist, so that no clause is held by a name only.
func TestSurface(t *testing.T) {
	rows := 0
	for _, row := range claims.Rows(t, "SURFACE.md") {
		if row.Section == "Not here" {
			continue
		}
		rows++
		if len(row.Cells) != 3 {
			t.Errorf("not three cells: %q", row.Cells)
			continue
		}
		claims.Tests(t, "../..", row.Cells[1])
	}
	if rows < 80 {
		t.Errorf("%d clauses are left", rows)
	}
}
