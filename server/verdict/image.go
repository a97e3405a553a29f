package verdict

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	proofs "github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/report"
)

// The kinds of document.
const (
	kindReport     = "report"
	kindVEX        = "vex"
	kindProvenance = "provenance"
)

// document is one piece of evidence. What the message says is the stored form; the rest is what it
// was read into.
type document struct {
	id string
	*stored.EvidenceDocument

	report    *report.Report
	index     *policy.Index
	vex       *report.VEX
	vexIndex  *policy.VEXIndex
	selectors []attestor.Selector // of provenance
}

// link is a digest that leads to an image.
type link struct {
	kind     string // manifest or index
	platform string // of the image, as the index has it
}

// image is one image by its config digest.
type image struct {
	digest    string
	seenAt    time.Time // first run by an agent; zero: never
	usedAt    time.Time // last known to run or to be pushed about; see forgetUnused
	usedKept  time.Time // that time as it is stored
	updatedAt time.Time
	links     map[string]link
	names     []string // as it was pushed, for people
	firstSeen map[string]time.Time
	firstBlob *stored.EvidenceBlob

	verdicts  map[string]policy.Verdict          // what the policies say, by policy
	force     map[string]*stored.EvidenceVerdict // what is in force, and what is known of it since
	published *records.Verdict                   // what the agents get
	told      map[string]said
	due       time.Time // when time alone may change something; zero: never
	lease     time.Time // when published is to be renewed; zero: nobody runs it
	unwritten bool      // the store has refused the last change
	owed      bool      // what rests on earlier verdicts is to be revoked, or may be: the server may have ended in between
}

func (s *Service) newImage(digest string) *image {
	i := &image{
		digest: digest, links: map[string]link{}, firstSeen: map[string]time.Time{},
		verdicts: map[string]policy.Verdict{}, force: map[string]*stored.EvidenceVerdict{},
	}
	s.state.images[digest] = i
	return i
}

// name is the image with its verdict's number, as audit lines have it.
func (i *image) name() string {
	if i.published == nil {
		return i.digest
	}
	return i.digest + "@" + strconv.FormatUint(i.published.Seq, 10)
}

func (s *Service) addLink(i *image, digest string, l link) {
	i.links[digest] = l
	if s.state.leads[digest] == nil {
		s.state.leads[digest] = map[string]bool{}
	}
	s.state.leads[digest][i.digest] = true
}

func (s *Service) addDocument(d *document) {
	s.state.documents[d.id] = d
	for _, digest := range d.GetSubjects() {
		if s.state.about[digest] == nil {
			s.state.about[digest] = map[string]*document{}
		}
		s.state.about[digest][d.id] = d
	}
	if d.vex != nil && slices.ContainsFunc(d.vex.Statements, func(st report.Statement) bool { return st.Product == "" }) {
		s.state.general[d.id] = d
	}
}

func (s *Service) dropDocument(id string) {
	d := s.state.documents[id]
	if d == nil {
		return
	}
	delete(s.state.documents, id)
	delete(s.state.general, id)
	for _, digest := range d.GetSubjects() {
		delete(s.state.about[digest], id)
		if len(s.state.about[digest]) == 0 {
			delete(s.state.about, digest)
		}
	}
}

// concerned returns the images that the document is about, as far as is proved.
func (s *Service) concerned(d *document) []string {
	if s.state.general[d.id] != nil {
		return s.all()
	}
	found := map[string]bool{}
	for _, digest := range d.GetSubjects() {
		if s.state.images[digest] != nil {
			found[digest] = true
		}
		for config := range s.state.leads[digest] {
			found[config] = true
		}
	}
	return s.alike(found)
}

