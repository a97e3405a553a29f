package policy

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/assay-id/assay/server/verdict/report"
)

// The scenarios in testdata are read line by line, in the order of time; testdata/README.md says how to
// read and write them. This file runs them.

// refusals are the words for why a report is refused at the door.
var refusals = map[string]error{
	"identical": ErrIdentical, "older": ErrOlder, "older-db": ErrOlderDB, "future": ErrFuture,
	"weaker": ErrWeaker, "held": ErrHold, "other-source": ErrOtherSource,
}

// parseBlocks reads scan_policy blocks as conf does.
func parseBlocks(t testing.TB, text string) []Block {
	t.Helper()
	file, diags := hclsyntax.ParseConfig([]byte(text), "policy.hcl", hcl.InitialPos)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	var into struct {
		Policies []Block `hcl:"scan_policy,block"`
	}
	if diags := gohcl.DecodeBody(file.Body, nil, &into); diags.HasErrors() {
		t.Fatal(diags)
	}
	return into.Policies
}

func compile(t testing.TB, text string) *ScanPolicy {
	t.Helper()
	blocks := parseBlocks(t, text)
	if len(blocks) != 1 {
		t.Fatalf("%d policies in %s", len(blocks), text)
	}
	p, problems := New(blocks[0])
	if len(problems) > 0 {
		t.Fatalf("%s: %v", text, problems)
	}
	return p
}

// digest is the digest that a letter stands for.
func digest(name string) string {
	return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(name)))
}

// week is the Monday from which days are counted.
var week = time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)

// parseTime reads "Mon 10:00", in the first week of March 2026, or "2026-04-01 10:00".
func parseTime(text string) (time.Time, error) {
	day, clock, _ := strings.Cut(text, " ")
	for i, name := range []string{"Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"} {
		if day == name {
			day = week.AddDate(0, 0, i).Format(time.DateOnly)
		}
	}
	return time.Parse("2006-01-02 15:04", day+" "+clock)
}

// scenario is what has come to pass in one so far.
type scenario struct {
	t        *testing.T
	file     string
	line     int
	policies []*ScanPolicy
	in       Input
	reports  map[string]SourcedReport // by name, for "again"
	seen     map[string]time.Time
	verdicts map[string]*Verdict // the last ones, by policy
	verdict  *Verdict            // the one being looked at
	facts    []string
	report   *SourcedReport // whose findings are being read
	refuse   string
	vex      *TrustedVEX
}

func (s *scenario) fail(format string, args ...any) {
	s.t.Helper()
	s.t.Errorf("%s:%d: %s", s.file, s.line, fmt.Sprintf(format, args...))
}

func (s *scenario) fatal(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("%s:%d: %s", s.file, s.line, fmt.Sprintf(format, args...))
}

func (s *scenario) time(text string) time.Time {
	s.t.Helper()
	at, err := parseTime(strings.TrimSpace(text))
	if err != nil {
		s.fatal("%v", err)
	}
	return at
}

func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	total := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		first := 1
		for i, part := range strings.Split("\n"+string(text), "\n== ") {
			title, body, _ := strings.Cut(part, "\n")
			if i > 0 {
				total++
				t.Run(strings.TrimSuffix(filepath.Base(file), ".txt")+"/"+title, func(t *testing.T) {
					runScenario(t, file, first+1, body)
				})
			}
			first += strings.Count(part, "\n") + min(i, 1)
		}
	}
	if total < 40 {
		t.Errorf("%d scenarios are too few", total)
	}
}

func runScenario(t *testing.T, file string, line int, body string) {
	s := &scenario{
		t: t, file: file, line: line - 1, seen: map[string]time.Time{}, verdicts: map[string]*Verdict{},
		in: Input{Digest: digest("A")}, reports: map[string]SourcedReport{},
	}
	s.in.FirstSeen = func(id string) time.Time { return s.seen[id] }
	var block []string
	judged := false
	for text := range strings.SplitSeq(body, "\n") {
		s.line++
		line := strings.TrimSpace(text)
		switch {
		case len(block) > 0:
			block = append(block, text)
			if text == "}" {
				s.policies = append(s.policies, compile(t, strings.Join(block, "\n")))
				block = nil
			}
		case line == "" || line[0] == '#':
		case strings.HasPrefix(text, "scan_policy "):
			block = []string{text}
		case text[0] == ' ' || text[0] == '\t':
			s.detail(line)
		default:
			s.endReport()
			s.event(line)
			judged = judged || strings.HasPrefix(line, "at ")
		}
	}
	s.endReport()
	if !judged {
		s.fatal("the scenario expects nothing")
	}
}

