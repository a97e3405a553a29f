package report

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// cyclonedxVersions are the versions of the specification that are read; before 1.4 there were no
// vulnerabilities in it.
var cyclonedxVersions = []string{"1.4", "1.5", "1.6", "1.7"}

// trivyProperty is how Trivy begins the names of its properties.
const trivyProperty = "aquasecurity:trivy:"

// cdxComponent is what is kept of a component.
type cdxComponent struct {
	kind, ref, name, version, purl string
	config                         string   // image ID, where Trivy states it
	manifests                      []string // digests in the properties, the purl and the version
}

// cdxVulnerability is what is kept of a vulnerability until all components are known.
type cdxVulnerability struct {
	id       string
	aliases  []string
	severity Severity
	fixed    bool
	refs     []string // of affected components
	// The analysis, empty where there is none.
	state, justification, detail string
	at                           time.Time
}

// cyclonedx is a document while it is read.
type cyclonedx struct {
	report     *Report
	vex        *VEX
	root       *cdxComponent            // metadata.component, nil if not there
	components map[string]*cdxComponent // by bom-ref
	packages   int
	count      int  // of all components and references, which are kept until the end
	system     bool // an operating system is among the components
	vulns      []cdxVulnerability
	flaws      flawSet
}

// readCycloneDX reads a bill of materials with vulnerabilities, or a VEX document, or both in one.
//
// A bill of materials whose list of vulnerabilities is empty looks the same whether a scanner found
// nothing or nobody scanned (Trivy writes an empty list when it was not asked to scan), so that it
// cannot clear an image; one without the list is refused.
func readCycloneDX(top []byte) (*Document, error) {
	x := &cyclonedx{
		report:     &Report{Format: CycloneDX},
		vex:        &VEX{Format: CycloneDX},
		components: map[string]*cdxComponent{},
	}
	c, listed, version := at(top), false, ""
	c.object(func(key []byte) {
		switch string(key) {
		case "bomFormat":
			if s := c.text(maxWord); s != "CycloneDX" {
				c.fail("%q is not CycloneDX", s)
			}
		case "specVersion":
			version = c.text(maxWord)
		case "serialNumber":
			x.vex.ID = c.text(maxText)
		case "version":
			if n, ok := c.number(); ok {
				x.vex.Version = int(min(max(n, 0), 1<<30))
			}
		case "metadata":
			x.metadata(c)
		case "components":
			c.array(func() { x.component(c) })
		case "vulnerabilities":
			listed = c.array(func() { x.vulnerability(c) })
		}
	})
	if c.err == nil && !slices.Contains(cyclonedxVersions, version) {
		c.fail("version %q is not read, %s are", version, known(cyclonedxVersions...))
	}
	if c.err == nil && !listed {
		c.fail("no list of vulnerabilities: this is an inventory, not a scan")
	}
	if c.err != nil {
		return nil, c.err
	}
	return x.document()
}

func (x *cyclonedx) metadata(c *cursor) {
	var maker, supplier string
	c.object(func(key []byte) {
		switch string(key) {
		case "timestamp":
			x.report.ScannedAt = c.time()
			x.vex.Timestamp = x.report.ScannedAt
		case "tools":
			if c.kind() == '[' { // until 1.4
				c.array(func() { x.tool(c) })
				return
			}
			c.object(func(key []byte) {
				if string(key) == "components" {
					c.array(func() { x.tool(c) })
				}
			})
		case "authors":
			c.array(func() {
				if name := nameOf(c); x.vex.Author == "" {
					x.vex.Author = name
				}
			})
		case "manufacturer":
			maker = nameOf(c)
		case "supplier":
			supplier = nameOf(c)
		case "component":
			root := cdxRead(c, nil)
			x.root = &root
			x.remember(x.root)
		}
	})
	x.vex.Author = cmp.Or(x.vex.Author, maker, supplier)
}

// tool reads the first tool as the scanner.
func (x *cyclonedx) tool(c *cursor) {
	var name, version string
	c.object(func(key []byte) {
		switch string(key) {
		case "name":
			name = strings.ToLower(c.text(maxWord))
		case "version":
			version = c.text(maxWord)
		}
	})
	if x.report.Scanner == "" {
		x.report.Scanner, x.report.Version = name, version
	}
}

// nameOf is the name of the person or organisation at the cursor.
func nameOf(c *cursor) (name string) {
	c.object(func(key []byte) {
		if string(key) == "name" {
			name = c.text(maxText)
		}
	})
	return name
}

func (x *cyclonedx) remember(comp *cdxComponent) {
	if comp.ref != "" {
		x.components[comp.ref] = comp
	}
}

// kept counts what has to stay in memory until the whole document is read.
func (x *cyclonedx) kept(c *cursor) {
	if x.count++; x.count > MaxFindings {
		c.fail("%w: more than %d components and references to them", ErrTooLarge, MaxFindings)
	}
}

// component reads a component and those in it.
func (x *cyclonedx) component(c *cursor) {
	comp := cdxRead(c, func() { x.component(c) })
	x.remember(&comp)
	x.kept(c)
	switch comp.kind {
	case "operating-system":
		x.system = true
	case "library", "framework", "application":
		if comp.purl != "" {
			x.packages++
		}
	}
}

