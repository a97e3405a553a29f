package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/assay-id/assay/server/verdict/report"
)

// fitness says what a report is good for. Whatever it is, its findings count against the image.
type fitness int

const (
	sound    fitness = iota // may clear an image while it is fresh
	condemns                // of a format that is never the sole gate
	unsound                 // may have left something out, or cannot be believed
)

// use is a report whose findings count under a policy.
type use struct {
	at    int       // its place in Input.Reports
	name  string    // whose word it is: what sources names and min_sources counts
	time  time.Time // of the evidence
	fit   fitness
	why   string    // if it is not sound
	until time.Time // when a sound report becomes stale
	fresh bool
}

// evidence is what a policy has to go by, before any finding is looked at.
type evidence struct {
	uses []use
	// lacks are what is wanting, the reports' before the feeds'; none if enough sources are sound and
	// fresh, and the feeds that rules need are too.
	lacks []lack
	// enough is the time of the youngest sound evidence that MinSources sources reach, zero if they
	// do not.
	enough time.Time
	// left are the reasons why reports were left out.
	left []Reason
}

// lack is one thing that is wanting for evidence to clear an image.
type lack struct {
	status Status    // Stale, Missing or Error
	since  time.Time // zero if that is not known
	why    string
}

// worst returns the gravest of what is wanting, or Pass. An error outweighs what is merely not there: it is
// remembered, so that the next one does not begin a new grace.
func (e *evidence) worst() (Status, time.Time) {
	for _, s := range []Status{Error, Missing, Stale} {
		since, any := time.Time{}, false
		for _, l := range e.lacks {
			if l.status == s {
				since, any = earliest(since, l.since), true
			}
		}
		if any {
			return s, since
		}
	}
	return Pass, time.Time{}
}

// timeOf returns the time of a report's evidence: the earliest of what it says itself, what its
// signature proves, and when it came. A scanner that writes the time of writing for the time of
// scanning, and an old report under a new signature, gain nothing by it.
func timeOf(r *SourcedReport) time.Time {
	return earliest(r.Report.ScannedAt, r.VerifiedAt, r.ReceivedAt)
}

// nameOf returns whose word a report is. A source's own name counts only where nobody was verified, so
// that a name chosen by who pushes does not take the place of a trust policy's.
func nameOf(r *SourcedReport) string { return cmp.Or(r.TrustPolicy, r.Source) }

// label names a report for people.
func label(r *SourcedReport) string {
	if r.TrustPolicy != "" && r.Source != r.TrustPolicy && r.Source != "" {
		return r.TrustPolicy + "/" + r.Source
	}
	return nameOf(r)
}

// reference names a report in a Reason.
func reference(r *SourcedReport) string { return cmp.Or(r.Hash, label(r)) }

// gather finds out which reports count, and whether they are sound and fresh enough to clear.
func (p *ScanPolicy) gather(in *Input, c *clock) evidence {
	e := evidence{}
	var source *SourcedReport // whose reports are at hand, the newest first
	var soundAt time.Time     // of its newest sound one
	for _, at := range p.candidates(in, &e) {
		r := &in.Reports[at]
		u := use{at: at, name: nameOf(r), time: timeOf(r)}
		if source == nil || !sameSource(source, r) {
			source, soundAt = r, time.Time{}
		}
		if u.time.Before(soundAt) {
			continue // replaced by a sound one, which is strictly newer
		}
		u.fit, u.why = p.fitness(r, c)
		if u.fit == sound {
			u.until = u.time.Add(p.MaxAge)
			if !r.Report.DBAt.IsZero() {
				u.until = earliest(u.until, r.Report.DBAt.Add(p.MaxDBAge))
			}
			u.fresh = !c.reached(u.until)
			soundAt = u.time
		}
		e.uses = append(e.uses, u)
	}
	p.weigh(&e, in)
	return e
}

