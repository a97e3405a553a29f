// Package policy holds the scan policies an operator writes and the one pure function from evidence to
// verdict: ScanPolicy.Decide.
//
// The way through it:
//
//	Block   what stands in scan_policy "name" { … }; sample.hcl beside this file documents each key
//	New     checks a block, says everything that is wrong with it, and gives a ScanPolicy
//	Decide  (reports, VEX, exceptions, feeds, time) → Verdict, with the selectors and the reasons
//	Facts   the selectors of one image from its verdicts under every policy
//
// Which reports count (evidence.go), what they say together (rows.go), what is taken off again
// (clear.go) and what is left to say (tokens.go) each have a file. Replaces says which report may take
// the place of another, BlastGuard when a withdrawal is too large to be believed, Explain tells a
// verdict to a person. The folder testdata holds the rules as scenarios to be read.
//
// Why it is so: a verdict takes identities away, so it must be possible to ask later why, and to ask
// before what a new policy would do. Both are the same call with other arguments, because nothing here
// reads a clock, a file or a map in whatever order. The time is looked at in one place only, clock, which
// notes every instant that was still to come when it was asked for: the earliest of them is Until, and up
// to it the whole computation runs along the same path.
package policy

import (
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/verdict/report"
)

// Status is what a policy says of an image.
type Status string

// The statuses. Exactly one is true of an image under a policy, and it is the last part of the selector
// scan:status:<policy>:<status>.
const (
	// Pass: sound and fresh evidence, and no finding breaks a rule.
	Pass Status = "pass"
	// Grace: a rule is broken, or evidence is wanting, for less long than the policy lets it be.
	Grace Status = "grace"
	// Fail: a finding breaks a rule and its grace, if any, is over.
	Fail Status = "fail"
	// Stale: there were enough sound sources, and they are too old; or a feed a rule needs is.
	Stale Status = "stale"
	// Missing: there is no report that could clear the image.
	Missing Status = "missing"
	// Error: what there is cannot be relied on (filtered, no packages, from the future, …).
	Error Status = "error"
	// Exempt: the policy is off, or an operator's exception is for the image as a whole.
	Exempt Status = "exempt"
)

// Mode says what comes of a verdict.
type Mode string

// The modes.
const (
	// Enforce: the gate scan:policy:<name> is open exactly when the verdict allows it.
	Enforce Mode = "enforce"
	// Audit: the gate is open and the status selector says pass, whatever the verdict; the Verdict
	// holds what it would have been.
	Audit Mode = "audit"
	// Off: nothing is judged and the gate is open. (A policy that is not there at all has no gate,
	// so entries that ask for it stay closed.)
	Off Mode = "off"
)

// OnFail says how an identity is taken away where the gate is closed.
type OnFail string

// The ways to take an identity away.
const (
	Withdraw   OnFail = "withdraw"
	Quarantine OnFail = "quarantine"
	Revoke     OnFail = "withdraw+revoke"
)

// Limits on time that a policy cannot change.
const (
	// Skew is how far in the future a time may lie and still be believed.
	Skew = 5 * time.Minute
)

