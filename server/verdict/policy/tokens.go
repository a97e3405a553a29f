package policy

import (
	"slices"
	"strconv"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/verdict/report"
)

// scanType is the type of every selector here.
const scanType = "scan"

// ages are the buckets of scan:max-age. An image whose evidence is two hours old is in every bucket from
// 6h up, so that an entry which asks for 24h is also content with better.
var ages = []struct {
	age   time.Duration
	token attestor.Selector
}{
	{time.Hour, scan("max-age:1h")}, {6 * time.Hour, scan("max-age:6h")}, {24 * time.Hour, scan("max-age:24h")},
	{3 * day, scan("max-age:3d")}, {7 * day, scan("max-age:7d")}, {30 * day, scan("max-age:30d")},
}

// levels are what scan:no and scan:no-fixable are said of: nothing so severe, or more so, is left.
var levels = []struct {
	severity       report.Severity
	no, notFixable attestor.Selector
}{
	{report.Critical, scan("no:critical"), scan("no-fixable:critical")},
	{report.High, scan("no:high"), scan("no-fixable:high")},
	{report.Medium, scan("no:medium"), scan("no-fixable:medium")},
	{report.Low, scan("no:low"), scan("no-fixable:low")},
}

var noKEV = scan("no-kev:true")

func scan(value string) attestor.Selector { return attestor.Selector{Type: scanType, Value: value} }

// words are the selectors that bear the policy's name, and those of its thresholds.
type words struct {
	gate   attestor.Selector
	status map[Status]attestor.Selector
	epss   []attestor.Selector
	// rules are how reasons name the rules.
	rules []string
}

func newWords(p *ScanPolicy) words {
	w := words{gate: scan("policy:" + p.Name), status: map[Status]attestor.Selector{}}
	for _, s := range []Status{Pass, Grace, Fail, Stale, Missing, Error, Exempt} {
		w.status[s] = scan("status:" + p.Name + ":" + string(s))
	}
	for _, t := range p.EPSSBelow {
		w.epss = append(w.epss, scan("epss-below:"+strconv.FormatFloat(t, 'g', -1, 64)))
	}
	for _, f := range p.Fail {
		w.rules = append(w.rules, f.String())
	}
	return w
}

// bare are the selectors of an open gate and nothing else.
func (w *words) bare(s Status) []attestor.Selector {
	return []attestor.Selector{w.gate, w.status[s]}
}

// selectors says in selectors what the verdict is and what is known. Each is monotone: more findings, or
// older evidence, only ever takes one away, scan:status apart. (A finding without a score takes
// scan:epss-below away, until another finding tells its score or its CVE.) What says that something is not
// there needs enough sound and fresh reports, as cleared says; and, where a feed has to know, a fresh feed.
func (p *ScanPolicy) selectors(v *Verdict, e *evidence, t *tally, cleared bool, in *Input, c *clock) []attestor.Selector {
	all := make([]attestor.Selector, 0, 24)
	if v.Allowed {
		all = append(all, p.words.gate)
	}
	if p.Mode == Audit {
		all = append(all, p.words.status[Pass])
	} else {
		all = append(all, p.words.status[v.Status])
	}
	if !e.enough.IsZero() {
		for i, bucket := range ages {
			if c.reached(e.enough.Add(bucket.age)) {
				continue
			}
			for _, wider := range ages[i:] {
				all = append(all, wider.token)
			}
			break
		}
	}
	for _, u := range e.uses {
		if !u.fresh {
			continue
		}
		r := &in.Reports[u.at]
		all = appendWord(all, "scanner:", r.Report.Scanner)
		all = appendWord(all, "attested:", r.TrustPolicy)
	}
	if cleared {
		all = p.absent(all, t, in, c)
	}
	slices.SortFunc(all, attestor.Selector.Compare)
	return slices.Compact(all)
}

// absent adds what says that something is not there.
func (p *ScanPolicy) absent(all []attestor.Selector, t *tally, in *Input, c *clock) []attestor.Selector {
	for _, l := range levels {
		if t.worst < l.severity {
			all = append(all, l.no)
		}
		if t.fixable < l.severity {
			all = append(all, l.notFixable)
		}
	}
	// Nothing is known to be exploited, or likely to be, where there is nothing.
	if len(t.effective) == 0 {
		return append(append(all, noKEV), p.words.epss...)
	}
	if !t.kev && p.clears(in.Feeds.KEVAt, c) {
		all = append(all, noKEV)
	}
	if !t.unscored && len(p.EPSSBelow) > 0 && t.epss < p.EPSSBelow[len(p.EPSSBelow)-1] && p.clears(in.Feeds.EPSSAt, c) {
		for i, threshold := range p.EPSSBelow {
			if t.epss < threshold {
				all = append(all, p.words.epss[i])
			}
		}
	}
	return all
}

// clears reports whether a feed of that time may say that something is not in it.
func (p *ScanPolicy) clears(at time.Time, c *clock) bool {
	return !at.IsZero() && c.reached(at.Add(-Skew)) && !c.reached(at.Add(p.FeedMaxAge))
}

// appendWord adds a selector with a word that came from outside, if it can be one.
func appendWord(all []attestor.Selector, prefix, word string) []attestor.Selector {
	if word == "" {
		return all
	}
	s := scan(prefix + word)
	if s.Check() != nil {
		return all
	}
	return append(all, s)
}

// Facts returns the selectors of one image from its verdicts under every policy there is.
//
// What bears a policy's name is taken from that policy. The rest (scan:no:critical, scan:max-age:24h, …)
// bears none, and a lax policy would say it where a strict one does not; so it holds only if every policy
// says it that enforces and either opens its gate or has evidence. An entry that asks for such a selector
// together with scan:policy:<name> thus has it in that policy's sense. Policies in audit mode have a say
// only where none enforces: a trial changes nothing.
func Facts(verdicts []Verdict) attestor.Set {
	var named []attestor.Selector
	var common map[attestor.Selector]int
	voices := 0
	for _, mode := range []Mode{Enforce, Audit} {
		common, voices = map[attestor.Selector]int{}, 0
		for i := range verdicts {
			v := &verdicts[i]
			if v.Mode != mode || v.Evidence == Missing && !v.Allowed {
				continue
			}
			voices++
			for _, s := range v.Selectors {
				if !bearsName(s, v.Policy) {
					common[s]++
				}
			}
		}
		if hasMode(verdicts, mode) {
			break
		}
	}
	for i := range verdicts {
		for _, s := range verdicts[i].Selectors {
			if bearsName(s, verdicts[i].Policy) {
				named = append(named, s)
			}
		}
	}
	for s, n := range common {
		if n == voices {
			named = append(named, s)
		}
	}
	return attestor.NewSet(named...)
}

func hasMode(verdicts []Verdict, mode Mode) bool {
	return slices.ContainsFunc(verdicts, func(v Verdict) bool { return v.Mode == mode })
}

func bearsName(s attestor.Selector, policy string) bool {
	return s.Value == "policy:"+policy || len(s.Value) > len("status:"+policy+":") && s.Value[:len("status:"+policy+":")] == "status:"+policy+":"
}
