package view

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// VerdictList returns the verdicts ordered by digest.
func (p *Picture) VerdictList() []*identity.Verdict {
	return slices.SortedFunc(maps.Values(p.Verdicts), func(a, b *identity.Verdict) int { return cmp.Compare(a.Digest, b.Digest) })
}

func (p *Picture) checksum() []byte {
	held := make([]identity.HeldVerdict, 0, len(p.Verdicts))
	for _, v := range p.VerdictList() {
		held = append(held, identity.HeldVerdict{Digest: v.Digest, Seq: v.Seq})
	}
	return identity.ChecksumVerdicts(identity.Checksum(p.sorted, p.BundleList()), held)
}

// Verdict returns the verdict on the image that counts.
func (p *Picture) Verdict(digest string) (*identity.Verdict, bool) {
	v := p.Verdicts[digest]
	if v == nil || p.lapsed || v.Expired(p.asOf) {
		return nil, false
	}
	return v, true
}

// Facts returns what entries are matched with: facts without those that only a verdict can vouch for,
// whoever asserted them, and with those of the verdict on the image that the facts name.
//
// Facts that name several images, of which one process can run but one, get what the verdicts on all of
// them have in common, so that naming another image gains nobody anything.
func (p *Picture) Facts(facts attestor.Set) attestor.Set {
	facts = identity.Ungated(facts)
	if len(p.Verdicts) == 0 {
		return facts
	}
	digests := identity.Running(facts)
	if len(digests) == 0 {
		return facts
	}
	var granted []attestor.Selector
	for n, digest := range digests {
		v, ok := p.Verdict(digest)
		if !ok {
			return facts
		}
		if n == 0 {
			granted = v.Selectors.All()
			continue
		}
		granted = slices.DeleteFunc(slices.Clone(granted), func(s attestor.Selector) bool { return !v.Selectors.Has(s) })
	}
	return attestor.Union(facts, attestor.NewSet(granted...))
}

// next returns the earliest moment at which a verdict ends to count, zero if none does.
func (p *Picture) next() time.Time {
	var next time.Time
	for _, v := range p.Verdicts {
		if v.NotAfter.After(p.asOf) && (next.IsZero() || v.NotAfter.Before(next)) {
			next = v.NotAfter
		}
	}
	return next
}

// Lapse says whether verdicts count at all. An agent that has not heard from its server for long does
// not know whether what it holds is still true, so that for it none does.
func (v *View) Lapse(lapsed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	p := v.state.Load().picture
	if p.lapsed == lapsed {
		return
	}
	next := *p
	next.lapsed = lapsed
	v.replace(p, &next)
}

// advance lets verdicts end whose time is over.
func (v *View) advance(now time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	p := v.state.Load().picture
	next := *p
	next.asOf = now
	v.replace(p, &next)
}

// replace puts next, which differs from p at most in which verdicts count, in the place of p. mu is held.
func (v *View) replace(p, next *Picture) {
	changed := false
	for digest := range p.Verdicts {
		_, did := p.Verdict(digest)
		_, does := next.Verdict(digest)
		changed = changed || did != does
	}
	if changed {
		next.serial = p.serial + 1
	}
	v.publish(next, changed)
}

// nap is the longest that Run sleeps. A timer does not notice that the wall clock was set or the
// machine slept.
const nap = 10 * time.Second

// Run lets verdicts end when their time is over, until ctx ends, and returns nil.
func (v *View) Run(ctx context.Context) error {
	timer := time.NewTimer(nap)
	defer timer.Stop()
	for {
		p, replaced := v.Follow()
		now := v.now()
		wait := nap
		if next := p.next(); !next.IsZero() {
			wait = min(nap, max(next.Sub(now), time.Millisecond))
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-replaced:
			continue
		case <-timer.C:
		}
		if len(p.Verdicts) > 0 {
			v.advance(v.now())
		}
	}
}