// candidates returns the places of the reports that count at all, each source's together with the
// newest first, in an order that does not depend on theirs.
func (p *ScanPolicy) candidates(in *Input, e *evidence) []int {
	var order []int
	for at := range in.Reports {
		r := &in.Reports[at]
		if r.Report == nil {
			continue
		}
		if why := p.foreign(in, r); why != "" {
			e.left = append(e.left, Reason{Rule: "left out", Report: reference(r), Text: "the report of " + label(r) + " does not count: " + why})
			continue
		}
		order = append(order, at)
	}
	if len(order) > 1 {
		slices.SortStableFunc(order, func(a, b int) int {
			x, y := &in.Reports[a], &in.Reports[b]
			return cmp.Or(strings.Compare(nameOf(x), nameOf(y)), strings.Compare(x.TrustPolicy, y.TrustPolicy), strings.Compare(x.Source, y.Source),
				timeOf(y).Compare(timeOf(x)), y.Report.DBAt.Compare(x.Report.DBAt), y.ReceivedAt.Compare(x.ReceivedAt),
				strings.Compare(x.Hash, y.Hash), len(y.Report.Findings)-len(x.Report.Findings),
				// The same document may have come under two signatures; what makes it unsound is told of the last.
				y.Report.ScannedAt.Compare(x.Report.ScannedAt), y.VerifiedAt.Compare(x.VerifiedAt),
				slices.Compare(x.Report.Flaws, y.Report.Flaws))
		})
	}
	if len(e.left) > 0 {
		slices.SortStableFunc(e.left, func(a, b Reason) int {
			return cmp.Or(strings.Compare(a.Report, b.Report), strings.Compare(a.Text, b.Text))
		})
		if more := len(e.left) - maxReasons; more > 0 {
			e.left = append(e.left[:maxReasons], Reason{Rule: "more", Text: strconv.Itoa(more) + " more reports do not count"})
		}
	}
	return order
}

func sameSource(a, b *SourcedReport) bool {
	return a.Source == b.Source && a.TrustPolicy == b.TrustPolicy
}

// foreign says why a report is none of this policy's business, or nothing.
func (p *ScanPolicy) foreign(in *Input, r *SourcedReport) string {
	switch {
	case in.Digest == "":
		return "the image has no digest to match it with"
	case r.TrustPolicy == "" && !p.AllowUnsigned:
		return "nobody vouches for it, and allow_unsigned is not set"
	case !slices.Contains(p.Sources, nameOf(r)):
		return "the source is not one of sources"
	case r.Report.Subject.Config != "" && r.Report.Subject.Config != in.Digest && !slices.Contains(in.Linked, r.Report.Subject.Config):
		return "it is about the image " + short(r.Report.Subject.Config)
	case r.Match == Strong:
		return ""
	case r.Match != Weak:
		return "it could not be matched with the image"
	case !p.AllowIndexMatch:
		return "it is about an index that leads to the image, and allow_index_match is not set"
	}
	return ""
}

// fitness says what a report is good for.
func (p *ScanPolicy) fitness(r *SourcedReport, c *clock) (fitness, string) {
	if slices.Contains(r.Report.Flaws, report.FlawImportOnly) {
		return condemns, "reports in the form " + string(r.Report.Format) + " never clear an image"
	}
	for _, t := range []struct {
		what string
		time time.Time
	}{{"it says it was made at", r.Report.ScannedAt}, {"its database is said to be of", r.Report.DBAt}, {"its signature is of", r.VerifiedAt}, {"it came at", r.ReceivedAt}} {
		if !t.time.IsZero() && !c.reached(t.time.Add(-Skew)) {
			return unsound, t.what + " " + stamp(t.time) + ", which is in the future"
		}
	}
	if timeOf(r).IsZero() {
		return unsound, "nothing says when it was made"
	}
	if p.RequireDBTime && r.Report.DBAt.IsZero() {
		return unsound, "it does not say how old its database is, and require_db_time is set"
	}
	for _, flaw := range r.Report.Flaws {
		if why := p.spoils(flaw, r); why != "" {
			return unsound, why
		}
	}
	return sound, ""
}

