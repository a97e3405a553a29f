package issue

import (
	"container/list"
	"context"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// subject is a set of facts that somebody asked about. Issuer.mu guards it.
type subject struct {
	key   string
	facts attestor.Set
	// delegated says that somebody acts for whoever shows the facts.
	delegated bool
	// digests are of the images that the facts name.
	digests []string
	// entries are those it matches and may have, oldest first.
	entries   []*identity.Entry
	own       *identity.Bundle
	federated []*identity.Bundle

	// context is the answer of the moment, nil: to be made.
	context *identity.X509Context
	// changed is closed, and replaced, when the answer may have changed.
	changed chan struct{}
	// wakes counts how often changed was closed; asked and askedX509 are what it was when somebody
	// last asked anything, and asked for X509-SVIDs. -1: never.
	wakes, asked, askedX509 int
	wokenAt, askedAt        time.Time
	// place is where it stands among all subjects, by when they were asked about.
	place *list.Element
	// deferred says that changed is to be closed when no signature is waited for any more.
	deferred bool
}

// present reports whether somebody follows the subject, as far as can be known.
func (s *subject) present(asked int, now time.Time) bool {
	return asked == s.wakes || asked >= 0 && asked == s.wakes-1 && now.Sub(s.wokenAt) < afterWake
}

func (s *subject) followed(now time.Time) bool     { return s.present(s.asked, now) }
func (s *subject) followedX509(now time.Time) bool { return s.present(s.askedX509, now) }

// wake closes the channel.
func (s *subject) wake(now time.Time) {
	close(s.changed)
	s.changed = make(chan struct{})
	s.wakes++
	s.wokenAt = now
	s.context, s.deferred = nil, false
}

// ask returns the subject of the facts. mu is held.
func (i *Issuer) ask(facts attestor.Set, delegated bool, now time.Time) *subject {
	i.refresh(i.view.Picture(), now)
	key := facts.Key()
	if delegated {
		key = delegatedKey + key
	}
	s := i.subjects[key]
	if s == nil {
		if len(i.subjects) >= maxSubjects {
			i.forgetOldest(now)
		}
		s = &subject{key: key, facts: facts, delegated: delegated, changed: make(chan struct{}), asked: -1, askedX509: -1}
		i.subjects[key] = s
		s.place = i.order.PushFront(s)
		i.enter(s, now)
		i.match(s, now)
	}
	i.order.MoveToFront(s.place)
	s.asked, s.askedAt = s.wakes, now
	return s
}

// Bundles returns the own bundle, those that matching entries federate with, and a channel that is
// closed when any of it may have changed. Nothing is signed for it.
func (i *Issuer) Bundles(facts attestor.Set) (identity.BundleSet, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := i.ask(facts, false, i.now())
	return identity.BundleSet{Own: s.own, Federated: s.federated, Matched: len(s.entries), Rev: i.picture.Rev}, s.changed
}

// X509 returns the SVIDs of the entries whose selectors are all in facts, oldest entry first, one per
// hint (the oldest entry's), with the bundles they need, and a channel that is closed when any of it
// may have changed. It waits for what is being signed until ctx ends; if some SVIDs can be had it does
// not wait long for others. No match: no SVIDs and no error. A match with nothing valid to give: an
// error wrapping identity.ErrUnavailable.
func (i *Issuer) X509(ctx context.Context, facts attestor.Set) (identity.X509Context, <-chan struct{}, error) {
	return i.x509(ctx, facts, false)
}

func (i *Issuer) x509(ctx context.Context, facts attestor.Set, delegated bool) (identity.X509Context, <-chan struct{}, error) {
	var late *time.Timer
	patient := true
	for {
		i.mu.Lock()
		now := i.now()
		s := i.ask(facts, delegated, now)
		s.askedX509 = s.wakes
		calls, failed := i.prepare(s, now)
		if len(calls) == 0 || !patient {
			answer, changed, matched := i.answer(s, now), s.changed, len(s.entries)
			i.mu.Unlock()
			if len(answer.SVIDs) == 0 && matched > 0 {
				return *answer, changed, unavailable(failed)
			}
			return *answer, changed, nil
		}
		some := len(i.answer(s, now).SVIDs) > 0
		i.mu.Unlock()
		if some && late == nil {
			late = time.NewTimer(soft)
			defer late.Stop()
		}
		var fired <-chan time.Time
		if late != nil {
			fired = late.C
		}
		inTime, err := await(ctx, calls, fired)
		if err != nil {
			return identity.X509Context{}, nil, err
		}
		patient = inTime
	}
}

// prepare asks for what the subject lacks, and returns what is to be waited for and the error of the
// oldest entry that has failed. mu is held.
func (i *Issuer) prepare(s *subject, now time.Time) (calls []*call, failed error) {
	for _, e := range s.entries {
		sl := i.slot(s, e)
		sl.used = now
		if sl.usable(now) && sl.current() {
			if !now.Before(sl.renewAt) {
				i.request(sl, now)
			}
			continue
		}
		if c := i.request(sl, now); c != nil {
			calls = append(calls, c)
		} else if failed == nil {
			failed = sl.err
		}
	}
	return calls, failed
}

// answer returns the context of the moment: what is valid now. mu is held.
func (i *Issuer) answer(s *subject, now time.Time) *identity.X509Context {
	if s.context != nil && i.stands(s, now) {
		return s.context
	}
	c := &identity.X509Context{Bundle: s.own, Federated: s.federated, Rev: i.picture.Rev}
	for _, e := range s.entries {
		sl := i.slots[e.ID]
		if sl == nil || !sl.usable(now) {
			continue
		}
		svid := sl.svid
		if svid.Hint != e.Hint {
			other := *svid
			other.Hint = e.Hint
			svid = &other
		}
		c.SVIDs = append(c.SVIDs, svid)
	}
	s.context = c
	return c
}

// stands reports whether what is valid now is just what is in the subject's context. That may end, or be so
// again, between two scans, if the clock is set or the machine sleeps; then Run is to look, which tells those
// who follow. mu is held.
func (i *Issuer) stands(s *subject, now time.Time) bool {
	usable := 0
	for _, e := range s.entries {
		sl := i.slots[e.ID]
		if sl == nil || sl.svid == nil {
			continue
		}
		if sl.over == now.Before(sl.svid.NotAfter) {
			i.due(now)
		}
		if sl.usable(now) {
			usable++
		}
	}
	return usable == len(s.context.SVIDs) &&
		!slices.ContainsFunc(s.context.SVIDs, func(v *identity.X509SVID) bool { return !now.Before(v.NotAfter) })
}

// refresh makes subjects and slots reflect the picture. mu is held.
func (i *Issuer) refresh(p *view.Picture, now time.Time) {
	if p == i.picture {
		return
	}
	was := i.picture
	if p.Serial() < was.Serial() {
		return // somebody has read a newer one meanwhile
	}
	i.picture = p
	if p.Serial() == was.Serial() {
		return
	}
	kept := len(i.slots)
	for id, sl := range i.slots {
		e, ok := p.Entry(id)
		switch {
		case !ok:
			i.drop(sl)
		case e != sl.entry:
			sl.follow(e)
		case sl.svid == nil:
			// The server did not know the entry, or something else was wrong: it may be right now.
			sl.retryAt, sl.failures = time.Time{}, 0
		}
	}
	i.jwts.refresh(p)
	i.bundleChanged(was.Bundles[i.cfg.TrustDomain], i.own(), now)
	for _, s := range i.subjects {
		i.match(s, now)
	}
	i.withdraw(was, p)
	if len(i.slots) != kept {
		i.save()
	}
	i.due(now)
}

// match finds out what the subject may have now, has signed what is missing, and wakes those who
// follow: at once if something was taken away, else when what was added is there. mu is held.
func (i *Issuer) match(s *subject, now time.Time) {
	entries := i.allowed(i.picture.Match(s.facts), s.delegated, now)
	own, federated := i.own(), i.federated(entries)
	if slices.Equal(entries, s.entries) && own == s.own && slices.Equal(federated, s.federated) {
		return
	}
	before := s.entries
	bundles := own != s.own || !slices.Equal(federated, s.federated)
	s.entries, s.own, s.federated, s.context = entries, own, federated, nil
	taken := i.unlink(s, before)
	pending := false
	for _, e := range entries {
		if !e.ExpiresAt.IsZero() {
			i.due(e.ExpiresAt)
		}
		if i.slots[e.ID] == nil && (!s.followedX509(now) || e.NoPrefetch) {
			continue
		}
		sl := i.slot(s, e)
		if (!sl.usable(now) || !sl.current()) && s.followedX509(now) && i.request(sl, now) != nil {
			pending = true
		}
	}
	if pending && !taken && !bundles {
		s.deferred = true
		return
	}
	s.wake(now)
}

// unlink lets go of the entries that the subject does not match any more, and reports whether one of
// them, or the identity of one, was taken away.
func (i *Issuer) unlink(s *subject, before []*identity.Entry) (taken bool) {
	for _, old := range before {
		at := slices.IndexFunc(s.entries, func(e *identity.Entry) bool { return e.ID == old.ID })
		if at < 0 {
			taken = true
			if sl := i.slots[old.ID]; sl != nil {
				delete(sl.users, s)
			}
		} else if s.entries[at].SPIFFEID != old.SPIFFEID {
			taken = true
		}
	}
	return taken
}

// allowed leaves out the entries that are not for workloads to have: expired ones, those stored
// elsewhere, those that give power over the server if somebody acts for the workload, and all but the
// oldest of those with one hint.
func (i *Issuer) allowed(entries []*identity.Entry, delegated bool, now time.Time) []*identity.Entry {
	hints := map[string]bool{}
	return slices.DeleteFunc(entries, func(e *identity.Entry) bool {
		if delegated && (e.Admin || e.Downstream) {
			return true
		}
		if e.StoreSVID || e.Expired(now) || e.Hint != "" && hints[e.Hint] {
			return true
		}
		hints[e.Hint] = true
		return false
	})
}

// federated returns the held bundles that the entries federate with, ordered by trust domain.
func (i *Issuer) federated(entries []*identity.Entry) []*identity.Bundle {
	tds := map[spiffeid.TrustDomain]*identity.Bundle{}
	for _, e := range entries {
		for _, td := range e.FederatesWith {
			if b := i.picture.Bundles[td]; b != nil && td != i.cfg.TrustDomain {
				tds[td] = b
			}
		}
	}
	return slices.SortedFunc(maps.Values(tds), func(a, b *identity.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
}

// settled wakes those who follow a subject for which nothing is waited for any more. mu is held.
func (i *Issuer) settled(s *subject, changed bool, now time.Time) {
	if changed {
		s.deferred, s.context = true, nil
	}
	if !s.deferred {
		return
	}
	for _, e := range s.entries {
		if sl := i.slots[e.ID]; sl != nil && sl.call != nil {
			return
		}
	}
	s.wake(now)
}

// forgetSubject lets go of a subject. Whoever follows it all the same asks again and makes a new one.
func (i *Issuer) forgetSubject(s *subject) {
	delete(i.subjects, s.key)
	i.order.Remove(s.place)
	i.leave(s, i.now())
	for _, e := range s.entries {
		if sl := i.slots[e.ID]; sl != nil {
			delete(sl.users, s)
		}
	}
	close(s.changed)
}

// forgetOldest makes room for another subject: of those that were asked about longest ago, one that
// nobody follows goes before the others.
func (i *Issuer) forgetOldest(now time.Time) {
	const choice = 32
	last := i.order.Back()
	for n, at := 0, last; n < choice && at != nil; n, at = n+1, at.Prev() {
		if s := at.Value.(*subject); !s.followed(now) {
			i.forgetSubject(s)
			return
		}
	}
	if last != nil {
		i.forgetSubject(last.Value.(*subject))
	}
}
