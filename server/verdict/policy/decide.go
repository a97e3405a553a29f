package policy

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/assay-id/assay/server/verdict/report"
)

// Decide says what the policy makes of an image. It is pure: the same input gives the same verdict, in
// whatever order its lists are, and every Input.Now from the given one until Verdict.Until gives it too.
func (p *ScanPolicy) Decide(in Input) Verdict { return DecideAll([]*ScanPolicy{p}, in)[0] }

// DecideAll gives the verdicts of several policies on one image, in their order. It is what Decide gives
// for each, at less cost: policies with the same sources share the work. Input.Previous is for a single
// policy; use DecideEach where each has its own.
func DecideAll(policies []*ScanPolicy, in Input) []Verdict { return DecideEach(policies, nil, in) }

// DecideEach is DecideAll with the verdict in force under each policy, nil where there is none. Where
// previous is shorter than policies, Input.Previous is taken.
func DecideEach(policies []*ScanPolicy, previous []*Verdict, in Input) []Verdict {
	in.Now = in.Now.Round(0) // a monotonic reading is not part of the time
	// What is missing of indexes is made once, in copies.
	in.Reports, in.VEX = slices.Clone(in.Reports), slices.Clone(in.VEX)
	shared := &sets{in: &in}
	fit := exceptions(&in)
	verdicts := make([]Verdict, len(policies))
	byDefault := in.Previous
	for i, p := range policies {
		in.Previous = byDefault
		if i < len(previous) {
			in.Previous = previous[i]
		}
		verdicts[i] = p.decide(&in, shared, fit)
	}
	return verdicts
}

func (p *ScanPolicy) decide(in *Input, shared *sets, fit exempted) Verdict {
	v := Verdict{Policy: p.Name, Digest: in.Digest, Mode: p.Mode}
	if p.Mode == Off {
		v.Status, v.Evidence, v.Allowed, v.WouldAllow = Exempt, Exempt, true, true
		v.Reasons = []Reason{{Rule: "mode", Text: "the policy is off: nothing is judged and the gate is open"}}
		v.Selectors = p.words.bare(Exempt)
		return v
	}
	c := &clock{now: in.Now}
	x := p.eraser(in, fit, c)
	e := p.gather(in, c)
	about := make([]int, len(e.uses))
	for i, u := range e.uses {
		about[i] = u.at
	}
	t := p.tally(shared.about(about), x)
	cleared := len(e.lacks) == 0 // before the feeds have their say
	p.needFeeds(&e, t, in, c)

	v.Evidence, v.EvidenceSince = e.worst()
	v.Effective = t.effective
	p.settle(&v, &e, t, c)
	if !v.WouldAllow {
		if exempt := x.exempt(); exempt != nil {
			v.WouldAllow = true
			v.Reasons = append([]Reason{{Rule: "exception", Text: "the image as a whole is exempt: " + x.told(exempt)}}, v.Reasons...)
			v.Status = Exempt
		}
	}
	v.Allowed = v.WouldAllow || p.Mode == Audit
	if p.Mode == Audit {
		v.Reasons = append([]Reason{{Rule: "mode", Text: "the policy is in audit mode: the gate is open whatever the verdict"}}, v.Reasons...)
	}
	v.Reasons = append(v.Reasons, t.taken...)
	v.Reasons = append(v.Reasons, e.left...)
	v.TTLMax, v.JWTTTLMax = p.SVIDTTLMax, p.JWTTTLMax
	v.Quarantine = !v.Allowed && p.OnFail == Quarantine
	v.Revoke = !v.Allowed && p.OnFail == Revoke
	v.Selectors = p.selectors(&v, &e, t, cleared, in, c)
	v.Until = c.next
	return v
}

// violation is a finding that breaks a rule.
type violation struct {
	at       int // in the set
	rule     int // in the policy
	severity report.Severity
	// since and deadline are the bounds of its grace, zero if it has none.
	since, deadline time.Time
}

// tally is what is left of the findings and which of it breaks rules.
type tally struct {
	set       *set
	effective []report.Finding
	taken     []Reason // why others do not count
	more      int      // taken that are not told
	// worst and fixable are the worst severities of all findings and of those with a fix, Unknown if
	// there are none; with what unknown counts as.
	worst, fixable report.Severity
	// kev says that one is known to be exploited; epss is the highest probability, and unscored says
	// that one has none.
	kev, unscored bool
	epss          float64
	violations    []violation
}

