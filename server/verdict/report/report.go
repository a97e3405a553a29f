// Package report reads what scanners and analysts say about an image and reduces it to one form: a
// Report of findings, or VEX statements. It knows nothing of policy, trust or storage.
//
// Scanners disagree in words, in what they call the image and in what they leave out, and some leave
// out silently. So a reader never guesses: what a format does not say stays unknown in the Report,
// what makes a report unfit to clear an image is in its Flaws, and the policy decides.
package report

import (
	"errors"
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
	SLSAV02       Format = "slsa-v0.2"   // in-toto predicate https://slsa.dev/provenance/v0.2
	SLSAV1        Format = "slsa-v1"     // in-toto predicate https://slsa.dev/provenance/v1
	CosignSign    Format = "cosign-sign" // in-toto predicate https://sigstore.dev/cosign/sign/v1: a signature, nothing more
)

// Errors of Parse and ParseStatement that a caller acts on. All others say what is wrong with the
// document and mean that it is refused.
var (
	// ErrTooLarge: over one of the limits, MaxSize or MaxFindings.
	ErrTooLarge = errors.New("document too large")
	// ErrFormat: none of the formats that are read.
	ErrFormat = errors.New("document of no known format")
	// ErrEnvelope: a signed envelope (DSSE, Sigstore bundle). What it holds is read by ParseStatement
	// after its signature has been verified, never before.
	ErrEnvelope = errors.New("signed envelope")
)

// Document is what one document says. Which of its parts are there depends on the format: a scan fills
// Report, a VEX document VEX, provenance Provenance, a signature only Subjects. A CycloneDX bill of
// materials with analyses fills Report and VEX; whether its author may make VEX statements is for trust
// to decide.
type Document struct {
	// Format is what the document was read as: the predicate's for an in-toto statement, while
	// Report.Format is that of the scanner's report in it.
	Format Format
	// Statement says that the document is an in-toto statement.
	Statement bool
	// PredicateType is the statement's, empty if the document is not one.
	PredicateType string
	// Subjects are the SHA-256 digests that the statement is about, "sha256:…", sorted. They are also among the
	// manifests of Report.Subject. Subjects with digests of other algorithms only are left out: no image
	// is known by them.
	Subjects   []string
	Report     *Report
	VEX        *VEX
	Provenance *Provenance
}

// Provenance is what a SLSA statement says of how its subjects were built. It is the builder's word:
// worth as much as the signature over the statement.
type Provenance struct {
	PredicateType string
	// BuilderID is builder.id, BuildType the URI that gives the parameters their meaning.
	BuilderID, BuildType string
	// SourceURI is the repository that was built, without "git+", without "@ref" or "#ref" and without
	// credentials; SourceCommit its revision in lower-case hex, Ref the branch or tag ("refs/heads/main"),
	// Entrypoint the file or job that says how (".github/workflows/release.yml"). For a build type that is
	// not known they come from the dependencies, if exactly one of these is a git repository, else they
	// are empty.
	SourceURI, SourceCommit, Ref, Entrypoint string
	// InvocationID is the builder's name for the run.
	InvocationID string
	// StartedOn and FinishedOn are the build's, zero if not stated.
	StartedOn, FinishedOn time.Time
	// Subjects are the statement's.
	Subjects []string
	// Fields are single values of the predicate by their path ("buildDefinition.internalParameters.
	// github.event_name"), of known build types only. Variables, build arguments and environments are
	// left out, for they may hold secrets, except for what GitHub itself sets.
	Fields map[string]string
}

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
	// Manifests are platform manifest or index digests, sorted: the document does not say which is
	// which, and where several formats do, others mean the opposite by the same field.
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
	// FlawImportOnly: the document is not fit to clear an image: SARIF; or a CycloneDX bill of materials
	// without a single vulnerability, which looks the same whether anybody scanned or not.
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
	// Skipped is how many statements named neither an image by digest nor a package: a name or a tag
	// says nothing here, and without it the statement would speak of every image.
	Skipped int
}

// Statement says how one vulnerability stands to one product.
type Statement struct {
	// Vulnerability and Aliases are upper-cased identifiers.
	Vulnerability string
	Aliases       []string
	// Product is "sha256:…" where the statement names an image by digest, else empty; Package is a
	// purl below it (subcomponent), empty for the whole product. Where Product is empty the statement is
	// about Package wherever it is. One of the two is always there.
	Product string
	Package string
	// Status is one of not_affected, affected, fixed, under_investigation (OpenVEX's words;
	// CycloneDX's are mapped to them).
	Status        string
	Justification string
	Timestamp     time.Time
}
