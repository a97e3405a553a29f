// Package claims holds what a Markdown file says in its tables to the tests that it names, so that no test goes
// without anybody noticing what it stood for.
//
// A test is named `folder: Name`, with the cases that count in quotes behind it:
//
//	| what is said | `server/ca: TestSign` "agents differ in name and life only" |
package claims

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Row is a row of a table.
type Row struct {
	Section string // the heading above, without its #
	Cells   []string
}

// Rows returns the rows of all tables of a file, without those that name the columns.
func Rows(t *testing.T, file string) []Row {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var rows []Row
	section, body := "", false
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.HasPrefix(line, "#"):
			section = strings.Trim(line, "# \n")
		case strings.HasPrefix(line, "| ---"):
			body = true
		case !strings.HasPrefix(line, "| "):
			body = false
		case body:
			row := Row{Section: section}
			for cell := range strings.SplitSeq(strings.Trim(line, "|\n"), "|") {
				row.Cells = append(row.Cells, strings.TrimSpace(cell))
			}
			rows = append(rows, row)
		}
	}
	return rows
}

var (
	named  = regexp.MustCompile("`([a-z0-9/-]+): ([A-Za-z0-9]+)`((?: \"[^\"]+\")*)")
	quoted = regexp.MustCompile(`"([^"]+)"`)
)

// Tests checks that a text names tests, that they are there, and their cases with them. It returns what the text
// says besides.
func Tests(t *testing.T, root, text string) (rest string) {
	t.Helper()
	all := named.FindAllStringSubmatch(text, -1)
	if len(all) == 0 {
		t.Errorf("no test: %s", text)
	}
	for _, m := range all {
		dir := filepath.Join(root, m[1])
		body := bodyOf(t, dir, m[2])
		if body == "" {
			t.Errorf("%s has no %s", m[1], m[2])
			continue
		}
		for _, q := range quoted.FindAllStringSubmatch(m[3], -1) {
			if !strings.Contains(body, `"`+q[1]) && !strings.Contains(data(t, dir), q[1]) {
				t.Errorf("%s in %s has no case %q", m[2], m[1], q[1])
			}
		}
	}
	return named.ReplaceAllString(text, "")
}

// bodyOf returns the source of a function from its first line to the last of its file: what it calls stands there,
// or in a file of its own. Empty: there is none.
func bodyOf(t *testing.T, dir, name string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
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

// data returns what the tests of a folder read, where cases may stand too, with the names of its files.
func data(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(filepath.Join(dir, "testdata"), func(path string, d fs.DirEntry, err error) error {
		if kind := filepath.Ext(path); err != nil || kind != ".txt" && kind != ".txtar" {
			return err
		}
		text, err := os.ReadFile(path)
		all.WriteString("\n" + d.Name() + "\n")
		all.Write(text)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return all.String()
}
