package verdict

import (
	"encoding/json"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestAFilteredReportIsHeld(t *testing.T) {
	w := newWorld(t, prod)
	image := config(1)
	w.mustPush(scan{image: image, packages: 100, findings: []string{critical}})
	w.wantGate(image, false)
	w.pass(time.Minute)
	if _, err := w.push(scan{image: image, packages: 10}); !errors.Is(err, ErrHeld) {
		t.Errorf("a report on a tenth of the packages is answered with %v", err)
	}
	w.wantGate(image, false)
	w.mustPush(scan{image: image, packages: 90})
	w.wantGate(image, true)
}

func TestAVEXStatementClearsOnlyWhereItsSourceIsTrusted(t *testing.T) {
	key := newSigner(t)
	image := config(1)
	trusted := strings.Replace(prod, "fail {", "vex {\n    trust = [\"scanner\"]\n    max_age = \"24h\"\n  }\n  fail {", 1)
	for _, c := range []struct {
		name, rules string
		after       time.Duration
		open        bool
	}{
		{"a policy that trusts nobody with it", prod, 0, false},
		{"one that trusts the source", trusted, 0, true},
		{"the same when the statement is too old", trusted, 25 * time.Hour, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.rules+trusting(key, ""))
			w.mustPush(scan{image: image, findings: []string{critical}})
			at := w.now().Format(time.RFC3339)
			document := map[string]any{
				"@context": vexPredicate, "@id": "https://example.org/vex/1", "author": "team", "timestamp": at, "version": 1,
				"statements": []any{map[string]any{
					"vulnerability": map[string]any{"name": "CVE-2026-1"}, "timestamp": at,
					"products": []any{map[string]any{"@id": "pkg:oci/shop@" + image, "subcomponents": []any{map[string]any{"@id": "pkg:deb/debian/lib@1"}}}},
					"status":   "not_affected", "justification": "vulnerable_code_not_present",
				}},
			}
			if _, err := w.send(image, key.sign(t, vexPredicate, document, image)); err != nil {
				t.Fatal(err)
			}
			if c.after > 0 {
				w.wantGate(image, true)
				w.pass(c.after)
			}
			w.wantGate(image, c.open)
		})
	}
	t.Run("an unsigned one that a pusher brings for a source it names is refused", func(t *testing.T) {
		w := newWorld(t, trusted+trusting(key, ""))
		text, err := json.Marshal(map[string]any{"@context": vexPredicate, "@id": "x", "author": "me", "timestamp": w.now().Format(time.RFC3339), "version": 1, "statements": []any{}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Push(t.Context(), Pusher{Name: "me"}, Document{Image: "reg/shop@" + image, Content: text, Source: "scanner"}); !errors.Is(err, ErrVouch) {
			t.Errorf("got %v", err)
		}
	})
}

// TestEachThreatHasItsTest holds README.md to its table of threats.
func TestEachThreatHasItsTest(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "## Threats")
	if !found {
		t.Fatal("README.md has no threats")
	}
	rows := 0
	file := regexp.MustCompile("`([a-z0-9_/]+_test\\.go)`")
	name := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`")
	for line := range strings.Lines(table) {
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "| ---") || strings.HasPrefix(line, "| threat") {
			continue
		}
		rows++
		files, code := file.FindAllStringSubmatch(line, -1), ""
		for _, f := range files {
			text, err := os.ReadFile("../../" + f[1])
			if err != nil {
				t.Error(err)
			}
			code += string(text)
		}
		names := name.FindAllStringSubmatch(line, -1)
		if len(names) == 0 {
			t.Errorf("no test is named: %s", line)
		}
		for _, n := range names {
			if !strings.Contains(code, "func "+n[1]+"(") {
				t.Errorf("%s is in none of the files named beside it: %s", n[1], line)
			}
		}
	}
	if rows < 17 {
		t.Errorf("the table has %d threats", rows)
	}
}
