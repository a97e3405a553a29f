package report

import (
	"slices"
	"strings"
	"time"
)

// maxRules is how many of the rules that left a match out are told.
const maxRules = 20

// readGrype reads Grype's JSON. It prints its own configuration, so that a filter shows, and the age of
// its database. It says neither how many packages it looked at nor, before version 0.100 or so, that a
// distribution is past its end.
func readGrype(top []byte) (*Report, error) {
	r := &Report{Format: Grype, Scanner: "grype"}
	var (
		list    rows
		flaws   flawSet
		matches bool
		distro  string
		source  string
		c       = at(top)
	)
	c.object(func(key []byte) {
		switch string(key) {
		case "matches":
			matches = c.array(func() { c.failWith(list.add(grypeMatch(c))) })
		case "ignoredMatches":
			c.array(func() { c.failWith(list.add(grypeMatch(c))) })
		case "source":
			source = grypeSource(c, &r.Subject)
		case "distro":
			c.object(func(key []byte) {
				if string(key) == "name" {
					distro = c.text(maxWord)
				}
			})
		case "descriptor":
			grypeDescriptor(c, r, &flaws)
		case "alertsByPackage":
			c.array(func() { grypeAlerts(c, &flaws) })
		}
	})
	if c.err == nil && source != "image" {
		c.fail("source %q is not an image", source)
	}
	if c.err != nil {
		return nil, c.err
	}
	flaws.add(FlawNoTime, r.ScannedAt.IsZero())
	flaws.add(FlawUnknownOS, distro == "")
	flaws.add(FlawNoPackages, !matches || len(list.all) == 0 && distro == "")
	r.Findings, r.Flaws = list.merge(), flaws.sorted()
	return r, nil
}

// grypeSource reads what was scanned and answers its kind.
func grypeSource(c *cursor, s *Subject) (kind string) {
	c.object(func(key []byte) {
		switch string(key) {
		case "type":
			kind = c.text(maxWord)
		case "target":
			if c.kind() == '{' { // a path, where the source is not an image
				grypeTarget(c, s)
			}
		}
	})
	return kind
}

func grypeTarget(c *cursor, s *Subject) {
	var os, arch, variant string
	c.object(func(key []byte) {
		switch string(key) {
		case "imageID":
			s.Config = c.digest()
		case "manifestDigest":
			var err error
			s.Manifests, err = addDigest(s.Manifests, c.digest())
			c.failWith(err)
		case "repoDigests":
			s.Manifests = repoDigests(c, s.Manifests)
		case "userInput":
			s.Name = c.text(maxText)
		case "os":
			os = c.text(maxWord)
		case "architecture":
			arch = c.text(maxWord)
		case "variant":
			variant = c.text(maxWord)
		}
	})
	s.Platform = platform(os, arch, variant)
}

// grypeMatch reads a match, ignored or not.
func grypeMatch(c *cursor) Finding {
	f := Finding{EPSS: -1}
	var name, version, purl string
	c.object(func(key []byte) {
		switch string(key) {
		case "vulnerability":
			f.ID, f.Severity, f.Fixed = grypeVulnerability(c, &f)
		case "relatedVulnerabilities":
			c.array(func() {
				if id, _, _ := grypeVulnerability(c, &f); id != "" {
					f.Aliases = append(f.Aliases, id)
				}
				if len(f.Aliases) > maxAliases {
					c.fail("more than %d related vulnerabilities", maxAliases)
				}
			})
		case "artifact":
			c.object(func(key []byte) {
				switch string(key) {
				case "name":
					name = c.text(maxText)
				case "version":
					version = c.text(maxWord)
				case "purl":
					purl = c.text(maxText)
				}
			})
		case "appliedIgnoreRules":
			var why []string
			rules := 0
			c.array(func() {
				if rules++; rules > maxRules {
					return
				}
				if text := grypeRule(c).String(); !slices.Contains(why, text) {
					why = append(why, text)
				}
			})
			f.Suppressed = clean("ignored: "+strings.Join(why, "; "), maxText)
		}
	})
	f.Package = packageName(purl, name, version)
	return f
}

// grypeVulnerability reads a vulnerability or a related one. What either knows of exploitation is the
// finding's; severity and fix are those of the one that matched.
func grypeVulnerability(c *cursor, f *Finding) (id string, sev Severity, fixed bool) {
	c.object(func(key []byte) {
		switch string(key) {
		case "id":
			id = c.text(maxWord)
		case "severity":
			sev = severity(c.text(maxWord))
		case "fix":
			c.object(func(key []byte) {
				if string(key) == "state" {
					fixed = c.text(maxWord) == "fixed"
				}
			})
		case "knownExploited":
			c.array(func() { f.KEV = true })
		case "epss":
			c.array(func() {
				c.object(func(key []byte) {
					if string(key) == "epss" {
						f.EPSS = max(f.EPSS, probability(c))
					}
				})
			})
		}
	})
	return id, sev, fixed
}

