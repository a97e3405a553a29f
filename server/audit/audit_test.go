package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
)

var when = time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.FixedZone("", 3600))

func sample() Line {
	return Line{
		Time: when, Event: "svid.x509.new", Method: "/spire.api.server.svid.v1.SVID/BatchNewX509SVID",
		Caller: "spiffe://example.org/spire/agent/join_token/a", Peer: "192.0.2.1:4711",
		Agent: "spiffe://example.org/spire/agent/join_token/a", EntryID: "e1", SPIFFEID: "spiffe://example.org/shop",
		Serial: "1234", Authority: "abcd", ExpiresAt: when.Add(time.Hour), Facts: []string{"unix:uid:1000", "docker:label:app:shop"},
		Rev: 42, Outcome: Allow, Reason: "entry matches",
	}
}

func open(t testing.TB, path string) *Log {
	t.Helper()
	l, err := Open(path, Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func read(t testing.TB, path string) []map[string]any {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var lines []map[string]any
	for line := range strings.Lines(string(text)) {
		var parsed map[string]any
		if err := json.Unmarshal([]byte(line), &parsed); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		lines = append(lines, parsed)
	}
	return lines
}

func TestLine(t *testing.T) {
	t.Run("a line says everything, in an order that can be read", func(t *testing.T) {
		line := sample()
		want := `{"time":"2026-03-01T11:00:00.123456Z","event":"svid.x509.new","outcome":"allow","reason":"entry matches",` +
			`"method":"/spire.api.server.svid.v1.SVID/BatchNewX509SVID","caller":"spiffe://example.org/spire/agent/join_token/a",` +
			`"peer":"192.0.2.1:4711","agent_id":"spiffe://example.org/spire/agent/join_token/a","entry_id":"e1",` +
			`"spiffe_id":"spiffe://example.org/shop","serial":"1234","authority_id":"abcd","expires_at":"2026-03-01T12:00:00.123456Z",` +
			`"rev":42,"facts":["unix:uid:1000","docker:label:app:shop"]}` + "\n"
		if diff := cmp.Diff(want, string(appendLine(nil, &line))); diff != "" {
			t.Error(diff)
		}
	})

	t.Run("empty fields are left out", func(t *testing.T) {
		line := Line{Time: when, Event: "a", Outcome: Deny}
		if got := string(appendLine(nil, &line)); got != `{"time":"2026-03-01T11:00:00.123456Z","event":"a","outcome":"deny"}`+"\n" {
			t.Error(got)
		}
	})

	t.Run("the values of environment variables are not written", func(t *testing.T) {
		for fact, want := range map[string]string{
			"docker:env:DB_PASSWORD=test":   "docker:env:DB_PASSWORD=sha256:9f86d081884c",
			"docker:env:URL=a=b":            "docker:env:URL=sha256:42144f3939c3",
			"podman:env:test":               "podman:env:sha256:9f86d081884c",
			"docker:env:EMPTY=":             "docker:env:EMPTY=sha256:e3b0c44298fc",
			"docker:label:env:prod":         "docker:label:env:prod",
			"unix:uid:0":                    "unix:uid:0",
			"nonsense":                      "nonsense",
			"docker:environment:not=secret": "docker:environment:not=secret",
		} {
			if got := Redact(fact); got != want {
				t.Errorf("%s became %s, want %s", fact, got, want)
			}
		}
		path := filepath.Join(t.TempDir(), "audit.log")
		line := sample()
		line.Facts = append(line.Facts, "docker:env:DB_PASSWORD=hunter2")
		if err := open(t, path).Write(line); err != nil {
			t.Fatal(err)
		}
		if text, _ := os.ReadFile(path); bytes.Contains(text, []byte("hunter2")) || !bytes.Contains(text, []byte("DB_PASSWORD=sha256:")) {
			t.Errorf("wrote %s", text)
		}
	})

	t.Run("hostile text stays in its field", func(t *testing.T) {
		for name, text := range map[string]string{
			"a newline":                 "x\n{\"event\":\"forged\"}",
			"a quote":                   `","outcome":"allow`,
			"a backslash at the end":    `x\`,
			"a null byte":               "a\x00b",
			"an escape sequence":        "\x1b[2J",
			"an eight-bit escape":       "\u009b2J",
			"a line separator":          "a\u2028b\u2029c",
			"text turned around":        "a\u202eb",
			"an unprintable rare plane": "a\U000e0001b",
			"bytes that are no UTF-8":   "a\xff\xfeb",
			"half a character":          "a\xe2\x82",
		} {
			line := Line{Time: when, Event: "a", Outcome: Deny, Reason: text, SPIFFEID: text, Facts: []string{text, "docker:env:" + text + "=x"}}
			checkLine(t, name, &line)
		}
	})

	t.Run("long text is cut off at a character", func(t *testing.T) {
		line := Line{Time: when, Event: "a", Outcome: Deny, Reason: strings.Repeat("x", MaxField-1) + "€€€"}
		var got struct{ Reason string }
		if err := json.Unmarshal(appendLine(nil, &line), &got); err != nil {
			t.Fatal(err)
		}
		if want := strings.Repeat("x", MaxField-1) + "…"; got.Reason != want {
			t.Errorf("%d bytes, end %q", len(got.Reason), got.Reason[len(got.Reason)-10:])
		}
		line.Facts = make([]string, 3*MaxFacts)
		var facts struct{ Facts []string }
		if err := json.Unmarshal(appendLine(nil, &line), &facts); err != nil {
			t.Fatal(err)
		}
		if len(facts.Facts) != MaxFacts || facts.Facts[MaxFacts-1] != "… and 2001 more" {
			t.Errorf("%d facts, the last is %q", len(facts.Facts), facts.Facts[len(facts.Facts)-1])
		}
	})
}

// checkLine checks that what was encoded is one line of JSON that no terminal acts on and that says
// what it should.
func checkLine(t *testing.T, name string, line *Line) {
	t.Helper()
	text := appendLine(nil, line)
	if n := bytes.Count(text, []byte("\n")); n != 1 || text[len(text)-1] != '\n' {
		t.Errorf("%s: %d lines: %q", name, n, text)
	}
	for _, r := range string(text[:len(text)-1]) {
		if !unicode.IsPrint(r) && r != utf8.RuneError {
			t.Errorf("%s: %U is in %q", name, r, text)
		}
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatalf("%s: %q: %v", name, text, err)
	}
	for key, want := range map[string]string{"event": line.Event, "outcome": line.Outcome, "reason": line.Reason, "spiffe_id": line.SPIFFEID} {
		if len(want) > MaxField || want == "" {
			continue
		}
		if got[key] != string([]rune(want)) { // which puts U+FFFD for each bad byte
			t.Errorf("%s: %s is %q, want %q", name, key, got[key], want)
		}
	}
}

func TestLog(t *testing.T) {
	t.Run("a line is in the file when Write returns, and the file is its owner's alone", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		l := open(t, path)
		for i := range 3 {
			if err := l.Write(sample()); err != nil {
				t.Fatal(err)
			}
			if got := read(t, path); len(got) != i+1 || got[i]["spiffe_id"] != "spiffe://example.org/shop" {
				t.Errorf("after line %d the file holds %v", i, got)
			}
		}
		if stat, err := os.Stat(path); err != nil || stat.Mode() != 0o600 {
			t.Errorf("mode %v, %v", stat.Mode(), err)
		}
	})

	t.Run("the time is the clock's where the line has none", func(t *testing.T) {
		var out bytes.Buffer
		l, err := New(&out, Config{Now: func() time.Time { return when }})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Write(Line{Event: "a", Outcome: Error}); err != nil || !strings.Contains(out.String(), `"time":"2026-03-01T11:00:00.123456Z"`) {
			t.Errorf("%v: %s", err, out.String())
		}
	})

	t.Run("a line without event or with an unknown outcome is an error", func(t *testing.T) {
		var out bytes.Buffer
		l, err := New(&out, Config{})
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []Line{{Outcome: Allow}, {Event: "a"}, {Event: "a", Outcome: "maybe"}} {
			if err := l.Write(line); err == nil {
				t.Errorf("%+v was written", line)
			}
		}
		if out.Len() > 0 {
			t.Errorf("wrote %s", out.String())
		}
	})

	t.Run("what is there is appended to, also by two", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		a, b := open(t, path), open(t, path)
		for range 3 {
			if err := errors.Join(a.Write(sample()), b.Write(sample())); err != nil {
				t.Fatal(err)
			}
		}
		if got := read(t, path); len(got) != 6 {
			t.Errorf("%d lines", len(got))
		}
	})

	t.Run("many at once are one line each", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		l := open(t, path)
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				for j := range 50 {
					line := sample()
					line.EntryID = fmt.Sprintf("%d-%d", i, j)
					if err := l.Write(line); err != nil {
						t.Error(err)
					}
					if j == 25 && i%4 == 0 {
						if err := l.Reopen(); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
		seen := map[any]bool{}
		for _, line := range read(t, path) {
			seen[line["entry_id"]] = true
		}
		if len(seen) != 800 {
			t.Errorf("%d lines", len(seen))
		}
	})

	t.Run("after a rotation lines go to the new file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		l := open(t, path)
		if err := l.Write(sample()); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path, path+".1"); err != nil {
			t.Fatal(err)
		}
		if err := l.Write(sample()); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
		if err := l.Write(sample()); err != nil {
			t.Fatal(err)
		}
		if old, now := read(t, path+".1"), read(t, path); len(old) != 2 || len(now) != 1 {
			t.Errorf("%d lines in the old file, %d in the new one", len(old), len(now))
		}
	})

	t.Run("a reopen that fails keeps the old file", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "log", "audit.log")
		if err := os.Mkdir(filepath.Join(dir, "log"), 0o700); err != nil {
			t.Fatal(err)
		}
		l := open(t, path)
		if err := os.Rename(filepath.Join(dir, "log"), filepath.Join(dir, "moved")); err != nil {
			t.Fatal(err)
		}
		if err := l.Reopen(); err == nil {
			t.Error("reopened what is not there")
		}
		if err := l.Write(sample()); err != nil {
			t.Fatal(err)
		}
		if got := read(t, filepath.Join(dir, "moved", "audit.log")); len(got) != 1 {
			t.Errorf("%d lines", len(got))
		}
	})

	t.Run("a closed log refuses", func(t *testing.T) {
		l := open(t, filepath.Join(t.TempDir(), "audit.log"))
		if err := errors.Join(l.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
		if err := l.Write(sample()); !errors.Is(err, ErrClosed) {
			t.Errorf("write: %v", err)
		}
		if err := l.Reopen(); !errors.Is(err, ErrClosed) {
			t.Errorf("reopen: %v", err)
		}
	})

	t.Run("a full disk is an error to the caller and a number to the operator", func(t *testing.T) {
		if _, err := os.Stat("/dev/full"); err != nil {
			t.Skip("there is no /dev/full here")
		}
		reg := prometheus.NewRegistry()
		l, err := Open("/dev/full", Config{Metrics: reg})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := l.Write(sample()); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("got %v", err)
		}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		counted := map[string]float64{}
		for _, f := range families {
			counted[f.GetName()] = f.GetMetric()[0].GetCounter().GetValue()
		}
		if diff := cmp.Diff(map[string]float64{"assay_server_audit_lines_total": 0, "assay_server_audit_failures_total": 1}, counted); diff != "" {
			t.Error(diff)
		}
	})

	t.Run("the line after half a line is whole", func(t *testing.T) {
		out := &leaky{room: 30}
		l, err := New(out, Config{})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Write(sample()); err == nil {
			t.Fatal("half a line is no error")
		}
		if err := l.Write(sample()); err == nil { // not even a byte fits
			t.Fatal("no line is no error")
		}
		out.room = 1 << 20
		for range 2 {
			if err := l.Write(sample()); err != nil {
				t.Fatal(err)
			}
		}
		lines := strings.Split(out.text.String(), "\n")
		if len(lines) != 4 || json.Valid([]byte(lines[0])) || !json.Valid([]byte(lines[1])) || !json.Valid([]byte(lines[2])) {
			t.Errorf("wrote %q", lines)
		}
	})

	t.Run("a file that ends in half a line is continued on a fresh one", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		if err := os.WriteFile(path, []byte("{\"whole\":1}\n{\"half\":"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := open(t, path).Write(sample()); err != nil {
			t.Fatal(err)
		}
		text, _ := os.ReadFile(path)
		lines := strings.Split(string(text), "\n")
		if len(lines) != 4 || lines[1] != `{"half":` || !json.Valid([]byte(lines[2])) {
			t.Errorf("file holds %q", lines)
		}
	})

	t.Run("a path that cannot be opened says so", func(t *testing.T) {
		for _, path := range []string{"", t.TempDir(), filepath.Join(t.TempDir(), "none", "audit.log")} {
			if l, err := Open(path, Config{}); err == nil {
				_ = l.Close()
				t.Errorf("opened %q", path)
			}
		}
	})
}

// leaky takes so many bytes and then is full.
type leaky struct {
	text bytes.Buffer
	room int
}

func (w *leaky) Write(p []byte) (int, error) {
	n := min(len(p), w.room)
	w.room -= n
	w.text.Write(p[:n])
	if n < len(p) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

func FuzzLine(f *testing.F) {
	f.Add("svid.x509.new", "spiffe://example.org/a", "docker:env:A=b\n", uint64(1))
	f.Add("a\u2028", "\xff", "\"\\", uint64(0))
	f.Fuzz(func(t *testing.T, event, id, fact string, rev uint64) {
		if event == "" {
			return
		}
		checkLine(t, "fuzzed", &Line{Time: when, Event: event, Outcome: Allow, SPIFFEID: id, Reason: fact, Facts: []string{fact, id}})
	})
}

func BenchmarkWrite(b *testing.B) {
	l := open(b, filepath.Join(b.TempDir(), "audit.log"))
	line := sample()
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Write(line); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteParallel(b *testing.B) {
	l := open(b, filepath.Join(b.TempDir(), "audit.log"))
	line := sample()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := l.Write(line); err != nil {
				b.Fatal(err)
			}
		}
	})
}
