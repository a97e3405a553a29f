package report

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// severities are all the words that scanners use. What is not here is Unknown.
var severities = map[string]Severity{
	"critical": Critical,
	"high":     High, "important": High,
	"medium": Medium, "moderate": Medium,
	"low":        Low,
	"negligible": Negligible, "minimal": Negligible, "unimportant": Negligible, "none": Negligible,
	"info": Negligible, "informational": Negligible,
}

// severity reads a scanner's word, in any case.
func severity(word string) Severity { return severities[strings.ToLower(strings.TrimSpace(word))] }

// severityOfCVSS is the qualitative rating of a base score (CVSS v3.1 section 5), also for a version 2
// score, whose own scale has no critical.
func severityOfCVSS(score float64) Severity {
	switch {
	case score < 0 || score > 10:
		return Unknown
	case score >= 9:
		return Critical
	case score >= 7:
		return High
	case score >= 4:
		return Medium
	case score > 0:
		return Low
	default:
		return Negligible
	}
}

// String is the severity's word as policies write it.
func (s Severity) String() string {
	switch s {
	case Critical:
		return "critical"
	case High:
		return "high"
	case Medium:
		return "medium"
	case Low:
		return "low"
	case Negligible:
		return "negligible"
	default:
		return "unknown"
	}
}

// vulnerabilityID brings an identifier to the form that all readers and feeds compare.
func vulnerabilityID(s string) string { return strings.ToUpper(strings.TrimSpace(s)) }

// sameBug are the databases that give each vulnerability one name. A vendor's advisory (DSA-…, RHSA-…,
// USN-…) is an alias too, but of every vulnerability that it fixes: two findings that share one are
// not the same.
var sameBug = []string{"CVE-", "GHSA-", "GO-", "PYSEC-", "RUSTSEC-"}

func namesOneBug(id string) bool {
	return slices.ContainsFunc(sameBug, func(p string) bool { return strings.HasPrefix(id, p) })
}

func isCVE(id string) bool { return strings.HasPrefix(id, "CVE-") }

// rows collects the findings of one report.
type rows struct {
	all  []Finding
	seen int
}

// add takes one finding as the scanner wrote it. A finding that names several CVEs, as one led by an
// advisory does, becomes one finding for each: who looks one of them up in a feed of exploited
// vulnerabilities must find it, and who says that one of them does not matter must not clear the rest.
func (r *rows) add(f Finding) error {
	f.ID = vulnerabilityID(f.ID)
	if f.ID == "" {
		return fmt.Errorf("finding in %q has no identifier", f.Package)
	}
	if len(f.Aliases) > maxAliases {
		return fmt.Errorf("finding %s has more than %d aliases", f.ID, maxAliases)
	}
	var cves, others []string
	for _, id := range append([]string{f.ID}, f.Aliases...) {
		id = vulnerabilityID(id)
		if isCVE(id) {
			cves = append(cves, id)
		} else if id != "" {
			others = append(others, id)
		}
	}
	cves, others = distinct(cves), distinct(others)
	if len(cves) < 2 {
		f.Aliases = slices.DeleteFunc(distinct(append(cves, others...)), func(id string) bool { return id == f.ID })
		return r.put(f)
	}
	for _, cve := range cves {
		f.ID, f.Aliases = cve, others
		if err := r.put(f); err != nil {
			return err
		}
	}
	return nil
}

func (r *rows) put(f Finding) error {
	if r.seen++; r.seen > MaxFindings {
		return fmt.Errorf("%w: more than %d findings", ErrTooLarge, MaxFindings)
	}
	if len(f.Aliases) == 0 {
		f.Aliases = nil
	}
	r.all = append(r.all, f)
	return nil
}

func distinct(ids []string) []string {
	slices.Sort(ids)
	return slices.Compact(ids)
}

// place is one name of one vulnerability in one package.
type place struct{ pkg, id string }