// probability reads a number from 0 to 1, -1 for null.
func probability(c *cursor) float64 {
	n, ok := c.number()
	if !ok {
		return -1
	}
	if n < 0 || n > 1 {
		c.fail("%v is not a probability", n)
	}
	return n
}

func grypeDescriptor(c *cursor, r *Report, flaws *flawSet) {
	c.object(func(key []byte) {
		switch string(key) {
		case "version":
			r.Version = c.text(maxWord)
		case "timestamp":
			r.ScannedAt = c.time()
		case "db":
			r.DBAt = grypeDB(c)
		case "configuration":
			flaws.add(FlawFiltered, grypeFiltered(c))
		}
	})
}

// grypeDB answers when the database was built; version 6 of it moved the field.
func grypeDB(c *cursor) time.Time {
	var here, below time.Time
	c.object(func(key []byte) {
		switch string(key) {
		case "built":
			here = c.time()
		case "status":
			c.object(func(key []byte) {
				if string(key) == "built" {
					below = c.time()
				}
			})
		}
	})
	return earliest(here, below)
}

// grypeFiltered reads the printed configuration and says whether it leaves findings out. VEX documents
// do too, but each statement that was used is printed with its finding.
func grypeFiltered(c *cursor) (filtered bool) {
	c.object(func(key []byte) {
		switch string(key) {
		case "only-fixed", "only-notfixed", "ignore-wontfix", "ignore-states", "exclude":
			filtered = c.given() || filtered
		case "distro": // another distribution's feed says nothing of the packages that are there
			filtered = c.given() || filtered
		case "ignore":
			c.array(func() {
				rule := grypeRule(c) // read in any case: what may stand there does not hang on what stood before
				filtered = filtered || !rule.builtIn() && !rule.fromVEX()
			})
		}
	})
	return filtered
}

// grypeIgnore is a rule that leaves matches out.
type grypeIgnore struct {
	vulnerability, reason, namespace, fixState, vexStatus, vexJustification, matchType string
	name, version, language, kind, location, upstream                                  string
}

func grypeRule(c *cursor) (g grypeIgnore) {
	c.object(func(key []byte) {
		switch string(key) {
		case "vulnerability":
			g.vulnerability = c.text(maxText)
		case "reason":
			g.reason = c.text(maxText)
		case "namespace":
			g.namespace = c.text(maxText)
		case "fix-state":
			g.fixState = c.text(maxText)
		case "vex-status":
			g.vexStatus = c.text(maxText)
		case "vex-justification":
			g.vexJustification = c.text(maxText)
		case "match-type":
			g.matchType = c.text(maxText)
		case "package":
			c.object(func(key []byte) { g.packageField(c, key) })
		}
	})
	return g
}

func (g *grypeIgnore) packageField(c *cursor, key []byte) {
	switch string(key) {
	case "name":
		g.name = c.text(maxText)
	case "version":
		g.version = c.text(maxText)
	case "language":
		g.language = c.text(maxText)
	case "type":
		g.kind = c.text(maxText)
	case "location":
		g.location = c.text(maxText)
	case "upstream-name":
		g.upstream = c.text(maxText)
	}
}

// builtIn says that the rule is one that Grype always has: headers of a kernel are not a kernel.
func (g grypeIgnore) builtIn() bool {
	names := []string{"kernel-headers", "linux-headers-.*", "linux(-.*)?-headers-.*", "linux-libc-dev", "linux-kbuild-.*"}
	upstreams := []string{"kernel", "linux", "linux.*"}
	rest := g
	rest.name, rest.kind, rest.upstream, rest.matchType, rest.reason = "", "", "", "", ""
	return rest == (grypeIgnore{}) && g.matchType == "exact-indirect-match" &&
		slices.Contains(names, g.name) && slices.Contains(upstreams, g.upstream)
}

// fromVEX says that the rule only lets a VEX statement work.
func (g grypeIgnore) fromVEX() bool {
	rest := g
	rest.vexStatus, rest.vexJustification, rest.reason = "", "", ""
	return g.vexStatus != "" && rest == (grypeIgnore{})
}

func (g grypeIgnore) String() string {
	var parts []string
	for _, p := range []struct{ label, value string }{
		{"", g.vexStatus}, {"", g.vexJustification}, {"", g.reason}, {"fix state ", g.fixState},
		{"vulnerability ", g.vulnerability}, {"namespace ", g.namespace}, {"package ", g.name}, {"at ", g.location},
	} {
		if p.value != "" {
			parts = append(parts, p.label+p.value)
		}
	}
	if len(parts) == 0 {
		return "rule"
	}
	return strings.Join(parts, ", ")
}

// grypeAlerts reads what Grype says of one package beside its matches.
func grypeAlerts(c *cursor, flaws *flawSet) {
	c.object(func(key []byte) {
		if string(key) != "alerts" {
			return
		}
		c.array(func() {
			c.object(func(key []byte) {
				if string(key) != "type" {
					return
				}
				kind := c.text(maxWord)
				flaws.add(FlawEOSL, kind == "distro-eol")
				flaws.add(FlawUnknownOS, kind == "distro-disabled" || kind == "distro-unknown")
			})
		})
	})
}
