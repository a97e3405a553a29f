package policy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/assay-id/assay/server/verdict/report"
)

// row is one vulnerability in one package, as everybody who found it sees it together: the worst
// severity, a fix if anybody knows one, and so on.
type row struct {
	found report.Finding
	// key is what packages are the same by.
	key string
	// cve is its CVE number, empty if it has none. Two CVEs are two vulnerabilities, whatever else
	// they are called together.
	cve string
	// ids name this very vulnerability, the one it is called by first.
	ids []string
	// packages are the other names of the package, as reports wrote them.
	packages []string
	// unrated says that somebody could not say how severe it is; hidden, that every scanner that
	// found it was told to leave it out.
	unrated, hidden bool
}

// ref is a row with the report, by its place in Input.Reports, that is to be named for it. Rows of an
// index are never changed: where two become one, it is a new one.
type ref struct {
	*row
	from int
	// at is the row's place in the report's index, -1 if it is not of one.
	at int
}

func compareRefs(a, b ref) int {
	return cmp.Or(strings.Compare(a.key, b.key), strings.Compare(a.found.ID, b.found.ID))
}

// Index is a report as Decide needs it. It is not changed once made.
type Index struct {
	of   *report.Report
	rows []*row // sorted by key, then by identifier
}

// NewIndex prepares a report. The report must not be changed afterwards.
func NewIndex(r *report.Report) *Index {
	rows := make([]row, 0, len(r.Findings))
	for i := range r.Findings {
		f := &r.Findings[i]
		one := row{
			found:   *f,
			key:     packageKey(f.Package),
			ids:     identifiers(f),
			unrated: f.Severity <= report.Unknown || f.Severity > report.Critical,
			hidden:  f.Suppressed != "",
		}
		if one.unrated {
			one.found.Severity = report.Unknown
		}
		if !(f.EPSS >= 0 && f.EPSS <= 1) { // a number that is none, too
			one.found.EPSS = -1
		}
		rows = appendEach(rows, one)
	}
	refs := make([]ref, len(rows))
	for i := range rows {
		rows[i].name()
		refs[i].row = &rows[i]
	}
	slices.SortStableFunc(refs, compareRefs)
	x := &Index{of: r, rows: make([]*row, 0, len(rows))}
	for _, one := range merge(refs) {
		x.rows = append(x.rows, one.row)
	}
	return x
}

// appendEach adds a row for each CVE that a finding claims to be, or one if it claims none.
func appendEach(rows []row, one row) []row {
	cves := 0
	for _, id := range one.ids {
		if isCVE(id) {
			one.cve = id
			cves++
		}
	}
	if cves < 2 {
		return append(rows, one)
	}
	others := slices.DeleteFunc(slices.Clone(one.ids), isCVE)
	aliases := slices.DeleteFunc(slices.Clone(one.found.Aliases), isCVE)
	if !isCVE(one.found.ID) {
		aliases = append(aliases, one.found.ID)
		slices.Sort(aliases)
	}
	for _, id := range one.ids {
		if isCVE(id) {
			each := one
			each.cve, each.found.ID, each.found.Aliases = id, id, aliases
			each.ids = append([]string{id}, others...)
			rows = append(rows, each)
		}
	}
	return rows
}

// identifiers returns what names this very vulnerability: what the report calls it, and those aliases
// that are never shared by several. An advisory (DSA, RHSA, ALAS) stands for any number of CVEs; to take
// it for one would let a statement about one of them clear all.
func identifiers(f *report.Finding) []string {
	n := 1
	for _, alias := range f.Aliases {
		if namesOne(alias) && alias != f.ID {
			n++
		}
	}
	ids := append(make([]string, 0, n), f.ID)
	for _, alias := range f.Aliases {
		if namesOne(alias) && alias != f.ID {
			ids = append(ids, alias)
		}
	}
	return ids
}

func isCVE(id string) bool { return strings.HasPrefix(id, "CVE-") }

func namesOne(id string) bool {
	if isCVE(id) || strings.HasPrefix(id, "GHSA-") {
		return true
	}
	return strings.HasPrefix(id, "GO-") || strings.HasPrefix(id, "PYSEC-") || strings.HasPrefix(id, "RUSTSEC-")
}