// cdxRead reads a component; inner reads each component in it and may be nil.
func cdxRead(c *cursor, inner func()) (comp cdxComponent) {
	c.object(func(key []byte) {
		switch string(key) {
		case "type":
			comp.kind = c.text(maxWord)
		case "bom-ref":
			comp.ref = c.text(maxText)
		case "name":
			comp.name = c.text(maxText)
		case "version":
			comp.version = c.text(maxWord)
		case "purl":
			comp.purl = c.text(maxText)
		case "properties":
			c.array(func() { cdxProperty(c, &comp) })
		case "components":
			if inner != nil {
				c.array(inner)
			}
		}
	})
	// Only an image has digests of an image. Syft writes the manifest's as the version.
	var d string
	var err error
	switch {
	case isImagePurl(comp.purl):
		d, err = digestOfPurl(comp.purl)
	case comp.kind == "container" && strings.HasPrefix(comp.version, "sha256:"):
		d, err = digest(comp.version)
	}
	c.failWith(err)
	comp.manifests, err = addDigest(comp.manifests, d)
	c.failWith(err)
	return comp
}

func cdxProperty(c *cursor, comp *cdxComponent) {
	var name, value string
	c.object(func(key []byte) {
		switch string(key) {
		case "name":
			name = c.text(maxWord)
		case "value":
			value = c.text(maxText)
		}
	})
	if c.err != nil || value == "" {
		return
	}
	var d string
	var err error
	switch name {
	case trivyProperty + "ImageID":
		// Which of two would be the image is not for us to say.
		if comp.config != "" && comp.config != value {
			err = fmt.Errorf("two different image IDs")
			break
		}
		comp.config, err = digest(value)
	case trivyProperty + "RepoDigest":
		if d, err = digestOfRef(value); err == nil {
			comp.manifests, err = addDigest(comp.manifests, d)
		}
	}
	c.failWith(err)
}

func (x *cyclonedx) vulnerability(c *cursor) {
	var v cdxVulnerability
	c.object(func(key []byte) {
		switch string(key) {
		case "id":
			v.id = c.text(maxWord)
		case "references":
			c.array(func() {
				c.object(func(key []byte) {
					if string(key) == "id" {
						v.aliases = append(v.aliases, c.text(maxWord))
						x.kept(c)
					}
				})
			})
		case "ratings":
			// Several parties rate; which of them the reader should believe the format does not say.
			c.array(func() { v.severity = max(v.severity, cdxRating(c)) })
		case "recommendation":
			// The one sentence that means a version with a fix, Trivy's; others may advise anything.
			v.fixed = v.fixed || strings.HasPrefix(c.text(maxText), "Upgrade ")
		case "analysis":
			v.analysis(c)
		case "affects":
			c.array(func() {
				v.affects(c)
				x.kept(c)
			})
		}
	})
	if c.err == nil && vulnerabilityID(v.id) == "" {
		c.fail("a vulnerability has no id")
	}
	if x.vulns = append(x.vulns, v); len(x.vulns) > MaxFindings {
		c.fail("%w: more than %d vulnerabilities", ErrTooLarge, MaxFindings)
	}
}

func cdxRating(c *cursor) Severity {
	var word, method string
	score := -1.0
	c.object(func(key []byte) {
		switch string(key) {
		case "severity":
			word = c.text(maxWord)
		case "method":
			method = c.text(maxWord)
		case "score":
			if n, ok := c.number(); ok {
				score = n
			}
		}
	})
	if word == "" && strings.HasPrefix(method, "CVSS") {
		return severityOfCVSS(score)
	}
	return severity(word)
}

func (v *cdxVulnerability) affects(c *cursor) {
	ref, unaffected := "", false
	c.object(func(key []byte) {
		switch string(key) {
		case "ref":
			ref = c.text(maxText)
		case "versions":
			c.array(func() {
				c.object(func(key []byte) {
					if string(key) == "status" {
						unaffected = c.text(maxWord) == "unaffected" || unaffected
					}
				})
			})
		}
	})
	v.refs = append(v.refs, ref)
	v.fixed = v.fixed || unaffected
}

func (v *cdxVulnerability) analysis(c *cursor) {
	c.object(func(key []byte) {
		switch string(key) {
		case "state":
			v.state = c.text(maxWord)
			if _, ok := cdxStates[v.state]; v.state != "" && !ok {
				c.fail("%q is not a state of analysis", v.state)
			}
		case "justification":
			v.justification = c.text(maxWord)
		case "detail":
			v.detail = c.text(maxText)
		case "firstIssued":
			if t := c.time(); v.at.IsZero() {
				v.at = t
			}
		case "lastUpdated":
			if t := c.time(); !t.IsZero() {
				v.at = t
			}
		}
	})
}

// cdxStates are CycloneDX's words in OpenVEX's.
var cdxStates = map[string]string{
	"not_affected":           "not_affected",
	"false_positive":         "not_affected",
	"resolved":               "fixed",
	"resolved_with_pedigree": "fixed",
	"exploitable":            "affected",
	"in_triage":              "under_investigation",
}