// event runs a line that begins with a time, or with a word.
func (s *scenario) event(line string) {
	s.t.Helper()
	s.verdict, s.facts, s.vex = nil, nil, nil
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "at":
		s.at(rest)
		return
	case "unresolvable":
		s.in.Digest = ""
		return
	case "proven":
		s.in.Linked = append(s.in.Linked, digest(rest))
		return
	}
	parts := strings.SplitN(line, " ", 4)
	if len(parts) < 3 {
		s.fatal("what is %q?", line)
	}
	at := s.time(parts[0] + " " + parts[1])
	kind, rest := strings.TrimSuffix(parts[2], ":"), strings.Join(parts[3:], "")
	head, clauses, _ := strings.Cut(rest, ": ")
	head = strings.TrimSuffix(head, ":")
	switch kind {
	case "runs":
		s.in.SeenAt = at
	case "report":
		s.readReport(at, strings.Fields(head), split(clauses))
	case "vex":
		team := strings.TrimPrefix(head, "from ")
		if team == "nobody" {
			team = ""
		}
		s.in.VEX = append(s.in.VEX, TrustedVEX{TrustPolicy: team, ReceivedAt: at, VEX: &report.VEX{Format: report.OpenVEX, ID: rest + at.String(), Timestamp: at}})
		s.vex = &s.in.VEX[len(s.in.VEX)-1]
	case "exception":
		s.exception(at, strings.Fields(head), clauses)
	case "kev":
		s.in.Feeds.KEVAt, s.in.Feeds.KEV = at, map[string]bool{}
		for _, id := range split(rest) {
			s.in.Feeds.KEV[id] = true
		}
	case "epss":
		s.in.Feeds.EPSSAt, s.in.Feeds.EPSS = at, map[string]float64{}
		for _, pair := range split(rest) {
			id, p, _ := strings.Cut(pair, " ")
			s.in.Feeds.EPSS[id] = s.number(p)
		}
	default:
		s.fatal("what is %q?", kind)
	}
}

func split(clauses string) []string {
	var all []string
	for c := range strings.SplitSeq(clauses, ",") {
		if c = strings.TrimSpace(c); c != "" {
			all = append(all, c)
		}
	}
	return all
}

func (s *scenario) number(text string) float64 {
	f, err := strconv.ParseFloat(text, 64)
	if err != nil {
		s.fatal("%v", err)
	}
	return f
}

// readReport reads "NAME from SOURCE" and its clauses, or "NAME again".
func (s *scenario) readReport(at time.Time, head, clauses []string) {
	if len(head) == 2 && head[1] == "again" {
		old := s.reports[head[0]]
		old.ReceivedAt = at
		s.report = &old
	} else if len(head) == 3 && head[1] == "from" {
		s.report = &SourcedReport{
			Source: head[2], TrustPolicy: head[2], ReceivedAt: at, Match: Strong, Hash: head[0],
			Report: &report.Report{Format: report.Trivy, Scanner: "trivy", ScannedAt: at, Packages: 100},
		}
	} else {
		s.fatal("a report is from somebody, or comes again")
	}
	r := s.report
	for _, clause := range clauses {
		word, rest, _ := strings.Cut(clause, " ")
		switch word {
		case "scanned":
			if rest == "never" {
				r.Report.ScannedAt = time.Time{}
				r.Report.Flaws = append(r.Report.Flaws, report.FlawNoTime)
			} else {
				r.Report.ScannedAt = s.time(rest)
			}
		case "db":
			r.Report.DBAt = s.time(rest)
		case "verified":
			r.VerifiedAt = s.time(rest)
		case "packages":
			r.Report.Packages = int(s.number(rest))
		case "flaw":
			r.Report.Flaws = append(r.Report.Flaws, report.Flaw(rest))
		case "weak":
			r.Match = Weak
		case "unmatched":
			r.Match = ""
		case "unsigned":
			r.TrustPolicy = ""
		case "as":
			r.Source = rest
		case "by":
			r.Report.Scanner = rest
		case "about":
			r.Report.Subject.Config = digest(rest)
		case "rewritten":
			r.Hash += "'"
		case "refused":
			s.refuse = rest
		default:
			s.fatal("what is %q of a report?", clause)
		}
	}
}

