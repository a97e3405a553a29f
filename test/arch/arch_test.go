// Package arch checks who may import whom, over what the go command says of the module. The rules are
// in rules_test.go, as data with reasons; a package without a rule fails: a new folder asks for a place
// first.
package arch

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/assay-id/assay"

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath, Dir, Name, Doc string
	GoFiles, TestGoFiles       []string
	Imports                    []string
}

func (p pkg) path() string { return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/") }

// look opens every folder of the module. The go command remembers the result of a test together with
// what the test itself looked at, and knows nothing of what its children read.
var look = sync.OnceValue(func() error {
	return filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == ".git" || d.Name() == "bin" || d.Name() == ".cache") {
			return filepath.SkipDir
		}
		return err
	})
})

// list returns the packages of the module and, with deps, all that they need.
func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	if err := look(); err != nil && !errors.Is(err, fs.ErrNotExist) { // somebody may be cleaning up
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Dir,Name,Doc,GoFiles,TestGoFiles,Imports"}, args...)...)
	cmd.Dir = "../.."
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, said.String())
	}
	var all []pkg
	for stream := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := stream.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// fits reports whether a path matches a pattern; see rule. A part may also end in ..., for any ending.
func fits(pattern, path string) bool {
	want, got := strings.Split(pattern, "/"), strings.Split(path, "/")
	for i, part := range want {
		if part == "..." && i == len(want)-1 {
			return true
		}
		if i >= len(got) {
			return false
		}
		if start, open := strings.CutSuffix(part, "..."); open && start != "" {
			if !strings.HasPrefix(got[i], start) {
				return false
			}
			continue
		}
		if part != "*" && part != got[i] {
			return false
		}
	}
	return len(got) == len(want)
}

func fitsAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return fits(pattern, path) })
}

// placeOf returns a package's rule.
func placeOf(path string) (rule, bool) {
	for _, r := range rules {
		if fits(r.pattern, path) {
			return r, true
		}
	}
	return rule{}, false
}

// forTests reports whether a package is a suite: named after what it tests, imported by tests alone.
func forTests(path string) bool { return strings.HasSuffix(path, "test") && path != "test" }

// allowed says why one package may not import another, or nothing.
func allowed(from, to string) string {
	here, _ := placeOf(from)
	there, ok := placeOf(to)
	if !ok {
		return "it has no place"
	}
	for _, side := range sides {
		if fits(side.from, from) && fits(side.not, to) && !fitsAny(side.but, to) {
			return "the two daemons are kept apart"
		}
	}
	parts := strings.Split(to, "/")
	switch {
	case parts[0] == "test" && !strings.HasPrefix(from, "test"):
		return "only tests import tests"
	case forTests(to) && !forTests(from) && here.floor != tests:
		return "only tests import suites"
	case parts[0] == "attestor" && len(parts) == 3 && here.floor < doors:
		return "only commands import an attestor's roles"
	case parts[0] == "attestor" && len(parts) > 1 && there.floor != words && strings.HasPrefix(from, "attestor/"):
		if strings.Split(from, "/")[1] != parts[1] {
			return "an attestor does not import another"
		}
	}
	if there.floor < here.floor || here.floor == words && there.floor == words || fitsAny(here.also, to) {
		return ""
	}
	return "it is not on a floor below, and no rule names it"
}

func TestFloors(t *testing.T) {
	all := list(t, "./...")
	for _, p := range all {
		if _, ok := placeOf(p.path()); !ok {
			t.Errorf("%s has no place: give it a rule in test/arch, with a floor", p.path())
			continue
		}
		for _, imported := range p.Imports {
			to, ours := strings.CutPrefix(imported, module+"/")
			if !ours {
				continue
			}
			if why := allowed(p.path(), to); why != "" {
				t.Errorf("%s may not import %s: %s", p.path(), to, why)
			}
		}
	}
}

func TestHeavyLibrariesStayHome(t *testing.T) {
	for _, p := range list(t, "./...") {
		for _, imported := range p.Imports {
			for _, home := range homes {
				if (imported == home.library || strings.HasPrefix(imported, home.library+"/")) && !fitsAny(home.at, p.path()) {
					t.Errorf("%s may not import %s, whose home is %s", p.path(), imported, strings.Join(home.at, ", "))
				}
			}
		}
	}
}

func TestBinaries(t *testing.T) {
	for _, c := range closures {
		t.Run(c.binary, func(t *testing.T) {
			all := list(t, "-deps", "./"+c.binary)
			for _, p := range all {
				path := p.ImportPath
				if by := c.excused[path]; by != "" && onlyImporter(all, path, by) {
					continue
				}
				if ours, ok := strings.CutPrefix(path, module+"/"); ok {
					path = "./" + ours
				}
				if fitsAny(c.not, path) && !fitsAny(c.but, path) {
					t.Errorf("%s contains %s, and must not: %s", c.binary, path, c.why)
				}
			}
		})
	}
}

// onlyImporter reports whether nobody but one package imports a path.
func onlyImporter(all []pkg, path, by string) bool {
	return !slices.ContainsFunc(all, func(p pkg) bool { return p.ImportPath != by && slices.Contains(p.Imports, path) })
}

