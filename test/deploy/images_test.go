package deploy

import (
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestBuildsAreTheSameEverywhere builds a binary as the Makefile does, here and from a copy of the source in
// another folder: what is in images must not tell where it was built.
func TestBuildsAreTheSameEverywhere(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "a", "longer", "path")
	for _, dir := range []string{"cmd", "conf", "attestor", "agent", "server", "workloadapi"} {
		if err := os.CopyFS(filepath.Join(elsewhere, dir), os.DirFS(filepath.Join(root, dir))); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"go.mod", "go.sum", "Makefile"} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(elsewhere, file), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var sums [][32]byte
	for _, dir := range []string{root, elsewhere} {
		out := t.TempDir()
		dry := exec.CommandContext(t.Context(), "make", "-n", "build", "VERSION=v1", "BIN="+out)
		dry.Dir = dir
		plan, err := dry.Output()
		if err != nil {
			t.Fatal(err)
		}
		// The smallest of them, by the same words.
		at := strings.Index(string(plan), "CGO_ENABLED")
		words, _, ok := strings.Cut(string(plan)[max(at, 0):], " ./cmd/")
		if at < 0 || !ok || !strings.Contains(string(plan), "./cmd/assay-csi") {
			t.Fatalf("make build is %q", plan)
		}
		build := exec.CommandContext(t.Context(), "sh", "-c", words+" ./cmd/assay-csi")
		build.Dir = dir
		if text, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		binary, err := os.ReadFile(filepath.Join(out, "assay-csi"))
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, sha256.Sum256(binary))
	}
	if sums[0] != sums[1] {
		t.Errorf("the binaries are %x and %x", sums[0], sums[1])
	}
}
