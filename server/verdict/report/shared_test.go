package report

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/test/lab"
)

// sharedData is a folder of documents that nobody of this project wrote: beside the repository, or where
// ASSAY_SHARED_DATA says.
func sharedData(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("ASSAY_SHARED_DATA")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "data")
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("REAL SAMPLES WERE NOT READ: %v; set ASSAY_SHARED_DATA to a folder that has them", err)
	}
	return dir
}

// sharedFiles are all documents in the folder, by their path in it.
func sharedFiles(t testing.TB) map[string][]byte {
	t.Helper()
	dir, files := sharedData(t), map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		files[filepath.ToSlash(name)], err = os.ReadFile(path)
		return err
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("read %s: %d files, %v", dir, len(files), err)
	}
	return files
}

// tally is what is compared with an independent count.
type tally struct {
	Config   string         `json:"config"`
	Findings map[string]int `json:"findings"` // by severity
}

func tallyOf(r *Report) tally {
	c := tally{Config: r.Subject.Config, Findings: map[string]int{}}
	for _, f := range r.Findings {
		c.Findings[f.Severity.String()]++
	}
	return c
}

// queries count the findings of a format with jq, once per identifier and package.
var queries = map[Format]string{
	Trivy: `[.Results[]?.Vulnerabilities[]? | {id: .VulnerabilityID, pkg: (.PkgIdentifier.PURL // "\(.PkgName)@\(.InstalledVersion)"),
		sev: (.Severity // "unknown" | ascii_downcase)}] | unique_by([.id, .pkg]) | group_by(.sev) | map({key: .[0].sev, value: length}) | from_entries`,
	Grype: `[.matches[] | {id: .vulnerability.id, pkg: .artifact.purl, sev: (.vulnerability.severity | ascii_downcase)}]
		| unique_by([.id, .pkg]) | group_by(.sev) | map({key: .[0].sev, value: length}) | from_entries`,
	SARIF: `[.runs[] | .tool.driver.rules as $rules | .results[] | {id: .ruleId, pkg: (.message.text | split("\n")[0:2]),
		sev: ($rules[.ruleIndex].properties.tags[-1] | ascii_downcase)}]
		| unique_by([.id, .pkg]) | group_by(.sev) | map({key: .[0].sev, value: length}) | from_entries`,
}

var configs = map[Format]string{
	Trivy: `.Metadata.ImageID`, Grype: `.source.target.imageID`, SARIF: `.runs[0].properties.imageID`,
}

// TestSharedReports reads every real scan and compares what is found with what jq counts.
func TestSharedReports(t *testing.T) {
	jq, jqErr := exec.LookPath("jq")
	for name, data := range sharedFiles(t) {
		if !strings.HasPrefix(name, "scan-reports/") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			d, err := Parse(data)
			if err != nil {
				t.Fatal(err)
			}
			wellFormed(t, d)
			got := tallyOf(d.Report)
			if n := len(d.Report.Findings); n == 0 {
				t.Error("nothing was found in a report that has findings")
			}
			if diff := cmp.Diff(plainTally(t, d.Format, data), got); diff != "" {
				t.Errorf("-generic JSON +read:\n%s", diff)
			}
			if jqErr != nil {
				lab.Missing(t, "jq", jqErr)
			}
			query, ok := queries[d.Format]
			if !ok {
				t.Fatalf("no query for %s: write one", d.Format)
			}
			cmd := exec.CommandContext(t.Context(), jq, "-c", fmt.Sprintf("{config: %s, findings: (%s)}", configs[d.Format], query))
			cmd.Stdin = bytes.NewReader(data)
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("jq: %v", err)
			}
			var want tally
			if err := json.Unmarshal(out, &want); err != nil {
				t.Fatalf("jq answered %s: %v", out, err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-jq +read:\n%s", diff)
			}
		})
	}
}

// plainTally counts with encoding/json and maps, knowing nothing of the readers.
func plainTally(t *testing.T, format Format, data []byte) tally {
	t.Helper()
	var doc any
	if err := json.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	get := func(v any, path ...any) any {
		for _, p := range path {
			switch p := p.(type) {
			case string:
				m, _ := v.(map[string]any)
				v = m[p]
			case int:
				l, _ := v.([]any)
				if p >= len(l) {
					return nil
				}
				v = l[p]
			}
		}
		return v
	}
	list := func(v any) []any { l, _ := v.([]any); return l }
	seen, c := map[string]bool{}, tally{Findings: map[string]int{}}
	count := func(sev any, parts ...any) {
		if key := fmt.Sprint(parts...); !seen[key] {
			seen[key] = true
			word, _ := sev.(string)
			if word == "" {
				word = "unknown"
			}
			c.Findings[strings.ToLower(word)]++
		}
	}
	switch format {
	case Trivy:
		c.Config, _ = get(doc, "Metadata", "ImageID").(string)
		for _, r := range list(get(doc, "Results")) {
			for _, v := range list(get(r, "Vulnerabilities")) {
				count(get(v, "Severity"), get(v, "VulnerabilityID"), get(v, "PkgIdentifier", "PURL"), get(v, "PkgName"), get(v, "InstalledVersion"))
			}
		}
	case Grype:
		c.Config, _ = get(doc, "source", "target", "imageID").(string)
		for _, m := range list(get(doc, "matches")) {
			count(get(m, "vulnerability", "severity"), get(m, "vulnerability", "id"), get(m, "artifact", "purl"))
		}
	case SARIF:
		c.Config, _ = get(doc, "runs", 0, "properties", "imageID").(string)
		for _, r := range list(get(doc, "runs", 0, "results")) {
			index, _ := get(r, "ruleIndex").(float64)
			tags := list(get(doc, "runs", 0, "tool", "driver", "rules", int(index), "properties", "tags"))
			count(tags[len(tags)-1], get(r, "ruleId"), strings.Split(get(r, "message", "text").(string), "\n")[:2])
		}
	default:
		t.Fatalf("no count for %s: write one", format)
	}
	return c
}

