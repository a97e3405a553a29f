package report

import "strings"

// operatorVersion and operatorKind are the resource of the Trivy operator that is read.
const (
	operatorVersion = "aquasecurity.github.io/v1alpha1"
	operatorKind    = "VulnerabilityReport"
)

// readOperator reads a VulnerabilityReport. Its digest is that of the reference in the pod, usually an
// index, and may be missing.
func readOperator(top []byte) (*Report, error) {
	r := &Report{Format: TrivyOperator, Scanner: "trivy"}
	var (
		list           rows
		flaws          flawSet
		kind           string
		listed, system bool
		family, server string
		c              = at(top)
	)
	c.object(func(key []byte) {
		switch string(key) {
		case "apiVersion":
			if s := c.text(maxWord); s != operatorVersion {
				c.fail("%q is not read, %s is", s, operatorVersion)
			}
		case "kind":
			if kind = c.text(maxWord); kind != operatorKind {
				c.fail("%q is not read, %s is", kind, operatorKind)
			}
		case "report":
			c.object(func(key []byte) {
				switch string(key) {
				case "updateTimestamp":
					r.ScannedAt = c.time()
				case "scanner":
					operatorScanner(c, r)
				case "registry":
					c.object(func(key []byte) {
						if string(key) == "server" {
							server = c.text(maxText)
						}
					})
				case "artifact":
					operatorArtifact(c, &r.Subject)
				case "os":
					system = c.object(func(key []byte) {
						switch string(key) {
						case "family":
							family = c.text(maxWord)
						case "eosl":
							flaws.add(FlawEOSL, c.is())
						}
					})
				case "vulnerabilities":
					listed = c.array(func() { c.failWith(list.add(operatorFinding(c))) })
				}
			})
		}
	})
	if c.err == nil && kind == "" {
		c.fail("kind is missing, %s is read", operatorKind)
	}
	if c.err != nil {
		return nil, c.err
	}
	r.Subject.Name = clean(strings.Trim(server+"/"+r.Subject.Name, "/"), maxText)
	unknown := family == "" || family == "none"
	flaws.add(FlawNoTime, r.ScannedAt.IsZero())
	flaws.add(FlawUnknownOS, system && unknown) // older operators do not say
	flaws.add(FlawNoPackages, !listed || len(list.all) == 0 && unknown)
	r.Findings, r.Flaws = list.merge(), flaws.sorted()
	return r, nil
}

func operatorScanner(c *cursor, r *Report) {
	c.object(func(key []byte) {
		switch string(key) {
		case "name":
			r.Scanner = strings.ToLower(c.text(maxWord))
		case "version":
			r.Version = c.text(maxWord)
		}
	})
}

func operatorArtifact(c *cursor, s *Subject) {
	c.object(func(key []byte) {
		switch string(key) {
		case "digest":
			var err error
			s.Manifests, err = addDigest(s.Manifests, c.digest())
			c.failWith(err)
		case "repository":
			s.Name = c.text(maxText)
		}
	})
}

func operatorFinding(c *cursor) Finding {
	f := Finding{EPSS: -1}
	var name, version, purl string
	c.object(func(key []byte) {
		switch string(key) {
		case "vulnerabilityID":
			f.ID = c.text(maxWord)
		case "resource":
			name = c.text(maxText)
		case "installedVersion":
			version = c.text(maxWord)
		case "fixedVersion":
			f.Fixed = c.text(maxWord) != ""
		case "severity":
			f.Severity = severity(c.text(maxWord))
		case "packagePURL":
			purl = c.text(maxText)
		}
	})
	f.Package = packageName(purl, name, version)
	return f
}
