package report

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// openVEXContexts are the versions of OpenVEX that are read, by their @context. The first two are the
// same text at different times; in them products are texts and a vulnerability is a text.
var openVEXContexts = []string{"https://openvex.dev/ns", "https://openvex.dev/ns/v0.0.1", "https://openvex.dev/ns/v0.2.0"}

var (
	vexStatuses       = []string{"not_affected", "affected", "fixed", "under_investigation"}
	vexJustifications = []string{
		"", "component_not_present", "vulnerable_code_not_present", "vulnerable_code_not_in_execute_path",
		"vulnerable_code_cannot_be_controlled_by_adversary", "inline_mitigations_already_exist",
	}
)

var errNoProduct = fmt.Errorf("no statement names an image by digest or a package by its purl; names and tags say nothing")

// product is what a statement is about: an image, a package in an image, or a package anywhere.
type product struct{ image, pkg string }

// put adds a statement about each product, or counts it as skipped if there is none.
func (v *VEX) put(s Statement, products ...product) error {
	if len(products) == 0 {
		v.Skipped++
		return nil
	}
	for _, p := range products {
		if len(v.Statements) == MaxFindings {
			return fmt.Errorf("%w: more than %d statements", ErrTooLarge, MaxFindings)
		}
		s.Product, s.Package = p.image, p.pkg
		v.Statements = append(v.Statements, s)
	}
	return nil
}

// aliases brings the other names of a vulnerability into order.
func aliases(id string, names []string) ([]string, error) {
	if len(names) > maxAliases {
		return nil, fmt.Errorf("%s has more than %d aliases", id, maxAliases)
	}
	var all []string
	for _, n := range names {
		if n = vulnerabilityID(n); n != "" && n != id {
			all = append(all, n)
		}
	}
	return distinct(all), nil
}

// readOpenVEX reads an OpenVEX document. subjects are those of the in-toto statement around it, which
// a statement without products is about (OpenVEX, "Encapsulating Format").
func readOpenVEX(top []byte, subjects []string) (*Document, error) {
	v := &VEX{Format: OpenVEX}
	x := &openVEX{subjects: subjects}
	var updated time.Time
	c := at(top)
	c.object(func(key []byte) {
		switch string(key) {
		case "@context":
			if s := c.text(maxText); !slices.Contains(openVEXContexts, s) {
				c.fail("%q is not read, %s are", s, known(openVEXContexts...))
			}
		case "@id":
			v.ID = c.text(maxText)
		case "author":
			v.Author = c.text(maxText)
		case "timestamp":
			v.Timestamp = c.time()
		case "last_updated":
			updated = c.time()
		case "version":
			v.Version = vexVersion(c)
		case "statements":
			c.array(func() { x.statement(c) })
		}
	})
	if c.err != nil {
		return nil, c.err
	}
	for _, p := range x.all {
		if p.s.Timestamp.IsZero() {
			p.s.Timestamp = v.Timestamp
		}
		if err := v.put(p.s, p.products...); err != nil {
			return nil, err
		}
	}
	if updated.After(v.Timestamp) {
		v.Timestamp = updated
	}
	if len(v.Statements) == 0 {
		return nil, errNoProduct
	}
	return &Document{Format: OpenVEX, VEX: v}, nil
}

// vexVersion reads the document's version, a number that old documents wrote as text.
func vexVersion(c *cursor) int {
	s, ok := c.scalar(maxWord)
	if !ok {
		return 0
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		c.fail("%q is not a version", s)
	}
	return n
}

// openVEX is a document while it is read.
type openVEX struct {
	subjects []string
	all      []vexPending
	count    int // of components and of what is said about them
}

// vexPending is a statement until the time of its document is known.
type vexPending struct {
	s        Statement
	products []product
}

// kept counts what stays in memory until the document is read.
func (x *openVEX) kept(c *cursor, n int) {
	if x.count += n; x.count > MaxFindings {
		c.fail("%w: more than %d statements, products and subcomponents", ErrTooLarge, MaxFindings)
	}
}

