package issue

import (
	"maps"
	"slices"
	"time"

	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

const (
	// lingerImage is how long an image still counts as running after the last subject that named it was
	// forgotten: who asks now and then need not wait for the server's verdict each time.
	lingerImage = 10 * time.Minute
	// maxImages bounds the images that count as running; the server takes 20,000.
	maxImages = 16384
)

// images are those that workloads run, by what is known of those who ask. Issuer.mu guards them.
type images struct {
	known   map[string]*image // by digest
	changed chan struct{}     // closed, and replaced, when another set is known
}

type image struct {
	subjects int
	left     time.Time // when the last subject went
}

func newImages() images { return images{known: map[string]*image{}, changed: make(chan struct{})} }

// Running returns the digests of the images that workloads run, as identity.Running has them, in order, and
// a channel that is closed when there are others.
func (i *Issuer) Running() ([]string, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Sorted(maps.Keys(i.images.known)), i.images.changed
}

// tell wakes those who want to know what runs. mu is held.
func (i *Issuer) tell() {
	close(i.images.changed)
	i.images.changed = make(chan struct{})
}

// enter notes the images of a new subject. mu is held.
func (i *Issuer) enter(s *subject, now time.Time) {
	s.digests = identity.Running(s.facts)
	for _, digest := range s.digests {
		im := i.images.known[digest]
		if im == nil {
			if len(i.images.known) >= maxImages {
				i.forgetImages(now.Add(lingerImage)) // all that nobody has
			}
			im = &image{}
			i.images.known[digest] = im
			i.tell()
		}
		im.subjects++
		i.due(now.Add(lingerImage)) // see stillThere
	}
}

// expectImages lets the images count as running whose verdicts were kept over a restart, so that the
// server does not take these back before the workloads have asked again.
func (i *Issuer) expectImages(now time.Time) {
	for digest := range i.picture.Verdicts {
		i.images.known[digest] = &image{left: now}
	}
}

// leave notes that a subject is gone. mu is held.
func (i *Issuer) leave(s *subject, now time.Time) {
	for _, digest := range s.digests {
		im := i.images.known[digest]
		if im.subjects--; im.subjects == 0 {
			im.left = now
			i.due(now.Add(lingerImage))
		}
	}
}

// stillThere closes the channel of a subject that nobody has asked about for long, if it names an image:
// whoever follows asks again, and otherwise the image is not said to run for ever. mu is held.
func (i *Issuer) stillThere(s *subject, now time.Time) {
	if len(s.digests) == 0 {
		return
	}
	at := s.askedAt.Add(lingerImage)
	if s.wokenAt.After(s.askedAt) {
		at = s.wokenAt.Add(afterWake)
	}
	if now.Before(at) {
		i.due(at)
		return
	}
	s.wake(now)
	i.due(now.Add(afterWake))
}

// forgetImages forgets those whose time is over. mu is held.
func (i *Issuer) forgetImages(now time.Time) {
	before := len(i.images.known)
	for digest, im := range i.images.known {
		switch {
		case im.subjects > 0:
		case now.Sub(im.left) >= lingerImage:
			delete(i.images.known, digest)
		default:
			i.due(im.left.Add(lingerImage))
		}
	}
	if len(i.images.known) != before {
		i.tell()
	}
}

// withdraw drops what was signed for entries that rest on a verdict, and that no subject matches any
// more: should the verdict come back, what is out there may have been revoked meanwhile. mu is held.
func (i *Issuer) withdraw(was, is *view.Picture) {
	if verdictsEqual(was, is) {
		return
	}
	matched := map[string]bool{}
	for _, s := range i.subjects {
		for _, e := range s.entries {
			matched[e.ID] = true
		}
	}
	for id, sl := range i.slots {
		if !matched[id] && sl.entry.Gated() {
			i.drop(sl)
		}
	}
	for _, sl := range i.jwts.slots {
		if !matched[sl.entry.ID] && sl.entry.Gated() {
			i.jwts.drop(sl)
		}
	}
}

// verdictsEqual reports whether the verdicts that count are the same.
func verdictsEqual(a, b *view.Picture) bool {
	counts := func(p *view.Picture) map[string]*identity.Verdict {
		all := map[string]*identity.Verdict{}
		for digest := range p.Verdicts {
			if v, ok := p.Verdict(digest); ok {
				all[digest] = v
			}
		}
		return all
	}
	return maps.EqualFunc(counts(a), counts(b), func(a, b *identity.Verdict) bool { return a.Seq == b.Seq })
}