// alike adds to a set of images those that are the same under another name, and returns all, sorted.
func (s *Service) alike(found map[string]bool) []string {
	for digest := range maps.Clone(found) {
		of := s.whole(s.state.images[digest])
		found[of.digest] = true
		for other, l := range of.links {
			if l.kind == linkManifest && s.state.images[other] != nil {
				found[other] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// whole returns the image by its config digest, for one that is known by its manifest; itself for others,
// and as long as nothing was proved. Agents whose engine keeps images by manifest run images under that
// name (see identity.Running). All that is known of an image counts under both names, and each has a
// verdict of its own.
func (s *Service) whole(i *image) *image {
	for config := range s.state.leads[i.digest] {
		if of := s.state.images[config]; of != nil && of.links[i.digest].kind == linkManifest {
			return of // a manifest has but one
		}
	}
	return i
}

// resolved reports whether it is known what the digest leads to: to itself if a report says that it is a
// config digest, or something leads to it. That an agent runs it says neither.
func (s *Service) resolved(digest string) bool {
	if i := s.state.images[digest]; len(s.state.leads[digest]) > 0 || i != nil && len(i.links) > 0 {
		return true
	}
	for _, d := range s.state.about[digest] {
		if d.report != nil && d.report.Subject.Config == digest {
			return true
		}
	}
	return false
}

// evidenceOf returns the documents about an image, sorted, whether they count or not.
func (s *Service) evidenceOf(i *image) []*document {
	i = s.whole(i)
	found := map[string]*document{}
	maps.Copy(found, s.state.about[i.digest])
	for digest := range i.links {
		maps.Copy(found, s.state.about[digest])
	}
	maps.Copy(found, s.state.general)
	list := slices.Collect(maps.Values(found))
	sort.Slice(list, func(a, b int) bool { return list[a].id < list[b].id })
	return list
}

// match applies the join rule: by the config digest, by a manifest that is proved to be of this image,
// or, weakly, by an index that leads to it together with the platform. Names and tags never match.
func (s *Service) match(d *document, i *image) policy.Match {
	i = s.whole(i)
	subjects := d.GetSubjects()
	if d.report != nil {
		switch config := d.report.Subject.Config; {
		case config == i.digest:
			return policy.Strong
		case config != "":
			// Of an engine that keeps images by manifest, scanners have its digest for that of the image.
			subjects = []string{config}
		}
	}
	var weak bool
	for _, digest := range subjects {
		if digest == i.digest {
			return policy.Strong
		}
		l, ok := i.links[digest]
		switch {
		case !ok:
		case l.kind == linkManifest:
			return policy.Strong
		case d.report == nil, d.report.Subject.Platform != "" && samePlatform(d.report.Subject.Platform, l.platform):
			weak = true
		}
	}
	if weak {
		return policy.Weak
	}
	return ""
}

// samePlatform compares os/arch or os/arch/variant in whatever way they are written.
func samePlatform(a, b string) bool {
	norm := func(text string) string {
		parts := strings.SplitN(text+"//", "/", 4)
		return proofs.Platform(parts[0], parts[1], strings.Trim(parts[2], "/"))
	}
	return norm(a) == norm(b)
}

// Kinds of link.
const (
	linkManifest = "manifest"
	linkIndex    = "index"
)

// maxManifests is how many manifests one push may bring.
const maxManifests = 32

// chain is what manifests prove: the images that a digest leads to.
type chain map[string]map[string]link // config digest to the digests that lead there

// prove reads manifests and indexes. Each is known by the hash of its own bytes and nothing else, so it
// does not matter who brings them.
func prove(blobs [][]byte) (chain, error) {
	if len(blobs) > maxManifests {
		return nil, fmt.Errorf("there are %d manifests, the limit is %d", len(blobs), maxManifests)
	}
	configs, indexes := map[string]string{}, map[string][]proofs.Manifest{}
	for n, blob := range blobs {
		digest := digestOf(blob)
		p, err := proofs.Prove(digest, blob)
		if err != nil {
			return nil, fmt.Errorf("manifest number %d: %w", n+1, err)
		}
		if p.Config != "" {
			configs[digest] = p.Config
		} else {
			indexes[digest] = p.Manifests
		}
	}
	out := chain{}
	add := func(config, digest string, l link) {
		if out[config] == nil {
			out[config] = map[string]link{}
		}
		out[config][digest] = l
	}
	for manifest, config := range configs {
		add(config, manifest, link{kind: linkManifest})
	}
	for digest, list := range indexes {
		for _, m := range list {
			if config := configs[m.Digest]; config != "" {
				add(config, digest, link{kind: linkIndex, platform: m.Platform})
				add(config, m.Digest, link{kind: linkManifest, platform: m.Platform})
			}
		}
	}
	return out, nil
}

// fetch gets from the registry what is needed to prove where a digest leads.
func (s *Service) fetch(ctx context.Context, repository, digest string) ([][]byte, error) {
	first, err := s.Fetcher.Fetch(ctx, repository, digest)
	if err != nil {
		return nil, err
	}
	p, err := proofs.Prove(digest, first)
	if err != nil {
		return nil, err
	}
	blobs := [][]byte{first}
	for _, m := range p.Manifests {
		if len(blobs) == maxManifests {
			break
		}
		child, err := s.Fetcher.Fetch(ctx, repository, m.Digest)
		if err != nil {
			return nil, err
		}
		blobs = append(blobs, child)
	}
	return blobs, nil
}

// load reads everything that is stored.
func (s *Service) load(ctx context.Context) error {
	e, err := s.Store.ReadEvidence(ctx)
	if err != nil {
		return err
	}
	if s.marks, err = openMarks(s.cfg.MarksPath); err != nil {
		return err
	}
	maps.Copy(s.state.marks, e.Marks)
	if err := s.marks.merge(s.state.marks); err != nil {
		return err
	}
	for id, m := range e.Documents {
		d := &document{id: id, EvidenceDocument: m}
		s.state.blobs[m.GetBody().GetHash()]++
		s.state.blobs[m.GetRaw().GetHash()]++
		if err := s.read(ctx, d); err != nil {
			// One that cannot be read clears nothing, and the others still count.
			s.cfg.Log.WithError(err).WithField("hash", m.GetHash()).Error("a stored document cannot be read and does not count")
			m.Void = clip("it cannot be read: " + err.Error())
		}
		s.addDocument(d)
	}
	for digest, m := range e.Images {
		s.state.blobs[m.GetFirstSeen().GetHash()]++
		if err := s.readImage(ctx, digest, m); err != nil {
			return err
		}
	}
	for id, m := range e.Exceptions {
		s.state.excepted[id] = exceptionOf(id, m)
	}
	s.state.guards = e.Guards
	s.outbox.load(e.Alerts)
	s.crl.number = e.CRL.GetNumber()
	return s.sweepBlobs(ctx)
}

// sweepBlobs deletes what a crash left between a blob and the record that was to name it.
func (s *Service) sweepBlobs(ctx context.Context) error {
	all, err := s.Store.Blobs(ctx)
	if err != nil {
		return err
	}
	return s.Store.DropBlobs(ctx, slices.DeleteFunc(all, func(hash string) bool { return s.state.blobs[hash] > 0 })...)
}

// read fills in what a stored document was read into.
func (s *Service) read(ctx context.Context, d *document) error {
	if d.GetKind() == kindProvenance {
		d.selectors = selectorsOf(d.GetSelectors())
		return nil
	}
	body, err := s.Store.Blob(ctx, d.GetBody())
	if err != nil {
		return err
	}
	switch d.GetKind() {
	case kindReport:
		if d.report, err = s.state.words.decodeReport(body); err != nil {
			return err
		}
		d.index = policy.NewIndex(d.report)
	case kindVEX:
		if d.vex, err = s.state.words.decodeVEX(body); err != nil {
			return err
		}
		d.vexIndex = policy.NewVEXIndex(d.vex)
	default:
		return fmt.Errorf("unknown kind %q", d.GetKind())
	}
	d.selectors = selectorsOf(d.GetSelectors())
	return nil
}

func (s *Service) readImage(ctx context.Context, digest string, m *stored.EvidenceImage) error {
	i := s.newImage(digest)
	i.seenAt, i.updatedAt, i.names = timeOf(m.GetSeenAt()), timeOf(m.GetUpdatedAt()), m.GetNames()
	i.usedAt, i.usedKept = timeOf(m.GetUsedAt()), timeOf(m.GetUsedAt())
	for _, l := range m.GetLinks() {
		s.addLink(i, l.GetDigest(), link{kind: l.GetKind(), platform: l.GetPlatform()})
	}
	for _, v := range m.GetVerdicts() {
		i.force[v.GetPolicy()] = v
	}
	i.firstBlob = m.GetFirstSeen()
	if i.firstBlob != nil {
		body, err := s.Store.Blob(ctx, i.firstBlob)
		var first stored.EvidenceFirstSeen
		if err == nil {
			err = decodeBody(body, &first)
		}
		if err != nil {
			return fmt.Errorf("read when findings of image %s were first seen: %w", digest, err)
		}
		for id, at := range first.GetAt() {
			i.firstSeen[s.state.words.one(id)] = time.Unix(at, 0).UTC()
		}
	}
	published, err := s.Store.Verdict(ctx, digest)
	if err != nil && !errors.Is(err, records.ErrNotFound) {
		return err
	}
	i.published, i.owed = published, published != nil && published.Revoke
	return nil
}

// stored returns the record of an image.
func (i *image) stored() *stored.EvidenceImage {
	m := &stored.EvidenceImage{SeenAt: nanos(i.seenAt), UpdatedAt: nanos(i.updatedAt), Names: i.names, FirstSeen: i.firstBlob, UsedAt: nanos(i.usedAt)}
	for _, digest := range slices.Sorted(maps.Keys(i.links)) {
		m.Links = append(m.Links, &stored.EvidenceLink{Digest: digest, Kind: i.links[digest].kind, Platform: i.links[digest].platform})
	}
	for _, name := range slices.Sorted(maps.Keys(i.force)) {
		m.Verdicts = append(m.Verdicts, i.force[name])
	}
	return m
}

// learn notes when each finding of a report was first seen in the image, and writes that down.
func (s *Service) learn(ctx context.Context, i *image, r *report.Report, now time.Time) (dropped string, err error) {
	fresh, now := false, now.Truncate(time.Second).UTC()
	see := func(id string) {
		if _, ok := i.firstSeen[id]; !ok {
			i.firstSeen[id] = now
			fresh = true
		}
	}
	for n := range r.Findings {
		see(r.Findings[n].ID)
		for _, alias := range r.Findings[n].Aliases {
			see(alias)
		}
	}
	if !fresh {
		return "", nil
	}
	m := &stored.EvidenceFirstSeen{At: make(map[string]int64, len(i.firstSeen))}
	for id, at := range i.firstSeen {
		m.At[id] = at.Unix()
	}
	body, err := encodeBody(m)
	if err != nil {
		return "", err
	}
	old := i.firstBlob
	if i.firstBlob, err = s.putBlob(ctx, body); err != nil {
		return "", err
	}
	return s.freeBlob(old), nil
}

// putBlob keeps bytes and counts who names them: equal bytes are one blob.
func (s *Service) putBlob(ctx context.Context, content []byte) (*stored.EvidenceBlob, error) {
	blob, err := s.Store.PutBlob(ctx, content)
	if err != nil {
		return nil, err
	}
	s.state.blobs[blob.GetHash()]++
	return blob, nil
}

// freeBlob takes a name away and returns the hash if it was the last one.
func (s *Service) freeBlob(blob *stored.EvidenceBlob) string {
	hash := blob.GetHash()
	if hash == "" {
		return ""
	}
	if s.state.blobs[hash]--; s.state.blobs[hash] > 0 {
		return ""
	}
	delete(s.state.blobs, hash)
	return hash
}
