package issue

import (
	"slices"
	"time"

	"github.com/assay-id/assay/workloadapi/identity"
)

// scan looks at everything that has a time: what is to be renewed or tried again, what has expired,
// and what nobody wants any more. mu is held.
func (i *Issuer) scan(now time.Time) {
	i.nextScan = now.Add(scanEvery) // what follows brings it nearer
	stale := map[*subject]bool{}
	missing := 0
	for _, sl := range i.slots {
		i.scanSlot(sl, stale, now)
		wanted := i.wanted(sl, now)
		if wanted && !sl.usable(now) && (sl.over || sl.failures > 0) {
			missing++
		}
		if !wanted && (!sl.forced || sl.svid == nil) {
			continue
		}
		if !sl.usable(now) || !sl.current() || !now.Before(sl.renewAt) {
			i.request(sl, now) // if it may not be tried yet, request says when
		} else {
			i.due(sl.renewAt)
		}
	}
	for _, s := range i.subjects {
		if slices.ContainsFunc(s.entries, func(e *identity.Entry) bool { return e.Expired(now) }) {
			delete(stale, s) // match wakes it
			i.match(s, now)
		}
		for _, e := range s.entries {
			if !e.ExpiresAt.IsZero() {
				i.due(e.ExpiresAt)
			}
		}
	}
	for s := range stale {
		s.wake(now)
	}
	i.scanJWT(now)
	i.trim(now)
	i.forgetImages(now)
	i.metrics.held.WithLabelValues("x509").Set(float64(len(i.slots)))
	i.metrics.held.WithLabelValues("jwt").Set(float64(len(i.jwts.slots)))
	i.metrics.missing.Set(float64(missing))
	i.metrics.subjects.Set(float64(len(i.subjects)))
}

// scanSlot finds out whether a slot's SVID has expired, or has not after all, and notes whom that
// concerns. mu is held.
func (i *Issuer) scanSlot(sl *slot, stale map[*subject]bool, now time.Time) {
	if sl.svid == nil {
		return
	}
	since := now.Sub(sl.svid.NotAfter)
	if over := since >= 0; over != sl.over {
		sl.over = over
		for s := range sl.users {
			stale[s] = true
		}
	}
	if since >= keepOver {
		sl.svid, sl.top = nil, nil
		i.held()
	} else if since < 0 {
		i.due(sl.svid.NotAfter)
	}
}

// wanted reports whether somebody follows a subject that has the slot's entry.
func (i *Issuer) wanted(sl *slot, now time.Time) bool {
	for s := range sl.users {
		if s.followedX509(now) {
			return true
		}
	}
	return false
}

// trim forgets subjects nobody follows, and the SVIDs that were used longest ago beyond those the
// cache holds, except those that somebody follows.
func (i *Issuer) trim(now time.Time) {
	for _, s := range i.subjects {
		if s.followed(now) {
			i.stillThere(s, now)
			continue
		}
		if now.Sub(s.wokenAt) >= forget {
			i.forgetSubject(s)
		} else {
			i.due(s.wokenAt.Add(forget))
		}
	}
	over := len(i.slots) - i.cfg.X509Size
	if over <= 0 {
		return
	}
	var idle []*slot
	for _, sl := range i.slots {
		if sl.call == nil && !i.wanted(sl, now) {
			idle = append(idle, sl)
		}
	}
	slices.SortFunc(idle, func(a, b *slot) int { return a.used.Compare(b.used) })
	for _, sl := range idle[:min(over, len(idle))] {
		delete(i.slots, sl.entry.ID)
	}
	if len(idle) > 0 {
		i.save()
	}
}

// bundleChanged looks for authorities that are newly tainted or gone. What a tainted one signed is
// replaced at once and served until then; what a revoked one signed is not served any more. mu is
// held; the caller matches the subjects afterwards.
func (i *Issuer) bundleChanged(was, is *identity.Bundle, now time.Time) {
	if was == nil || is == nil || was == is {
		return
	}
	taintedBefore := map[string]bool{}
	for _, a := range was.X509 {
		if a.Tainted {
			taintedBefore[string(a.Certificate.Raw)] = true
		}
	}
	for _, a := range is.X509 {
		if a.Tainted && !taintedBefore[string(a.Certificate.Raw)] {
			i.replace(a.Certificate, now)
		}
	}
	i.revoked.see(was, is, now)
	for _, cert := range i.revoked.certs {
		i.withdrawn(cert)
	}
	bad := map[string]bool{}
	for _, a := range slices.Concat(was.JWT, was.WIT) {
		bad[a.KeyID] = true // gone, unless it is in the new one
	}
	for _, a := range slices.Concat(is.JWT, is.WIT) {
		bad[a.KeyID] = a.Tainted
	}
	i.jwts.dropKeys(bad)
	i.held()
}