// endReport takes in the report that was being read, as the server would: it replaces the one of its
// source if it may, and what it found is remembered.
func (s *scenario) endReport() {
	s.t.Helper()
	if s.report == nil {
		return
	}
	r, refuse := *s.report, s.refuse
	s.report, s.refuse = nil, ""
	s.reports[r.Hash] = r
	slices.SortStableFunc(r.Report.Findings, func(a, b report.Finding) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), strings.Compare(a.Package, b.Package))
	})
	place := slices.IndexFunc(s.in.Reports, func(o SourcedReport) bool { return sameSource(&o, &r) })
	if place >= 0 {
		err := Replaces(s.in.Reports[place], r)
		if want := refusals[refuse]; !errors.Is(err, want) || (want == nil) != (err == nil) {
			s.fail("the report %s: %v, want %q", r.Hash, err, refuse)
		}
		if err != nil {
			return
		}
		s.in.Reports[place] = r
	} else {
		if refuse != "" {
			s.fail("there is nothing to refuse it for")
		}
		s.in.Reports = append(s.in.Reports, r)
	}
	for _, f := range r.Report.Findings {
		if s.seen[f.ID].IsZero() {
			s.seen[f.ID] = r.ReceivedAt
		}
	}
}

// exception reads "NAME by APPROVER until TIME: clauses".
func (s *scenario) exception(at time.Time, head []string, rest string) {
	if len(head) < 1 {
		s.fatal("the exception has no name")
	}
	e := Exception{ID: head[0], CreatedAt: at}
	for i := 1; i+1 < len(head); i++ {
		switch head[i] {
		case "by":
			e.Approver = head[i+1]
		case "until":
			e.Expires = s.time(head[i+1] + " " + head[i+2])
		}
	}
	clauses, reason, _ := strings.Cut(rest, "because ")
	e.Reason = reason
	for _, clause := range split(clauses) {
		word, rest, _ := strings.Cut(clause, " ")
		switch word {
		case "for":
			e.Digest = digest(rest)
		case "in":
			e.Package = rest
		case "policy":
			e.Policy = rest
		default:
			e.Vulnerability = clause
		}
	}
	s.in.Exceptions = append(s.in.Exceptions, e)
}

// detail reads an indented line: a finding, a statement, or what is expected of a verdict.
func (s *scenario) detail(line string) {
	s.t.Helper()
	switch {
	case s.report != nil:
		s.finding(line)
	case s.vex != nil:
		s.statement(line)
	case s.verdict != nil || s.facts != nil:
		s.expect(line)
	default:
		s.fatal("%q belongs to nothing", line)
	}
}

// words are the severities in a scenario.
var severities = map[string]report.Severity{
	"critical": report.Critical, "high": report.High, "medium": report.Medium, "low": report.Low,
	"negligible": report.Negligible, "unknown": report.Unknown,
}

func (s *scenario) finding(line string) {
	clauses := split(line)
	head := strings.Fields(clauses[0]) // CVE-1 in package severity
	if len(head) != 4 || head[1] != "in" {
		s.fatal("a finding is: ID in PACKAGE SEVERITY")
	}
	severity, ok := severities[head[3]]
	if !ok {
		s.fatal("%q is no severity", head[3])
	}
	f := report.Finding{ID: head[0], Package: head[2], Severity: severity, EPSS: -1}
	for _, clause := range clauses[1:] {
		word, rest, _ := strings.Cut(clause, " ")
		switch word {
		case "fixed":
			f.Fixed = true
		case "kev":
			f.KEV = true
		case "epss":
			f.EPSS = s.number(rest)
		case "also":
			f.Aliases = append(f.Aliases, rest)
		case "suppressed":
			f.Suppressed = rest
		default:
			s.fatal("what is %q of a finding?", clause)
		}
	}
	slices.Sort(f.Aliases)
	s.report.Report.Findings = append(s.report.Report.Findings, f)
}

