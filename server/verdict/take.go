package verdict

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/trust"
)

// subjects are the digests under which the document is found again.
func (in *incoming) subjects() []string {
	var list []string
	switch {
	case in.read.Report != nil:
		list = subjectsOf(in.read.Report)
	case in.read.VEX != nil:
		for _, st := range in.read.VEX.Statements {
			if st.Product != "" {
				list = append(list, st.Product)
			}
		}
	default:
		list = append(list, in.proof.Matched...)
	}
	if len(list) == 0 {
		list = []string{in.digest}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// slot is the ID of the document for one source: documents with the same ID replace one another.
func (in *incoming) slot(source string, subjects []string) (id, subject string) {
	subject = subjects[0]
	switch {
	case in.read.Report != nil:
		subject = cmp.Or(in.read.Report.Subject.Config, in.digest)
		return keyOf(kindReport, subject, source, in.repository, in.read.Report.Scanner), subject
	case in.read.VEX != nil:
		return keyOf(kindVEX, in.digest, source, in.repository, in.read.VEX.Author, in.read.VEX.ID), subject
	}
	return keyOf(kindProvenance, subject, source, in.repository, in.hash), subject
}

// sourced is the document as a scan policy sees it.
func (s *Service) sourced(d *document, i *image) policy.SourcedReport {
	return policy.SourcedReport{
		Source: d.GetRepository(), TrustPolicy: d.GetSource(), Report: d.report, Index: d.index,
		ReceivedAt: timeOf(d.GetReceivedAt()), VerifiedAt: timeOf(d.GetVerifiedAt()), Hash: d.GetHash(), Match: s.match(d, i),
	}
}

// take puts the document into the state and the store, and judges the images that it is about. mu is
// held.
func (s *Service) take(ctx context.Context, in *incoming, who Pusher, d Document) (*Pushed, error) {
	out := &Pushed{Format: string(in.read.Format), Kind: in.kind(), Hash: in.hash, Sources: in.sources, Notes: in.notes}
	if in.read.Report != nil {
		out.Findings = len(in.read.Report.Findings)
	}
	fresh, marks, err := s.admit(in)
	if err != nil {
		return nil, err
	}
	if len(fresh) == 0 {
		out.Duplicate = true
		out.Images = s.imagesOf(in)
		for _, digest := range out.Images {
			s.state.images[digest].usedAt = in.now
		}
		return out, s.extend(ctx, in)
	}
	change := records.EvidenceChange{
		Documents: map[string]*stored.EvidenceDocument{}, Marks: marks, Images: map[string]*stored.EvidenceImage{},
	}
	body, raw, err := s.keep(ctx, in, d, len(fresh))
	if err != nil {
		return nil, err
	}
	replaced := map[string]*document{}
	undo := func(err error) (*Pushed, error) {
		for id := range fresh {
			s.dropDocument(id)
			if old := replaced[id]; old != nil {
				s.addDocument(old)
				s.state.blobs[old.GetBody().GetHash()]++
				s.state.blobs[old.GetRaw().GetHash()]++
			}
		}
		return nil, err
	}
	for id, source := range fresh {
		if old := s.state.documents[id]; old != nil {
			replaced[id] = old
			change.DropBlobs = append(change.DropBlobs, s.freeBlob(old.GetBody()), s.freeBlob(old.GetRaw()))
			s.dropDocument(id)
		}
		now := &document{id: id, EvidenceDocument: in.stored(who, d, source, body, raw), report: in.read.Report, vex: in.read.VEX}
		now.selectors = selectorsOf(now.GetSelectors())
		if now.report != nil {
			s.state.words.share(now.report)
			now.index = policy.NewIndex(now.report)
		}
		if now.vex != nil {
			now.vexIndex = policy.NewVEXIndex(now.vex)
		}
		s.addDocument(now)
		change.Documents[id] = now.EvidenceDocument
	}
	concerned, dropped, err := s.meet(ctx, in, fresh)
	if err != nil {
		return undo(err)
	}
	change.DropBlobs = append(change.DropBlobs, dropped...)
	change.DropBlobs = slices.DeleteFunc(change.DropBlobs, func(hash string) bool { return hash == "" })
	for _, digest := range concerned {
		if len(change.Images) < 20 { // the others are written with their verdicts
			change.Images[digest] = s.state.images[digest].stored()
		}
	}
	// The file first: a mark without its document refuses a replay, a document without its mark does not.
	if err := s.marks.add(marks); err != nil {
		return undo(err)
	}
	if err := s.Store.WriteEvidence(ctx, change); err != nil {
		return undo(err)
	}
	maps.Copy(s.state.marks, marks)
	if len(concerned) == 0 {
		out.Notes = append(out.Notes, "it is not known which image this digest leads to"+in.unresolved+"; push the manifest with it, or the config digest")
	}
	out.Images = concerned
	return out, s.evaluate(ctx, "push", concerned)
}

// admit compares the document with what is known, for each of its sources. It returns the IDs under
// which it is news, with their sources, and the marks that it leaves.
func (s *Service) admit(in *incoming) (map[string]string, map[string]*stored.EvidenceMark, error) {
	fresh, marks := map[string]string{}, map[string]*stored.EvidenceMark{}
	subjects := in.subjects()
	for _, digest := range subjects {
		if len(s.state.about[digest]) >= maxDocuments {
			return nil, nil, clash(ErrMany, "there are %d documents about %s already, which is the limit", maxDocuments, digest)
		}
	}
	for _, source := range in.sources {
		id, subject := in.slot(source, subjects)
		old := s.state.documents[id]
		if old != nil && old.GetHash() == in.hash {
			continue
		}
		if r := in.read.Report; r != nil {
			next := policy.SourcedReport{
				Source: in.repository, TrustPolicy: source, Report: r,
				ReceivedAt: in.now, VerifiedAt: in.proof.VerifiedAt, Hash: in.hash,
			}
			if err := s.newer(old, next, s.state.marks[id], in.accepted); err != nil {
				return nil, nil, err
			}
			marks[id] = later(s.state.marks[id], &stored.EvidenceMark{
				Subject: subject, Source: source, Repository: in.repository, Hash: in.hash,
				Time: nanos(evidenceTime(next)), DbTime: nanos(r.DBAt), Packages: int32(min(r.Packages, 1<<30)), //nolint:gosec // bounded
			})
		}
		if v := in.read.VEX; v != nil {
			if old != nil && old.vex != nil && (v.Version < old.vex.Version || v.Version == old.vex.Version && !v.Timestamp.After(old.vex.Timestamp)) {
				return nil, nil, clash(ErrStale, "version %d of %s of the same VEX document is known already", old.vex.Version, old.vex.Timestamp.Format(time.RFC3339))
			}
			marks[id] = later(s.state.marks[id], &stored.EvidenceMark{
				Subject: subject, Source: source, Repository: in.repository, Hash: in.hash, Time: nanos(v.Timestamp),
			})
			if m := s.state.marks[id]; m != nil && old == nil && nanos(v.Timestamp) <= m.GetTime() {
				return nil, nil, clash(ErrStale, "a VEX document of %s was known already", timeOf(m.GetTime()).Format(time.RFC3339))
			}
		}
		fresh[id] = source
	}
	return fresh, marks, nil
}

// evidenceTime is the time that a report counts from.
func evidenceTime(r policy.SourcedReport) time.Time {
	earliest := r.ReceivedAt
	for _, t := range []time.Time{r.Report.ScannedAt, r.VerifiedAt} {
		if !t.IsZero() && t.Before(earliest) {
			earliest = t
		}
	}
	return earliest
}

// newer says why a report may not take the place of what is known.
func (s *Service) newer(old *document, next policy.SourcedReport, mark *stored.EvidenceMark, accepted bool) error {
	if old != nil && old.report != nil {
		was := policy.SourcedReport{
			Source: next.Source, TrustPolicy: next.TrustPolicy, Report: old.report,
			ReceivedAt: timeOf(old.GetReceivedAt()), VerifiedAt: timeOf(old.GetVerifiedAt()), Hash: old.GetHash(),
		}
		// That packages are gone is what Replaces looks at last.
		switch err := policy.Replaces(was, next); {
		case errors.Is(err, policy.ErrHold) && accepted:
		case errors.Is(err, policy.ErrHold):
			return clash(ErrHeld, "%w; if that is as it should be: assay-server evidence accept -report %s -reason …", err, next.Hash)
		case err != nil:
			return clash(ErrStale, "%w", err)
		}
	}
	if mark == nil {
		return nil
	}
	// The mark is what a restored store forgot, or what is left of a document that was deleted.
	if at := evidenceTime(next); nanos(at) < mark.GetTime() || nanos(at) == mark.GetTime() && mark.GetHash() != next.Hash {
		return clash(ErrStale, "evidence of %s of the same source was known already, and this is of %s",
			timeOf(mark.GetTime()).Format(time.RFC3339), at.UTC().Format(time.RFC3339))
	}
	if db := nanos(next.Report.DBAt); db != 0 && db < mark.GetDbTime() {
		return clash(ErrStale, "evidence from a database of %s was known already, and this is from one of %s",
			timeOf(mark.GetDbTime()).Format(time.RFC3339), next.Report.DBAt.Format(time.RFC3339))
	}
	return nil
}

// keep stores the bodies, each named once for every record that will name it.
func (s *Service) keep(ctx context.Context, in *incoming, d Document, names int) (body, raw *stored.EvidenceBlob, err error) {
	var reduced []byte
	switch {
	case in.read.Report != nil:
		reduced, err = encodeReport(in.read.Report)
	case in.read.VEX != nil:
		reduced, err = encodeVEX(in.read.VEX)
	}
	if err != nil {
		return nil, nil, err
	}
	for range names {
		if reduced != nil {
			if body, err = s.putBlob(ctx, reduced); err != nil {
				return nil, nil, err
			}
		}
		if in.proof.Kind != trust.Bare {
			if raw, err = s.putBlob(ctx, d.Content); err != nil {
				return nil, nil, err
			}
		}
	}
	return body, raw, nil
}

func (in *incoming) stored(who Pusher, d Document, source string, body, raw *stored.EvidenceBlob) *stored.EvidenceDocument {
	var with map[string]string
	if who.Push != nil {
		with = maps.Clone(who.Push.Fields)
		for name, value := range with {
			with[name] = clip(value)
		}
	}
	return &stored.EvidenceDocument{
		PushedWith: with,
		Kind:       in.kind(), Format: string(in.read.Format), Source: source, TrustPolicies: in.proof.TrustPolicies, Repository: in.repository,
		Hash: in.hash, Form: string(in.proof.Kind), Signer: clip(in.proof.Signer), Issuer: clip(in.proof.Issuer), PushedBy: clip(who.Name),
		ReceivedAt: nanos(in.now), VerifiedAt: nanos(in.proof.VerifiedAt), Subjects: in.subjects(), Image: clip(d.Image), Wanted: in.wanted,
		CallerPolicies: in.callers, Body: body, Raw: raw, Selectors: storedSelectors(in.proof.Selectors().All()),
	}
}

// meet makes the images known that the document is about, and what it links and found. It returns
// their digests, and blobs that are not named any more.
func (s *Service) meet(ctx context.Context, in *incoming, fresh map[string]string) (concerned, dropped []string, err error) {
	if err := s.extendLinks(in); err != nil {
		return nil, nil, err
	}
	found := map[string]bool{}
	for id := range fresh {
		doc := s.state.documents[id]
		if doc.report != nil && doc.report.Subject.Config != "" && s.state.images[doc.report.Subject.Config] == nil {
			s.newImage(doc.report.Subject.Config)
		}
		for _, digest := range s.concerned(doc) {
			found[digest] = true
		}
		if doc.report == nil {
			continue
		}
		for digest := range found {
			i := s.state.images[digest]
			if s.match(doc, i) == "" {
				continue
			}
			hash, err := s.learn(ctx, i, doc.report, in.now)
			if err != nil {
				return nil, nil, err
			}
			dropped = append(dropped, hash)
		}
	}
	concerned = slices.Sorted(maps.Keys(found))
	for _, digest := range concerned {
		s.state.images[digest].named(in.repository)
	}
	return concerned, dropped, nil
}

// maxNames is how many names are kept of an image.
const maxNames = 8

func (i *image) named(repository string) {
	if repository != "" && len(i.names) < maxNames && !slices.Contains(i.names, repository) {
		i.names = append(i.names, repository)
	}
}

// maxLinks bounds how many digests may lead to one image.
const maxLinks = 128

// extendLinks takes over what was proved.
func (s *Service) extendLinks(in *incoming) error {
	for config, links := range in.proved {
		if _, leads := links[in.digest]; !leads && config != in.digest {
			continue // of other platforms, which nobody asked about
		}
		i := s.state.images[config]
		if i == nil {
			i = s.newImage(config)
		}
		for digest, l := range links {
			if len(i.links) >= maxLinks {
				return clash(ErrMany, "there are %d digests that lead to %s already, which is the limit", maxLinks, config)
			}
			s.addLink(i, digest, l)
		}
	}
	return nil
}

// extend takes over what a duplicate proves beside.
func (s *Service) extend(ctx context.Context, in *incoming) error {
	if len(in.proved) == 0 {
		return nil
	}
	if err := s.extendLinks(in); err != nil {
		return err
	}
	return s.evaluate(ctx, "push", s.imagesOf(in))
}

// imagesOf returns the images that a push is about.
func (s *Service) imagesOf(in *incoming) []string {
	found := map[string]bool{}
	for _, digest := range in.wanted {
		if s.state.images[digest] != nil {
			found[digest] = true
		}
		for config := range s.state.leads[digest] {
			found[config] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}