// ScanPolicy is a checked scan policy. New makes it; it is not changed afterwards, so that any number of
// goroutines may decide with it.
type ScanPolicy struct {
	Name string
	Mode Mode
	// Sources are the trust policies that may feed this one; MinSources of them must have a fresh and
	// sound report for an image to pass.
	Sources    []string
	MinSources int
	// AllowUnsigned lets reports count that no trust policy vouches for, by their source's name.
	AllowUnsigned bool
	// MaxAge and MaxDBAge are how old a report and the database behind it may be.
	MaxAge, MaxDBAge time.Duration
	// RequireDBTime makes a report without the time of its database unsound.
	RequireDBTime bool
	// FeedMaxAge is how old the KEV and EPSS feeds may be and still clear a finding.
	FeedMaxAge time.Duration
	// Fail are the rules; a finding that fits any of them breaks the policy.
	Fail []FailRule
	// UnknownAs is what a finding without a severity counts as.
	UnknownAs report.Severity
	// OnMissing, OnStale and OnError say what holds where evidence is wanting.
	OnMissing, OnStale, OnError Otherwise
	// Grace is how long after it was first seen a finding of each severity may break a rule.
	Grace [report.Critical + 1]time.Duration
	VEX   VEXRule
	// TrustScannerSuppressions leaves out what the scanner itself left out.
	TrustScannerSuppressions bool
	// AllowEmpty lets a report clear an image in which it found no packages or no known system.
	AllowEmpty bool
	// AllowIndexMatch lets a report count that is bound to the image by an index and a platform only.
	AllowIndexMatch bool
	OnFail          OnFail
	// Blast holds back withdrawals that are too large; the zero value holds nothing back.
	Blast BlastGuard
	// SVIDTTLMax and JWTTTLMax cap the lifetimes of identities behind the gate.
	SVIDTTLMax, JWTTTLMax time.Duration
	// ExceptionMaxAge is how long after it was made an exception counts, whatever it says itself.
	ExceptionMaxAge time.Duration
	// EPSSBelow are the thresholds of scan:epss-below, ascending.
	EPSSBelow []float64

	words words
}

// FailRule is one fail block: a finding breaks it if all that is asked for is so.
type FailRule struct {
	// Severity is the least severity that breaks the rule, Unknown for any.
	Severity report.Severity
	// OnlyFixed asks for findings with a known fix, KEV for those known to be exploited.
	OnlyFixed, KEV bool
	// EPSS is the least probability that breaks the rule, 0 for any.
	EPSS float64
}

// Action is what holds where evidence is wanting.
type Action string

// The actions.
const (
	Deny       Action = "deny"
	Allow      Action = "allow"
	GraceFirst Action = "grace"
)

// Otherwise says what holds where evidence is wanting: Deny, Allow, or Allow for a while and then Deny.
type Otherwise struct {
	Action Action
	For    time.Duration
}

// VEXRule says whose VEX statements take findings off.
type VEXRule struct {
	// Trust are the names of trust policies; empty means nobody's.
	Trust []string
	// Accept are the statuses that take a finding off.
	Accept []string
	// RequireJustification refuses not_affected without a justification.
	RequireJustification bool
	// MaxAge is how long a statement counts.
	MaxAge time.Duration
	// AnyImage accepts statements that name a package but no image.
	AnyImage bool
}

// Match says how a report was bound to the image. Whether it is, and how, verdict decides by the digests that were
// proved to lead to the image.
type Match string

// The matches. Any other value is none.
const (
	// Strong: by config digest, or by a manifest that is proved to be of this config.
	Strong Match = "strong"
	// Weak: by an index that leads to this image, with the platform stated.
	Weak Match = "weak"
)

// SourcedReport is a report with what the server knows about how it came.
type SourcedReport struct {
	// Source is the name under which reports of this image replace one another.
	Source string
	// TrustPolicy is the trust policy under which the report or its bringer was verified, empty if
	// none. It is never taken from the report.
	TrustPolicy string
	Report      *report.Report
	// ReceivedAt is when the server took it, VerifiedAt the verified time of its signature, zero if
	// there is none.
	ReceivedAt, VerifiedAt time.Time
	Match                  Match
	// Hash names the report's bytes, for example "sha256:…": in reasons, and to know it again.
	Hash string
	// Index may hold NewIndex(Report), so that it need not be made for each decision.
	Index *Index
}

// TrustedVEX is a VEX document with what the server knows about how it came.
type TrustedVEX struct {
	// TrustPolicy is the trust policy under which it was verified, empty if none.
	TrustPolicy            string
	VEX                    *report.VEX
	ReceivedAt, VerifiedAt time.Time
	// Index may hold NewVEXIndex(VEX), so that it need not be made for each decision.
	Index *VEXIndex
}

