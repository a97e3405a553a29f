package policy

import (
	"fmt"
	"math/rand"
	"slices"
	"testing"
	"time"

	"github.com/assay-id/assay/server/verdict/report"
)

// dice makes inputs out of the bytes of a fuzzer, or of a random source, and is at an end when they are.
type dice struct{ left []byte }

func (d *dice) roll(sides int) int {
	if len(d.left) == 0 {
		return 0
	}
	b := d.left[0]
	d.left = d.left[1:]
	return int(b) % sides
}

func (d *dice) chance(in int) bool { return d.roll(in) == 1 }

func pick[T any](d *dice, from ...T) T { return from[d.roll(len(from))] }

var (
	diceIDs      = []string{"CVE-1", "CVE-2", "CVE-3", "GHSA-1", "GHSA-2", "DSA-1", ""}
	dicePackages = []string{"a@1", "pkg:deb/d/b@1?arch=x", "pkg:deb/d/b@1", "pkg:deb/d/b@2", "", "pkg:npm/%40x/y@1"}
	diceNames    = []string{"ci", "registry", "security", ""}
	diceLengths  = []string{"", "1m", "1h", "24h", "7d"}
)

// when is a time about now, seldom far from it.
func (d *dice) when() time.Time {
	switch d.roll(16) {
	case 0:
		return time.Time{}
	case 1:
		return pick(d, time.Unix(0, 0), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), week.Add(Skew), week.Add(Skew+1))
	case 2:
		return week.Add(time.Duration(d.roll(256)) * 8 * time.Hour)
	case 3:
		return week.Add(time.Duration(d.roll(12)) * time.Minute)
	}
	return week.Add(-time.Duration(d.roll(256)) * 17 * time.Minute)
}

func (d *dice) policy() *ScanPolicy {
	b := Block{
		Name: "p", Mode: pick(d, "", "", "enforce", "audit", "off"), Sources: []string{"ci", "registry"}, AllowUnsigned: d.chance(3),
		MaxAge: pick(d, diceLengths...), MaxDBAge: pick(d, diceLengths...), RequireDBTime: d.chance(5), FeedMaxAge: pick(d, diceLengths...),
		UnknownAs: pick(d, "", "critical", "low", "negligible"), OnMissing: pick(d, "", "allow", "grace:1h"), OnStale: pick(d, "", "allow", "grace:24h"),
		OnError: pick(d, "", "allow", "grace:12h"), TrustScanner: d.chance(2), AllowEmpty: d.chance(2), AllowIndex: d.chance(2),
		OnFail: pick(d, "", "quarantine", "withdraw+revoke"), ExceptionMax: pick(d, diceLengths...),
	}
	if d.chance(3) {
		n := 2
		b.MinSources = &n
	}
	for range d.roll(3) {
		f := Fails{Severity: pick(d, "critical", "high", "medium", "low"), OnlyFixed: d.chance(3), KEV: d.chance(3)}
		if d.chance(3) {
			p := 0.3
			f.EPSS = &p
		}
		b.Fail = append(b.Fail, f)
	}
	graces := []string{"0s", "1h", "48h"}
	for _, severity := range []string{"critical", "high", "medium"} {
		if d.chance(2) {
			graces = graces[d.roll(len(graces)):] // the lesser have no less
			b.Grace = append(b.Grace, Graces{Severity: severity, For: graces[0]})
		}
	}
	if d.chance(2) {
		justified := d.chance(2)
		b.VEX = &Vexes{Trust: []string{"security", "ci"}, RequireJustification: &justified, MaxAge: pick(d, diceLengths...), AnyImage: d.chance(2)}
	}
	p, problems := New(b)
	if len(problems) > 0 {
		panic(fmt.Sprint(problems))
	}
	return p
}

func (d *dice) finding() report.Finding {
	f := report.Finding{
		ID: pick(d, diceIDs...), Package: pick(d, dicePackages...), Severity: report.Severity(d.roll(7) - 1),
		Fixed: d.chance(2), KEV: d.chance(6), EPSS: pick(d, -1, 0, 0.2, 0.9, 7),
	}
	for range d.roll(3) {
		f.Aliases = append(f.Aliases, pick(d, diceIDs...))
	}
	if d.chance(5) {
		f.Suppressed = "ignored"
	}
	return f
}

func (d *dice) report() SourcedReport {
	name := pick(d, "ci", "ci", "registry", "registry", "security", "")
	r := SourcedReport{
		Source: pick(d, name, "other"), TrustPolicy: name, ReceivedAt: d.when(), VerifiedAt: pick(d, time.Time{}, d.when()),
		Match: pick(d, Strong, Strong, Strong, Weak, ""), Hash: fmt.Sprint("r", d.roll(100)),
		Report: &report.Report{Scanner: pick(d, "trivy", "grype", "a\x00b", ""), ScannedAt: d.when(), DBAt: pick(d, time.Time{}, d.when()), Packages: d.roll(100)},
	}
	if d.chance(9) {
		r.TrustPolicy = ""
	}
	if d.chance(9) {
		r.Report.Subject.Config = digest("B")
	}
	if d.chance(4) {
		r.Report.Flaws = append(r.Report.Flaws, pick(d, report.FlawFiltered, report.FlawNoPackages, report.FlawUnknownOS, report.FlawNoTime, report.FlawImportOnly, report.FlawEOSL, "new"))
	}
	for range d.roll(5) {
		r.Report.Findings = append(r.Report.Findings, d.finding())
	}
	return r
}