// spoils says why a report with the flaw cannot clear, or nothing if it can all the same.
func (p *ScanPolicy) spoils(flaw report.Flaw, r *SourcedReport) string {
	switch flaw {
	case report.FlawNoPackages:
		if p.AllowEmpty {
			return ""
		}
		return "it looked at no package, and allow_empty is not set"
	case report.FlawUnknownOS:
		if p.AllowEmpty {
			return ""
		}
		return "it did not know the operating system, and allow_empty is not set"
	case report.FlawNoTime:
		if !r.VerifiedAt.IsZero() {
			return ""
		}
		return "it does not say when the scan was made, and no signature does"
	case report.FlawFiltered:
		return "its scanner was told to leave findings out"
	case report.FlawEOSL:
		return "the operating system is past its end of support, so that nobody looks for its vulnerabilities"
	}
	return fmt.Sprintf("it has the flaw %q", flaw)
}

// whose is what one name's reports are worth: the best of them.
type whose struct {
	fresh, sound bool
	until, time  time.Time // the latest of its sound reports
}

// weigh counts who cleared the image, and says what is wanting if they are too few.
func (p *ScanPolicy) weigh(e *evidence, in *Input) {
	var names []whose
	for i := range e.uses {
		u := &e.uses[i]
		if i == 0 || e.uses[i-1].name != u.name {
			names = append(names, whose{})
		}
		w := &names[len(names)-1]
		if u.fit != sound {
			continue
		}
		w.fresh, w.sound = w.fresh || u.fresh, true
		if u.until.After(w.until) {
			w.until = u.until
		}
		if u.time.After(w.time) {
			w.time = u.time
		}
	}
	names = slices.DeleteFunc(names, func(w whose) bool { return !w.sound })
	fresh := 0
	for _, w := range names {
		if w.fresh {
			fresh++
		}
	}
	if len(names) >= p.MinSources {
		slices.SortFunc(names, func(a, b whose) int { return b.time.Compare(a.time) })
		e.enough = names[p.MinSources-1].time
	}
	switch {
	case fresh >= p.MinSources:
	case len(names) >= p.MinSources:
		// Stale since the moment when one too few was left.
		slices.SortFunc(names, func(a, b whose) int { return b.until.Compare(a.until) })
		since := names[p.MinSources-1].until
		e.lacks = append(e.lacks, lack{Stale, since, fmt.Sprintf("%d of %d needed sources are fresh; the last of the others has been too old since %s", fresh, p.MinSources, stamp(since))})
	default:
		e.lacks = append(e.lacks, p.want(e, in, len(names)))
	}
}

// want says whether what is wanting is missing or in error. have is how many names have a sound report.
func (p *ScanPolicy) want(e *evidence, in *Input, have int) lack {
	var bad lack
	for i := range e.uses {
		if u := &e.uses[i]; u.fit == unsound {
			r := &in.Reports[u.at]
			bad = lack{Error, earliest(bad.since, r.ReceivedAt), "the report of " + label(r) + " cannot clear the image: " + u.why}
		}
	}
	if bad.status == Error {
		bad.since = sinceBefore(bad.since, in.Previous)
		return bad
	}
	missing := lack{status: Missing, since: in.SeenAt}
	switch {
	case in.Digest == "":
		missing.why = "the image could not be resolved to a config digest, so that no report can be matched with it"
	case p.MinSources > 1:
		missing.why = fmt.Sprintf("%d of %d needed sources have a report that could clear the image", have, p.MinSources)
	default:
		missing.why = "no source has a report that could clear the image"
	}
	for _, u := range e.uses {
		if u.fit == condemns {
			missing.why += "; " + u.why
			break
		}
	}
	return missing
}

// sinceBefore keeps a grace for errors from beginning anew with each erroneous report.
func sinceBefore(since time.Time, previous *Verdict) time.Time {
	if previous != nil && previous.Evidence == Error {
		return earliest(since, previous.EvidenceSince)
	}
	return since
}

// stamp writes an instant for people.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

// short cuts a digest to what people compare.
func short(digest string) string {
	if hex, found := strings.CutPrefix(digest, "sha256:"); found && len(hex) > 12 {
		return "sha256:" + hex[:12] + "…"
	}
	return digest
}