func (x *openVEX) statement(c *cursor) {
	var (
		s        Statement
		names    []string
		products []vexComponent
		below    []string // subcomponents of the whole statement, as old documents had them
		given    bool
	)
	c.object(func(key []byte) {
		switch string(key) {
		case "vulnerability":
			s.Vulnerability, names = vexVulnerability(c)
		case "timestamp":
			s.Timestamp = c.time()
		case "status":
			if s.Status = c.text(maxWord); !slices.Contains(vexStatuses, s.Status) {
				c.fail("%q is not a status, %s are", s.Status, known(vexStatuses...))
			}
		case "justification":
			if s.Justification = c.text(maxWord); !slices.Contains(vexJustifications, s.Justification) {
				c.fail("%q is not a justification, %s are", s.Justification, known(vexJustifications[1:]...))
			}
		case "products":
			given = c.array(func() { products = append(products, x.component(c)) })
		case "subcomponents":
			c.array(func() { below = append(below, x.component(c).purl) })
		}
	})
	if x.kept(c, 1); c.err != nil {
		return
	}
	switch {
	case s.Vulnerability == "":
		c.fail("a statement names no vulnerability")
	case s.Status == "":
		c.fail("the statement on %s has no status", s.Vulnerability)
	}
	var err error
	s.Aliases, err = aliases(s.Vulnerability, names)
	c.failWith(err)
	if !given || len(products) == 0 {
		for _, d := range x.subjects {
			products = append(products, vexComponent{image: d})
		}
	}
	var about []product
	for _, p := range products {
		if len(below) > 0 {
			p.below = below
		}
		if x.kept(c, max(1, len(p.below))); c.err != nil {
			return
		}
		about = append(about, p.products()...)
	}
	x.all = append(x.all, vexPending{s, about})
}

// vexVulnerability reads an identifier with its aliases, or a bare identifier.
func vexVulnerability(c *cursor) (id string, names []string) {
	if c.kind() == '"' {
		return vulnerabilityID(c.text(maxWord)), nil
	}
	iri := ""
	c.object(func(key []byte) {
		switch string(key) {
		case "@id":
			iri = c.text(maxText)
		case "name":
			id = vulnerabilityID(c.text(maxWord))
		case "aliases":
			names = c.texts(maxWord)
		}
	})
	if id == "" { // some writers put the name here only
		id = vulnerabilityID(clean(iri[strings.LastIndexByte(iri, '/')+1:], maxWord))
	}
	return id, names
}

// vexComponent is a product, or a part of one.
type vexComponent struct {
	purl  string // a package's, not an image's
	image string // digest of an image
	below []string
}

// component reads a component as an object, or as the text that old documents had.
func (x *openVEX) component(c *cursor) vexComponent {
	x.kept(c, 1)
	if c.kind() == '"' {
		p, err := vexName(c.text(maxText))
		c.failWith(err)
		return p
	}
	var (
		id, purl, hash string
		below          []string
	)
	c.object(func(key []byte) {
		switch string(key) {
		case "@id":
			id = c.text(maxText)
		case "identifiers":
			c.object(func(key []byte) {
				if string(key) == "purl" {
					purl = c.text(maxText)
				}
			})
		case "hashes":
			c.object(func(key []byte) {
				if string(key) == "sha-256" {
					hash = c.text(maxText)
				}
			})
		case "subcomponents":
			c.array(func() { below = append(below, x.component(c).purl) })
		}
	})
	// Both names may be given; either may be the one with the digest.
	p, err := vexName(purl)
	c.failWith(err)
	other, err := vexName(id)
	c.failWith(err)
	switch {
	case p.image != "" && other.image != "" && p.image != other.image:
		c.fail("a product with two digests, %s and %s", p.image, other.image)
	case p.image != "" || other.image != "":
		p = vexComponent{image: cmp.Or(p.image, other.image)}
	case isImagePurl(purl) || isImagePurl(id):
		p = vexComponent{}
	default:
		p.purl = cmp.Or(p.purl, other.purl)
	}
	if p.image == "" && p.purl == "" && hash != "" {
		p.image, err = digest("sha256:" + strings.ToLower(hash))
		c.failWith(err)
	}
	p.below = below
	return p
}

// vexName reads the name of a component: the purl of an image or a package, or a reference by digest.
func vexName(s string) (p vexComponent, err error) {
	switch {
	case isImagePurl(s):
		p.image, err = digestOfPurl(s)
	case purlType(s) != "":
		p.purl = s
	case digestRE.MatchString(s):
		p.image = s
	case strings.Contains(s, "@sha256:"):
		p.image, err = digestOfRef(s)
	}
	return p, err
}

// products are what a statement about p is about. A part of a product that is known by its name only
// would become that part of everything: it is left out.
func (p vexComponent) products() []product {
	if len(p.below) == 0 {
		switch {
		case p.image != "":
			return []product{{image: p.image}}
		case p.purl != "":
			return []product{{pkg: p.purl}}
		}
		return nil
	}
	if p.image == "" {
		return nil
	}
	var all []product
	for _, pkg := range p.below {
		if pkg != "" {
			all = append(all, product{image: p.image, pkg: pkg})
		}
	}
	return all
}
