package feed

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/feedv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Limits of a Hello.
const (
	maxHeldEntries  = 200_000
	maxHeldBundles  = 10_000
	maxStoreID      = 255
	maxVersion      = 255
	maxCapabilities = 64
	maxCapability   = 64 // bytes
	// maxRunning is how many images one agent may run, and hold verdicts on. A node has a few hundred
	// containers.
	maxRunning = 20_000
)

// verdicts is the capability of agents and servers that know of verdicts on images.
const verdicts = "verdicts"

// checkHello refuses what no honest agent says.
func checkHello(h *feedv1.Hello) error {
	tooMany := func(what string, n, limit int) error {
		return status.Errorf(codes.InvalidArgument, "invalid hello: %d %s, the limit is %d", n, what, limit)
	}
	switch {
	case len(h.GetStoreId()) > maxStoreID:
		return tooMany("bytes of store ID", len(h.GetStoreId()), maxStoreID)
	case len(h.GetEntries()) > maxHeldEntries:
		return tooMany("held entries", len(h.GetEntries()), maxHeldEntries)
	case len(h.GetBundles()) > maxHeldBundles:
		return tooMany("held bundles", len(h.GetBundles()), maxHeldBundles)
	case len(h.GetAgentVersion()) > maxVersion:
		return tooMany("bytes of version", len(h.GetAgentVersion()), maxVersion)
	case len(h.GetCapabilities()) > maxCapabilities:
		return tooMany("capabilities", len(h.GetCapabilities()), maxCapabilities)
	case len(h.GetVerdicts()) > maxRunning:
		return tooMany("held verdicts", len(h.GetVerdicts()), maxRunning)
	case len(h.GetRunning()) > maxRunning:
		return tooMany("running images", len(h.GetRunning()), maxRunning)
	}
	for _, v := range h.GetVerdicts() {
		if !identity.ValidDigest(v.GetDigest()) {
			return errDigest("hello")
		}
	}
	for _, digest := range h.GetRunning() {
		if !identity.ValidDigest(digest) {
			return errDigest("hello")
		}
	}
	for _, c := range h.GetCapabilities() {
		if len(c) > maxCapability {
			return tooMany("bytes of capability", len(c), maxCapability)
		}
	}
	for _, e := range h.GetEntries() {
		if n := len(e.GetId()); n == 0 || n > identity.MaxEntryID {
			return tooMany("bytes of entry ID", n, identity.MaxEntryID)
		}
		if e.GetRevisionNumber() < 0 || e.GetCreatedAt() < 0 {
			return status.Error(codes.InvalidArgument, "invalid hello: a held entry has a negative number")
		}
	}
	for _, b := range h.GetBundles() {
		if td, err := identity.ParseTrustDomain(b.GetTrustDomain()); err != nil || td.Name() != b.GetTrustDomain() {
			return status.Error(codes.InvalidArgument, "invalid hello: a held bundle has no trust domain's name")
		}
	}
	return nil
}

func errDigest(of string) error {
	return status.Errorf(codes.InvalidArgument, "invalid %s: an image digest is not sha256: and 64 hexadecimal digits", of)
}

// held is what an agent has of a picture: either the last picture sent to it, or, until it was sent
// one, what its Hello says.
type held struct {
	storeID string
	entries []heldEntry  // sorted by ID
	bundles []heldBundle // sorted by trust domain
	// verdicts are sorted by digest.
	verdicts []identity.HeldVerdict
}

type heldEntry struct {
	id                string
	revision, created int64
}

type heldBundle struct {
	trustDomain string
	sequence    uint64
}

// fromHello sorts what a Hello says. An ID that is there twice is an agent that has lost count.
func fromHello(h *feedv1.Hello) (*held, error) {
	if err := checkHello(h); err != nil {
		return nil, err
	}
	out := &held{
		storeID: h.GetStoreId(),
		entries: make([]heldEntry, 0, len(h.GetEntries())),
		bundles: make([]heldBundle, 0, len(h.GetBundles())),
	}
	for _, e := range h.GetEntries() {
		out.entries = append(out.entries, heldEntry{id: e.GetId(), revision: e.GetRevisionNumber(), created: e.GetCreatedAt()})
	}
	for _, b := range h.GetBundles() {
		out.bundles = append(out.bundles, heldBundle{trustDomain: b.GetTrustDomain(), sequence: b.GetSequenceNumber()})
	}
	slices.SortFunc(out.entries, func(a, b heldEntry) int { return strings.Compare(a.id, b.id) })
	slices.SortFunc(out.bundles, func(a, b heldBundle) int { return strings.Compare(a.trustDomain, b.trustDomain) })
	for i := 1; i < len(out.entries); i++ {
		if out.entries[i].id == out.entries[i-1].id {
			return nil, status.Errorf(codes.InvalidArgument, "invalid hello: entry %q is there twice", out.entries[i].id)
		}
	}
	for _, v := range h.GetVerdicts() {
		out.verdicts = append(out.verdicts, identity.HeldVerdict{Digest: v.GetDigest(), Seq: v.GetSequenceNumber()})
	}
	slices.SortFunc(out.verdicts, func(a, b identity.HeldVerdict) int { return strings.Compare(a.Digest, b.Digest) })
	for i := 1; i < len(out.verdicts); i++ {
		if out.verdicts[i].Digest == out.verdicts[i-1].Digest {
			return nil, status.Errorf(codes.InvalidArgument, "invalid hello: verdict on %s is there twice", out.verdicts[i].Digest)
		}
	}
	for i := 1; i < len(out.bundles); i++ {
		if out.bundles[i].trustDomain == out.bundles[i-1].trustDomain {
			return nil, status.Errorf(codes.InvalidArgument, "invalid hello: bundle %q is there twice", out.bundles[i].trustDomain)
		}
	}
	return out, nil
}