// tally looks at each finding. Where nothing is taken off, effective is the set's own slice.
func (p *ScanPolicy) tally(s *set, x *eraser) *tally {
	t := &tally{set: s, effective: slices.Clip(s.findings)}
	for i := range s.rows {
		r := s.rows[i].row
		if rule, why := x.off(r); rule != "" {
			if t.taken == nil {
				t.effective = append(make([]report.Finding, 0, len(s.findings)), s.findings[:i]...)
			}
			if len(t.taken) < maxReasons {
				t.taken = append(t.taken, Reason{Rule: rule, Finding: r.found.ID, Text: r.found.ID + " in " + r.found.Package + " does not count: " + why})
			} else {
				t.more++
			}
			continue
		}
		f := &s.findings[i]
		if t.taken != nil {
			t.effective = append(t.effective, *f)
		}
		t.count(p, x, i, f)
	}
	if t.more > 0 {
		t.taken = append(t.taken, Reason{Rule: "more", Text: strconv.Itoa(t.more) + " more findings do not count, for like reasons"})
	}
	return t
}

func (t *tally) count(p *ScanPolicy, x *eraser, i int, f *report.Finding) {
	r := t.set.rows[i].row
	severity := f.Severity
	if r.unrated {
		severity = max(severity, p.UnknownAs)
	}
	t.worst = max(t.worst, severity)
	if f.Fixed {
		t.fixable = max(t.fixable, severity)
	}
	t.kev = t.kev || f.KEV
	t.epss = max(t.epss, f.EPSS)
	t.unscored = t.unscored || f.EPSS < 0
	for n := range p.Fail {
		if !p.Fail[n].broken(severity, f) {
			continue
		}
		v := violation{at: i, rule: n, severity: severity}
		if grace := p.Grace[severity]; grace > 0 {
			if v.since = x.firstSeen(r, t.set.of); !v.since.IsZero() {
				v.deadline = v.since.Add(grace)
			}
		}
		t.violations = append(t.violations, v)
		return
	}
}

func (f *FailRule) broken(severity report.Severity, finding *report.Finding) bool {
	return severity >= f.Severity && (!f.OnlyFixed || finding.Fixed) && (!f.KEV || finding.KEV) && (f.EPSS == 0 || finding.EPSS >= f.EPSS)
}

// firstSeen returns when the vulnerability was first seen in this image, by whichever name; if nobody
// remembers, when the first of the reports came. A memory of the future is none.
func (x *eraser) firstSeen(r *row, reports []int) time.Time {
	var first time.Time
	if x.in.FirstSeen != nil {
		for _, id := range r.ids {
			if seen := x.in.FirstSeen(id); !seen.IsZero() && x.c.reached(seen.Add(-Skew)) {
				first = earliest(first, seen)
			}
		}
	}
	if !first.IsZero() {
		return first
	}
	for _, at := range reports {
		first = earliest(first, x.in.Reports[at].ReceivedAt)
	}
	if first.IsZero() || !x.c.reached(first.Add(-Skew)) {
		return time.Time{}
	}
	return first
}

// needFeeds says what is wanting if a rule asks for a feed that cannot clear: a finding that is not in an
// old feed may well be in a new one. With no finding left, no feed is needed.
func (p *ScanPolicy) needFeeds(e *evidence, t *tally, in *Input, c *clock) {
	if len(t.effective) == 0 {
		return
	}
	kev, epss := false, false
	for i := range p.Fail {
		kev, epss = kev || p.Fail[i].KEV, epss || p.Fail[i].EPSS > 0
	}
	if kev {
		p.needFeed(e, "KEV", in.Feeds.KEVAt, in.Previous, c)
	}
	if epss {
		p.needFeed(e, "EPSS", in.Feeds.EPSSAt, in.Previous, c)
	}
}

