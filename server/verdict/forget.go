package verdict

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
)

// maxForget is how many images are forgotten at once; the others wait until the next round of the timer.
const maxForget = 500

// forgetUnused drops what is known of images that nobody has run for Rules.KeepUnused and nobody has
// pushed about: the image, the documents that are about no other, and its verdict. mu is held.
//
// What stays are the marks, without the words that are for people: an old clean report cannot be pushed
// again, however long nobody used the image. VEX documents about packages in whatever image stay too.
//
// An image that runs is never forgotten, and a restart of the server, when no agent has said yet what it
// runs, takes none for unused: when an image was last used is stored, a few times in each period.
func (s *Service) forgetUnused(ctx context.Context, now time.Time) error {
	keep := s.rules.KeepUnused
	if keep <= 0 || now.Before(s.sweep) {
		return nil
	}
	step := min(keep/8, 24*time.Hour)
	s.sweep = now.Add(min(step, longest)) // unless all goes well
	if err := s.keepUse(ctx, now); err != nil {
		return err
	}
	cutoff, unused := now.Add(-keep), map[string]bool{}
	for _, digest := range s.all() {
		if len(unused) < maxForget && s.unusedSince(s.state.images[digest], cutoff) {
			unused[digest] = true
		}
	}
	full := len(unused) >= maxForget
	documents := s.unusedDocuments(unused, cutoff)
	if len(unused)+len(documents) == 0 {
		s.sweep = now.Add(step)
		return nil
	}
	err := s.forget(ctx, unused, documents)
	if err == nil && !full {
		s.sweep = now.Add(step)
	}
	return err
}

// keepUse writes down when images were last used, where the store does not know.
func (s *Service) keepUse(ctx context.Context, now time.Time) error {
	change := records.EvidenceChange{Images: map[string]*stored.EvidenceImage{}}
	flush := func() error {
		if err := s.Store.WriteEvidence(ctx, change); err != nil {
			return err
		}
		for digest := range change.Images {
			s.state.images[digest].usedKept = s.state.images[digest].usedAt
		}
		change.Images = map[string]*stored.EvidenceImage{}
		return nil
	}
	for digest, i := range s.state.images {
		// One that ran under a server which did not write this down counts as used now.
		if len(s.View.Runners(digest)) > 0 || i.usedAt.IsZero() && !i.seenAt.IsZero() {
			i.usedAt = now
		}
		if i.usedAt.Equal(i.usedKept) {
			continue
		}
		change.Images[digest] = i.stored()
		if change.Full() {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// unusedSince reports whether nobody has run the image since then, under whatever name, and nobody has
// pushed about it.
func (s *Service) unusedSince(i *image, cutoff time.Time) bool {
	var last time.Time
	for _, digest := range s.alike(map[string]bool{i.digest: true}) {
		other := s.state.images[digest]
		for _, t := range []time.Time{other.seenAt, other.usedAt} {
			if t.After(last) {
				last = t
			}
		}
	}
	for _, d := range s.evidenceOf(i) {
		if at := timeOf(d.GetReceivedAt()); s.state.general[d.id] == nil && at.After(last) {
			last = at
		}
	}
	if last.IsZero() {
		last = i.updatedAt
	}
	return last.Before(cutoff)
}

// unusedDocuments returns those that are about no image that stays, and are as old.
func (s *Service) unusedDocuments(unused map[string]bool, cutoff time.Time) []*document {
	var list []*document
	for id, d := range s.state.documents {
		if s.state.general[id] != nil || !timeOf(d.GetReceivedAt()).Before(cutoff) {
			continue
		}
		if !slices.ContainsFunc(s.concerned(d), func(digest string) bool { return !unused[digest] }) {
			list = append(list, d)
		}
	}
	return list
}

// forget drops images and documents: first from the store, then from memory, so that what could not be
// written is tried again.
func (s *Service) forget(ctx context.Context, unused map[string]bool, documents []*document) error {
	change, dropped := newForgetting(), []string{}
	flush := func() error {
		if err := s.Store.WriteEvidence(ctx, change); err != nil {
			return err
		}
		maps.Copy(s.state.marks, change.Marks)
		for id := range change.Documents {
			d := s.state.documents[id]
			s.dropDocument(id)
			dropped = append(dropped, s.freeBlob(d.GetBody()), s.freeBlob(d.GetRaw()))
		}
		for digest := range change.Images {
			dropped = append(dropped, s.dropImage(digest))
		}
		change = newForgetting()
		return nil
	}
	for _, d := range documents {
		change.Documents[d.id] = nil
		if m := s.state.marks[d.id]; m != nil {
			change.Marks[d.id] = &stored.EvidenceMark{Hash: m.GetHash(), Time: m.GetTime(), DbTime: m.GetDbTime()}
		}
		if change.Full() {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	for digest := range unused {
		// Before its image: one without a verdict is judged at the next start, a verdict without its image
		// would stay.
		if _, err := s.Store.DeleteVerdict(ctx, digest); err != nil && !errors.Is(err, records.ErrNotFound) {
			return errors.Join(err, flush())
		}
		s.state.images[digest].published = nil
		change.Images[digest] = nil
		if change.Full() {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if err := flush(); err != nil {
		return err
	}
	list := make([]string, 0, len(unused))
	for digest := range unused {
		list = append(list, digest)
	}
	slices.Sort(list)
	s.note(audit.Line{
		Event: "evidence.forget", Outcome: audit.Allow, Caller: "policy", Facts: list,
		Reason: fmt.Sprintf("nobody has run or pushed about them for %s: %d images, %d documents", s.rules.KeepUnused, len(unused), len(documents)),
	})
	dropped = slices.DeleteFunc(dropped, func(hash string) bool { return hash == "" })
	err := s.Store.DropBlobs(ctx, dropped...) // what is left is swept at the next start
	if s.marks != nil && len(documents) > 0 {
		err = errors.Join(err, s.marks.rewrite(s.state.marks))
	}
	return err
}

func newForgetting() records.EvidenceChange {
	return records.EvidenceChange{
		Documents: map[string]*stored.EvidenceDocument{}, Marks: map[string]*stored.EvidenceMark{}, Images: map[string]*stored.EvidenceImage{},
	}
}

// dropImage takes an image out of the state, and returns a blob that nothing names any more.
func (s *Service) dropImage(digest string) string {
	i := s.state.images[digest]
	for link := range i.links {
		delete(s.state.leads[link], digest)
		if len(s.state.leads[link]) == 0 {
			delete(s.state.leads, link)
		}
	}
	delete(s.state.images, digest)
	return s.freeBlob(i.firstBlob)
}