// TestSharedFilteredPairs shows what no reader can see: two reports of one image, of which the second
// was made with a filter and says nothing of it. Only who scans, with which command, can be trusted.
func TestSharedFilteredPairs(t *testing.T) {
	files := sharedFiles(t)
	for whole, part := range map[string]string{
		"trivy-alpine-39.json":     "trivy-alpine-39-high-critical.json",
		"trivy-debian-buster.json": "trivy-debian-buster-ignore-unfixed.json",
	} {
		t.Run(part, func(t *testing.T) {
			var r [2]*Report
			for i, name := range []string{whole, part} {
				d, err := Parse(files["scan-reports/"+name])
				if err != nil {
					t.Fatal(err)
				}
				r[i] = d.Report
			}
			if r[0].Subject.Config == "" || r[0].Subject.Config != r[1].Subject.Config {
				t.Errorf("image IDs %s and %s", r[0].Subject.Config, r[1].Subject.Config)
			}
			if len(r[1].Findings) >= len(r[0].Findings) {
				t.Errorf("%d findings, and %d filtered", len(r[0].Findings), len(r[1].Findings))
			}
			if diff := cmp.Diff(r[0].Flaws, r[1].Flaws); diff != "" {
				t.Errorf("the filter shows after all:\n%s", diff)
			}
		})
	}
}

// TestSharedImageNames shows that the digests of one image are told apart, and its name is only a name.
func TestSharedImageNames(t *testing.T) {
	d, err := Parse(sharedFiles(t)["scan-reports/grype-keycloak.json"])
	if err != nil {
		t.Fatal(err)
	}
	want := Subject{
		Config: "sha256:8cf8fd2be2ded92962d52adff75ad06a4c30f69c66facbdf223364c6c9e33b8c",
		Manifests: []string{
			"sha256:347a0d748d05a050dc64b92de2246d2240db6eb38afbc17c3c08d0acb0db1b50",
			"sha256:d1630d3eb8285a978301bcefc5b223e564ae300750af2fc9ea3f413c5376a47e",
		},
		Platform: "linux/amd64",
		Name:     "docker.io/keycloak/keycloak:21.0.2@sha256:347a0d748d05a050dc64b92de2246d2240db6eb38afbc17c3c08d0acb0db1b50",
	}
	if diff := cmp.Diff(want, d.Report.Subject); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := stamp(d.Report.DBAt); got != "2023-09-01T01:26:55Z" {
		t.Errorf("database of %s", got)
	}
}

// TestSharedProvenance reads the statement inside a real bundle, and nothing of the bundle before.
func TestSharedProvenance(t *testing.T) {
	data := sharedFiles(t)["sigstore-bundle-provenance.json"]
	if _, err := Parse(data); !errors.Is(err, ErrEnvelope) {
		t.Errorf("the bundle itself: %v", err)
	}
	var bundle struct {
		Envelope struct {
			Payload string `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	if err := json.Unmarshal(data, &bundle); err != nil {
		t.Fatal(err)
	}
	payload, err := base64.StdEncoding.DecodeString(bundle.Envelope.Payload)
	if err != nil {
		t.Fatal(err)
	}
	d, err := ParseStatement(payload)
	if err != nil {
		t.Fatal(err)
	}
	got := *d.Provenance
	if got.Fields["invocation.environment.GITHUB_REPOSITORY_OWNER_ID"] != "71096353" {
		t.Errorf("fields %v", got.Fields)
	}
	got.Fields = nil
	want := Provenance{
		PredicateType: "https://slsa.dev/provenance/v0.2",
		BuilderID:     "https://github.com/actions/runner", BuildType: "https://github.com/npm/cli/gha/v2",
		SourceURI: "https://github.com/sigstore/sigstore-js", SourceCommit: "dae8bd8eb433a4147b4655c00fe73e0f22bc0fb1",
		Ref: "refs/heads/main", Entrypoint: ".github/workflows/release.yml", InvocationID: "4735384265-1",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestSharedRest sees to it that no file is left unread: what is not a report is refused with a sentence.
func TestSharedRest(t *testing.T) {
	for name, data := range sharedFiles(t) {
		if strings.HasPrefix(name, "scan-reports/") {
			continue
		}
		if d, err := Parse(data); err == nil {
			t.Errorf("%s was read: %s", name, render(d))
		}
	}
}
