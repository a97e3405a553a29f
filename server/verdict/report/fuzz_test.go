package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// seed adds the samples whose name begins with one of the prefixes, all if there is none, and the real
// ones if they are there.
func seed(f *testing.F, prefixes ...string) {
	f.Helper()
	for _, folder := range []string{"read", "refused"} {
		for _, name := range samples(f, folder) {
			for _, p := range append(prefixes, "")[:max(1, len(prefixes))] {
				if strings.HasPrefix(name, p) {
					f.Add(read(f, folder, name+".json"))
				}
			}
		}
	}
	dir := os.Getenv("ASSAY_SHARED_DATA")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "data")
	}
	real, _ := filepath.Glob(filepath.Join(dir, "scan-reports", "*.json")) // a bad pattern it is not
	for _, path := range real {
		if data, err := os.ReadFile(path); err == nil {
			f.Add(data)
		}
	}
}

// fuzz checks what holds of any bytes: no panic, either a document or an error, and a document is well
// formed and says the same whatever the order of its members.
func fuzz(f *testing.F, prefixes ...string) {
	seed(f, prefixes...)
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Parse(data)
		if (d == nil) == (err == nil) {
			t.Fatalf("document %v and error %v", d, err)
		}
		if err != nil {
			return
		}
		wellFormed(t, d)
		if len(data) > 64<<10 {
			return
		}
		turned, err := Parse(turn(t, data))
		if err != nil {
			t.Fatalf("backwards: %v", err)
		}
		if d.Provenance != nil && len(d.Provenance.Fields) == maxFields {
			return // which of more are kept depends on the order
		}
		if diff := cmp.Diff(d, turned); diff != "" {
			t.Errorf("-forwards +backwards:\n%s", diff)
		}
	})
}

func FuzzTrivy(f *testing.F)      { fuzz(f, "trivy-") }
func FuzzGrype(f *testing.F)      { fuzz(f, "grype-") }
func FuzzCycloneDX(f *testing.F)  { fuzz(f, "cyclonedx-") }
func FuzzOpenVEX(f *testing.F)    { fuzz(f, "openvex-") }
func FuzzSARIF(f *testing.F)      { fuzz(f, "sarif-") }
func FuzzOperator(f *testing.F)   { fuzz(f, "operator-") }
func FuzzCosignVuln(f *testing.F) { fuzz(f, "cosign-") }
func FuzzVulns(f *testing.F)      { fuzz(f, "vulns-") }
func FuzzSLSA(f *testing.F)       { fuzz(f, "slsa-") }
func FuzzStatement(f *testing.F)  { fuzz(f, "statement-") }
func FuzzAny(f *testing.F)        { fuzz(f) }

// FuzzJSON compares check and cursor with encoding/json: what is accepted is the same but for what is
// refused on purpose, and it means the same.
func FuzzJSON(f *testing.F) {
	seed(f)
	for _, s := range []string{`1`, `-0.5e+3`, `"\u00e9\ud83d\ude00\/"`, `[[],{},null,true,false]`, ` {"a" : [ 1 , 2 ] } `} {
		f.Add([]byte(s))
	}
	f.Add([]byte(strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth)))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := check(data)
		wrong := refusedOnPurpose(data)
		if valid := json.Valid(data) && wrong == ""; valid != (err == nil) {
			t.Fatalf("encoding/json: %v %s, we: %v", json.Valid(data), wrong, err)
		}
		if err != nil {
			return
		}
		d := json.NewDecoder(bytes.NewReader(data))
		d.UseNumber()
		var want any
		if err := d.Decode(&want); err != nil {
			t.Fatal(err)
		}
		c := at(data)
		got := generic(c)
		if c.err != nil {
			t.Fatal(c.err)
		}
		if !reflect.DeepEqual(want, got) { // cmp.Diff would look at each level twice as often as at the one above
			t.Errorf("encoding/json: %v\nwe: %v", want, got)
		}
		c = at(data)
		if raw := c.raw(); !bytes.Equal(raw, bytes.TrimSpace(data)) {
			t.Errorf("skipped %q of %q", raw, data)
		}
	})
}

// generic reads any value as encoding/json does.
func generic(c *cursor) any {
	switch b := c.kind(); b {
	case '{':
		m := map[string]any{}
		c.object(func(key []byte) { m[string(key)] = generic(c) })
		return m
	case '[':
		l := []any{}
		c.array(func() { l = append(l, generic(c)) })
		return l
	case '"':
		return string(c.bytes())
	case 't', 'f':
		return c.is()
	case 'n':
		c.skip()
		return nil
	default:
		return json.Number(c.raw())
	}
}

// refusedOnPurpose says which of the rules that JSON does not have a document breaks.
func refusedOnPurpose(data []byte) string {
	if !utf8.Valid(data) {
		return "UTF-8"
	}
	if halfCharacter(data) {
		return "half a character"
	}
	type level struct {
		keys   map[string]bool
		object bool
		key    bool // the next text is one
	}
	var open []level
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) || err != nil {
			return ""
		}
		top := len(open) - 1
		if text, ok := tok.(string); ok && top >= 0 && open[top].object && open[top].key {
			if open[top].keys[text] {
				return "duplicate key"
			}
			if open[top].keys[text] = true; len(open[top].keys) > maxMembers {
				return "members"
			}
			open[top].key = false
			continue
		}
		if top >= 0 && open[top].object {
			open[top].key = true
		}
		switch tok {
		case json.Delim('{'):
			open = append(open, level{keys: map[string]bool{}, object: true, key: true})
		case json.Delim('['):
			open = append(open, level{})
		case json.Delim('}'), json.Delim(']'):
			open = open[:top]
			if top > 0 && open[top-1].object {
				open[top-1].key = true
			}
		}
		if len(open) > MaxDepth {
			return "depth"
		}
	}
}

// halfCharacter finds an escape that is half of a pair, in valid JSON, where a backslash is only in a
// text. encoding/json puts U+FFFD in its place.
func halfCharacter(data []byte) bool {
	high := false // the escape just before was a first half
	for i := 0; i < len(data); i++ {
		if data[i] != '\\' {
			if high {
				return true
			}
			continue
		}
		i++
		if i+4 >= len(data) || data[i] != 'u' {
			if high {
				return true
			}
			continue
		}
		n, err := strconv.ParseUint(string(data[i+1:i+5]), 16, 16)
		if err != nil {
			return false // not JSON
		}
		i += 4
		first, second := n>>10 == 0xd800>>10, n>>10 == 0xdc00>>10
		if high != second {
			return true
		}
		high = first
	}
	return high
}
