package hostile

import (
	"testing"

	"github.com/assay-id/assay/test/claims"
)

// TestMistakes checks that the tests which README.md names exist, so that none goes without anybody
// noticing what it stood for.
func TestMistakes(t *testing.T) {
	rows := claims.Rows(t, "README.md")
	for _, row := range rows {
		if len(row.Cells) != 2 {
			t.Errorf("not two cells: %q", row.Cells)
			continue
		}
		claims.Tests(t, "../..", row.Cells[1])
	}
	if len(rows) < 27+10 {
		t.Errorf("%d mistakes and rules are left", len(rows))
	}
}
