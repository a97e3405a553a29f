package verdict

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/report"
	"github.com/assay-id/assay/server/verdict/trust"
)

// TestAgeOfEvidence asks each check by itself: what one of them lets through, another would refuse in many a case.
func TestAgeOfEvidence(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	before := func(d time.Duration) time.Time { return now.Add(-d) }
	image := config(1)
	t.Run("what is yet to come is refused", func(t *testing.T) {
		about := func(r report.Report) *report.Document {
			r.Subject.Config = image
			return &report.Document{Report: &r}
		}
		vex := func(at time.Time) *report.Document {
			return &report.Document{VEX: &report.VEX{Timestamp: at, Statements: []report.Statement{{Product: image}}}}
		}
		for name, c := range map[string]struct {
			read *report.Document
			says string // empty: it is taken
		}{
			"a scan of now":                    {about(report.Report{ScannedAt: now, DBAt: now}), ""},
			"a scan as early as clocks differ": {about(report.Report{ScannedAt: now.Add(policy.Skew), DBAt: now.Add(policy.Skew)}), ""},
			"a scan of later":                  {about(report.Report{ScannedAt: now.Add(policy.Skew + 1)}), "made at"},
			"a database of later":              {about(report.Report{ScannedAt: now, DBAt: now.Add(policy.Skew + 1)}), "database is of"},
			"a VEX document of now":            {vex(now), ""},
			"a VEX document of later":          {vex(now.Add(policy.Skew + 1)), "VEX document is of"},
		} {
			in := &incoming{now: now, digest: image, wanted: []string{image}, read: c.read, proof: &trust.Proof{}}
			wantStale(t, name, in.check(), c.says)
		}
	})
	t.Run("what is older than what is known is refused", func(t *testing.T) {
		scan := func(at, db time.Time, hash string) policy.SourcedReport {
			return policy.SourcedReport{Source: "ci", Report: &report.Report{ScannedAt: at, DBAt: db, Packages: 1}, ReceivedAt: now, Hash: hash}
		}
		known := func(at, db time.Time) *document {
			r := scan(at, db, "known")
			return &document{report: r.Report, EvidenceDocument: &stored.EvidenceDocument{Hash: "known", ReceivedAt: nanos(before(time.Minute))}}
		}
		mark := func(at, db time.Time) *stored.EvidenceMark {
			return &stored.EvidenceMark{Time: nanos(at), DbTime: nanos(db), Hash: "known"}
		}
		hour, day, week := before(time.Hour), before(24*time.Hour), before(7*24*time.Hour)
		for name, c := range map[string]struct {
			old  *document
			mark *stored.EvidenceMark
			next policy.SourcedReport
			says string // empty: it is taken
		}{
			"nothing is known":                          {nil, nil, scan(day, day, "a"), ""},
			"it is newer than the document":             {known(day, week), nil, scan(hour, week, "a"), ""},
			"it is as old as the document":              {known(day, week), nil, scan(day, week, "a"), "not later than"},
			"it is older than the document":             {known(hour, week), nil, scan(day, week, "a"), "not later than"},
			"its database is older than the document's": {known(day, day), nil, scan(hour, week, "a"), "older vulnerability database"},
			"it is newer than the mark":                 {nil, mark(day, week), scan(hour, week, "a"), ""},
			"it is the one of the mark":                 {nil, mark(day, week), scan(day, week, "known"), ""},
			"it is as old as the mark, and another":     {nil, mark(day, week), scan(day, week, "a"), "evidence of"},
			"it is older than the mark":                 {nil, mark(hour, week), scan(day, week, "a"), "evidence of"},
			"its database is older than the mark's":     {nil, mark(day, day), scan(hour, week, "a"), "from a database of"},
			"it does not say how old its database is":   {nil, mark(day, day), scan(hour, time.Time{}, "a"), ""},
		} {
			wantStale(t, name, new(Service).newer(c.old, c.next, c.mark, false), c.says)
		}
	})
}

// wantStale wants an error of age in some words, or none for no words.
func wantStale(t *testing.T, name string, err error, says string) {
	t.Helper()
	if says == "" {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return
	}
	if !errors.Is(err, ErrStale) || !strings.Contains(err.Error(), says) {
		t.Errorf("%s: error is %v, want %q", name, err, says)
	}
}
