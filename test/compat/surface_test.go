package compat

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSurface checks that what SURFACE.md names is there: tests, their cases, and places in transcripts.
func TestSurface(t *testing.T) {
	text, err := os.ReadFile("SURFACE.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([a-z0-9/-]+): ([A-Za-z0-9]+)`((?: \"[^\"]+\")*)")
	quoted := regexp.MustCompile(`"([^"]+)"`)
	rows, tested := 0, true
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "## ") {
			tested = line != "## Not here\n"
		}
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| clause") || strings.HasPrefix(line, "| what |") || strings.HasPrefix(line, "| ---") || !tested {
			continue
		}
		rows++
		all := named.FindAllStringSubmatch(line, -1)
		if len(all) == 0 {
			t.Errorf("no test: %s", line)
		}
		for _, m := range all {
			source := written(t, filepath.Join("..", "..", m[1]))
			if !strings.Contains(source, "\nfunc "+m[2]+"(") {
				t.Errorf("%s has no %s", m[1], m[2])
			}
			for _, q := range quoted.FindAllStringSubmatch(m[3], -1) {
				if !strings.Contains(source, q[1]) {
					t.Errorf("%s: nothing has %q", m[1], q[1])
				}
			}
		}
	}
	if rows < 80 {
		t.Errorf("%d clauses are left", rows)
	}
}

// written is all Go code of a folder, and all that its tests read, with the names of those files.
func written(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		inside := filepath.Dir(path) == dir || strings.HasPrefix(path, filepath.Join(dir, "testdata")+"/")
		if d.IsDir() {
			if path != dir && !strings.HasPrefix(path, filepath.Join(dir, "testdata")) {
				return filepath.SkipDir
			}
			return nil
		}
		if kind := filepath.Ext(path); !inside || kind != ".go" && kind != ".txt" && kind != ".txtar" {
			return nil
		}
		text, err := os.ReadFile(path)
		all.WriteString("\n" + d.Name() + "\n")
		all.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}
