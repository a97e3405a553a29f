package report

import (
	"slices"
	"strconv"
	"strings"
)

// sarifVersion is the version of SARIF that is read.
const sarifVersion = "2.1.0"

// sarifRule is what is kept of a rule.
type sarifRule struct {
	severity Severity
	other    bool // not about a vulnerability
}

// readSARIF reads SARIF as Trivy and Grype write it, to be looked at: what is in it of packages and
// fixes is in sentences, Grype does not say which image it was, and nobody says when. FlawImportOnly
// is always among its flaws.
func readSARIF(top []byte) (*Report, error) {
	r := &Report{Format: SARIF}
	var list rows
	var version string
	flaws := flawSet{FlawImportOnly}
	c := at(top)
	c.object(func(key []byte) {
		switch string(key) {
		case "version":
			version = c.text(maxWord)
		case "runs":
			c.array(func() { sarifRun(c, r, &list) })
		}
	})
	if c.err == nil && version != sarifVersion {
		c.fail("version %q is not read, %s is", version, sarifVersion)
	}
	if c.err != nil {
		return nil, c.err
	}
	flaws.add(FlawNoTime, r.ScannedAt.IsZero())
	flaws.add(FlawNoPackages, len(list.all) == 0)
	r.Findings, r.Flaws = list.merge(), flaws.sorted()
	return r, nil
}

// sarifResult is a result until the rules of its run are known.
type sarifResult struct {
	rule, suppressed string
	name, version    string // of the package
	fixed            bool
	index            int
}

func sarifRun(c *cursor, r *Report, list *rows) {
	rules, byIndex := map[string]sarifRule{}, []sarifRule(nil)
	var results []sarifResult
	c.object(func(key []byte) {
		switch string(key) {
		case "tool":
			c.object(func(key []byte) {
				if string(key) == "driver" {
					byIndex = sarifDriver(c, r, rules)
				}
			})
		case "properties":
			sarifProperties(c, &r.Subject)
		case "invocations":
			c.array(func() {
				c.object(func(key []byte) {
					if string(key) == "startTimeUtc" {
						if t := c.time(); r.ScannedAt.IsZero() || t.Before(r.ScannedAt) {
							r.ScannedAt = t
						}
					}
				})
			})
		case "results":
			c.array(func() {
				res, counts := sarifRead(c)
				if results = append(results, res); !counts {
					results = results[:len(results)-1]
				}
				if len(results) > MaxFindings {
					c.fail("%w: more than %d results", ErrTooLarge, MaxFindings)
				}
			})
		}
	})
	for _, res := range results {
		rule, ok := rules[res.rule]
		if !ok && res.index >= 0 && res.index < len(byIndex) {
			rule = byIndex[res.index]
		}
		if rule.other {
			continue
		}
		c.failWith(list.add(sarifFinding(res, rule)))
	}
}

func sarifDriver(c *cursor, r *Report, rules map[string]sarifRule) (byIndex []sarifRule) {
	c.object(func(key []byte) {
		switch string(key) {
		case "name":
			r.Scanner = strings.ToLower(c.text(maxWord))
		case "version":
			r.Version = c.text(maxWord)
		case "rules":
			c.array(func() {
				id, rule := sarifReadRule(c)
				rules[id] = rule
				if byIndex = append(byIndex, rule); len(byIndex) > MaxFindings {
					c.fail("%w: more than %d rules", ErrTooLarge, MaxFindings)
				}
			})
		}
	})
	return byIndex
}

func sarifReadRule(c *cursor) (id string, rule sarifRule) {
	var score string
	c.object(func(key []byte) {
		switch string(key) {
		case "id":
			id = c.text(maxText)
		case "properties":
			c.object(func(key []byte) {
				switch string(key) {
				case "tags":
					for _, tag := range c.texts(maxWord) {
						rule.severity = max(rule.severity, severity(tag))
						rule.other = rule.other || slices.Contains([]string{"secret", "misconfiguration", "license"}, tag)
					}
				case "security-severity":
					score, _ = c.scalar(maxWord)
				}
			})
		}
	})
	if n, err := strconv.ParseFloat(score, 64); err == nil && rule.severity == Unknown {
		rule.severity = severityOfCVSS(n)
	}
	return id, rule
}

// sarifProperties reads what Trivy says of the image.
func sarifProperties(c *cursor, s *Subject) {
	c.object(func(key []byte) {
		switch string(key) {
		case "imageID":
			s.Config = c.digest()
		case "imageName":
			s.Name = c.text(maxText)
		case "repoDigests":
			s.Manifests = repoDigests(c, s.Manifests)
		}
	})
}

// sarifRead reads a result and says whether it is about something found.
func sarifRead(c *cursor) (res sarifResult, counts bool) {
	res.index, counts = -1, true
	c.object(func(key []byte) {
		switch string(key) {
		case "ruleId":
			res.rule = c.text(maxText)
		case "ruleIndex":
			if n, ok := c.number(); ok && n >= 0 && n < MaxFindings {
				res.index = int(n)
			}
		case "kind":
			kind := c.text(maxWord)
			counts = kind != "pass" && kind != "notApplicable"
		case "message":
			c.object(func(key []byte) {
				if string(key) == "text" && c.kind() == '"' {
					res.lines(string(c.bytes()))
				}
			})
		case "suppressions":
			c.array(func() {
				c.object(func(key []byte) {
					if string(key) == "justification" {
						res.suppressed = suppression("", c.text(maxText), "")
					}
				})
				if res.suppressed == "" {
					res.suppressed = suppression("", "", "")
				}
			})
		}
	})
	return res, counts
}

// lines reads the text that Trivy writes, a line for each thing it knows.
func (res *sarifResult) lines(text string) {
	for line := range strings.Lines(text) {
		label, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch label {
		case "Package":
			res.name = clean(value, maxText)
		case "Installed Version":
			res.version = clean(value, maxWord)
		case "Fixed Version":
			res.fixed = value != ""
		}
	}
}

// sarifFinding takes a result apart: in Grype's the rule has the package after the identifier.
func sarifFinding(res sarifResult, rule sarifRule) Finding {
	f := Finding{ID: res.rule, Severity: rule.severity, Fixed: res.fixed, Suppressed: res.suppressed, EPSS: -1}
	if id := leadingID.FindString(res.rule); id != "" {
		f.ID, f.Package = id, strings.TrimPrefix(strings.TrimPrefix(res.rule, id), "-")
	}
	if res.name != "" {
		f.Package = packageName("", res.name, res.version)
	}
	return f
}