// document makes of what was read what it says.
func (x *cyclonedx) document() (*Document, error) {
	d := &Document{Format: CycloneDX}
	analysed := 0
	for _, v := range x.vulns {
		if v.state != "" {
			analysed++
		}
	}
	if analysed > 0 {
		if err := x.statements(); err != nil {
			return nil, err
		}
		d.VEX = x.vex
		if analysed == len(x.vulns) && x.packages == 0 {
			if len(d.VEX.Statements) == 0 {
				return nil, errNoProduct
			}
			return d, nil // a VEX document: it found nothing, it comments
		}
	}
	var list rows
	for _, v := range x.vulns {
		f := Finding{ID: v.id, Aliases: v.aliases, Severity: v.severity, Fixed: v.fixed, EPSS: -1}
		if s := cdxStates[v.state]; s == "not_affected" || s == "fixed" {
			f.Suppressed = suppression(v.state, strings.Trim(v.justification+" "+v.detail, " "), "")
		}
		if len(v.refs) == 0 {
			v.refs = []string{""}
		}
		for _, ref := range v.refs {
			f.Package = x.packageAt(ref)
			if err := list.add(f); err != nil {
				return nil, err
			}
		}
	}
	r := x.report
	if x.root != nil {
		r.Subject = Subject{Config: x.root.config, Manifests: x.root.manifests, Name: x.root.name}
	}
	r.Packages = x.packages
	x.flaws.add(FlawNoTime, r.ScannedAt.IsZero())
	x.flaws.add(FlawUnknownOS, !x.system)
	x.flaws.add(FlawNoPackages, x.packages == 0)
	x.flaws.add(FlawImportOnly, len(x.vulns) == 0)
	r.Findings, r.Flaws = list.merge(), x.flaws.sorted()
	d.Report = r
	return d, nil
}

// packageAt is the package that a reference names, in a scan.
func (x *cyclonedx) packageAt(ref string) string {
	comp, text := x.resolve(ref)
	if comp == nil {
		return text
	}
	return packageName(comp.purl, comp.name, comp.version)
}

// resolve finds the component that a reference names, in this document or, as BOM-Link
// (urn:cdx:serial/version#bom-ref), in another. Without one the answer is what the reference says.
func (x *cyclonedx) resolve(ref string) (*cdxComponent, string) {
	if ref == "" {
		return x.root, ""
	}
	if comp := x.components[ref]; comp != nil {
		return comp, ref
	}
	link, fragment, ok := strings.Cut(ref, "#")
	if !ok || !strings.HasPrefix(link, "urn:cdx:") {
		return nil, ref
	}
	if s, err := url.PathUnescape(fragment); err == nil {
		fragment = clean(s, maxText)
	}
	return x.components[fragment], fragment
}

// statements turns analyses into statements.
func (x *cyclonedx) statements() error {
	for _, v := range x.vulns {
		if v.state == "" {
			continue
		}
		s := Statement{
			Vulnerability: vulnerabilityID(v.id),
			Status:        cdxStates[v.state],
			Justification: v.justification,
			Timestamp:     v.at,
		}
		if s.Timestamp.IsZero() {
			s.Timestamp = x.vex.Timestamp
		}
		var err error
		if s.Aliases, err = aliases(s.Vulnerability, v.aliases); err != nil {
			return err
		}
		if len(v.refs) == 0 {
			v.refs = []string{""}
		}
		for _, ref := range v.refs {
			if err := x.vex.put(s, x.products(ref)...); err != nil {
				return err
			}
		}
	}
	return nil
}

// products are what a statement about ref is about, none if the document does not name it well enough:
// a package in a product that is only named is not that package everywhere.
func (x *cyclonedx) products(ref string) []product {
	comp, text := x.resolve(ref)
	if comp == nil {
		if d, err := digestOfPurl(text); err == nil && d != "" && isImagePurl(text) {
			return []product{{image: d}}
		}
		if text == ref && x.root == nil && purlType(text) != "" && !isImagePurl(text) {
			return []product{{pkg: text}}
		}
		if text != ref {
			return nil // a package of a bill of materials that is not here
		}
	}
	if comp != nil {
		if images := comp.images(""); len(images) > 0 {
			return images
		}
		text = packageName(comp.purl, comp.name, comp.version)
	}
	if x.root != nil && comp != x.root {
		return x.root.images(text)
	}
	if comp != nil && comp.kind != "container" && purlType(comp.purl) != "" && !isImagePurl(comp.purl) {
		return []product{{pkg: comp.purl}}
	}
	return nil
}

// images are the products "package in this image", none if the component is no image with a digest.
// The image ID is enough where it is known: it is the name that joins.
func (comp *cdxComponent) images(pkg string) []product {
	if comp.config != "" {
		return []product{{image: comp.config, pkg: pkg}}
	}
	var all []product
	for _, d := range comp.manifests {
		all = append(all, product{image: d, pkg: pkg})
	}
	return all
}
