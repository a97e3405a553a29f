package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPackagesOfLaterVersionsAreUpgrades: dpkg and rpm sort what is behind a hyphen before the version, so that
// what "git describe" says of a build after a release would be older than the release.
func TestPackagesOfLaterVersionsAreUpgrades(t *testing.T) {
	script, err := os.ReadFile(filepath.Join("..", "..", "deploy", "packages", "build.sh"))
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[string]string{
		"v1.2.3":                        "1.2.3",
		"v1.2.3-dirty":                  "1.2.3+dirty",
		"v1.2.3-4-g0abcdef":             "1.2.3+4.g0abcdef",
		"v1.2.3-4-g0abcdef-dirty":       "1.2.3+4.g0abcdef.dirty",
		"v1.3.0-rc.1":                   "1.3.0-rc.1",
		"v1.3.0-rc.1-4-g0abcdef":        "1.3.0-rc.1.4.g0abcdef",
		"v1.3.0-rc.1-12-g0abcdef-dirty": "1.3.0-rc.1.12.g0abcdef.dirty",
		"0abcdef":                       "0.0.0-dev.0abcdef",
		"0abcdef-dirty":                 "0.0.0-dev.0abcdef.dirty",
		"dev":                           "0.0.0-dev.dev",
	} {
		// A tree with nothing but the script in it, for it removes what it made before; and nfpm is a function.
		build := filepath.Join(t.TempDir(), "deploy", "packages", "build.sh")
		if err := os.MkdirAll(filepath.Dir(build), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(build, script, 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "bash", build, "nfpm", version)
		cmd.Env = append(os.Environ(), `BASH_FUNC_nfpm%%=() { echo "made $VERSION $5"; }`)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, kind := range []string{"deb", "rpm"} {
			if n := strings.Count(string(out), "made "+want+" "+kind+"\n"); n != 2 {
				t.Errorf("of %s %d packages are %s of %s:\n%s", version, n, kind, want, out)
			}
		}
	}
}