func (p *ScanPolicy) needFeed(e *evidence, name string, at time.Time, previous *Verdict, c *clock) {
	need := "a rule needs the " + name + " feed, "
	switch {
	case at.IsZero():
		e.lacks = append(e.lacks, lack{Error, sinceBefore(at, previous), need + "and there is none"})
	case !c.reached(at.Add(-Skew)):
		e.lacks = append(e.lacks, lack{Error, sinceBefore(at, previous), need + "which says it is of " + stamp(at) + ", in the future"})
	case c.reached(at.Add(p.FeedMaxAge)):
		e.lacks = append(e.lacks, lack{Stale, at.Add(p.FeedMaxAge), need + "which is of " + stamp(at) + ", more than " + length(p.FeedMaxAge) + " ago"})
	}
}

// settle puts findings and evidence together. A broken rule outweighs evidence that is wanting: who
// found it may be out of date, but nobody has said otherwise. Of all that is wanting, each must be let
// pass.
func (p *ScanPolicy) settle(v *Verdict, e *evidence, t *tally, c *clock) {
	broken, first := t.broken(c)
	v.Reasons = t.reasons(p)
	switch {
	case broken:
		v.Status = Fail
	case !first.deadline.IsZero():
		v.Status, v.WouldAllow = Grace, true
		v.GraceSince, v.GraceUntil = first.since, first.deadline
	default:
		v.Status, v.WouldAllow = Pass, true
	}
	denied := broken
	for i := range e.lacks {
		l := &e.lacks[i]
		text, until, passes := p.letPass(l, broken, c)
		v.Reasons = append(v.Reasons, Reason{Rule: ruleFor(l.status), Text: text})
		switch {
		case denied:
		case !passes:
			denied = true
			v.Status, v.WouldAllow = l.status, false
		case !until.IsZero():
			if v.GraceUntil.IsZero() || until.Before(v.GraceUntil) {
				v.GraceSince, v.GraceUntil = l.since, until
			}
			v.Status = Grace
		case v.Status == Pass:
			v.Status = l.status
		}
	}
	if denied {
		v.GraceSince, v.GraceUntil = time.Time{}, time.Time{}
	}
	if v.Status == Pass {
		v.Reasons = append(v.Reasons, Reason{Rule: "pass", Text: p.passed(e, t)})
	}
}

// letPass says whether the gate may be open although something is wanting, until when if there is an end
// to it, and why. Where a rule is broken anyway nobody asks for the time.
func (p *ScanPolicy) letPass(l *lack, broken bool, c *clock) (text string, until time.Time, passes bool) {
	rule, otherwise := ruleFor(l.status), p.otherwise(l.status)
	switch {
	case otherwise.Action == Allow:
		return l.why + "; " + rule + " allows it", until, true
	case otherwise.Action == Deny:
		return l.why, until, false
	case l.since.IsZero():
		return l.why + "; " + rule + " would give it " + length(otherwise.For) + ", but nobody knows since when", until, false
	}
	until = l.since.Add(otherwise.For)
	text = l.why + "; " + rule + " gives it " + length(otherwise.For) + ", from " + stamp(l.since) + " until " + stamp(until)
	// There is no grace before the instant it begins at: such a time is a clock's mistake.
	if broken || !c.reached(l.since) || c.reached(until) {
		return text, time.Time{}, false
	}
	return text, until, true
}

func ruleFor(s Status) string { return "on_" + string(s) }

func (p *ScanPolicy) otherwise(s Status) Otherwise {
	switch s {
	case Stale:
		return p.OnStale
	case Missing:
		return p.OnMissing
	}
	return p.OnError
}

// broken reports whether a rule is broken whose grace is over, or returns the violation whose grace ends
// first.
func (t *tally) broken(c *clock) (bool, violation) {
	var first violation
	for _, v := range t.violations {
		if v.deadline.IsZero() {
			return true, violation{}
		}
		if first.deadline.IsZero() || v.deadline.Before(first.deadline) {
			first = v
		}
	}
	if first.deadline.IsZero() {
		return false, violation{}
	}
	return c.reached(first.deadline), first
}

func (p *ScanPolicy) passed(e *evidence, t *tally) string {
	var fresh []string
	for _, u := range e.uses {
		if u.fresh && (len(fresh) == 0 || fresh[len(fresh)-1] != u.name) {
			fresh = append(fresh, u.name)
		}
	}
	return "fresh evidence of " + strings.Join(fresh, ", ") + ", and none of " + strconv.Itoa(len(t.effective)) + " findings breaks a rule"
}
