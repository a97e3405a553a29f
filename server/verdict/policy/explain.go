package policy

import (
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/assay-id/assay/server/verdict/report"
)

// maxReasons bounds what is told of single findings: an old image breaks a rule hundreds of times, and
// Effective lists them all.
const maxReasons = 16

// reasons tells which findings break rules, the gravest first.
func (t *tally) reasons(p *ScanPolicy) []Reason {
	if len(t.violations) == 0 {
		return nil
	}
	// Only as many are put in order as are told.
	told := make([]violation, 0, maxReasons)
	for _, v := range t.violations {
		i := len(told)
		for i > 0 && v.graver(&told[i-1]) {
			i--
		}
		if i < maxReasons {
			told = slices.Insert(told[:min(len(told), maxReasons-1)], i, v)
		}
	}
	reasons := make([]Reason, 0, len(told)+4)
	for i := range told {
		reasons = append(reasons, t.reason(p, &told[i]))
	}
	if more := len(t.violations) - len(told); more > 0 {
		reasons = append(reasons, Reason{Rule: "more", Text: strconv.Itoa(more) + " more findings break a rule"})
	}
	return reasons
}

// graver reports whether a violation is to be told first: its grace ends sooner, or it is worse.
func (v *violation) graver(o *violation) bool {
	if order := v.deadline.Compare(o.deadline); order != 0 {
		return order < 0
	}
	return v.severity > o.severity
}

func (t *tally) reason(p *ScanPolicy, v *violation) Reason {
	f, r := &t.set.findings[v.at], t.set.rows[v.at]
	var b strings.Builder
	b.Grow(192)
	b.WriteString(f.ID)
	b.WriteString(" in ")
	b.WriteString(f.Package)
	b.WriteString(" is ")
	b.WriteString(severityWord(v.severity))
	if r.unrated && v.severity > f.Severity {
		b.WriteString(" (unrated, counted as unknown_as says)")
	}
	if f.Fixed {
		b.WriteString(", has a fix")
	}
	if f.KEV {
		b.WriteString(", is known to be exploited")
	}
	if f.EPSS >= 0 && p.Fail[v.rule].EPSS > 0 {
		b.WriteString(", is likely to be (EPSS " + strconv.FormatFloat(f.EPSS, 'g', 4, 64) + ")")
	}
	b.WriteString(": breaks ")
	b.WriteString(p.words.rules[v.rule])
	switch {
	case !v.deadline.IsZero():
		b.WriteString(", with grace from " + stamp(v.since) + " until " + stamp(v.deadline))
	case p.Grace[v.severity] > 0:
		b.WriteString(", without grace, for nobody knows when it was first seen")
	}
	return Reason{Rule: "fail", Finding: f.ID, Report: t.set.reference(r), Text: b.String()}
}

func (s *set) reference(r ref) string {
	if r.from < len(s.refs) {
		return s.refs[r.from]
	}
	return ""
}

// String writes the rule as the file has it: fail{severity=high only_fixed}.
func (f FailRule) String() string {
	var parts []string
	if f.Severity != report.Unknown {
		parts = append(parts, "severity="+severityWord(f.Severity))
	}
	if f.OnlyFixed {
		parts = append(parts, "only_fixed")
	}
	if f.KEV {
		parts = append(parts, "kev")
	}
	if f.EPSS > 0 {
		parts = append(parts, "epss="+strconv.FormatFloat(f.EPSS, 'g', -1, 64))
	}
	return "fail{" + strings.Join(parts, " ") + "}"
}

func severityWord(s report.Severity) string {
	if s <= report.Unknown || s > report.Critical {
		return "unknown"
	}
	return severityWords[report.Critical-s]
}

// Explain tells a verdict to a person, in sentences: what it is, what comes of it, why, and until when.
func Explain(v Verdict) string {
	var b strings.Builder
	say := func(parts ...string) {
		for _, part := range parts {
			b.WriteString(strings.Map(printable, part))
		}
		b.WriteString(".\n")
	}
	image := "the image"
	if v.Digest != "" {
		image = "image " + short(v.Digest)
	}
	say("Policy ", v.Policy, " says ", string(v.Status), " of ", image, ": ", meaning(&v))
	gate := "scan:policy:" + v.Policy
	switch {
	case v.Mode == Audit && !v.WouldAllow:
		say("The gate ", gate, " is open, because the policy only audits; enforced, it would be closed")
	case v.Allowed:
		say("The gate ", gate, " is open")
	case v.Quarantine:
		say("The gate ", gate, " is closed: workloads of this image lose what is behind it and get their quarantine identity, if an entry gives one")
	case v.Revoke:
		say("The gate ", gate, " is closed: workloads of this image lose what is behind it, and the certificates they hold are revoked")
	default:
		say("The gate ", gate, " is closed: workloads of this image lose what is behind it")
	}
	if !v.GraceUntil.IsZero() {
		say("Its grace began ", stamp(v.GraceSince), " and ends ", stamp(v.GraceUntil))
	}
	for _, r := range v.Reasons {
		from := ""
		if r.Report != "" && r.Finding != "" {
			from = " (report " + short(r.Report) + ")"
		}
		say("- ", r.Text, from)
	}
	if n := len(v.Effective); n == 1 {
		say("1 finding counts")
	} else if v.Mode != Off {
		say(strconv.Itoa(n), " findings count")
	}
	if !v.Until.IsZero() {
		say("Unless something new is learned, this holds until ", stamp(v.Until))
	} else {
		say("Unless something new is learned, this holds")
	}
	return b.String()
}

// printable keeps what a report or an operator wrote from commanding a terminal.
func printable(r rune) rune {
	if unicode.IsPrint(r) {
		return r
	}
	return '?'
}

func meaning(v *Verdict) string {
	switch v.Status {
	case Pass:
		return "the evidence is sound and fresh, and nothing in it breaks a rule"
	case Grace:
		return "something is wrong with it, but not for long enough yet"
	case Fail:
		return "a finding breaks a rule"
	case Stale:
		return "what cleared it is too old"
	case Missing:
		return "nothing clears it"
	case Error:
		return "what there is to clear it cannot be relied on"
	}
	if v.Mode == Off {
		return "it is not judged"
	}
	return "an operator exempted it"
}
