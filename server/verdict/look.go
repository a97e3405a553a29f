package verdict

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/report"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/workloadapi/identity"
)

// ErrNoImage says that nothing is known of an image.
var ErrNoImage = errors.New("nothing is known of such an image")

// InForce is what one policy says of an image, and whether the guard holds it back.
type InForce struct {
	policy.Verdict
	// Held says that the verdict is held back: Effectively allows what was allowed before.
	Held, Effectively bool
}

// Summary is one image in short.
type Summary struct {
	Digest    string        // of its configuration, or of its manifest where an engine knows it by that
	Names     []string      // as it was pushed about: for people, and nothing is decided by them
	Verdicts  []InForce     // one of each scan policy, by name
	Agents    []spiffeid.ID // who runs it now
	Documents int           // how many are about it, whether they count or not
	UpdatedAt time.Time     // when a verdict last changed
}

func (s *Service) summary(i *image) Summary {
	out := Summary{
		Digest: i.digest, Names: slices.Clone(i.names), Agents: s.View.Runners(i.digest), Documents: len(s.evidenceOf(i)), UpdatedAt: i.updatedAt,
	}
	for _, name := range slices.Sorted(maps.Keys(i.verdicts)) {
		m := i.force[name]
		out.Verdicts = append(out.Verdicts, InForce{Verdict: i.verdicts[name], Held: m.GetHeld(), Effectively: m.GetAllowed()})
	}
	return out
}

// List returns images in the order of their digests that come after the given one: those with the
// status under some policy, if one is given, and those that run, if asked for. next is where to go on.
func (s *Service) List(status string, running bool, after string, limit int) (list []Summary, next string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, digest := range s.all() {
		if digest <= after {
			continue
		}
		if len(list) == limit {
			return list, list[limit-1].Digest
		}
		i := s.state.images[digest]
		if status != "" && !slices.ContainsFunc(slices.Collect(maps.Values(i.verdicts)), func(v policy.Verdict) bool { return string(v.Status) == status }) {
			continue
		}
		if running && len(s.View.Runners(digest)) == 0 {
			continue
		}
		list = append(list, s.summary(i))
	}
	return list, ""
}

// Summaries returns the images with the digests, in short.
func (s *Service) Summaries(digests []string) []Summary {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Summary
	for _, digest := range digests {
		if i := s.state.images[digest]; i != nil {
			list = append(list, s.summary(i))
		}
	}
	return list
}

// Piece is one document as an operator sees it.
type Piece struct {
	Kind       string // report, vex or provenance
	Format     string // what it was read as
	Source     string // under whose name it counts
	Repository string // that it was pushed for
	Hash       string // of its bytes
	Form       string // how it was signed; empty: it was not
	Signer     string // the identity or key that signed it
	Issuer     string // who vouched for that identity
	PushedBy   string
	Scanner    string // of a report
	Match      string // how it is bound to the image: strong, weak or none
	Void       string // why it does not count; empty: it does
	// TrustPolicies are those it verified under, Flaws why a report may not say everything.
	TrustPolicies, Flaws []string
	// VerifiedAt is the verified time of the signature, ScannedAt and DBAt are what a report says of itself.
	// Each may be zero.
	ReceivedAt, VerifiedAt, ScannedAt, DBAt time.Time
	// Findings and Packages are how many a report lists; 0 packages: it lists none.
	Findings, Packages int
	// PushedWith is what the pusher's token said of the run that pushed.
	PushedWith map[string]string
}

// Gate is an entry that demands evidence.
type Gate struct {
	Entry   *identity.Entry
	Open    bool     // the image shows all the evidence that the entry demands
	Missing []string // what it does not show, as selectors
}

// Link is a digest that is proved to lead to an image: Kind is manifest or index, Platform what the index says.
type Link struct{ Digest, Kind, Platform string }

// Found is a finding that counts under a policy.
type Found struct {
	Policy string
	report.Finding
	FirstSeen time.Time // in this image
}

// Whole is everything about one image.
type Whole struct {
	Summary
	Links      []Link
	Documents  []Piece
	Findings   []Found
	Exceptions []policy.Exception // that are for it
	Selectors  []string           // that its containers show
	Gates      []Gate
	SeenAt     time.Time // when it was first run; zero: never
	Seq        uint64    // of the verdict that is published; 0: none is
}

