package verdict

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/report"
	"github.com/assay-id/assay/server/verdict/trust"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Local is the source of what a local administrator pushes without naming another.
const Local = "local"

// Errors of Push. All others are the server's own trouble.
var (
	// ErrRefused says that the document is not taken; what wraps it says why in a sentence.
	ErrRefused = errors.New("evidence refused")
	// ErrImage says that the image cannot be made out.
	ErrImage = refusal("image")
	// ErrStale says that something newer is known already.
	ErrStale = refusal("not-newer")
	// ErrSubject says that the document is about another image.
	ErrSubject = refusal("other-image")
	// ErrUnread says that the document cannot be read.
	ErrUnread = refusal("unreadable")
	// ErrVouch says that nobody vouches for it.
	ErrVouch = refusal("untrusted")
	// ErrHeld says that it looks as if the scanner had gone wrong, and an operator is to look at it.
	ErrHeld = refusal("held")
	// ErrMany says that there is too much of it.
	ErrMany = refusal("too-many")
)

// refused is a reason below ErrRefused; its text is a metric label.
type refused struct{ word string }

func refusal(word string) error  { return &refused{word} }
func (r *refused) Error() string { return r.word }
func (r *refused) Unwrap() error { return ErrRefused }
func label(err error) string     { return cmp.Or(reasonWord(err), "other") }
func clash(why error, text string, args ...any) error {
	return &because{why: why, err: fmt.Errorf(text, args...)}
}

// because is a sentence that is one of the reasons above.
type because struct{ why, err error }

func (b *because) Error() string   { return b.err.Error() }
func (b *because) Unwrap() []error { return []error{b.why, b.err} }

func reasonWord(err error) string {
	if r, ok := errors.AsType[*refused](err); ok {
		return r.word
	}
	if errors.Is(err, trust.ErrRefused) {
		return "trust"
	}
	return ""
}

// Pusher is who brings a document, as far as was found out before.
type Pusher struct {
	// Name says who it is, for the audit line and for people.
	Name string
	// Admin may push for any image, and for any source by name.
	Admin bool
	// Push is what a caller's SVID or token proved; nil for an administrator.
	Push *trust.Push
}

// vouchers returns the sources that let the pusher in for a repository, and those of them that vouch
// for what it brings unsigned.
func (p Pusher) vouchers(repository string) (all, unsigned []string) {
	if p.Push == nil {
		return nil, nil
	}
	for _, s := range p.Push.For(repository) {
		all = append(all, s.Name())
		if s.AllowUnsigned() {
			unsigned = append(unsigned, s.Name())
		}
	}
	return all, unsigned
}

// Document is what a pusher says about what it brings.
type Document struct {
	// Image is "registry/repository@sha256:…" or the digest alone.
	Image string
	// Manifests lead from the digest to the config digest.
	Manifests [][]byte
	// Source is the one that an administrator pushes for.
	Source string
	// Content are the document's bytes.
	Content []byte
	// Signed says that the document counts only if it is signed, whoever brings it.
	Signed bool
}

// Pushed is what became of a document.
type Pushed struct {
	Format, Kind, Hash string
	Sources            []string
	Duplicate          bool
	Findings           int
	// Images are the config digests of the images that the document is about.
	Images []string
	Notes  []string
}

// maxDocuments bounds what is kept of one digest, so that one pusher cannot fill the memory.
const maxDocuments = 200

// Push takes in one document. When it returns, the document is on the disk and the verdicts that follow
// from it are written. An error that wraps ErrRefused says what is wrong with the document; then
// nothing has changed.
func (s *Service) Push(ctx context.Context, who Pusher, d Document) (*Pushed, error) {
	in := &incoming{now: s.cfg.Now(), hash: digestOf(d.Content)}
	out, err := s.pushed(ctx, who, d, in)
	if errors.Is(err, ErrHeld) {
		s.hold(who, d, in.now)
	}
	return out, err
}