func (s *scenario) statement(line string) {
	clauses := split(line)
	head := strings.Fields(clauses[0]) // CVE-1 status
	if len(head) != 2 {
		s.fatal("a statement is: ID STATUS")
	}
	st := report.Statement{Vulnerability: head[0], Status: head[1]}
	for _, clause := range clauses[1:] {
		word, rest, _ := strings.Cut(clause, " ")
		switch word {
		case "for":
			st.Product = digest(rest)
		case "in":
			st.Package = rest
		case "because":
			st.Justification = rest
		case "dated":
			st.Timestamp = s.time(rest)
		case "also":
			st.Aliases = append(st.Aliases, rest)
		default:
			s.fatal("what is %q of a statement?", clause)
		}
	}
	s.vex.VEX.Statements = append(s.vex.VEX.Statements, st)
}

// at decides: "TIME POLICY: STATUS, open|closed", or "TIME facts:".
func (s *scenario) at(rest string) {
	s.t.Helper()
	head, want, found := strings.Cut(rest, ": ")
	head = strings.TrimSuffix(head, ":")
	parts := strings.Fields(head)
	if len(parts) != 3 {
		s.fatal("at which time does which policy say what?")
	}
	in := s.in
	in.Now = s.time(parts[0] + " " + parts[1])
	if parts[2] == "facts" {
		s.facts = append([]string{}, Facts(DecideAll(s.policies, in)).Strings()...)
		return
	}
	i := slices.IndexFunc(s.policies, func(p *ScanPolicy) bool { return p.Name == parts[2] })
	if i < 0 || !found {
		s.fatal("there is no policy %s, or nothing is expected of it", parts[2])
	}
	in.Previous = s.verdicts[parts[2]]
	v := s.policies[i].Decide(in)
	s.verdict, s.verdicts[parts[2]] = &v, &v
	gate := "closed"
	if v.Allowed {
		gate = "open"
	}
	if got := string(v.Status) + ", " + gate; got != want {
		s.fail("got %s, want %s\n%s", got, want, Explain(v))
	}
	if broken := broken(s.policies[i], in, v); broken != "" {
		s.fail("%s\n%s", broken, Explain(v))
	}
}

// expect checks one thing that is expected of the verdict.
func (s *scenario) expect(line string) {
	s.t.Helper()
	word, rest, _ := strings.Cut(line, " ")
	have := s.facts
	if s.verdict != nil {
		have = nil
		for _, sel := range s.verdict.Selectors {
			have = append(have, sel.String())
		}
	}
	switch word {
	case "shows", "lacks":
		for sel := range strings.FieldsSeq(rest) {
			if slices.Contains(have, sel) != (word == "shows") {
				s.fail("it %s not %s: %v", word, sel, have)
			}
		}
		return
	}
	if s.verdict == nil {
		s.fatal("facts only show and lack")
	}
	switch word {
	case "because":
		if !slices.ContainsFunc(s.verdict.Reasons, func(r Reason) bool { return strings.Contains(r.Rule+": "+r.Text, rest) }) {
			s.fail("no reason says %q:\n%s", rest, Explain(*s.verdict))
		}
	case "until":
		got := "ever"
		if !s.verdict.Until.IsZero() {
			got = s.verdict.Until.Format("2006-01-02 15:04")
		}
		want := rest
		if rest != "ever" {
			want = s.time(rest).Format("2006-01-02 15:04")
		}
		if got != want {
			s.fail("it holds until %s, want %s", got, want)
		}
	case "grace":
		since, until, _ := strings.Cut(rest, " to ")
		if !s.verdict.GraceSince.Equal(s.time(since)) || !s.verdict.GraceUntil.Equal(s.time(until)) {
			s.fail("its grace is %s to %s", s.verdict.GraceSince, s.verdict.GraceUntil)
		}
	case "counts":
		var ids []string
		for _, f := range s.verdict.Effective {
			ids = append(ids, f.ID)
		}
		want := strings.Fields(rest)
		if rest == "nothing" {
			want = nil
		}
		if !slices.Equal(ids, want) {
			s.fail("%v count, want %v", ids, want)
		}
	case "would":
		if s.verdict.WouldAllow != (rest == "open") {
			s.fail("enforced, it would be the other way")
		}
	case "quarantines":
		if !s.verdict.Quarantine {
			s.fail("it does not")
		}
	case "revokes":
		if !s.verdict.Revoke {
			s.fail("it does not")
		}
	case "caps": // caps 10m 2m
		if got := length(s.verdict.TTLMax) + " " + length(s.verdict.JWTTTLMax); got != rest {
			s.fail("it caps %s, want %s", got, rest)
		}
	default:
		s.fatal("what is %q of a verdict?", word)
	}
}
