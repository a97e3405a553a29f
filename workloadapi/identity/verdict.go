package identity

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/wire/feedv1"
)

// Selector types that only a server's verdict on an image can vouch for. An entry with a selector of
// one of them is gated; what an attestor says of these types on its own is nobody's to believe.
const (
	ScanType = "scan"
	SigType  = "sig"
	ProvType = "prov"
)

// The type and the beginnings of the values of the selectors that name a container's image by its config
// digest, image:id:sha256:…, and by the digest of its manifest, image:manifest:sha256:….
const (
	imageType     = "image"
	imageID       = "id:"
	imageManifest = "manifest:"
)

// Gating reports whether the selector is one that only a verdict can vouch for.
func Gating(s attestor.Selector) bool {
	return s.Type == ScanType || s.Type == SigType || s.Type == ProvType
}

// Gated reports whether the entry demands a verdict on the image.
func (e *Entry) Gated() bool { return slices.ContainsFunc(e.Selectors.All(), Gating) }

// Gates returns those of the entry's selectors that only a verdict can vouch for.
func (e *Entry) Gates() attestor.Set { return filter(e.Selectors, Gating) }

// Ungated returns the selectors of the set that anybody but a verdict vouches for.
func Ungated(set attestor.Set) attestor.Set {
	return filter(set, func(s attestor.Selector) bool { return !Gating(s) })
}

func filter(set attestor.Set, keep func(attestor.Selector) bool) attestor.Set {
	all := set.All()
	if !slices.ContainsFunc(all, func(s attestor.Selector) bool { return !keep(s) }) {
		return set
	}
	var kept []attestor.Selector
	for _, s := range all {
		if keep(s) {
			kept = append(kept, s)
		}
	}
	return attestor.NewSet(kept...)
}

// Digests returns the config digests of the images that the set names, in order.
func Digests(set attestor.Set) []string { return imagesBy(imageID, set) }

// Running returns the digests by which a server is asked for its verdicts on the images that the facts
// of a workload name, in order: the config digests, or the manifests' where there are none. Engines that
// keep images by manifest do not say the config digest, and only a server can prove which it is.
func Running(facts attestor.Set) []string {
	if digests := Digests(facts); len(digests) > 0 {
		return digests
	}
	return imagesBy(imageManifest, facts)
}

func imagesBy(prefix string, set attestor.Set) []string {
	var digests []string
	for _, s := range set.All() {
		if s.Type != imageType {
			continue
		}
		if digest, ok := strings.CutPrefix(s.Value, prefix); ok && ValidDigest(digest) {
			digests = append(digests, digest)
		}
	}
	return digests
}

// ValidDigest reports whether the text is "sha256:" and 64 lower-case hexadecimal digits.
func ValidDigest(text string) bool {
	hex, ok := strings.CutPrefix(text, "sha256:")
	return ok && len(hex) == 64 && strings.Trim(hex, "0123456789abcdef") == ""
}

// Limits of a verdict that came from outside.
const (
	maxVerdictPolicies = 100
	maxVerdictText     = 1024 // bytes
)

// Verdict is what a server decided of an image, as an agent holds it. It is immutable.
type Verdict struct {
	// Digest is the image's config digest, or that of its manifest; see Running.
	Digest string
	// Seq grows with each change.
	Seq uint64
	// Selectors are what containers of the image show besides what the agent finds out.
	Selectors attestor.Set
	NotAfter  time.Time // whole seconds; from then on it does not count; zero: never
	Policies  []PolicyVerdict
}

// PolicyVerdict is what one policy says of an image, for people.
type PolicyVerdict struct {
	Policy  string // its name in the server's file
	Status  string // as in the selector scan:status:<policy>:<status>
	Summary string // why, in a sentence; may be empty
}

// Expired reports whether the verdict has ended to count.
func (v *Verdict) Expired(now time.Time) bool {
	return !v.NotAfter.IsZero() && !now.Before(v.NotAfter)
}

// VerdictFromWire parses a verdict. Selectors that verdicts have no say in are refused.
func VerdictFromWire(w *feedv1.Verdict) (*Verdict, error) {
	if w == nil {
		return nil, errors.New("missing verdict")
	}
	v := &Verdict{Digest: w.GetDigest(), Seq: w.GetSequenceNumber()}
	if !ValidDigest(v.Digest) {
		return nil, errors.New("invalid verdict: digest is not sha256: and 64 hexadecimal digits")
	}
	var err error
	if v.Selectors, err = SelectorsFromWire(w.GetSelectors()); err != nil {
		return nil, err
	}
	for _, s := range v.Selectors.All() {
		if !Gating(s) {
			return nil, fmt.Errorf("invalid verdict: selector type %q is none of scan, sig and prov", s.Type)
		}
	}
	if v.NotAfter, err = unixTime(w.GetNotAfter()); err != nil {
		return nil, fmt.Errorf("invalid verdict: end: %w", err)
	}
	if n := len(w.GetPolicies()); n > maxVerdictPolicies {
		return nil, fmt.Errorf("invalid verdict: %d policies, the limit is %d", n, maxVerdictPolicies)
	}
	for _, p := range w.GetPolicies() {
		if len(p.GetPolicy()) > maxVerdictText || len(p.GetStatus()) > maxVerdictText || len(p.GetSummary()) > maxVerdictText {
			return nil, fmt.Errorf("invalid verdict: a text is longer than %d bytes", maxVerdictText)
		}
		v.Policies = append(v.Policies, PolicyVerdict{Policy: p.GetPolicy(), Status: p.GetStatus(), Summary: p.GetSummary()})
	}
	return v, nil
}

// Wire returns the verdict as the feed carries it.
func (v *Verdict) Wire() *feedv1.Verdict {
	w := &feedv1.Verdict{
		Digest: v.Digest, SequenceNumber: v.Seq, Selectors: SelectorsWire(v.Selectors), NotAfter: unixSeconds(v.NotAfter),
	}
	for _, p := range v.Policies {
		w.Policies = append(w.Policies, &feedv1.PolicyVerdict{Policy: p.Policy, Status: p.Status, Summary: p.Summary})
	}
	return w
}

// Asked is what an agent has something signed for: an entry, at the revision that it knows, on the strength of
// the verdicts that it holds.
type Asked struct {
	EntryID  string
	Revision int64         // the entry's
	Verdicts []HeldVerdict // on images by which somebody here may have it; none for an entry that demands none
}

// HeldVerdict is what a checksum covers of a verdict.
type HeldVerdict struct {
	Digest string // of the image
	Seq    uint64 // the verdict's
}

// ChecksumVerdicts returns the Checksum of what an agent holds that also holds verdicts, from that of
// the rest. Without verdicts the two are the same. The verdicts are sorted by digest.
func ChecksumVerdicts(rest []byte, verdicts []HeldVerdict) []byte {
	if len(verdicts) == 0 {
		return rest
	}
	h := sha256.New()
	h.Write([]byte("verdicts"))
	h.Write(rest)
	var number [8]byte
	for _, v := range verdicts {
		h.Write([]byte(v.Digest)) // all of one length
		h.Write(binary.BigEndian.AppendUint64(number[:0], v.Seq))
	}
	return h.Sum(nil)
}