func TestNamesAndComments(t *testing.T) {
	for _, p := range list(t, "./...") {
		if slices.Contains(badNames, p.Name) || slices.Contains(badNames, filepath.Base(p.Dir)) {
			t.Errorf("%s: %q says nothing about what is in it", p.path(), p.Name)
		}
		written := slices.DeleteFunc(slices.Clone(p.GoFiles), func(name string) bool { return strings.HasSuffix(name, ".pb.go") })
		if len(written) == 0 {
			continue // generated, or tests only
		}
		want := "Package " + p.Name + " "
		if p.Name == "main" {
			want = "Command " + filepath.Base(p.Dir) + " "
		}
		if !strings.HasPrefix(p.Doc, want) {
			t.Errorf("%s: its comment does not begin with %q", p.path(), want)
		}
	}
}

// TestAttestorLists compares the attestors' folders with the two lists that link them in.
func TestAttestorLists(t *testing.T) {
	linked := map[string]map[string]bool{
		"node":     importsOf(t, "cmd/assay-agent/attestors.go"),
		"workload": importsOf(t, "cmd/assay-agent/attestors.go"),
		"server":   importsOf(t, "cmd/assay-server/attestors.go"),
	}
	folders, err := filepath.Glob("../../attestor/*/*")
	if err != nil {
		t.Fatal(err)
	}
	exist := make(map[string]bool)
	for _, folder := range folders {
		role := filepath.Base(folder)
		name := filepath.Base(filepath.Dir(folder))
		if linked[role] == nil {
			continue
		}
		path := module + "/attestor/" + name + "/" + role
		exist[path] = true
		if !linked[role][path] {
			t.Errorf("attestor/%s/%s is not in the list of its binary", name, role)
		}
		if _, err := os.Stat(filepath.Join("../../attestor", name, "README.md")); err != nil {
			t.Errorf("attestor/%s has no README.md for operators", name)
		}
	}
	for role, imports := range linked {
		for path := range imports {
			if strings.HasPrefix(path, module+"/attestor/") && !exist[path] {
				t.Errorf("the list for %s names %s, which is no attestor's role", role, path)
			}
		}
	}
}

// importsOf returns what a file imports.
func importsOf(t *testing.T, path string) map[string]bool {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join("../..", path), nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	imports := make(map[string]bool)
	for _, spec := range file.Imports {
		name, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		imports[name] = true
	}
	return imports
}

// TestOnlyRecordsWrites finds those who make a transaction on the store beside server/records.
func TestOnlyRecordsWrites(t *testing.T) {
	for _, p := range list(t, "./...") {
		if fitsAny(kvWriters, p.path()) || !slices.Contains(p.Imports, module+"/server/store/kv") {
			continue
		}
		for _, name := range p.GoFiles {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "Txn" {
					if x, ok := s.X.(*ast.Ident); ok && x.Name == "kv" {
						t.Errorf("%s/%s makes a transaction: only server/records writes to the store", p.path(), name)
					}
				}
				return true
			})
		}
	}
}

func TestFits(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"attestor", "attestor", true},
		{"attestor", "attestor/unix", false},
		{"attestor/*", "attestor/unix", true},
		{"attestor/*", "attestor", false},
		{"attestor/*", "attestor/unix/workload", false},
		{"attestor/*/node", "attestor/x509pop/node", true},
		{"server/wire/...", "server/wire", true},
		{"server/wire/...", "server/wire/feedv1", true},
		{"server/wire/...", "server/wired", false},
		{"attestor/k8s.../...", "attestor/k8spsat/server", true},
		{"attestor/k8s.../...", "attestor/docker", false},
		{"go.etcd.io/...", "go.etcd.io/bbolt", true},
		{"", "server", false},
	} {
		if got := fits(c.pattern, c.path); got != c.want {
			t.Errorf("fits(%q, %q) is %v", c.pattern, c.path, got)
		}
	}
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"agent", "server/view", false},
		{"agent/uplink", "server/wire/feedv1", true},
		{"agent/view", "server/store/kv", false},
		{"server/view", "agent/view", false},
		{"server/api", "workloadapi", false},
		{"server/api", "workloadapi/identity", true},
		{"server/view", "server/feed", false},
		{"server/feed", "server/view", true},
		{"attestor/unix/workload", "attestor/unix", true},
		{"attestor/unix/workload", "attestor/docker", false},
		{"attestor/x509pop/node", "attestor/x509pop/server", false},
		{"attestor/unix", "attestor/unix/workload", false},
		{"agent", "attestor/unix/workload", false},
		{"cmd/assay-agent", "attestor/unix/workload", true},
		{"workloadapi/identity", "attestor", true},
		{"attestor", "attestor/unix", false},
		{"server", "server/store/kvtest", false},
		{"cmd/assay", "test/lab", false},
		{"server/brandnew", "attestor", true},
	} {
		if why := allowed(c.from, c.to); (why == "") != c.want && c.from != "server/brandnew" {
			t.Errorf("%s importing %s: %q", c.from, c.to, why)
		}
	}
	if _, ok := placeOf("server/brandnew"); ok {
		t.Error("a package nobody gave a place has one")
	}
}
