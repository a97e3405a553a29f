package report

import (
	"strconv"
	"strings"
)

// readVulns reads the in-toto predicate vulns, v0.1 or v0.2. The text of v0.1 puts a finding under
// "vulnerability", its own example does not and neither does v0.2: both forms are read in both.
//
// The format names no packages, no fixes and no operating system. An empty list of results means that
// the scanner found nothing, the text says; a missing one means nothing.
func readVulns(predicate []byte, d *Document) error {
	s, err := readScan(predicate)
	if err != nil {
		return err
	}
	r := &Report{
		Format: d.Format, Scanner: scannerName(s.uri), Version: s.version,
		ScannedAt: s.done, DBAt: s.db,
	}
	if r.ScannedAt.IsZero() {
		r.ScannedAt = s.started
	}
	var list rows
	if s.result != nil {
		c := at(s.result)
		c.array(func() { c.failWith(list.add(vulnsFinding(c))) })
		if c.err != nil {
			return c.err
		}
	}
	var flaws flawSet
	flaws.add(FlawNoTime, r.ScannedAt.IsZero())
	flaws.add(FlawNoPackages, s.result == nil)
	r.Findings, r.Flaws = list.merge(), flaws.sorted()
	d.Report = r
	return nil
}

// vulnsFinding reads a result in either form.
func vulnsFinding(c *cursor) Finding {
	f := Finding{EPSS: -1}
	var read func(key []byte)
	read = func(key []byte) {
		switch string(key) {
		case "vulnerability":
			c.object(read)
		case "id":
			id := c.text(maxWord)
			if f.ID != "" && id != f.ID {
				c.fail("two identifiers, %q and %q", f.ID, id)
			}
			f.ID = id
		case "severity":
			if c.kind() == '{' {
				vulnsSeverity(c, &f)
				return
			}
			c.array(func() { vulnsSeverity(c, &f) })
		}
	}
	c.object(read)
	return f
}

// vulnsSeverity reads one method's score, a word or a number as text. Which method should count the
// format does not say, so that the worst does. A number counts only where the method's name says that
// it is a CVSS base score.
func vulnsSeverity(c *cursor, f *Finding) {
	var method, score string
	c.object(func(key []byte) {
		switch string(key) {
		case "method":
			method = strings.ToLower(c.text(maxWord))
		case "score":
			score, _ = c.scalar(maxWord)
		}
	})
	n, err := strconv.ParseFloat(score, 64)
	switch {
	case err != nil:
		f.Severity = max(f.Severity, severity(score))
	case strings.Contains(method, "epss"):
		if n >= 0 && n <= 1 {
			f.EPSS = max(f.EPSS, n)
		}
	case strings.Contains(method, "cvss") || strings.Contains(method, "nvd"):
		f.Severity = max(f.Severity, severityOfCVSS(n))
	}
}
