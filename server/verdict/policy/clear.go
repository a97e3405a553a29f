package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/server/verdict/report"
)

// Exception is an operator's word that a finding does not count, for a while.
type Exception struct {
	ID string
	// Policy is the policy it is for, empty for every one.
	Policy string
	// Digest is the config digest of the image it is for, Package the package (a purl, in which what
	// is left out may be anything). At least one must be there; if both are, both must fit.
	Digest, Package string
	// Vulnerability is what it is about. Empty means all of the package's; with a Digest and no
	// Package it exempts the image as a whole, whatever is known or not known of it.
	Vulnerability string
	// Reason and Approver are for those who ask later. Without them it does not count.
	Reason, Approver string
	// It counts from CreatedAt until Expires, and never for longer than a policy's ExceptionMaxAge.
	CreatedAt, Expires time.Time
}

// ErrException marks an exception that can never count.
var ErrException = errors.New("exception refused")

// Check says why an exception can never count, with an error that wraps ErrException, or nil.
func (e *Exception) Check() error {
	var why string
	switch {
	case e.Digest == "" && e.Package == "":
		why = "it names neither an image nor a package"
	case strings.TrimSpace(e.Reason) == "":
		why = "it gives no reason"
	case strings.TrimSpace(e.Approver) == "":
		why = "it does not say who approved it"
	case e.CreatedAt.IsZero():
		why = "it does not say when it was made"
	case e.Expires.IsZero():
		why = "it does not say when it ends"
	case !e.Expires.After(e.CreatedAt):
		why = "it ends before it begins"
	default:
		return nil
	}
	return fmt.Errorf("check exception %s: %w: %s", e.ID, ErrException, why)
}

// holds reports whether the exception is in force.
func (e *Exception) holds(p *ScanPolicy, c *clock) bool {
	return c.reached(e.CreatedAt) && !c.reached(e.end(p))
}

func (e *Exception) end(p *ScanPolicy) time.Time {
	return earliest(e.Expires, e.CreatedAt.Add(p.ExceptionMaxAge))
}

// whole reports whether it exempts an image as a whole.
func (e *Exception) whole() bool { return e.Vulnerability == "" && e.Package == "" }

// exempted are the exceptions that can count for one image: those for it as a whole, and the others by
// vulnerability. Each list is in an order that does not depend on the input's.
type exempted struct {
	whole []*Exception
	by    map[string][]*Exception
}

func exceptions(in *Input) exempted {
	var fit []*Exception
	for i := range in.Exceptions {
		e := &in.Exceptions[i]
		if (e.Digest == "" || e.Digest == in.Digest) && e.Check() == nil {
			fit = append(fit, e)
		}
	}
	if len(fit) == 0 {
		return exempted{}
	}
	// The last to end goes first, so that a boundary is only noted where it is one.
	slices.SortStableFunc(fit, func(a, b *Exception) int {
		return cmp.Or(b.Expires.Compare(a.Expires), strings.Compare(a.ID, b.ID))
	})
	x := exempted{by: map[string][]*Exception{}}
	for _, e := range fit {
		if e.whole() {
			x.whole = append(x.whole, e)
		} else {
			x.by[e.Vulnerability] = append(x.by[e.Vulnerability], e)
		}
	}
	return x
}

// eraser takes findings off for one policy.
type eraser struct {
	p  *ScanPolicy
	in *Input
	c  *clock
	exempted
	// trusted are the VEX documents that count, those of one trust policy together.
	trusted []*TrustedVEX
}

func (p *ScanPolicy) eraser(in *Input, fit exempted, c *clock) *eraser {
	x := &eraser{p: p, in: in, c: c, exempted: fit}
	for i := range in.VEX {
		doc := &in.VEX[i]
		if doc.VEX == nil || doc.TrustPolicy == "" || !slices.Contains(p.VEX.Trust, doc.TrustPolicy) {
			continue
		}
		if doc.Index == nil || doc.Index.of != doc.VEX {
			doc.Index = NewVEXIndex(doc.VEX)
		}
		x.trusted = append(x.trusted, doc)
	}
	if len(x.trusted) < 2 {
		return x
	}
	slices.SortStableFunc(x.trusted, func(a, b *TrustedVEX) int {
		return cmp.Or(strings.Compare(a.TrustPolicy, b.TrustPolicy), strings.Compare(a.VEX.ID, b.VEX.ID))
	})
	return x
}

// off says why a finding does not count: the rule, and a text. Both are empty if it does.
func (x *eraser) off(r *row) (rule, why string) {
	if r.hidden && x.p.TrustScannerSuppressions {
		return "trust_scanner_suppressions", "its scanner left it out: " + r.found.Suppressed
	}
	if len(x.trusted) == 0 && len(x.by) == 0 {
		return "", ""
	}
	if rule, why = x.vex(r); rule == "" {
		rule, why = x.exception(r)
	}
	return rule, why
}

