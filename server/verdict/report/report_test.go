package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write what is read into testdata/read/*.txt; look at the difference before it is committed")

// read is a file of this package's tests.
func read(t testing.TB, path ...string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(append([]string{"testdata"}, path...)...))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// samples are the names of the documents in a folder of testdata, without .json.
func samples(t testing.TB, folder string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", folder, "*.json"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no samples in %s (%v)", folder, err)
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".json")
	}
	return files
}

// TestRead compares what each sample says with the text beside it, which is made to be checked by eye.
func TestRead(t *testing.T) {
	for _, name := range samples(t, "read") {
		t.Run(name, func(t *testing.T) {
			d, err := Parse(read(t, "read", name+".json"))
			if err != nil {
				t.Fatal(err)
			}
			wellFormed(t, d)
			got := render(d)
			path := filepath.Join("testdata", "read", name+".txt")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestRefused compares the sentence that refuses each sample with its line in testdata/refused.txt.
func TestRefused(t *testing.T) {
	const path = "testdata/refused.txt"
	var got strings.Builder
	for _, name := range samples(t, "refused") {
		d, err := Parse(read(t, "refused", name+".json"))
		if err == nil {
			t.Errorf("%s was read: %s", name, render(d))
			continue
		}
		if d != nil {
			t.Errorf("%s: a document beside an error", name)
		}
		if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < 0x20 }) || len(err.Error()) > 700 {
			t.Errorf("%s: the sentence is not fit for a log: %q", name, err)
		}
		fmt.Fprintf(&got, "%s\n    %v\n", name, err)
	}
	if *update {
		if err := os.WriteFile(path, []byte(got.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestRefusedBySize(t *testing.T) {
	t.Run("33 MiB are refused before anything is looked at", func(t *testing.T) {
		_, err := Parse(bytes.Repeat([]byte("x"), 33<<20))
		if !errors.Is(err, ErrTooLarge) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("32 MiB are not", func(t *testing.T) {
		data := read(t, "read", "trivy-clean.json")
		data = append(data, bytes.Repeat([]byte(" "), MaxSize-len(data))...)
		if _, err := Parse(data); err != nil {
			t.Error(err)
		}
	})
	many := func(n int, one string) string {
		return strings.TrimSuffix(strings.Repeat(one+",", n), ",")
	}
	t.Run("more findings than the limit are refused", func(t *testing.T) {
		one := `{"VulnerabilityID":"CVE-1","PkgName":"a","Severity":"LOW"}`
		doc := `{"SchemaVersion":2,"Results":[{"Class":"os-pkgs","Vulnerabilities":[` + many(MaxFindings+1, one) + `]}]}`
		if _, err := Parse([]byte(doc)); !errors.Is(err, ErrTooLarge) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("more statements than the limit are refused", func(t *testing.T) {
		below := many(MaxFindings+1, `"pkg:a/b"`)
		doc := `{"@context":"https://openvex.dev/ns","statements":[{"vulnerability":"CVE-1","status":"fixed",
			"products":["pkg:oci/a@sha256:` + strings.Repeat("a", 64) + `"],"subcomponents":[` + below + `]}]}`
		if _, err := Parse([]byte(doc)); !errors.Is(err, ErrTooLarge) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("many findings that are one cost no more than their number", func(t *testing.T) {
		var b strings.Builder
		for i := range 50_000 {
			fmt.Fprintf(&b, `{"VulnerabilityID":"CVE-1","PkgName":"a","VendorIDs":["DSA-%d","GHSA-%d"]},`, i, i)
		}
		doc := `{"SchemaVersion":2,"Results":[{"Class":"os-pkgs","Vulnerabilities":[` + strings.TrimSuffix(b.String(), ",") + `]}]}`
		d, err := Parse([]byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		if n := len(d.Report.Findings); n != 1 {
			t.Errorf("%d findings", n)
		}
	})
	t.Run("an object of too many members is refused", func(t *testing.T) {
		var b strings.Builder
		for i := range maxMembers + 1 {
			fmt.Fprintf(&b, `"%d":0,`, i)
		}
		if _, err := Parse([]byte("{" + strings.TrimSuffix(b.String(), ",") + "}")); err == nil || !strings.Contains(err.Error(), "members") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("64 levels are read and 65 are not", func(t *testing.T) {
		nested := func(n int) []byte { return []byte(strings.Repeat("[", n) + strings.Repeat("]", n)) }
		if _, err := check(nested(MaxDepth)); err != nil {
			t.Error(err)
		}
		if _, err := check(nested(MaxDepth + 1)); err == nil {
			t.Error("65 levels were read")
		}
	})
	t.Run("texts are clipped between characters", func(t *testing.T) {
		doc := `{"SchemaVersion":2,"ArtifactName":"` + strings.Repeat("é", 2000) + `"}`
		d, err := Parse([]byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := d.Report.Subject.Name, strings.Repeat("é", maxText/2); got != want {
			t.Errorf("%d bytes, want %d", len(got), len(want))
		}
	})
}

func TestParseStatement(t *testing.T) {
	t.Run("a payload that is not a statement is refused", func(t *testing.T) {
		for _, name := range []string{"trivy-clean", "openvex-products", "cyclonedx-vex"} {
			if _, err := ParseStatement(read(t, "read", name+".json")); !errors.Is(err, ErrFormat) {
				t.Errorf("%s: got %v", name, err)
			}
		}
	})
	t.Run("a statement is read as Parse reads it", func(t *testing.T) {
		data := read(t, "read", "slsa-v1-github.json")
		a, err := ParseStatement(data)
		if err != nil {
			t.Fatal(err)
		}
		b, err := Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(a, b); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("an envelope is not opened before its signature is verified", func(t *testing.T) {
		for _, name := range []string{"envelope-dsse", "envelope-sigstore"} {
			if _, err := Parse(read(t, "refused", name+".json")); !errors.Is(err, ErrEnvelope) {
				t.Errorf("%s: got %v", name, err)
			}
		}
	})
}

// TestOrder shows that a document says the same in whatever order its members stand.
func TestOrder(t *testing.T) {
	for _, name := range samples(t, "read") {
		t.Run(name, func(t *testing.T) {
			data := read(t, "read", name+".json")
			want, err := Parse(data)
			if err != nil {
				t.Fatal(err)
			}
			turned, err := Parse(turn(t, data))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, turned); diff != "" {
				t.Errorf("-forwards +backwards:\n%s", diff)
			}
		})
	}
}

// turn writes the members of every object backwards.
func turn(t *testing.T, value []byte) []byte {
	t.Helper()
	switch at(value).kind() {
	case '{':
		all := members(value)
		slices.Reverse(all)
		var parts [][]byte
		for _, m := range all {
			key, err := json.Marshal(m.key)
			if err != nil {
				t.Fatal(err)
			}
			parts = append(parts, append(append(key, ':'), turn(t, m.value)...))
		}
		return slices.Concat([]byte("{"), bytes.Join(parts, []byte(",")), []byte("}"))
	case '[':
		var parts [][]byte
		c := at(value)
		c.array(func() { parts = append(parts, turn(t, c.raw())) })
		return slices.Concat([]byte("["), bytes.Join(parts, []byte(",")), []byte("]"))
	default:
		return value
	}
}

// wellFormed checks what must hold of every document, whatever it was read from.
func wellFormed(t testing.TB, d *Document) {
	t.Helper()
	digests := slices.Clone(d.Subjects)
	if r := d.Report; r != nil {
		digests = append(digests, r.Subject.Manifests...)
		if r.Subject.Config != "" {
			digests = append(digests, r.Subject.Config)
		}
		if !slices.IsSorted(r.Flaws) || len(slices.Compact(slices.Clone(r.Flaws))) != len(r.Flaws) {
			t.Errorf("flaws %v are not a sorted set", r.Flaws)
		}
		for i, f := range r.Findings {
			if f.ID == "" || f.ID != strings.ToUpper(f.ID) || slices.Contains(f.Aliases, f.ID) || !slices.IsSorted(f.Aliases) {
				t.Errorf("finding %+v", f)
			}
			if f.EPSS > 1 || f.Severity < Unknown || f.Severity > Critical {
				t.Errorf("finding %+v", f)
			}
			if i > 0 && (r.Findings[i-1].ID > f.ID || r.Findings[i-1].ID == f.ID && r.Findings[i-1].Package > f.Package) {
				t.Errorf("finding %d is out of order", i)
			}
		}
	}
	if d.VEX != nil {
		for _, s := range d.VEX.Statements {
			if s.Product != "" {
				digests = append(digests, s.Product)
			}
			if s.Vulnerability == "" || s.Product == "" && s.Package == "" || !slices.Contains(vexStatuses, s.Status) {
				t.Errorf("statement %+v", s)
			}
		}
	}
	for _, s := range digests {
		if !digestRE.MatchString(s) {
			t.Errorf("digest %q", s)
		}
	}
	if d.Report == nil && d.VEX == nil && d.Provenance == nil && d.Format != CosignSign {
		t.Error("a document that says nothing")
	}
}

// render writes a document for people.
func render(d *Document) string {
	var b strings.Builder
	line := func(name string, value any) {
		if s := fmt.Sprint(value); s != "" && s != "0" && s != "[]" {
			fmt.Fprintf(&b, "%s: %s\n", name, s)
		}
	}
	line("format", d.Format)
	line("predicate", d.PredicateType)
	line("subjects", shortAll(d.Subjects))
	if r := d.Report; r != nil {
		line("report", string(r.Format)+", "+r.Scanner+" "+r.Version)
		line("config", short(r.Subject.Config))
		line("manifests", shortAll(r.Subject.Manifests))
		line("platform", r.Subject.Platform)
		line("name", r.Subject.Name)
		line("scanned", stamp(r.ScannedAt))
		line("database", stamp(r.DBAt))
		line("packages", r.Packages)
		line("flaws", r.Flaws)
		for _, f := range r.Findings {
			fmt.Fprintf(&b, "  %s %s in %q", f.Severity, f.ID, f.Package)
			for _, part := range []struct {
				there bool
				text  string
			}{
				{f.Fixed, ", fixed"}, {f.KEV, ", exploited"}, {f.EPSS >= 0, fmt.Sprintf(", epss %g", f.EPSS)},
				{len(f.Aliases) > 0, fmt.Sprintf(", also %v", f.Aliases)}, {f.Suppressed != "", ", suppressed: " + f.Suppressed},
			} {
				if part.there {
					b.WriteString(part.text)
				}
			}
			b.WriteByte('\n')
		}
	}
	if v := d.VEX; v != nil {
		line("vex", fmt.Sprintf("%s by %q, version %d, %s, %d skipped", v.ID, v.Author, v.Version, stamp(v.Timestamp), v.Skipped))
		for _, s := range v.Statements {
			fmt.Fprintf(&b, "  %s %s", s.Vulnerability, s.Status)
			for _, part := range []struct{ name, value string }{
				{" in ", short(s.Product)}, {" package ", s.Package}, {" because ", s.Justification}, {" at ", stamp(s.Timestamp)},
			} {
				if part.value != "" {
					b.WriteString(part.name + part.value)
				}
			}
			if len(s.Aliases) > 0 {
				fmt.Fprintf(&b, ", also %v", s.Aliases)
			}
			b.WriteByte('\n')
		}
	}
	if p := d.Provenance; p != nil {
		line("builder", p.BuilderID)
		line("build type", p.BuildType)
		line("source", p.SourceURI)
		line("commit", p.SourceCommit)
		line("ref", p.Ref)
		line("entrypoint", p.Entrypoint)
		line("invocation", p.InvocationID)
		line("started", stamp(p.StartedOn))
		line("finished", stamp(p.FinishedOn))
		var names []string
		for name := range p.Fields {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			fmt.Fprintf(&b, "  %s = %s\n", name, p.Fields[name])
		}
	}
	return b.String()
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}

// short cuts a digest of one digit repeated, as the samples have them, to that digit.
func short(digest string) string {
	hex, ok := strings.CutPrefix(digest, "sha256:")
	if ok && hex == strings.Repeat(hex[:1], 64) {
		return "sha256:" + hex[:1] + "…"
	}
	return digest
}

func shortAll(digests []string) []string {
	var all []string
	for _, d := range digests {
		all = append(all, short(d))
	}
	return all
}
