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
	// ErrLarge says that it is larger than what is taken.
	ErrLarge = refusal("too-large")
)

// ErrRules says that other rules about who may push were put in force while a document was on its way. Nothing is
// wrong with it: it may be pushed again.
var ErrRules = errors.New("the rules about who may push evidence were replaced while the document was on its way; push it again")

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
	Format    string   // what it was read as, for example "trivy"
	Kind      string   // report, vex or provenance
	Hash      string   // of its bytes, "sha256:…"
	Sources   []string // under whose names it counts; several if several trust policies vouch for it
	Duplicate bool     // it was there already, and changed nothing
	Findings  int      // in a report
	// Images are the config digests of the images that the document is about.
	Images []string
	Notes  []string // what the pusher should know, in sentences
}

// maxDocuments bounds what is kept of one digest, so that one pusher cannot fill the memory.
const maxDocuments = 200

// Push takes in one document. When it returns, the document is on the disk and the verdicts that follow
// from it are written. An error that wraps ErrRefused says what is wrong with the document; then, and with
// ErrRules, nothing has changed.
func (s *Service) Push(ctx context.Context, who Pusher, d Document) (*Pushed, error) {
	in := &incoming{now: s.cfg.Now(), hash: digestOf(d.Content)}
	out, err := s.pushed(ctx, who, d, in)
	if errors.Is(err, ErrHeld) {
		s.hold(who, d, in.now)
	}
	return out, err
}

// TooLarge refuses a document that is larger than what is taken, without having read it whole.
func (s *Service) TooLarge(ctx context.Context, who Pusher, image string) error {
	err := clash(ErrLarge, "the document is larger than %d MiB", trust.MaxDocument>>20)
	s.m.rejected.WithLabelValues(label(err)).Inc()
	s.rejected(ctx, who, Document{Image: image}, err)
	return err
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
	for {
		rules, err := s.judgeDocument(ctx, in, who, d)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		switch {
		case who.Push != nil && !s.callers.Current(who.Push):
			s.mu.Unlock()
			return nil, ErrRules
		case s.replaced == rules:
			defer s.mu.Unlock()
			return s.take(ctx, in, who, d)
		}
		s.mu.Unlock() // whoever vouched for it may not be trusted any more
	}
}

// judgeDocument finds out what the document says and whether it may. It returns the number of the rules by which it
// did.
func (s *Service) judgeDocument(ctx context.Context, in *incoming, who Pusher, d Document) (rules uint64, err error) {
	s.mu.Lock()
	rules = s.replaced
	s.mu.Unlock()
	in.notes = nil
	if err := s.vouch(ctx, in, who, d); err != nil {
		return 0, err
	}
	if err := in.parse(); err != nil {
		return 0, err
	}
	return rules, in.check()
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