// merge joins sorted rows of the same package that are the same vulnerability. It takes the slice over
// and returns it sorted again.
func merge(rows []ref) []ref {
	out := rows[:0]
	for start := 0; start < len(rows); {
		end := start + 1
		for end < len(rows) && rows[end].key == rows[start].key {
			end++
		}
		group := rows[start:end]
		if len(group) > 1 && shareNames(group) {
			group = join(group)
		}
		out = append(out, group...)
		start = end
	}
	return out
}

// shareNames reports whether two of the rows have an identifier in common.
func shareNames(rows []ref) bool {
	names := 0
	for _, r := range rows {
		names += len(r.ids)
	}
	if names > 16 {
		seen := make(map[string]bool, names)
		for _, r := range rows {
			for _, id := range r.ids {
				if seen[id] {
					return true
				}
				seen[id] = true
			}
		}
		return false
	}
	for i, r := range rows {
		for _, id := range r.ids {
			for _, o := range rows[i+1:] {
				if slices.Contains(o.ids, id) {
					return true
				}
			}
		}
	}
	return false
}

// join merges the rows of one package. Those with the same CVE become one. Those without any become one
// where they hang together by other names, and part of every CVE that goes by one of these names: an
// advisory that stands for two CVEs says of both what it says.
func join(rows []ref) []ref {
	var named, nameless []ref
	at := map[string]int{}     // CVE to its place in named
	also := map[string][]int{} // another name to the places of its CVEs
	for _, r := range rows {
		own := *r.row
		// These belong to an index: clipped, they are copied when they grow.
		own.ids, own.packages, own.found.Aliases = slices.Clip(own.ids), slices.Clip(own.packages), slices.Clip(own.found.Aliases)
		r.row, r.at = &own, -1
		if r.cve == "" {
			nameless = append(nameless, r)
		} else if place, known := at[r.cve]; known {
			named[place].add(r)
		} else {
			at[r.cve] = len(named)
			named = append(named, r)
		}
	}
	for place := range named {
		for _, id := range named[place].ids {
			if at := also[id]; len(at) == 0 || at[len(at)-1] != place {
				also[id] = append(at, place)
			}
		}
	}
	var rest []ref
	for _, r := range connect(nameless) {
		var into []int
		for _, id := range r.ids {
			into = append(into, also[id]...)
		}
		slices.Sort(into)
		for _, place := range slices.Compact(into) {
			named[place].add(r)
		}
		if len(into) == 0 {
			rest = append(rest, r)
		}
	}
	named = append(named, rest...)
	for i := range named {
		named[i].name()
	}
	slices.SortStableFunc(named, compareRefs)
	return named
}

// connect merges rows that have an identifier in common, be it by way of others.
func connect(rows []ref) []ref {
	into := make([]int, len(rows)) // the row that each became part of
	find := func(i int) int {
		for into[i] != i {
			into[i] = into[into[i]]
			i = into[i]
		}
		return i
	}
	owner := map[string]int{}
	for i := range rows {
		into[i] = i
		for _, id := range rows[i].ids {
			first, known := owner[id]
			if !known {
				owner[id] = i
				continue
			}
			a, b := find(first), find(i)
			into[max(a, b)] = min(a, b)
		}
	}
	for i := range rows {
		if to := find(i); to != i {
			rows[to].add(rows[i])
		}
	}
	out := rows[:0]
	for i := range rows {
		if into[i] == i {
			out = append(out, rows[i])
		}
	}
	return out
}

// add takes over what another row of the same vulnerability says, the worst of both.
func (r *ref) add(o ref) {
	if o.found.Severity > r.found.Severity {
		r.found.Severity, r.from = o.found.Severity, o.from
	}
	r.found.Fixed = r.found.Fixed || o.found.Fixed
	r.found.KEV = r.found.KEV || o.found.KEV
	r.found.EPSS = max(r.found.EPSS, o.found.EPSS)
	r.unrated = r.unrated || o.unrated
	if r.hidden = r.hidden && o.hidden; !r.hidden {
		r.found.Suppressed = ""
	}
	r.ids = addNames(r.ids, o.ids...)
	r.found.Aliases = addNames(r.found.Aliases, o.found.Aliases...)
	if o.found.Package != r.found.Package {
		r.packages = addNames(r.packages, o.found.Package)
	}
	r.packages = addNames(r.packages, o.packages...)
}

// maxNames is how many names of one thing are kept. Honest reports have a handful; without a limit a
// report could tie a hundred thousand findings to each of a hundred thousand others.
const maxNames = 64