// update is what turns what an agent holds into a picture.
type update struct {
	full           bool
	rev            kv.Rev
	picture        *view.AgentPicture
	entries        []*identity.Entry
	removedEntries []string
	bundles        []*identity.Bundle
	removedBundles []string
	verdicts       []*records.Verdict
	removedDigests []string
	madeAt         time.Time
	// capabilities are said with the first picture of a stream.
	capabilities []string
}

// everything is the update for an agent that is to forget what it holds.
func everything(p *view.AgentPicture) *update {
	return &update{full: true, picture: p, entries: p.Entries, bundles: p.Bundles, verdicts: p.Verdicts}
}

// since returns the update from what a Hello says.
func (h *held) since(p *view.AgentPicture) *update {
	u := &update{picture: p}
	merge(h.entries, p.Entries,
		func(a heldEntry, b *identity.Entry) int { return strings.Compare(a.id, b.ID) },
		func(a heldEntry, b *identity.Entry) bool {
			created := int64(0)
			if !b.CreatedAt.IsZero() {
				created = b.CreatedAt.Unix()
			}
			return a.revision == b.Revision && a.created == created
		},
		func(a heldEntry) { u.removedEntries = append(u.removedEntries, a.id) },
		func(b *identity.Entry) { u.entries = append(u.entries, b) })
	merge(h.bundles, byTrustDomain(p.Bundles),
		func(a heldBundle, b *identity.Bundle) int {
			return strings.Compare(a.trustDomain, b.TrustDomain.Name())
		},
		func(a heldBundle, b *identity.Bundle) bool { return a.sequence == b.Sequence },
		func(a heldBundle) { u.removedBundles = append(u.removedBundles, a.trustDomain) },
		func(b *identity.Bundle) { u.bundles = append(u.bundles, b) })
	merge(h.verdicts, p.Verdicts,
		func(a identity.HeldVerdict, b *records.Verdict) int { return strings.Compare(a.Digest, b.Digest) },
		func(a identity.HeldVerdict, b *records.Verdict) bool { return a.Seq == b.Seq },
		func(a identity.HeldVerdict) { u.removedDigests = append(u.removedDigests, a.Digest) },
		func(b *records.Verdict) { u.verdicts = append(u.verdicts, b) })
	return u
}

// between returns the update from one picture to a later one. Values are immutable, so what is not
// the very same value has changed.
func between(old, p *view.AgentPicture) *update {
	u := &update{picture: p}
	merge(old.Entries, p.Entries,
		func(a, b *identity.Entry) int {
			if a == b {
				return 0
			}
			return strings.Compare(a.ID, b.ID)
		},
		func(a, b *identity.Entry) bool { return a == b },
		func(a *identity.Entry) { u.removedEntries = append(u.removedEntries, a.ID) },
		func(b *identity.Entry) { u.entries = append(u.entries, b) })
	merge(byTrustDomain(old.Bundles), byTrustDomain(p.Bundles),
		func(a, b *identity.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) },
		func(a, b *identity.Bundle) bool { return a == b },
		func(a *identity.Bundle) { u.removedBundles = append(u.removedBundles, a.TrustDomain.Name()) },
		func(b *identity.Bundle) { u.bundles = append(u.bundles, b) })
	merge(old.Verdicts, p.Verdicts,
		func(a, b *records.Verdict) int { return strings.Compare(a.Digest, b.Digest) },
		func(a, b *records.Verdict) bool { return a == b },
		func(a *records.Verdict) { u.removedDigests = append(u.removedDigests, a.Digest) },
		func(b *records.Verdict) { u.verdicts = append(u.verdicts, b) })
	return u
}

func (u *update) empty() bool {
	return len(u.entries)+len(u.removedEntries)+len(u.bundles)+len(u.removedBundles)+
		len(u.verdicts)+len(u.removedDigests) == 0
}

// byTrustDomain returns the bundles in the one order that merge needs; in pictures the own is first.
func byTrustDomain(bundles []*identity.Bundle) []*identity.Bundle {
	return slices.SortedFunc(slices.Values(bundles), func(a, b *identity.Bundle) int {
		return a.TrustDomain.Compare(b.TrustDomain)
	})
}

// merge walks two lists in the same order and reports what is only in the first (gone) and what is
// new or not the same in the second (put).
func merge[A, B any](as []A, bs []B, compare func(A, B) int, same func(A, B) bool, gone func(A), put func(B)) {
	for len(as) > 0 && len(bs) > 0 {
		switch order := compare(as[0], bs[0]); {
		case order < 0:
			gone(as[0])
			as = as[1:]
		case order > 0:
			put(bs[0])
			bs = bs[1:]
		default:
			if !same(as[0], bs[0]) {
				put(bs[0])
			}
			as, bs = as[1:], bs[1:]
		}
	}
	for _, a := range as {
		gone(a)
	}
	for _, b := range bs {
		put(b)
	}
}
