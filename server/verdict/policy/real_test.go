package policy

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/server/verdict/report"
)

// real reads a report that nobody of this project wrote, as it would come from ci an hour after it was
// made.
func real(t *testing.T, name string) SourcedReport {
	t.Helper()
	dir := os.Getenv("ASSAY_SHARED_DATA")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "data")
	}
	text, err := os.ReadFile(filepath.Join(dir, "scan-reports", name))
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("REAL SAMPLES WERE NOT READ: %v; set ASSAY_SHARED_DATA to a folder that has them", err)
	} else if err != nil {
		t.Fatal(err)
	}
	doc, err := report.Parse(text)
	if err != nil || doc.Report == nil {
		t.Fatalf("%s: no report: %v", name, err)
	}
	at := doc.Report.ScannedAt
	if at.IsZero() {
		at = week
	}
	return SourcedReport{Source: "ci", TrustPolicy: "ci", Report: doc.Report, ReceivedAt: at.Add(time.Hour), Match: Strong, Hash: name}
}

func TestRealReports(t *testing.T) {
	p := compile(t, `scan_policy "prod" {
		sources = ["ci"]
		fail { severity = "high" }
	}`)
	for name, want := range map[string]Status{
		"grype-keycloak.json":                     Pass, // six low ones
		"trivy-debian-buster.json":                Fail,
		"trivy-fluentd-gems.json":                 Fail,
		"trivy-alpine-39.json":                    Fail,    // past its end of support, and it has critical ones
		"trivy-operator-vulnerabilityreport.json": Fail,    // of unknown severity
		"trivy-alpine-310.sarif.json":             Missing, // never the sole gate
	} {
		t.Run(name, func(t *testing.T) {
			r := real(t, name)
			in := Input{Digest: r.Report.Subject.Config, Now: r.ReceivedAt, Reports: []SourcedReport{r}}
			v := p.Decide(in)
			if v.Status != want || len(v.Effective) == 0 {
				t.Errorf("want %s:\n%s", want, Explain(v))
			}
			if why := broken(p, in, v); why != "" {
				t.Error(why)
			}
		})
	}
	t.Run("a filtered report of the same scan does not take the full one's place", func(t *testing.T) {
		for full, filtered := range map[string]string{
			"trivy-alpine-39.json":     "trivy-alpine-39-high-critical.json",
			"trivy-debian-buster.json": "trivy-debian-buster-ignore-unfixed.json",
		} {
			old, next := real(t, full), real(t, filtered)
			next.ReceivedAt = next.ReceivedAt.Add(time.Hour)
			if err := Replaces(old, next); !errors.Is(err, ErrOlder) {
				t.Errorf("%s: %v", filtered, err)
			}
		}
	})
}

func TestShared(t *testing.T) {
	// Policies and indexes serve many at a time; the race detector is the judge.
	inputs, policies := fleet(4, 20, 100), fivePolicies(t)
	want := make([][]Verdict, len(inputs))
	for i := range inputs {
		want[i] = DecideAll(policies, inputs[i])
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for i := range inputs {
				if diff := cmp.Diff(want[i], DecideAll(policies, inputs[i])); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
	all.Wait()
}