func addNames(names []string, more ...string) []string {
	for _, name := range more {
		if len(names) < maxNames && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// name settles by which identifier the row goes: a CVE before all others, then the first by alphabet.
func (r *row) name() {
	if len(r.packages) > 0 {
		all := append(slices.Clone(r.packages), r.found.Package)
		slices.Sort(all)
		all = slices.Compact(all)
		r.found.Package, r.packages = all[0], all[1:]
	}
	if len(r.ids) == 1 {
		if !inOrder(r.found.Aliases, r.found.ID) {
			r.found.Aliases = otherNames(slices.Clone(r.found.Aliases), r.found.ID)
		}
		return
	}
	r.ids = slices.Clone(r.ids)
	slices.SortFunc(r.ids, func(a, b string) int {
		if isCVE(a) != isCVE(b) {
			if isCVE(a) {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	r.ids = slices.Compact(r.ids)
	r.found.ID = r.ids[0]
	r.found.Aliases = otherNames(slices.Concat(r.ids[1:], r.found.Aliases), r.found.ID)
}

// otherNames returns the names of what goes by id in order, once each and without that one.
func otherNames(names []string, id string) []string {
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(name string) bool { return name == id })
}

// inOrder reports whether otherNames would leave the names as they are.
func inOrder(names []string, id string) bool {
	for i, name := range names {
		if name == id || i > 0 && names[i-1] >= name {
			return false
		}
	}
	return true
}

// set is what some reports of an image say together, with what the feeds add to it.
type set struct {
	of   []int    // places in Input.Reports
	refs []string // what reports are called in reasons, by their places in Input.Reports
	rows []ref
	// findings are the rows' with KEV and EPSS of the feeds, in the same order.
	findings []report.Finding
}

// sets are those that were made for one image, so that policies with the same sources share them.
type sets struct {
	in   *Input
	refs []string
	made []*set
	// scores are what the feeds say of each report's rows.
	scores [][]score
}

// score is what the feeds say of a vulnerability; epss is negative if they do not.
type score struct {
	kev  bool
	epss float64
}

func (f *Feeds) score(r *row) score {
	if r.cve == "" {
		return score{epss: -1}
	}
	s := score{kev: f.KEV[r.cve], epss: -1}
	if p, ok := f.EPSS[r.cve]; ok && p <= 1 {
		s.epss = p
	}
	return s
}

// about returns what the given reports say together.
func (s *sets) about(reports []int) *set {
	for _, made := range s.made {
		if slices.Equal(made.of, reports) {
			return made
		}
	}
	if s.refs == nil {
		for i := range s.in.Reports {
			s.refs = append(s.refs, reference(&s.in.Reports[i]))
		}
	}
	made := &set{of: reports, refs: s.refs, rows: s.merged(reports)}
	made.findings = make([]report.Finding, len(made.rows))
	for i, r := range made.rows {
		f := &made.findings[i]
		*f = r.found
		var feeds score
		if r.at >= 0 {
			feeds = s.scores[r.from][r.at]
		} else {
			feeds = s.in.Feeds.score(r.row)
		}
		f.KEV = f.KEV || feeds.kev
		f.EPSS = max(f.EPSS, feeds.epss)
	}
	s.made = append(s.made, made)
	return made
}

func (s *sets) merged(reports []int) []ref {
	var all []ref
	for n, at := range reports {
		r := &s.in.Reports[at]
		if r.Index == nil || r.Index.of != r.Report {
			r.Index = NewIndex(r.Report) // r is the decision's own copy
		}
		next := make([]ref, len(r.Index.rows))
		for i, one := range r.Index.rows {
			next[i] = ref{one, at, i}
		}
		s.look(at, r.Index.rows)
		if n == 0 {
			all = next
			continue
		}
		all = weave(all, next)
	}
	if len(reports) > 1 {
		all = merge(all)
	}
	return all
}

// look asks the feeds about a report's rows, once.
func (s *sets) look(at int, rows []*row) {
	if s.scores == nil {
		s.scores = make([][]score, len(s.in.Reports))
	}
	if s.scores[at] != nil {
		return
	}
	scores := make([]score, len(rows))
	for i, r := range rows {
		scores[i] = s.in.Feeds.score(r)
	}
	s.scores[at] = scores
}

// weave puts two sorted lists into one.
func weave(a, b []ref) []ref {
	all := make([]ref, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if compareRefs(a[0], b[0]) <= 0 {
			all, a = append(all, a[0]), a[1:]
		} else {
			all, b = append(all, b[0]), b[1:]
		}
	}
	return append(append(all, a...), b...)
}