// pushed is Push for a document that came at in.now.
func (s *Service) pushed(ctx context.Context, who Pusher, d Document, in *incoming) (*Pushed, error) {
	out, err := s.push(ctx, who, d, in)
	switch {
	case err == nil:
		s.settle(ctx)
		s.m.ingested.WithLabelValues(out.Format, map[bool]string{false: "taken", true: "duplicate"}[out.Duplicate]).Inc()
	case errors.Is(err, ErrRefused) || errors.Is(err, trust.ErrRefused):
		s.m.rejected.WithLabelValues(label(err)).Inc()
		s.rejected(ctx, who, d, err)
		if !errors.Is(err, ErrRefused) {
			err = &because{why: ErrRefused, err: err}
		}
	}
	return out, err
}

// incoming is a document on its way in.
type incoming struct {
	now        time.Time
	repository string
	digest     string
	proved     chain
	wanted     []string // the digest and all that was proved to be the same image
	hash       string
	proof      *trust.Proof
	read       *report.Document
	callers    []string // the evidence sources that let the pusher in
	unsigned   []string // those of them that vouch for unsigned documents
	sources    []string // that vouch for the document
	notes      []string
	unresolved string // why the registry was of no help
	accepted   bool   // by an operator, although it looks as if the scanner had gone wrong
}

func (s *Service) push(ctx context.Context, who Pusher, d Document, in *incoming) (*Pushed, error) {
	if err := in.image(who, d); err != nil {
		return nil, err
	}
	s.mu.Lock()
	in.wanted = s.sameImage(in)
	known := s.resolved(in.digest) || len(in.proved) > 0
	s.mu.Unlock()
	if !known && s.Fetcher != nil && in.repository != "" {
		if err := s.resolve(ctx, in); err != nil {
			in.unresolved = ", and the registry could not say it either: " + clip(err.Error())
		}
	}
	if err := s.vouch(ctx, in, who, d); err != nil {
		return nil, err
	}
	if err := in.parse(); err != nil {
		return nil, err
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.take(ctx, in, who, d)
}

// image makes out which image the document is pushed for.
func (in *incoming) image(who Pusher, d Document) error {
	name, digest, found := strings.Cut(d.Image, "@")
	if !found {
		name, digest = "", d.Image
	}
	if !identity.ValidDigest(digest) {
		return clash(ErrImage, "the image must be given as registry/repository@sha256:… with 64 lower-case hex digits, or as the digest alone; a name or a tag says nothing about what is in it")
	}
	if len(name) > maxText || strings.ContainsAny(name, " \t\r\n") {
		return clash(ErrImage, "%q is no repository", clip(name))
	}
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i] // a tag
	}
	in.repository, in.digest = name, digest
	if in.callers, in.unsigned = who.vouchers(name); !who.Admin && len(in.callers) == 0 {
		return clash(ErrVouch, "no evidence_source lets %s push for repository %q", who.Name, name)
	}
	var err error
	if in.proved, err = prove(d.Manifests); err != nil {
		return clash(ErrImage, "%w", err)
	}
	return nil
}

// resolve asks the registry where the digest leads.
func (s *Service) resolve(ctx context.Context, in *incoming) error {
	blobs, err := s.fetch(ctx, in.repository, in.digest)
	if err != nil {
		return err
	}
	if in.proved, err = prove(blobs); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in.wanted = s.sameImage(in)
	return nil
}

