package trust

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// acceptance is what a policy found.
type acceptance struct {
	grant     grant
	statement *statement
	at        time.Time
}

// accept says whether the policy vouches for the document: somebody it trusts signed, about one of the
// digests, a kind of statement that they are trusted with. The signature comes first; nothing that is
// not signed is looked into.
func (p *Policy) accept(ctx context.Context, doc *document, want Want, seen time.Time) (*acceptance, error) {
	if !p.scope.has(want.Repository) {
		return nil, refuse(ErrScope, "it is limited to %s, and the image is pushed as %q", orList(p.scope), clip(want.Repository))
	}
	g, at, err := p.signer(ctx, doc, seen)
	if err != nil {
		return nil, err
	}
	s, err := doc.content()
	if err != nil {
		return nil, err
	}
	if len(s.matching(want.Digests)) == 0 {
		return nil, refuse(ErrDigest, "the document is signed, but about %s, and not about %s", someOf(s.subjects), someOf(want.Digests))
	}
	if !isOneOf(s.predicateType, p.accepts) {
		return nil, refuse(ErrPredicate, "its signers are not trusted with statements of type %q", clip(s.predicateType))
	}
	if err := p.made(g, s); err != nil {
		return nil, err
	}
	return &acceptance{grant: *g, statement: s, at: at}, nil
}

// signer says who signed, if it is somebody trusted, and when.
func (p *Policy) signer(ctx context.Context, doc *document, seen time.Time) (*grant, time.Time, error) {
	if doc.bundle != nil && !doc.bundle.byKey {
		return p.certified(doc, seen)
	}
	if doc.envelope == nil {
		return nil, time.Time{}, refuse(ErrMalformed, "the Sigstore bundle is a key's signature over a bare digest; have the key sign a statement")
	}
	k, err := p.verifyEnvelope(ctx, doc, seen)
	if err != nil {
		return nil, time.Time{}, err
	}
	return &grant{policy: p.name, signer: k.fingerprint}, seen, nil
}

// certified tries every sigstore block and says of each why it does not fit.
func (p *Policy) certified(doc *document, seen time.Time) (*grant, time.Time, error) {
	if len(p.signers) == 0 {
		return nil, time.Time{}, refuse(ErrUntrusted, "it has no sigstore block, and the document is signed under a certificate")
	}
	var refusals []error
	for _, s := range p.signers {
		v := doc.verifyBundle(s.terms)
		if v.err != nil {
			refusals = append(refusals, v.err)
			continue
		}
		g, err := s.identify(p, v, seen)
		if err == nil {
			g.policy = p.name
			return g, v.at, nil
		}
		refusals = append(refusals, err)
	}
	return nil, time.Time{}, join(refusals)
}

// sshRerun is what CircleCI calls a job into which somebody can log in while it runs.
const sshRerun = "ssh-rerun"

// identify compares who signed with who may.
func (s *signers) identify(p *Policy, v verdictOfBundle, seen time.Time) (*grant, error) {
	if v.last.After(seen.Add(Skew)) {
		return nil, refuse(ErrTime, "the document was signed at %s, which is after it was received at %s; a clock is wrong",
			v.last.Format(time.RFC3339), seen.UTC().Format(time.RFC3339))
	}
	print, err := fingerprint(v.leaf.PublicKey)
	if err != nil {
		return nil, refuse(ErrMalformed, "the key of the certificate is unreadable: %w", err)
	}
	if p.revoked[print] {
		return nil, refuse(ErrRevoked, "the document is signed with key %s, which is in revoked_keys", print)
	}
	name, err := signerName(v.leaf)
	if err != nil {
		return nil, err
	}
	fields, err := extensions(v.leaf)
	if err != nil {
		return nil, err
	}
	g := &grant{signer: name, issuer: fields[FieldIssuer], fields: fields}
	if !s.issuer.match(g.issuer) {
		return nil, refuse(ErrIdentity, "the signer was authenticated by %q, and not by %s", clip(g.issuer), s.issuer)
	}
	if s.identity != nil && !s.identity.match(name) {
		return nil, refuse(ErrIdentity, "the signer is %q, and not %s", clip(name), s.identity)
	}
	if err := s.where.hold(fields); err != nil {
		return nil, err
	}
	named := slices.ContainsFunc(s.where, func(c condition) bool { return c.field == FieldRunnerEnvironment })
	if fields[FieldRunnerEnvironment] == sshRerun && !named {
		return nil, refuse(ErrIdentity, "the signer is a job that somebody could log in to (%s is %q)", FieldRunnerEnvironment, sshRerun)
	}
	return g, nil
}

// hold says which condition does not.
func (cs conditions) hold(fields map[string]string) error {
	for _, c := range cs {
		value, stated := fields[c.field]
		switch {
		case !stated:
			return refuse(ErrIdentity, "%s is not stated, and must be %s", c.field, c.is)
		case !c.is.match(value):
			return refuse(ErrIdentity, "%s is %q, and not %s", c.field, clip(value), c.is)
		}
	}
	return nil
}

// isOneOf reports whether a predicate type is in the list, in which one that ends in / is a beginning.
func isOneOf(predicate string, types []string) bool {
	return slices.ContainsFunc(types, func(t string) bool {
		return t == predicate || strings.HasSuffix(t, "/") && strings.HasPrefix(predicate, t)
	})
}

// someOf writes a list of digests so that it fits a line.
func someOf(digests []string) string {
	const most = 3
	if len(digests) <= most {
		return strings.Join(digests, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(digests[:most], ", "), len(digests)-most)
}
