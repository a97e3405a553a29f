package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/verdict/report"
)

// broken says which property of every verdict this one breaks, or nothing.
func broken(p *ScanPolicy, in Input, v Verdict) string {
	for _, check := range []func(*ScanPolicy, Input, Verdict) string{brokenForm, brokenUntil, brokenOrder} {
		if why := check(p, in, v); why != "" {
			return why
		}
	}
	return ""
}

// brokenForm checks what a verdict on its own must be.
func brokenForm(p *ScanPolicy, _ Input, v Verdict) string {
	statuses, gate := 0, false
	for _, s := range v.Selectors {
		if err := s.Check(); err != nil {
			return err.Error()
		}
		if strings.HasPrefix(s.Value, "status:") {
			statuses++
		}
		gate = gate || s.Value == "policy:"+p.Name
		if strings.HasPrefix(s.Value, "no") && v.Evidence != Pass && !feedWanting(v) {
			return fmt.Sprintf("%s with evidence %s", s, v.Evidence)
		}
	}
	switch {
	case statuses != 1:
		return fmt.Sprintf("%d status selectors", statuses)
	case gate != v.Allowed:
		return "the gate's selector and Allowed differ"
	case !slices.IsSortedFunc(v.Selectors, attestor.Selector.Compare):
		return "the selectors are not sorted"
	case v.Status == Pass && (v.Evidence != Pass || !v.WouldAllow):
		return "pass without evidence"
	case v.Status == Fail && v.WouldAllow:
		return "fail, and allowed"
	case v.Status == Grace && (v.GraceUntil.IsZero() || v.Until.IsZero() || v.Until.After(v.GraceUntil)):
		return "grace without an end"
	case v.Status != Grace && !v.GraceUntil.IsZero():
		return "an end of grace without grace"
	case len(v.Reasons) == 0:
		return "no reason"
	case v.Allowed && (v.Quarantine || v.Revoke):
		return "allowed, and punished"
	}
	return ""
}

// feedWanting says that what wants is a feed: then the reports may still say what is not there.
func feedWanting(v Verdict) bool {
	return slices.ContainsFunc(v.Reasons, func(r Reason) bool { return strings.Contains(r.Text, " feed") })
}

// brokenUntil checks that the verdict is the same at every instant before Until, and decides at it.
func brokenUntil(p *ScanPolicy, in Input, v Verdict) string {
	if !v.Until.IsZero() && !v.Until.After(in.Now) {
		return "it holds until a time that has passed"
	}
	end := v.Until
	if end.IsZero() {
		end = in.Now.Add(10 * 365 * day)
	}
	span := end.Sub(in.Now)
	for _, at := range []time.Time{in.Now.Add(1), in.Now.Add(span / 3), in.Now.Add(span / 2), end.Add(-time.Second), end.Add(-1)} {
		if at.Before(in.Now) || !at.Before(end) {
			continue
		}
		later := in
		later.Now = at
		if diff := cmp.Diff(v, p.Decide(later), cmpopts.EquateEmpty()); diff != "" {
			return fmt.Sprintf("at %s, before %s, it is another:\n%s", at, end, diff)
		}
	}
	return ""
}

// brokenOrder checks that neither the order of the lists nor an index changes anything, and that
// deciding for several is deciding for each.
func brokenOrder(p *ScanPolicy, in Input, v Verdict) string {
	other := in
	other.Reports, other.VEX, other.Exceptions = slices.Clone(in.Reports), slices.Clone(in.VEX), slices.Clone(in.Exceptions)
	for i := range other.Reports {
		if other.Reports[i].Report != nil {
			other.Reports[i].Index = NewIndex(other.Reports[i].Report)
		}
	}
	for i := range other.VEX {
		other.VEX[i].Index = NewVEXIndex(other.VEX[i].VEX)
	}
	slices.Reverse(other.Reports)
	slices.Reverse(other.VEX)
	slices.Reverse(other.Exceptions)
	for _, got := range DecideAll([]*ScanPolicy{p, p}, other) {
		if diff := cmp.Diff(v, got, cmpopts.EquateEmpty()); diff != "" {
			return "in another order it is another:\n" + diff
		}
	}
	return ""
}

var _ = report.Unknown
