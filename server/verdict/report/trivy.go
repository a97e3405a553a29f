package report

import (
	"slices"
	"strings"
)

// trivySchema is the version of Trivy's JSON that is read.
const trivySchema = 2

// imageArtifacts are Trivy's words for what it may have looked at to say something of an image: the
// image, or its bill of materials. Old versions wrote none.
var imageArtifacts = []string{"", "container_image", "cyclonedx", "spdx"}

// notPackages are the classes of results that are not about packages.
var notPackages = []string{"config", "secret", "license", "license-file", "custom"}

// readTrivy reads Trivy's JSON. It says nothing of how it was asked: a report made with --severity or
// --ignore-unfixed looks like a complete one, and so does one whose ignore file hid findings, unless it
// was made with --show-suppressed. It has no date of the database.
func readTrivy(top []byte) (*Report, error) {
	r := &Report{Format: Trivy, Scanner: "trivy"}
	var (
		list   rows
		flaws  flawSet
		looked bool // at packages of any kind
		family string
		c      = at(top)
	)
	c.object(func(key []byte) {
		switch string(key) {
		case "SchemaVersion":
			if n, _ := c.number(); n != trivySchema {
				c.fail("schema version %v is not read, %d is", n, trivySchema)
			}
		case "Trivy":
			c.object(func(key []byte) {
				if string(key) == "Version" {
					r.Version = c.text(maxWord)
				}
			})
		case "ArtifactName":
			r.Subject.Name = c.text(maxText)
		case "ArtifactType":
			if kind := c.text(maxWord); !slices.Contains(imageArtifacts, kind) {
				c.fail("%q is not a container image", kind)
			}
		case "CreatedAt":
			r.ScannedAt = c.time()
		case "Metadata":
			family = trivyMetadata(c, &r.Subject, &flaws)
		case "Results":
			c.array(func() {
				packages, ok := trivyResult(c, &list)
				r.Packages += packages
				looked = looked || ok
			})
		}
	})
	if c.err != nil {
		return nil, c.err
	}
	flaws.add(FlawNoTime, r.ScannedAt.IsZero())
	flaws.add(FlawUnknownOS, family == "" || family == "none")
	flaws.add(FlawNoPackages, !looked)
	r.Findings, r.Flaws = list.merge(), flaws.sorted()
	return r, nil
}

// trivyMetadata reads what the report says of the image and answers the family of its system.
func trivyMetadata(c *cursor, s *Subject, flaws *flawSet) (family string) {
	c.object(func(key []byte) {
		switch string(key) {
		case "OS":
			c.object(func(key []byte) {
				switch string(key) {
				case "Family":
					family = strings.ToLower(c.text(maxWord))
				case "EOSL":
					flaws.add(FlawEOSL, c.is())
				}
			})
		case "ImageID":
			s.Config = c.digest()
		case "RepoDigests":
			s.Manifests = repoDigests(c, s.Manifests)
		case "ImageConfig":
			var os, arch, variant string
			c.object(func(key []byte) {
				switch string(key) {
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
	})
	return family
}

// repoDigests reads an array of references by digest and adds the digests.
func repoDigests(c *cursor, all []string) []string {
	c.array(func() {
		d, err := digestOfRef(c.text(maxText))
		c.failWith(err)
		all, err = addDigest(all, d)
		c.failWith(err)
	})
	return all
}

// trivyResult reads one result: how many packages it lists, and whether it is about packages. Trivy
// lists the packages only if asked; that the result is there says that it looked.
func trivyResult(c *cursor, list *rows) (packages int, looked bool) {
	var class, kind string
	c.object(func(key []byte) {
		switch string(key) {
		case "Class":
			class = c.text(maxWord)
		case "Type":
			kind = c.text(maxWord)
		case "Packages":
			c.array(func() { packages++ })
		case "Vulnerabilities":
			c.array(func() { c.failWith(list.add(trivyFinding(c))) })
		case "ExperimentalModifiedFindings", "ModifiedFindings":
			c.array(func() { trivyModified(c, list) })
		}
	})
	// Before version 0.20 or so there was no class, and then a type is a kind of packages.
	looked = class == "os-pkgs" || class == "lang-pkgs" || class == "" && kind != "" && !slices.Contains(notPackages, kind)
	return packages, looked
}

func trivyFinding(c *cursor) Finding {
	f := Finding{EPSS: -1}
	var name, version, purl, fixed, status string
	c.object(func(key []byte) {
		switch string(key) {
		case "VulnerabilityID":
			f.ID = c.text(maxWord)
		case "VendorIDs":
			f.Aliases = c.texts(maxWord)
		case "PkgName":
			name = c.text(maxText)
		case "InstalledVersion":
			version = c.text(maxWord)
		case "PkgIdentifier":
			c.object(func(key []byte) {
				if string(key) == "PURL" {
					purl = c.text(maxText)
				}
			})
		case "FixedVersion":
			fixed = c.text(maxWord)
		case "Status":
			status = c.text(maxWord)
		case "Severity":
			f.Severity = severity(c.text(maxWord))
		}
	})
	f.Package = packageName(purl, name, version)
	f.Fixed = fixed != "" || status == "fixed"
	return f
}

// trivyModified reads a finding that an ignore file or a VEX document took out of the result.
func trivyModified(c *cursor, list *rows) {
	var kind, status, text, source string
	var f Finding
	c.object(func(key []byte) {
		switch string(key) {
		case "Type":
			kind = c.text(maxWord)
		case "Status":
			status = c.text(maxWord)
		case "Statement":
			text = c.text(maxText)
		case "Source":
			source = c.text(maxText)
		case "Finding":
			f = trivyFinding(c)
		}
	})
	if c.err != nil || kind != "" && kind != "vulnerability" {
		return
	}
	f.Suppressed = suppression(status, text, source)
	c.failWith(list.add(f))
}

// suppression says why a finding was left out: what it was called, why, and who said so.
func suppression(status, reason, source string) string {
	if status == "" {
		status = "suppressed"
	}
	if reason != "" {
		status += ": " + reason
	}
	if source != "" {
		status += " (" + source + ")"
	}
	return clean(status, maxText)
}
