package attestor_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestForgeries checks that the tests and cases which README.md names exist, so that none goes without
// anybody noticing what it stood for.
func TestForgeries(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	named := regexp.MustCompile("`([a-z0-9/]+): ([A-Za-z0-9]+)`((?: \"[^\"]+\")*)")
	quoted := regexp.MustCompile(`"([^"]+)"`)
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| forgery") || strings.HasPrefix(line, "| ---") {
			continue
		}
		rows++
		all := named.FindAllStringSubmatch(line, -1)
		if len(all) == 0 {
			t.Errorf("no test: %s", line)
		}
		for _, m := range all {
			dir := filepath.Join("..", m[1])
			source := sources(t, dir)
			if !strings.Contains(source, "\nfunc "+m[2]+"(") {
				t.Errorf("%s has no %s", m[1], m[2])
			}
			for _, q := range quoted.FindAllStringSubmatch(m[3], -1) {
				_, err := os.Stat(filepath.Join(dir, "testdata", "forged", q[1]+".json"))
				if err != nil && !strings.Contains(source, `"`+q[1]) {
					t.Errorf("%s has no case %q", m[1], q[1])
				}
			}
		}
	}
	if rows < 42 {
		t.Errorf("%d forgeries are left", rows)
	}
}

// sources is all Go code of a folder.
func sources(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	return all.String()
}

// TestREADMEs demands of each attestor that its README.md tells operators what it proves, against whom, and
// what it cannot see. An attestor is a folder with a node's or a workload's side.
func TestREADMEs(t *testing.T) {
	var found []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == "node" || d.Name() == "workload") {
			found = append(found, filepath.Dir(path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(found)
	found = slices.Compact(found)
	if len(found) < 15 {
		t.Errorf("only %q have sides", found)
	}
	for _, dir := range found {
		text, err := os.ReadFile(filepath.Join(dir, "README.md"))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, part := range []string{"**What it proves.**", "**Against whom.**", "cannot see", "```hcl", "electors\n"} {
			if !strings.Contains(strings.ReplaceAll(string(text), "\n", " "), part) && !strings.Contains(string(text), part) {
				t.Errorf("%s/README.md has no %q", dir, part)
			}
		}
	}
}
