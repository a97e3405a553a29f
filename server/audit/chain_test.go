package audit

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// several writes lines to a log.
func several(t *testing.T, l *Log, events ...string) {
	t.Helper()
	for _, e := range events {
		if err := l.Write(Line{Event: e, Outcome: Allow}); err != nil {
			t.Fatal(err)
		}
	}
}

func verified(t *testing.T, text []byte, after string) *Verified {
	t.Helper()
	v, err := Verify(bytes.NewReader(text), after)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestTheChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := open(t, path)
	several(t, l, "a", "b", "c")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, path)
	several(t, l, "d", "e")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("holds, also over a restart", func(t *testing.T) {
		v := verified(t, text, "none")
		if v.Lines != 5 || v.Chained != 5 || len(v.Broken) != 0 || v.First != "none" || len(v.Last) != 64 {
			t.Errorf("%+v", v)
		}
	})
	lines := strings.SplitAfter(string(text), "\n")[:5]
	for name, c := range map[string]struct {
		lines []string
		at    int
	}{
		"a changed line breaks it at the next": {[]string{lines[0], strings.Replace(lines[1], `"b"`, `"x"`, 1), lines[2], lines[3], lines[4]}, 3},
		"a missing line breaks it":             {[]string{lines[0], lines[2], lines[3], lines[4]}, 2},
		"a missing first line breaks it":       {lines[1:], 1},
		"a line put in breaks it":              {[]string{lines[0], `{"event":"forged","outcome":"allow"}` + "\n", lines[1]}, 2},
		"two lines in another order break it":  {[]string{lines[0], lines[2], lines[1], lines[3]}, 2},
		"a line that is no JSON breaks it":     {[]string{lines[0], "nonsense\n", lines[1]}, 3},
		"the same line twice breaks it":        {[]string{lines[0], lines[1], lines[1]}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			v := verified(t, []byte(strings.Join(c.lines, "")), "none")
			if len(v.Broken) == 0 || v.Broken[0].Line != c.at {
				t.Errorf("%+v", v)
			}
		})
	}
	t.Run("goes on in the next file after a rotation", func(t *testing.T) {
		last := verified(t, text, "").Last
		if err := os.Rename(path, path+".1"); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
		several(t, l, "f")
		next, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if v := verified(t, next, last); len(v.Broken) != 0 || v.First != last {
			t.Errorf("%+v, want first %s", v, last)
		}
		if v := verified(t, next, strings.Repeat("0", 64)); len(v.Broken) != 1 {
			t.Errorf("a missing file is not noticed: %+v", v)
		}
	})
}

// short takes half of every second write.
type short struct {
	bytes.Buffer
	n int
}

func (s *short) Write(p []byte) (int, error) {
	if s.n++; s.n%2 == 0 {
		p = p[:len(p)/2]
	}
	return s.Buffer.Write(p)
}

func TestTheChainGoesOnAfterHalfALine(t *testing.T) {
	t.Run("of this process", func(t *testing.T) {
		var out short
		l, err := New(&out, Config{})
		if err != nil {
			t.Fatal(err)
		}
		for n := range 7 {
			if err := l.Write(Line{Event: "a", Outcome: Allow}); (err != nil) != (n%2 == 1) {
				t.Fatalf("write %d: %v", n, err)
			}
		}
		if v := verified(t, out.Bytes(), "none"); v.Chained != 4 || len(v.Torn) != 3 || len(v.Broken) != 0 {
			t.Errorf("%+v\n%s", v, out.String())
		}
	})
	t.Run("of one that was killed", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		l := open(t, path)
		several(t, l, "a", "b")
		_ = l.Close()
		text, _ := os.ReadFile(path)
		if err := os.WriteFile(path, text[:len(text)-10], 0o600); err != nil {
			t.Fatal(err)
		}
		several(t, open(t, path), "c", "d")
		text, _ = os.ReadFile(path)
		if v := verified(t, text, "none"); v.Chained != 3 || len(v.Torn) != 1 || len(v.Broken) != 0 {
			t.Errorf("%+v\n%s", v, text)
		}
	})
	t.Run("and begins in a file without one", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		if err := os.WriteFile(path, []byte("{\"event\":\"old\"}\n{\"event\":\"older\"}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		several(t, open(t, path), "new")
		text, _ := os.ReadFile(path)
		if v := verified(t, text, ""); v.Lines != 3 || v.Chained != 1 || len(v.Broken) != 0 {
			t.Errorf("%+v\n%s", v, text)
		}
	})
}

func FuzzVerify(f *testing.F) {
	f.Add([]byte("{\"prev\":\"none\"}\n{\"prev\":1}\nx"), "none")
	f.Fuzz(func(t *testing.T, text []byte, after string) {
		v, err := Verify(bytes.NewReader(text), after)
		if err != nil || v.Chained > v.Lines || len(v.Broken) > maxBreaks {
			t.Errorf("%+v, %v", v, err)
		}
	})
}