// sameImage returns the digests that are known to be the same image. mu is held.
func (s *Service) sameImage(in *incoming) []string {
	found := map[string]bool{in.digest: true}
	join := func(config string) {
		found[config] = true
		if i := s.state.images[config]; i != nil {
			for digest := range i.links {
				found[digest] = true
			}
		}
	}
	if s.state.images[in.digest] != nil {
		join(in.digest)
	}
	for config := range s.state.leads[in.digest] {
		join(config)
	}
	for config, links := range in.proved {
		if _, leads := links[in.digest]; leads || config == in.digest {
			join(config)
			for digest := range links {
				found[digest] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// vouch finds out who vouches for the document.
func (s *Service) vouch(ctx context.Context, in *incoming, who Pusher, d Document) error {
	if d.Source != "" && !who.Admin {
		return clash(ErrVouch, "only an administrator may name the source that a document is from")
	}
	proof, err := s.verifier.VerifyAt(ctx, d.Content, trust.Want{Digests: in.wanted, Repository: in.repository}, in.now)
	if err != nil {
		return err
	}
	in.proof = proof
	switch {
	case proof.Kind == trust.Bare && d.Signed:
		return clash(ErrVouch, "what is attached to an image in a registry counts only if it is signed")
	case proof.Kind != trust.Bare:
		in.sources = proof.TrustPolicies
	case who.Admin:
		in.sources = []string{cmp.Or(d.Source, Local)}
	default:
		in.sources = in.unsigned
	}
	if len(in.sources) == 0 {
		return clash(ErrVouch, "the document is not signed, and no evidence_source that lets %s push has allow_unsigned", who.Name)
	}
	if len(in.sources) > 16 {
		in.sources = in.sources[:16]
	}
	return nil
}

func (in *incoming) parse() error {
	var err error
	switch {
	case in.proof.Body == nil: // a signature and nothing else
		in.read = &report.Document{Format: report.CosignSign, PredicateType: in.proof.PredicateType, Subjects: in.proof.Subjects}
		return nil
	case in.proof.Kind == trust.Bare:
		in.read, err = report.Parse(in.proof.Body)
	default:
		in.read, err = report.ParseStatement(in.proof.Body)
		if errors.Is(err, report.ErrFormat) && in.proof.PredicateType != "" {
			// A policy may accept statements that we know nothing to say about but that they are there.
			in.read, err = &report.Document{Format: report.Format(clip(in.proof.PredicateType)), Subjects: in.proof.Subjects}, nil
		}
	}
	if err != nil {
		return clash(ErrUnread, "%w", err)
	}
	return nil
}

// kind says what the document is for.
func (in *incoming) kind() string {
	switch {
	case in.read.Report != nil:
		return kindReport
	case in.read.VEX != nil:
		return kindVEX
	}
	return kindProvenance
}

// check compares the document with the image it was pushed for and with the clock.
func (in *incoming) check() error {
	late := in.now.Add(policy.Skew)
	if r := in.read.Report; r != nil {
		named := subjectsOf(r)
		switch {
		case len(named) == 0:
			// The format has no place for an image (SARIF): who vouches for the rest vouches for this.
			r.Subject.Manifests = []string{in.digest}
			in.notes = append(in.notes, "the report does not say which image it is about; it counts for the one it was pushed for")
		case !intersect(named, in.wanted):
			return clash(ErrSubject, "the report is about %s, and was pushed for %s", strings.Join(named, ", "), in.digest)
		}
		if r.ScannedAt.After(late) {
			return clash(ErrStale, "the report says that it was made at %s, which is yet to come", r.ScannedAt.Format(time.RFC3339))
		}
		if r.DBAt.After(late) {
			return clash(ErrStale, "the report says that its database is of %s, which is yet to come", r.DBAt.Format(time.RFC3339))
		}
	}
	if v := in.read.VEX; v != nil {
		if v.Timestamp.After(late) {
			return clash(ErrStale, "the VEX document is of %s, which is yet to come", v.Timestamp.Format(time.RFC3339))
		}
		kept := v.Statements[:0]
		for _, st := range v.Statements {
			if st.Product != "" && !slices.Contains(in.wanted, st.Product) {
				continue
			}
			kept = append(kept, st)
		}
		if left := len(v.Statements) - len(kept); left > 0 {
			in.notes = append(in.notes, fmt.Sprintf("%d statements are about other images and are left out", left))
		}
		if v.Statements = kept; len(kept) == 0 {
			return clash(ErrSubject, "no statement of the VEX document is about %s or about a package in it", in.digest)
		}
	}
	if in.kind() == kindProvenance && in.proof.Kind == trust.Bare {
		return clash(ErrVouch, "a statement about how an image was made counts only if it is signed; push the DSSE envelope or the Sigstore bundle")
	}
	return nil
}

// subjectsOf returns the digests that a report names.
func subjectsOf(r *report.Report) []string {
	var list []string
	if r.Subject.Config != "" {
		list = append(list, r.Subject.Config)
	}
	return append(list, r.Subject.Manifests...)
}

func intersect(a, b []string) bool {
	return slices.ContainsFunc(a, func(x string) bool { return slices.Contains(b, x) })
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

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
	return &stored.EvidenceDocument{
		Kind: in.kind(), Format: string(in.read.Format), Source: source, TrustPolicies: in.proof.TrustPolicies, Repository: in.repository,
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
