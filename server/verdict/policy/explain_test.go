package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/server/verdict/report"
)

// scanned is a report of ci, made and received at the given time.
func scanned(at time.Time, findings ...report.Finding) SourcedReport {
	return SourcedReport{
		Source: "ci", TrustPolicy: "ci", ReceivedAt: at, Match: Strong, Hash: "sha256:0123456789abcdef",
		Report: &report.Report{Format: report.Trivy, Scanner: "trivy", ScannedAt: at, Packages: 100, Findings: findings},
	}
}

func TestExplain(t *testing.T) {
	p := compile(t, `scan_policy "prod" {
		sources = ["ci"]
		on_fail = "quarantine"
		fail { severity = "high" }
		grace {
			severity = "high"
			for      = "72h"
		}
		vex { trust = ["security"] }
	}`)
	in := Input{Digest: digest("A"), Now: week, Reports: []SourcedReport{scanned(week,
		report.Finding{ID: "CVE-1", Package: "a@1", Severity: report.Critical, Fixed: true, EPSS: -1},
		report.Finding{ID: "CVE-2", Package: "b@1", Severity: report.High, EPSS: -1},
		report.Finding{ID: "CVE-3", Package: "c@1", Severity: report.High, EPSS: -1},
	)}}
	in.VEX = []TrustedVEX{{TrustPolicy: "security", ReceivedAt: week, VEX: &report.VEX{Statements: []report.Statement{
		{Vulnerability: "CVE-3", Product: digest("A"), Status: "not_affected", Justification: "component_not_present"},
	}}}}
	t.Run("a failing image is told with its findings, and what was taken off", func(t *testing.T) {
		want := `Policy prod says fail of image sha256:559aead08264…: a finding breaks a rule.
The gate scan:policy:prod is closed: workloads of this image lose what is behind it and get their quarantine identity, if an entry gives one.
- CVE-1 in a@1 is critical, has a fix: breaks fail{severity=high} (report sha256:0123456789ab…).
- CVE-2 in b@1 is high: breaks fail{severity=high}, with grace from 2026-03-02T00:00:00Z until 2026-03-05T00:00:00Z (report sha256:0123456789ab…).
- CVE-3 in c@1 does not count: security says not_affected (component_not_present).
2 findings count.
Unless something new is learned, this holds until 2026-03-02T01:00:00Z.
`
		if diff := cmp.Diff(want, Explain(p.Decide(in))); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("grace is told with its bounds", func(t *testing.T) {
		in := in
		in.Reports = []SourcedReport{scanned(week, report.Finding{ID: "CVE-2", Package: "b@1", Severity: report.High, EPSS: -1})}
		want := `Policy prod says grace of image sha256:559aead08264…: something is wrong with it, but not for long enough yet.
The gate scan:policy:prod is open.
Its grace began 2026-03-02T00:00:00Z and ends 2026-03-05T00:00:00Z.
- CVE-2 in b@1 is high: breaks fail{severity=high}, with grace from 2026-03-02T00:00:00Z until 2026-03-05T00:00:00Z (report sha256:0123456789ab…).
1 finding counts.
Unless something new is learned, this holds until 2026-03-02T01:00:00Z.
`
		if diff := cmp.Diff(want, Explain(p.Decide(in))); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("every status and mode has its sentences", func(t *testing.T) {
		for _, s := range []Status{Pass, Grace, Fail, Stale, Missing, Error, Exempt} {
			for _, m := range []Mode{Enforce, Audit, Off} {
				text := Explain(Verdict{Policy: "prod", Mode: m, Status: s})
				if !strings.Contains(text, "Policy prod says "+string(s)+" of the image: ") || strings.Contains(text, ": .") {
					t.Errorf("%s, %s: %s", s, m, text)
				}
			}
		}
	})
	t.Run("the gravest of many are told, and how many more there are", func(t *testing.T) {
		var many []report.Finding
		for i := range 300 {
			many = append(many, report.Finding{ID: fmt.Sprintf("CVE-%03d", i), Package: "a@1", Severity: report.High + report.Severity(i%2), EPSS: -1})
		}
		in := in
		in.Reports = []SourcedReport{scanned(week, many...)}
		v := p.Decide(in)
		if len(v.Effective) != 300 || len(v.Reasons) != maxReasons+1 {
			t.Fatalf("%d findings, %d reasons", len(v.Effective), len(v.Reasons))
		}
		for i, r := range v.Reasons[:maxReasons] {
			if want := fmt.Sprintf("CVE-%03d", 2*i+1); r.Finding != want {
				t.Errorf("reason %d is about %s, want %s", i, r.Finding, want)
			}
		}
		if last := v.Reasons[maxReasons]; last.Text != "284 more findings break a rule" {
			t.Errorf("the last one says %q", last.Text)
		}
	})
}

func TestDecideEach(t *testing.T) {
	text := func(name string) string {
		return `scan_policy "` + name + `" {
			sources  = ["ci"]
			on_error = "grace:1h"
		}`
	}
	policies := []*ScanPolicy{compile(t, text("a")), compile(t, text("b"))}
	bad := scanned(week)
	bad.Report.Flaws = []report.Flaw{report.FlawFiltered}
	in := Input{Digest: digest("A"), Now: week.Add(time.Minute), Reports: []SourcedReport{bad}}
	earlier := &Verdict{Evidence: Error, EvidenceSince: week.Add(-2 * time.Hour)}
	t.Run("each policy remembers its own", func(t *testing.T) {
		got := DecideEach(policies, []*Verdict{nil, earlier}, in)
		if got[0].Status != Grace || got[1].Status != Error {
			t.Errorf("they are %s and %s", got[0].Status, got[1].Status)
		}
	})
	t.Run("the caller's reports are left as they were", func(t *testing.T) {
		DecideAll(policies, in)
		if in.Reports[0].Index != nil {
			t.Error("an index was put into them")
		}
	})
	t.Run("another report's index is not used", func(t *testing.T) {
		in := in
		in.Reports = []SourcedReport{scanned(week, report.Finding{ID: "CVE-1", Package: "a", Severity: report.Critical})}
		in.Reports[0].Index = NewIndex(bad.Report)
		if v := policies[0].Decide(in); v.Status != Fail {
			t.Errorf("it is %s", v.Status)
		}
	})
}

func TestReplaces(t *testing.T) {
	old := scanned(week)
	for _, c := range []struct {
		name   string
		change func(*SourcedReport)
		want   error
	}{
		{"a later one may", func(*SourcedReport) {}, nil},
		{"one at the same time may not", func(r *SourcedReport) { r.Report.ScannedAt = week }, ErrOlder},
		{"one of another source may not", func(r *SourcedReport) { r.Source = "other" }, ErrOtherSource},
		{"one under another trust policy may not", func(r *SourcedReport) { r.TrustPolicy = "other" }, ErrOtherSource},
		{"the same may not, and is known by its hash", func(r *SourcedReport) { r.Hash = old.Hash }, ErrIdentical},
		{"none at all may not", func(r *SourcedReport) { r.Report = nil }, ErrWeaker},
		{"one that is past its end of support may", func(r *SourcedReport) { r.Report.Flaws = []report.Flaw{report.FlawEOSL} }, nil},
		{"one that counts no packages may", func(r *SourcedReport) { r.Report.Packages = 0 }, nil},
		{"another scanner without database time may", func(r *SourcedReport) { r.Report.Scanner = "other" }, nil},
		{"a signature from the future may not", func(r *SourcedReport) { r.VerifiedAt = week.Add(day) }, ErrFuture},
	} {
		t.Run(c.name, func(t *testing.T) {
			next := scanned(week.Add(time.Hour))
			next.Hash = "sha256:ff"
			c.change(&next)
			if err := Replaces(old, next); !errors.Is(err, c.want) || err != nil && !strings.HasPrefix(err.Error(), "replace report") {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestExceptionCheck(t *testing.T) {
	good := Exception{ID: "e", Digest: digest("A"), Vulnerability: "CVE-1", Reason: "r", Approver: "ann", CreatedAt: week, Expires: week.Add(time.Hour)}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*Exception){
		"no scope":      func(e *Exception) { e.Digest = "" },
		"no reason":     func(e *Exception) { e.Reason = " " },
		"no approver":   func(e *Exception) { e.Approver = "" },
		"no beginning":  func(e *Exception) { e.CreatedAt = time.Time{} },
		"no end":        func(e *Exception) { e.Expires = time.Time{} },
		"an early end":  func(e *Exception) { e.Expires = week },
		"a spent start": func(e *Exception) { e.CreatedAt = week.Add(2 * time.Hour) },
	} {
		e := good
		spoil(&e)
		if err := e.Check(); !errors.Is(err, ErrException) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
