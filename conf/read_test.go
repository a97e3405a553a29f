package conf

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
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