func (x *eraser) exception(r *row) (rule, why string) {
	if len(x.by) == 0 {
		return "", ""
	}
	for _, id := range r.ids {
		if e := x.first(x.by[id], r); e != nil {
			return "exception", x.told(e)
		}
	}
	if e := x.first(x.by[""], r); e != nil {
		return "exception", x.told(e)
	}
	return "", ""
}

// first returns the first exception that is in force for this policy and, about it (nil for the image as a whole).
func (x *eraser) first(all []*Exception, r *row) *Exception {
	for _, e := range all {
		if e.Policy != "" && e.Policy != x.p.Name || e.Package != "" && !r.within(e.Package) {
			continue
		}
		if e.holds(x.p, x.c) {
			return e
		}
	}
	return nil
}

// exempt returns the exception that exempts the image as a whole, if one is in force.
func (x *eraser) exempt() *Exception { return x.first(x.whole, nil) }

func (x *eraser) told(e *Exception) string {
	return "exception " + e.ID + " by " + e.Approver + " until " + stamp(e.end(x.p)) + ": " + e.Reason
}

// within reports whether a statement about a package is about all that the row was reported under.
func (r *row) within(pattern string) bool {
	if !covers(pattern, r.found.Package) {
		return false
	}
	for _, other := range r.packages {
		if !covers(pattern, other) {
			return false
		}
	}
	return true
}

// VEXIndex is a VEX document as Decide needs it: its statements by vulnerability. It is not changed
// once made.
type VEXIndex struct {
	of *report.VEX
	by map[string][]int
}

// NewVEXIndex prepares a document. The document must not be changed afterwards.
func NewVEXIndex(v *report.VEX) *VEXIndex {
	x := &VEXIndex{of: v, by: map[string][]int{}}
	for i := range v.Statements {
		s := &v.Statements[i]
		x.by[s.Vulnerability] = append(x.by[s.Vulnerability], i)
		for _, alias := range s.Aliases {
			if alias != s.Vulnerability && namesOne(alias) {
				x.by[alias] = append(x.by[alias], i)
			}
		}
	}
	return x
}

// word is the newest statement of one trust policy about a row.
type word struct {
	status, justification, team string
	time                        time.Time
	version                     int
}

// vex says whether trusted statements take a row off. Of each trust policy the newest statement counts;
// one that says affected outweighs all others, however old it is.
func (x *eraser) vex(r *row) (rule, why string) {
	for start := 0; start < len(x.trusted); {
		team := x.trusted[start].TrustPolicy
		end := start + 1
		for end < len(x.trusted) && x.trusted[end].TrustPolicy == team {
			end++
		}
		newest, any := x.newest(x.trusted[start:end], r)
		start = end
		if !any {
			continue
		}
		if newest.status == "affected" {
			return "", ""
		}
		if rule == "" && x.accepts(&newest) {
			rule, why = "vex", team+" says "+newest.status+" ("+cmp.Or(newest.justification, "no justification")+")"
		}
	}
	return rule, why
}

func (x *eraser) newest(docs []*TrustedVEX, r *row) (newest word, any bool) {
	for _, doc := range docs {
		for _, id := range r.ids {
			for _, i := range doc.Index.by[id] {
				s := &doc.VEX.Statements[i]
				if !x.about(s, r) {
					continue
				}
				w := word{
					status: s.Status, justification: s.Justification, team: doc.TrustPolicy, version: doc.VEX.Version,
					time: earliest(cmp.Or(s.Timestamp, doc.VEX.Timestamp), doc.VerifiedAt, doc.ReceivedAt),
				}
				if !any || w.outranks(&newest, x) {
					newest, any = w, true
				}
			}
		}
	}
	return newest, any
}

// outranks reports whether w is the later word; of two at the same time the later version, then the
// one that clears less.
func (w *word) outranks(o *word, x *eraser) bool {
	if order := cmp.Or(w.time.Compare(o.time), cmp.Compare(w.version, o.version)); order != 0 {
		return order > 0
	}
	if w.status == "affected" || o.status == "affected" {
		return o.status != "affected"
	}
	if a, b := x.acceptable(w), x.acceptable(o); a != b {
		return !a
	}
	return strings.Compare(w.status+w.justification, o.status+o.justification) < 0
}

// about reports whether a statement is about the row in this image. Names never bind it to the image.
func (x *eraser) about(s *report.Statement, r *row) bool {
	switch {
	case s.Product != "":
		if s.Product != x.in.Digest && !slices.Contains(x.in.Linked, s.Product) {
			return false
		}
	case s.Package == "" || !x.p.VEX.AnyImage:
		return false
	}
	return s.Package == "" || r.within(s.Package)
}

func (x *eraser) acceptable(w *word) bool {
	if !slices.Contains(x.p.VEX.Accept, w.status) {
		return false
	}
	return w.status != "not_affected" || !x.p.VEX.RequireJustification || w.justification != ""
}

func (x *eraser) accepts(w *word) bool {
	return x.acceptable(w) && !w.time.IsZero() && x.c.reached(w.time.Add(-Skew)) && !x.c.reached(w.time.Add(x.p.VEX.MaxAge))
}
