package report

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// statementTypes are the versions of in-toto statements that are read.
var statementTypes = []string{"https://in-toto.io/Statement/v0.1", "https://in-toto.io/Statement/v1"}

// predicates are the predicate types that are read. One whose name ends in / is the beginning of the
// types of several versions.
var predicates = []struct {
	uri    string
	format Format
	read   func(predicate []byte, d *Document) error
}{
	{"https://cosign.sigstore.dev/attestation/vuln/v1", CosignVuln, readCosignVuln},
	{"https://in-toto.io/attestation/vulns/v0.1", VulnsV01, readVulns},
	{"https://in-toto.io/attestation/vulns/v0.2", VulnsV02, readVulns},
	{"https://slsa.dev/provenance/v0.2", SLSAV02, readSLSA02},
	{"https://slsa.dev/provenance/v1", SLSAV1, readSLSA1},
	{"https://sigstore.dev/cosign/sign/v1", CosignSign, func([]byte, *Document) error { return nil }},
	{"https://openvex.dev/ns", OpenVEX, readVEXPredicate},
	{"https://openvex.dev/ns/", OpenVEX, readVEXPredicate},
	{"https://cyclonedx.org/bom", CycloneDX, readBOMPredicate},
	{"https://cyclonedx.org/bom/", CycloneDX, readBOMPredicate},
}

// statement reads a checked in-toto statement.
func statement(data []byte, top []member) (*Document, error) {
	for _, m := range marks {
		if has(top, m.key) {
			return nil, fmt.Errorf("read statement: %w: _type marks a statement and %s a %s document", ErrFormat, m.key, m.format)
		}
	}
	d, predicate, err := envelope(data)
	if err != nil {
		return nil, fmt.Errorf("read statement: %w", err)
	}
	for _, p := range predicates {
		if !isOrBegins(d.PredicateType, p.uri) {
			continue
		}
		d.Format = p.format
		if predicate == nil && p.format != CosignSign {
			return nil, fmt.Errorf("read %s statement: predicate is missing", p.format)
		}
		if err := p.read(predicate, d); err != nil {
			return nil, fmt.Errorf("read %s statement: %w", p.format, err)
		}
		return d, d.about()
	}
	var uris []string
	for _, p := range predicates {
		if !strings.HasSuffix(p.uri, "/") {
			uris = append(uris, p.uri)
		}
	}
	return nil, fmt.Errorf("read statement: %w: predicate type %q; read are %s", ErrFormat, d.PredicateType, known(uris...))
}

// isOrBegins says that s is a name, or begins with it if the name ends in /.
func isOrBegins(s, name string) bool {
	return s == name || strings.HasSuffix(name, "/") && strings.HasPrefix(s, name)
}

// envelope reads what all statements have.
func envelope(data []byte) (d *Document, predicate []byte, err error) {
	d = &Document{Statement: true}
	c, subjects := at(data), 0
	c.object(func(key []byte) {
		switch string(key) {
		case "_type":
			if s := c.text(maxText); !slices.Contains(statementTypes, s) {
				c.fail("%q is not read, %s are", s, known(statementTypes...))
			}
		case "predicateType":
			d.PredicateType = c.text(maxText)
		case "subject":
			c.array(func() {
				subjects++
				subject(c, d)
			})
		case "predicate":
			if c.kind() == '{' {
				predicate = c.raw()
			}
		}
	})
	if c.err == nil && subjects == 0 {
		c.fail("the statement is about nothing: subject is empty")
	}
	return d, predicate, c.err
}

// subject reads one subject's SHA-256 digest.
func subject(c *cursor, d *Document) {
	c.object(func(key []byte) {
		if string(key) != "digest" {
			return
		}
		c.object(func(key []byte) {
			if string(key) != "sha256" {
				return
			}
			dig, err := digest("sha256:" + c.text(maxText))
			c.failWith(err)
			d.Subjects, err = addDigest(d.Subjects, dig)
			c.failWith(err)
		})
	})
}

