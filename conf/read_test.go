package conf

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor"
)

func TestFilesThatAreNone(t *testing.T) {
	t.Run("bytes that are no text are one mistake", func(t *testing.T) {
		path := write(t, "server.hcl", "server {\n  trust_domain = \"\xff\xfe\"\n\x00}")
		_, err := LoadServer(path, judges, Options{})
		want := path + ":2,19: Invalid character encoding; This is no text in UTF-8; is it the right file?"
		if err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	})
	t.Run("a file that has nothing of HCL is one mistake, and is told what it looks like", func(t *testing.T) {
		for text, looks := range map[string]string{
			"hello world\n":                        "Nothing in this file is HCL",
			" {\"server\": {}}":                    "This looks like JSON, and nothing in it is HCL",
			"# ours\nserver:\n  trust_domain: a\n": "This looks like YAML, and nothing in it is HCL",
			"---\nserver:\n":                       "This looks like YAML, and nothing in it is HCL",
		} {
			path := write(t, "server.hcl", text)
			_, err := LoadServer(path, judges, Options{})
			want := "No HCL; " + looks + `; is it the right file? It must be as conf/server.hcl; "assay-server migrate" makes one of SPIRE's.`
			if err == nil || !strings.HasPrefix(err.Error(), path+":") || !strings.HasSuffix(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: %v, want %s", text, err, want)
			}
		}
	})
	t.Run("a file of entries is named by another flag", func(t *testing.T) {
		_, err := LoadEntries(filepath.Join(t.TempDir(), "none.hcl"), Options{})
		if err == nil || !strings.HasSuffix(err.Error(), "no such file or directory; name the file with -f.") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a zero byte is no text", func(t *testing.T) {
		path := write(t, "entries.hcl", "owner = \"a\"\n\x00")
		_, err := LoadEntries(path, Options{})
		if want := path + ":2,1: Invalid character encoding; This is no text in UTF-8; is it the right file?"; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	})
	t.Run("more mistakes than anybody reads are counted", func(t *testing.T) {
		var unknown strings.Builder
		for i := range 40 {
			fmt.Fprintf(&unknown, "  unknown%d = 1\n", i)
		}
		_, err := LoadServer(write(t, "server.hcl", "server {\n"+unknown.String()+"}\n"), judges, Options{})
		if err == nil {
			t.Fatal("no error")
		}
		lines := strings.Split(err.Error(), "\n")
		if last := lines[len(lines)-1]; len(lines) != 26 || !strings.HasPrefix(last, "and ") || !strings.HasSuffix(last, " more; mend these first.") {
			t.Errorf("%d lines, the last is %q", len(lines), last)
		}
	})
}

func TestProgramsThatAreNotThere(t *testing.T) {
	path := write(t, "server.hcl", goodServer+"key_manager \"pkcs11\" {\n  module_path = \"/nowhere/module.so\"\n  helper_path = \"/nowhere/helper\"\n  token_label = \"t\"\n  pin_path = \"/nowhere/pin\"\n}\n")
	t.Run("a look at the file finds them", func(t *testing.T) {
		opens := []attestor.JudgeKind{{Type: "join_token", Config: newProofConfig, Open: func(any, attestor.Needs) (attestor.Judge, error) { return nil, nil }}}
		_, err := LoadServer(path, opens, Options{Try: true})
		if err == nil || !strings.Contains(err.Error(), `Unreadable file; /nowhere/helper: no such file or directory; "make pkcs11" builds it.`) ||
			!strings.Contains(err.Error(), "Unreadable file; /nowhere/module.so: ") || strings.Contains(err.Error(), "/nowhere/pin") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a start leaves it to who opens them", func(t *testing.T) {
		if _, err := LoadServer(path, judges, Options{}); err != nil {
			t.Error(err)
		}
	})
}

func TestUnreadableFiles(t *testing.T) {
	dir := t.TempDir()
	for name, path := range map[string]string{
		"a missing file": filepath.Join(dir, "none.hcl"),
		"a directory":    dir,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := LoadServer(path, judges, Options{})
			if err == nil || !strings.HasPrefix(err.Error(), path+": Unreadable configuration file; ") {
				t.Errorf("got %v", err)
			}
		})
	}
}
