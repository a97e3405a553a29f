package deploy

import (
	"strings"
	"testing"

	"github.com/assay-id/assay/test/claims"
)

// TestClaims checks that the tests and cases which deploy/SPIRE.md names exist, so that nothing is promised
// that no test would miss.
func TestClaims(t *testing.T) {
	rows := claims.Rows(t, "../../deploy/SPIRE.md")
	for _, row := range rows {
		if len(row.Cells) != 3 || row.Cells[0] == "" || row.Cells[1] == "" {
			t.Errorf("not three cells: %q", row.Cells)
			continue
		}
		if rest := strings.Trim(claims.Tests(t, "../..", row.Cells[2]), ", "); rest != "" {
			t.Errorf("not a list of tests (%q): %s", rest, row.Cells[2])
		}
	}
	if len(rows) < 28 {
		t.Errorf("%d claims are left", len(rows))
	}
}
