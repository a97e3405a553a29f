// Package report reads what scanners and analysts say about an image and reduces it to one form: a
// Report of findings, or VEX statements. It knows nothing of policy, trust or storage.
//
// Scanners disagree in words, in what they call the image and in what they leave out, and some leave
// out silently. So a reader never guesses: what a format does not say stays unknown in the Report,
// what makes a report unfit to clear an image is in its Flaws, and the policy decides.
package report

import (
	"time"
)

// Format names what a document was read as.
type Format string

// The formats that are read.
const (
	Trivy         Format = "trivy"
	Grype         Format = "grype"
	CycloneDX     Format = "cyclonedx"
	OpenVEX       Format = "openvex"
	SARIF         Format = "sarif"
	TrivyOperator Format = "trivy-operator"
	CosignVuln    Format = "cosign-vuln" // in-toto predicate https://cosign.sigstore.dev/attestation/vuln/v1
	VulnsV01      Format = "vulns-v0.1"  // in-toto predicate https://in-toto.io/attestation/vulns/v0.1
	VulnsV02      Format = "vulns-v0.2"  // in-toto predicate https://in-toto.io/attestation/vulns/v0.2
)

// Severity is a finding's normalised severity. Higher is worse.
type Severity int

// Severities in order. Unknown sorts lowest only as a number: the policy says what it counts as.
const (
	Unknown Severity = iota
	Negligible
	Low
	Medium
	High
	Critical
)

// Subject is what a report says it is about. Digests are "sha256:" and 64 lower-case hex digits; all
// that the document names are kept, none is believed to be the same image as another.
type Subject struct {
	// Config is the image config digest (the image ID), empty if not stated.
	Config string
	// Manifests are platform manifest or index digests, in no order: the document does not say which
	// is which.
	Manifests []string
	// Platform is os/arch or os/arch/variant, empty if not stated.
	Platform string
	// Name is for people. It never matches anything.
	Name string
}

// Finding is one vulnerability in one package.
type Finding struct {
	// ID is the identifier the report leads with, upper-cased: CVE-…, GHSA-…, ….
	ID string
	// Aliases are other identifiers of the same vulnerability, sorted.
	Aliases []string
	// Package is the package's purl where the report gives one, else "name@version".
	Package  string
	Severity Severity
	// Fixed says that a version with a fix is known.
	Fixed bool
	// KEV says that the report itself lists it as known exploited. EPSS is the report's own
	// probability from 0 to 1, negative if it gives none.
	KEV  bool
	EPSS float64
	// Suppressed says why the scanner left the finding out of its result ("not_affected: …"), empty
	// if it did not. Whether that counts is the policy's to say.
	Suppressed string
}

// Flaw is a reason why a report may not say everything.
type Flaw string

// The flaws that readers find.
const (
	// FlawFiltered: the scanner was told to leave findings out (Grype's only-fixed, ignore rules).
	FlawFiltered Flaw = "filtered"
	// FlawNoPackages: no operating system or language package was looked at.
	FlawNoPackages Flaw = "no-packages"
	// FlawEOSL: the operating system is past its end of support, so that its feed is silent.
	FlawEOSL Flaw = "end-of-support"
	// FlawUnknownOS: the operating system was not recognised.
	FlawUnknownOS Flaw = "unknown-os"
	// FlawNoTime: the document does not say when the scan was made.
	FlawNoTime Flaw = "no-time"
	// FlawImportOnly: the format is not fit to clear an image (SARIF).
	FlawImportOnly Flaw = "import-only"
)

// Report is one scan of one image, reduced to what a policy can ask about.
type Report struct {
	Format  Format
	Scanner string // name, for example "trivy"
	Version string // of the scanner, empty if not stated
	Subject Subject
	// ScannedAt is the earliest time the document gives for the scan itself, zero if it gives none.
	ScannedAt time.Time
	// DBAt is the age of the vulnerability database, zero if not stated.
	DBAt time.Time
	// Findings are sorted by ID, then package.
	Findings []Finding
	// Packages is how many packages the report says were looked at, 0 if it does not say.
	Packages int
	Flaws    []Flaw
}

// VEX is a document of statements on whether vulnerabilities matter to products.
type VEX struct {
	Format     Format
	ID         string
	Author     string
	Timestamp  time.Time
	Version    int
	Statements []Statement
}

// Statement says how one vulnerability stands to one product.
type Statement struct {
	// Vulnerability and Aliases are upper-cased identifiers.
	Vulnerability string
	Aliases       []string
	// Product is "sha256:…" where the statement names an image by digest, else empty; Package is a
	// purl below it (subcomponent), empty for the whole product.
	Product string
	Package string
	// Status is one of not_affected, affected, fixed, under_investigation (OpenVEX's words;
	// CycloneDX's are mapped to them).
	Status        string
	Justification string
	Timestamp     time.Time
}