// Feeds are what the world says of vulnerabilities by their CVE number, in upper case. The times are of
// the feeds' contents, zero if there never was any; keep the last ones when a refresh goes wrong.
type Feeds struct {
	KEV    map[string]bool
	KEVAt  time.Time
	EPSS   map[string]float64
	EPSSAt time.Time
}

// Input is everything that Decide knows.
type Input struct {
	// Digest is the image config digest, "sha256:…"; empty if it could not be found out.
	Digest string
	// Linked are the manifest and index digests that are proved to lead to it.
	Linked []string
	Now    time.Time
	// SeenAt is when this image was first seen to run: the start of on_missing's grace.
	SeenAt  time.Time
	Reports []SourcedReport
	VEX     []TrustedVEX
	// Exceptions may be all there are: those that are for something else do not count.
	Exceptions []Exception
	Feeds      Feeds
	// FirstSeen returns when a vulnerability was first seen in this image, from durable memory, or
	// zero. It must give the same answer each time within one decision.
	FirstSeen func(id string) time.Time
	// Previous is the verdict in force under the same policy, nil if none. Decide takes from it only
	// since when evidence has been in error, so that a new error does not start a new grace.
	Previous *Verdict
}

// Verdict is what a policy says of an image. It says the same from Now until Until.
type Verdict struct {
	Policy, Digest string
	Mode           Mode
	Status         Status
	// Allowed says that the gate scan:policy:<name> is open; WouldAllow that it would be if the mode
	// were enforce.
	Allowed, WouldAllow bool
	// Evidence is Pass if reports and feeds are sound and fresh enough to clear the image, else
	// Stale, Missing or Error, and EvidenceSince says since when, zero if that is not known. It is
	// Exempt if the policy is off, which does not look.
	Evidence      Status
	EvidenceSince time.Time
	// GraceSince and GraceUntil are the bounds of the grace that ends first, for alerts at parts of
	// it; zero if there is none.
	GraceSince, GraceUntil time.Time
	// Reasons say what decided, the gravest first. They are bounded; the last one says how many were
	// left out.
	Reasons []Reason
	// Until is the next instant at which the answer may change by time alone; zero if never.
	Until time.Time
	// Selectors are sorted. Facts joins those of several policies.
	Selectors []attestor.Selector
	// TTLMax and JWTTTLMax cap lifetimes behind the gate; zero if the policy is off.
	TTLMax, JWTTTLMax time.Duration
	// Quarantine and Revoke say what to do, besides, with an identity whose gate is closed.
	Quarantine, Revoke bool
	// Effective are the findings that are left after VEX, exceptions and suppressions, with what the
	// feeds add, by package and then by identifier. The slice may be shared: it must not be changed.
	Effective []report.Finding
}

// Reason is one thing that decided.
type Reason struct {
	// Rule is the policy's key, for example "fail" or "on_stale".
	Rule string
	// Finding is the vulnerability's identifier, empty if it is not about one.
	Finding string
	// Report is the hash of the report it rests on, or its source's name; empty if it rests on none.
	Report string
	// Text is a sentence without its full stop.
	Text string
}

// clock is how a decision looks at the time. It only answers whether an instant has come, and keeps the
// earliest that has not: until then every answer stays the same, and with them all that follows.
type clock struct{ now, next time.Time }

// reached reports whether t has come. The instant itself counts as reached.
func (c *clock) reached(t time.Time) bool {
	if !t.After(c.now) {
		return true
	}
	if c.next.IsZero() || t.Before(c.next) {
		c.next = t
	}
	return false
}

// earliest returns the earliest of the times that are not zero, or zero.
func earliest(times ...time.Time) time.Time {
	var min time.Time
	for _, t := range times {
		if !t.IsZero() && (min.IsZero() || t.Before(min)) {
			min = t
		}
	}
	return min
}