// about lets the parts of the document know what the statement is about.
func (d *Document) about() error {
	if d.Provenance != nil {
		d.Provenance.PredicateType = d.PredicateType
		d.Provenance.Subjects = d.Subjects
	}
	if d.Report == nil {
		return nil
	}
	s := &d.Report.Subject
	for _, dig := range d.Subjects {
		if dig == s.Config {
			continue
		}
		var err error
		if s.Manifests, err = addDigest(s.Manifests, dig); err != nil {
			return fmt.Errorf("read %s statement: %w", d.Format, err)
		}
	}
	return nil
}

func readVEXPredicate(predicate []byte, d *Document) error {
	inner, err := readOpenVEX(predicate, d.Subjects)
	if err != nil {
		return err
	}
	d.VEX = inner.VEX
	return nil
}

func readBOMPredicate(predicate []byte, d *Document) error {
	inner, err := readCycloneDX(predicate)
	if err != nil {
		return err
	}
	d.Report, d.VEX = inner.Report, inner.VEX
	return nil
}

// members are the members of an object that has been checked as part of another document.
func members(value []byte) (all []member) {
	c := at(value)
	c.object(func(key []byte) { all = append(all, member{key: string(key), value: c.raw()}) })
	return all
}

// earliest is the earlier of two times, of which one or both may be missing.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// scan is what predicates on scans say of the scan itself.
type scan struct {
	uri, version      string
	db, started, done time.Time
	result            []byte
}

func readScan(predicate []byte) (scan, error) {
	var s scan
	c, there := at(predicate), false
	c.object(func(key []byte) {
		switch string(key) {
		case "scanner":
			there = c.object(func(key []byte) {
				switch string(key) {
				case "uri":
					s.uri = c.text(maxText)
				case "version":
					s.version = c.text(maxWord)
				case "db":
					c.object(func(key []byte) {
						if string(key) == "lastUpdate" {
							s.db = c.time()
						}
					})
				case "result":
					if c.kind() != 'n' {
						s.result = c.raw()
					}
				}
			})
		case "metadata":
			c.object(func(key []byte) {
				switch string(key) {
				case "scanStartedOn":
					s.started = c.time()
				case "scanFinishedOn":
					s.done = c.time()
				}
			})
		}
	})
	if c.err == nil && !there {
		c.fail("scanner is missing")
	}
	return s, c.err
}

// readCosignVuln reads the report inside as what it is. Trivy writes the time of writing into the
// metadata, so that converting an old report makes it look new: the report's own time counts if it is
// earlier.
func readCosignVuln(predicate []byte, d *Document) error {
	s, err := readScan(predicate)
	if err != nil {
		return err
	}
	if s.result == nil {
		return fmt.Errorf("scanner.result is missing")
	}
	inner, err := plain(s.result, members(s.result))
	if err != nil {
		return fmt.Errorf("scanner.result: %w", err)
	}
	if inner.Report == nil {
		return fmt.Errorf("scanner.result: %s, and not a scan", inner.Format)
	}
	r := inner.Report
	done := s.done
	if done.IsZero() {
		done = s.started
	}
	r.ScannedAt = earliest(done, r.ScannedAt)
	r.DBAt = earliest(s.db, r.DBAt)
	r.Flaws = withoutNoTime(r.Flaws, r.ScannedAt)
	if r.Scanner == "" {
		r.Scanner = scannerName(s.uri)
	}
	if r.Version == "" {
		r.Version = s.version
	}
	d.Report, d.VEX = r, inner.VEX
	return nil
}

// withoutNoTime drops FlawNoTime where a time has been found outside of the report.
func withoutNoTime(flaws []Flaw, at time.Time) []Flaw {
	var rest []Flaw
	for _, f := range flaws {
		if f != FlawNoTime || at.IsZero() {
			rest = append(rest, f)
		}
	}
	return rest
}