func (d *dice) input() Input {
	in := Input{Digest: digest("A"), Now: week, SeenAt: d.when(), Linked: []string{digest("M")}}
	if d.chance(20) {
		in.Digest = ""
	}
	for range 1 + d.roll(4) {
		in.Reports = append(in.Reports, d.report())
	}
	for range d.roll(3) {
		doc := TrustedVEX{TrustPolicy: pick(d, diceNames...), ReceivedAt: d.when(), VerifiedAt: d.when(), VEX: &report.VEX{ID: fmt.Sprint("v", d.roll(3)), Timestamp: d.when(), Version: d.roll(3)}}
		for range d.roll(4) {
			doc.VEX.Statements = append(doc.VEX.Statements, report.Statement{
				Vulnerability: pick(d, diceIDs...), Aliases: []string{pick(d, diceIDs...)}, Product: pick(d, digest("A"), digest("M"), digest("B"), ""),
				Package: pick(d, "", "a@1", "pkg:deb/d/b"), Status: pick(d, "not_affected", "fixed", "affected", "under_investigation"),
				Justification: pick(d, "", "component_not_present"), Timestamp: d.when(),
			})
		}
		in.VEX = append(in.VEX, doc)
	}
	for i := range d.roll(4) {
		in.Exceptions = append(in.Exceptions, Exception{
			ID: fmt.Sprint("e", i), Digest: pick(d, digest("A"), digest("B"), ""), Package: pick(d, "", "a@1", "pkg:deb/d/b"), Vulnerability: pick(d, diceIDs...),
			Reason: "r", Approver: "a", CreatedAt: d.when(), Expires: d.when(), Policy: pick(d, "", "p", "q"),
		})
	}
	in.Feeds = Feeds{KEVAt: d.when(), EPSSAt: d.when(), KEV: map[string]bool{"CVE-2": d.chance(3)}, EPSS: map[string]float64{"CVE-1": 0.05, "CVE-2": 0.4}}
	seen := map[string]time.Time{}
	for _, id := range diceIDs {
		seen[id] = d.when()
	}
	in.FirstSeen = func(id string) time.Time { return seen[id] }
	if d.chance(3) {
		in.Previous = &Verdict{Evidence: pick(d, Error, Pass), EvidenceSince: d.when()}
	}
	return in
}

// brokenWorse checks that more findings never open a gate and never add a selector but the status. It
// only asks where nothing takes findings off: a new name for an old finding may well be an excused one.
// Nor may it be remembered since another time, with which a grace would begin at another; and what is worse
// gets no longer grace.
func brokenWorse(p *ScanPolicy, in Input, d *dice) string {
	p = level(p)
	in.VEX, in.Exceptions = nil, nil
	seen := in.FirstSeen(diceIDs[0])
	in.FirstSeen = func(string) time.Time { return seen }
	before := p.Decide(in)
	worse := in
	worse.Reports = slices.Clone(in.Reports)
	for i := range worse.Reports {
		if d.chance(2) {
			r := *worse.Reports[i].Report
			r.Findings = append(slices.Clone(r.Findings), d.finding())
			worse.Reports[i].Report = &r
		}
	}
	after := p.Decide(worse)
	if after.Allowed && !before.Allowed {
		return "more findings open the gate:\n" + Explain(before) + Explain(after)
	}
	// A score that nobody knew may be what another finding tells.
	unscored := slices.ContainsFunc(before.Effective, func(f report.Finding) bool { return f.EPSS < 0 })
	for _, s := range after.Selectors {
		if unscored && slices.Contains(p.words.epss, s) {
			continue
		}
		if s != p.words.status[after.Status] && !slices.Contains(before.Selectors, s) {
			return fmt.Sprintf("more findings add %s:\n%s%s", s, Explain(before), Explain(after))
		}
	}
	return ""
}

// level returns the policy with no less grace for what is less severe.
func level(p *ScanPolicy) *ScanPolicy {
	even := *p
	for severity := report.Critical - 1; severity >= report.Unknown; severity-- {
		even.Grace[severity] = max(even.Grace[severity], even.Grace[severity+1])
	}
	return &even
}

// throw decides about one made-up image and says which property is broken.
func throw(left []byte) string {
	d := &dice{left}
	p, in := d.policy(), d.input()
	v := p.Decide(in)
	if why := broken(p, in, v); why != "" {
		return why + "\n" + Explain(v)
	}
	if why := brokenWorse(p, in, d); why != "" {
		return why
	}
	for i := 1; i < len(in.Reports); i++ {
		if Replaces(in.Reports[i-1], in.Reports[i]) == nil && Replaces(in.Reports[i], in.Reports[i-1]) == nil {
			return "two reports replace one another"
		}
	}
	return ""
}

func FuzzDecide(f *testing.F) {
	random := rand.New(rand.NewSource(1))
	for range 32 {
		seed := make([]byte, 400)
		random.Read(seed)
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, left []byte) {
		if why := throw(left); why != "" {
			t.Error(why)
		}
	})
}

func TestProperties(t *testing.T) {
	random := rand.New(rand.NewSource(2))
	statuses := map[Status]int{}
	for i := range 600 {
		seed := make([]byte, 600)
		random.Read(seed)
		if why := throw(seed); why != "" {
			t.Fatalf("throw %d: %s", i, why)
		}
		d := &dice{seed}
		p := d.policy()
		statuses[p.Decide(d.input()).Status]++
	}
	// The made-up images must be of every kind, or the properties were not asked for.
	for _, s := range []Status{Pass, Grace, Fail, Stale, Missing, Error, Exempt} {
		if statuses[s] < 3 {
			t.Errorf("only %d of the images are %s: %v", statuses[s], s, statuses)
		}
	}
}