// merge returns the findings with those made one that name the same vulnerability in the same package,
// sorted by ID and package. Of several, the worst severity and the highest EPSS count, a fix known to
// one is known, and one that is not suppressed makes the whole not suppressed. The first one leads.
func (r *rows) merge() []Finding {
	g := groups{parent: make([]int, len(r.all)), cve: make([]string, len(r.all)), at: make(map[place]int, len(r.all))}
	for i, f := range r.all {
		g.parent[i], g.cve[i] = i, cveOf(f)
	}
	// By CVE first: what follows may then join a finding without one to a group, but never two groups
	// of different CVEs.
	for i, f := range r.all {
		if cve := g.cve[i]; cve != "" {
			g.join(i, place{f.Package, cve})
		}
	}
	for i, f := range r.all {
		if !isCVE(f.ID) {
			g.join(i, place{f.Package, f.ID})
		}
		for _, id := range f.Aliases {
			if !isCVE(id) && namesOneBug(id) {
				g.join(i, place{f.Package, id})
			}
		}
	}
	into := make(map[int]int, len(r.all)) // the first of a group → its place in out
	more := map[int][]string{}            // names that joined, by place in out
	out := make([]Finding, 0, len(r.all))
	for i, f := range r.all {
		root := g.root(i)
		at, ok := into[root]
		if !ok {
			into[root] = len(out)
			out = append(out, f)
			continue
		}
		more[at] = append(append(more[at], f.ID), f.Aliases...)
		out[at].take(f)
	}
	for at, ids := range more {
		lead := out[at].ID
		ids = slices.DeleteFunc(distinct(append(ids, out[at].Aliases...)), func(id string) bool { return id == lead })
		if out[at].Aliases = nil; len(ids) > 0 {
			out[at].Aliases = ids
		}
	}
	slices.SortStableFunc(out, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), strings.Compare(a.Package, b.Package))
	})
	return out
}

// take makes f's case part of b, all but its names.
func (b *Finding) take(f Finding) {
	b.Severity = max(b.Severity, f.Severity)
	b.Fixed = b.Fixed || f.Fixed
	b.KEV = b.KEV || f.KEV
	b.EPSS = max(b.EPSS, f.EPSS)
	if f.Suppressed == "" {
		b.Suppressed = ""
	}
}

func cveOf(f Finding) string {
	if isCVE(f.ID) {
		return f.ID
	}
	for _, id := range f.Aliases {
		if isCVE(id) {
			return id
		}
	}
	return ""
}

// groups are disjoint sets of findings, each known by its first.
type groups struct {
	parent []int
	cve    []string // of the group, at its first
	at     map[place]int
}

func (g *groups) root(i int) int {
	for g.parent[i] != i {
		g.parent[i] = g.parent[g.parent[i]]
		i = g.parent[i]
	}
	return i
}

// join puts finding i into the group that p names, unless they are about different CVEs.
func (g *groups) join(i int, p place) {
	j, ok := g.at[p]
	if !ok {
		g.at[p] = i
		return
	}
	a, b := g.root(i), g.root(j)
	if a == b || g.cve[a] != "" && g.cve[b] != "" && g.cve[a] != g.cve[b] {
		return
	}
	first, second := min(a, b), max(a, b)
	g.parent[second] = first
	g.cve[first] = cmp.Or(g.cve[first], g.cve[second])
}

// leadingID finds the identifier that a text begins with, as SARIF's rule identifiers do; the rest,
// after a dash, is the package in Grype's.
var leadingID = regexp.MustCompile(`(?i)^(?:CVE-\d{4}-\d{4,}|GHSA(?:-[0-9a-z]{4}){3}|[A-Z]+-\d{4}[-:]\d+)`)

// flawSet collects flaws.
type flawSet []Flaw

func (f *flawSet) add(flaw Flaw, when bool) {
	if when && !slices.Contains(*f, flaw) {
		*f = append(*f, flaw)
	}
}

func (f flawSet) sorted() []Flaw {
	slices.Sort(f)
	return f
}