// find returns the image that is meant by a digest of any kind, or by the beginning of one.
func (s *Service) find(text string) (*image, error) {
	if _, digest, ok := strings.Cut(text, "@"); ok {
		text = digest
	}
	if i := s.state.images[text]; i != nil {
		return i, nil
	}
	found := map[string]bool{}
	for config := range s.state.leads[text] {
		found[config] = true
	}
	short := "sha256:" + strings.TrimPrefix(text, "sha256:")
	if len(found) == 0 && len(short) >= len("sha256:")+6 {
		for digest := range s.state.images {
			if strings.HasPrefix(digest, short) {
				found[digest] = true
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, ErrNoImage
	case 1:
		for digest := range found {
			return s.state.images[digest], nil
		}
	}
	return nil, fmt.Errorf("%w: %q means %d images: %s", ErrNoImage, clip(text), len(found), strings.Join(slices.Sorted(maps.Keys(found))[:min(len(found), 4)], ", "))
}

// Show returns everything about one image, which text names by a digest of any kind or the beginning of one. Of the
// entries that demand evidence it shows those that see lets through; nil: all.
func (s *Service) Show(text string, see func(*identity.Entry) bool) (*Whole, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, err := s.find(text)
	if err != nil {
		return nil, err
	}
	w := &Whole{Summary: s.summary(i), SeenAt: i.seenAt}
	for _, digest := range slices.Sorted(maps.Keys(i.links)) {
		w.Links = append(w.Links, Link{Digest: digest, Kind: i.links[digest].kind, Platform: i.links[digest].platform})
	}
	for _, d := range s.evidenceOf(i) {
		w.Documents = append(w.Documents, s.piece(d, i))
	}
	slices.SortFunc(w.Documents, func(a, b Piece) int {
		return cmp.Or(strings.Compare(a.Kind, b.Kind), strings.Compare(a.Source, b.Source), b.ReceivedAt.Compare(a.ReceivedAt))
	})
	for _, v := range w.Verdicts {
		for n := range v.Effective {
			if n == maxShown {
				break
			}
			f := v.Effective[n]
			w.Findings = append(w.Findings, Found{Policy: v.Policy, Finding: f, FirstSeen: i.firstSeen[f.ID]})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.state.excepted)) {
		if e := s.state.excepted[id]; e.Digest == "" || e.Digest == i.digest || e.Digest == s.whole(i).digest {
			w.Exceptions = append(w.Exceptions, e)
		}
	}
	if i.published != nil {
		w.Selectors, w.Seq = i.published.Selectors.Strings(), i.published.Seq
	}
	w.Gates = s.gates(i, see)
	return w, nil
}

// maxShown is how many findings of a policy are shown, the first ones.
const maxShown = 1000

func (s *Service) piece(d *document, i *image) Piece {
	p := Piece{
		Kind: d.GetKind(), Format: d.GetFormat(), Source: d.GetSource(), Repository: d.GetRepository(), Hash: d.GetHash(), Form: d.GetForm(),
		Signer: d.GetSigner(), Issuer: d.GetIssuer(), PushedBy: d.GetPushedBy(), Void: d.GetVoid(), Match: cmp.Or(string(s.match(d, i)), "none"),
		TrustPolicies: d.GetTrustPolicies(), PushedWith: d.GetPushedWith(), ReceivedAt: timeOf(d.GetReceivedAt()), VerifiedAt: timeOf(d.GetVerifiedAt()),
	}
	if s.forgotten(d) {
		p.Void = "newer evidence of this source was known once, before the store was restored"
	}
	if r := d.report; r != nil {
		p.Scanner, p.ScannedAt, p.DBAt, p.Findings, p.Packages = r.Scanner, r.ScannedAt, r.DBAt, len(r.Findings), r.Packages
		for _, f := range r.Flaws {
			p.Flaws = append(p.Flaws, string(f))
		}
	}
	if d.vex != nil {
		p.Findings = len(d.vex.Statements)
	}
	return p
}

// gates returns the entries that demand evidence and could be for this image, of those that see lets through.
func (s *Service) gates(i *image, see func(*identity.Entry) bool) []Gate {
	var list []Gate
	for after := ""; ; {
		entries, next := s.View.ListEntries(view.EntryFilter{Keep: see}, after, 1000)
		for _, e := range entries {
			if !e.Gated() {
				continue
			}
			if named := identity.Digests(e.Selectors); len(named) > 0 && !slices.Contains(named, i.digest) {
				continue
			}
			g := Gate{Entry: e}
			if i.published != nil {
				g.Open = e.Gates().In(i.published.Selectors)
				for _, missing := range e.Gates().Missing(i.published.Selectors) {
					g.Missing = append(g.Missing, missing.String())
				}
			} else {
				g.Missing = e.Gates().Strings()
			}
			if list = append(list, g); len(list) == maxShown {
				return list
			}
		}
		if next == "" {
			return list
		}
		after = next
	}
}

// Explain tells the story of one image in sentences, under one policy or all. It takes text and see as Show does.
func (s *Service) Explain(text, only string, see func(*identity.Entry) bool) (digest string, lines []string, err error) {
	w, err := s.Show(text, see)
	if err != nil {
		return "", nil, err
	}
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	say("Image %s%s", w.Digest, parenthesis(strings.Join(w.Names, ", ")))
	for n, l := range w.Links {
		if n == maxTold {
			say("%d more digests lead to it", len(w.Links)-n)
			break
		}
		say("The %s %s%s leads to it, which was proved", l.Kind, l.Digest, parenthesis(l.Platform))
	}
	switch n := len(w.Agents); {
	case n > 0:
		say("It is run by %s", joinIDs(w.Agents))
	case w.SeenAt.IsZero():
		say("No agent has ever reported that it runs it")
	default:
		say("No agent runs it at the moment; it was first seen to run at %s", w.SeenAt.Format(time.RFC3339))
	}
	if len(w.Documents) == 0 {
		say("There is no evidence about it")
	}
	now := s.cfg.Now()
	for _, d := range w.Documents {
		age := "received " + now.Sub(d.ReceivedAt).Round(time.Second).String() + " ago"
		if !d.ScannedAt.IsZero() {
			age = "scanned " + now.Sub(d.ScannedAt).Round(time.Second).String() + " ago, " + age
		}
		line := fmt.Sprintf("%s of %s (%s, match %s): %s", d.Kind, d.Source, cmp.Or(d.Scanner, d.Format), d.Match, age)
		switch d.Kind {
		case kindReport:
			line += ", " + count(d.Findings, "finding")
		case kindVEX:
			line += ", " + count(d.Findings, "statement")
		}
		if d.Void != "" {
			line += "; it does not count: " + d.Void
		}
		say("%s", line)
	}
	if signed := signedFacts(w.Selectors); len(signed) > 0 {
		say("What was signed about it gives its workloads %s", strings.Join(signed, ", "))
	}
	for _, v := range w.Verdicts {
		if only != "" && v.Policy != only {
			continue
		}
		for line := range strings.Lines(policy.Explain(v.Verdict)) {
			say("%s", strings.TrimSuffix(strings.TrimSpace(line), "."))
		}
		if v.Held {
			say("The blast guard holds this back: what was allowed stays allowed until \"evidence release -policy %s\"", v.Policy)
		}
	}
	for _, g := range w.Gates {
		if g.Open {
			say("Entry %s (%s) is open to its workloads as far as evidence is concerned", g.Entry.ID, g.Entry.SPIFFEID)
		} else {
			say("Entry %s (%s) is closed to its workloads: missing %s", g.Entry.ID, g.Entry.SPIFFEID, strings.Join(g.Missing, ", "))
		}
	}
	return w.Digest, lines, nil
}

// maxTold bounds what Explain lists of one kind.
const maxTold = 10

// signedFacts are the selectors that rest on signatures.
func signedFacts(selectors []string) []string {
	return slices.DeleteFunc(slices.Clone(selectors), func(s string) bool {
		return !strings.HasPrefix(s, "sig:") && !strings.HasPrefix(s, "prov:")
	})
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func parenthesis(text string) string {
	if text == "" {
		return ""
	}
	return " (" + text + ")"
}

func joinIDs(ids []spiffeid.ID) string {
	var list []string
	for n, id := range ids {
		if n == 10 {
			list = append(list, fmt.Sprintf("and %d more", len(ids)-n))
			break
		}
		list = append(list, id.String())
	}
	return strings.Join(list, ", ")
}

// Difference is what other policies would change for an image.
type Difference struct {
	Digest, Policy              string
	Before, After               policy.Status // Before is empty for a policy that is not there yet
	AllowedBefore, AllowedAfter bool
	Agents                      []spiffeid.ID   // who runs the image
	Reasons                     []policy.Reason // of After
}

// Simulate says what the given policies would make of the images, without any effect. A policy with the
// name of one in force takes its place.
func (s *Service) Simulate(ctx context.Context, policies []*policy.ScanPolicy, running bool) (images int, list []Difference, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.cfg.Now()
	for _, digest := range s.all() {
		if err := ctx.Err(); err != nil {
			return 0, nil, err
		}
		i := s.state.images[digest]
		agents := s.View.Runners(digest)
		if running && len(agents) == 0 {
			continue
		}
		images++
		for n, v := range s.judge(policies, i, now) {
			was, existed := i.verdicts[policies[n].Name]
			d := Difference{
				Digest: digest, Policy: v.Policy, After: v.Status, AllowedAfter: v.Allowed, Agents: agents, Reasons: v.Reasons,
			}
			if existed {
				d.Before, d.AllowedBefore = was.Status, i.force[v.Policy].GetAllowed()
			}
			if !existed || d.Before != d.After || d.AllowedBefore != d.AllowedAfter {
				list = append(list, d)
			}
		}
	}
	return images, list, nil
}
