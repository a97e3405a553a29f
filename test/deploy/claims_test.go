package deploy

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestClaims checks that the tests and cases which deploy/SPIRE.md names exist, so that nothing is promised
// that no test would miss.
func TestClaims(t *testing.T) {
	text, err := os.ReadFile("../../deploy/SPIRE.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	named := regexp.MustCompile("`([a-z0-9/]+): (Test[A-Za-z0-9]+)`((?: \"[^\"]+\")*)")
	quoted := regexp.MustCompile(`"([^"]+)"`)
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(line, "| \n"), " | ")
		if !strings.HasPrefix(line, "| ") || cells[0] == "with SPIRE" || cells[0] == "---" {
			continue
		}
		rows++
		if len(cells) != 3 || cells[0] == "" || cells[1] == "" {
			t.Errorf("not three cells: %s", line)
			continue
		}
		tests := named.FindAllStringSubmatch(cells[2], -1)
		if rest := strings.Trim(named.ReplaceAllString(cells[2], ""), ", "); len(tests) == 0 || rest != "" {
			t.Errorf("not a list of tests (%q): %s", rest, line)
		}
		for _, m := range tests {
			body := testIn(t, m[1], m[2])
			if body == "" {
				t.Errorf("%s has no %s", m[1], m[2])
				continue
			}
			for _, q := range quoted.FindAllStringSubmatch(m[3], -1) {
				_, script := os.Stat(filepath.Join("../..", m[1], "testdata", q[1]+".txtar"))
				if script != nil && !strings.Contains(body, `"`+q[1]) {
					t.Errorf("%s in %s has no case %q", m[2], m[1], q[1])
				}
			}
		}
	}
	if rows < 28 {
		t.Errorf("%d claims are left", rows)
	}
}

// testIn returns the source of a test from its first line to the last of its file: what it calls stands there,
// or in a file of its own. Empty: there is none.
func testIn(t *testing.T, dir, name string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, body, ok := strings.Cut(string(text), "\nfunc "+name+"("); ok {
			return body
		}
	}
	return ""
}
