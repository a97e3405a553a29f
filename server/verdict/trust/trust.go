// Package trust says who vouches for a piece of evidence: a scan report, a VEX document, a provenance
// statement. It turns bytes into a Proof, or into a refusal that names what is wrong with them.
//
// Three forms are known. A bare document is vouched for by nobody here; who pushed it (Callers: an OIDC
// token of a CI system, or an SVID) is all that is known of it. A DSSE envelope is signed with plain
// public keys, which a trust policy lists with the time in which each is used. A Sigstore bundle is
// signed under a certificate that says which workflow signed, and is verified offline against a trusted
// root file. What claims to be signed and does not verify is refused; it never counts as bare.
//
// Why it is so: verification is a pure function of the bytes, the policies and the time at which the
// server first saw the bytes. The server keeps the bytes, so a policy that changes (a key revoked, an
// identity no longer trusted) is applied to everything it once accepted, and a restart comes to the same
// answers. Nothing is cached.
//
// Why a signature under a key is judged by when it was first seen: a DSSE envelope carries no time that
// its signer could not have invented, so the window of a key is compared with our own clock at receipt.
// A stolen key that has left its window is worthless from then on. What was received in time stays
// valid; revoked_keys is for keys whose earlier signatures are in doubt too. A Sigstore certificate is
// judged by the times that logs and timestamp authorities signed.
//
// Why prov:* selectors come from certificate extensions first: the CI system's issuer wrote those, while
// whoever holds the signing identity wrote the statement's body. The source (repository, commit, ref) is
// taken whole from one of the two, so that a body cannot add a commit to a repository the certificate
// names. And only statements about how an image was made say prov:* at all: the certificate on a scan
// report tells where the scanner runs, not where the image comes from.
package trust

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Limits on what is looked at.
const (
	// MaxDocument is the largest document, in bytes, that is verified or passed on.
	MaxDocument = 32 << 20
	// Skew is how far the clocks of others may be ahead of ours.
	Skew = 5 * time.Minute
)

// Kind is the form a document came in.
type Kind string

// The forms.
const (
	Bare   Kind = "bare"
	DSSE   Kind = "dsse"
	Bundle Kind = "sigstore-bundle"
)

// Want is what a document has to be about.
type Want struct {
	// Digests name the image, as "sha256:…" (or sha384, sha512) in lower-case hex: its config,
	// manifest or index digest, all of them proven to be the same image. A signed statement has to
	// name one of them.
	Digests []string
	// Repository is what the image is pushed as, without tag and digest, for policies that are
	// limited to repositories.
	Repository string
}

// Proof is what is known of a document that was accepted.
type Proof struct {
	// TrustPolicies are the names of the policies that vouch for it, sorted; none for a bare document.
	TrustPolicies []string
	Kind          Kind
	// Signer is who signed, under the first of the policies: the one subject alternative name of the
	// certificate, or the key as "sha256:…" over its SubjectPublicKeyInfo. Issuer is the OIDC issuer
	// that authenticated the signer, empty for keys.
	Signer, Issuer string
	// Fields are the extensions of the signer's certificate by name (FieldSourceURI
	// and so on).
	Fields map[string]string
	// Subjects are the digests that the statement names, as "sha256:…", sorted; Matched are those of
	// them that were asked for.
	Subjects, Matched []string
	// PredicateType is the statement's, SignaturePredicate for a signature over a bare digest.
	PredicateType string
	// VerifiedAt is the earliest time that a log or timestamp authority vouches for; the time of
	// first sight for DSSE, which has none; zero for a bare document.
	VerifiedAt time.Time
	// Body is the document without its wrapping: the in-toto statement, or the bare document. It is
	// nil for a signature over a bare digest.
	Body []byte

	grants []grant
}

// grant is what one policy accepted.
type grant struct {
	policy         string
	signer, issuer string
	fields         map[string]string
	// made says that the statement is about how the image was made, so that it yields prov:*.
	made   bool
	about  provenance
	mapped map[string][]string
}

// Config are the optional parts of a Verifier.
type Config struct {
	// Now is the clock of Verify; nil means time.Now.
	Now func() time.Time
	// Metrics takes the counter of verified and refused documents; nil counts for nobody.
	Metrics prometheus.Registerer
}

// Verifier holds the trust policies in force. It is safe for concurrent use.
type Verifier struct {
	policies atomic.Pointer[[]*Policy]
	now      func() time.Time
	verified *prometheus.CounterVec
}

// New returns a Verifier with the given policies, none of which means that only bare documents pass.
// The error says that the metrics could not be registered.
func New(policies []*Policy, config Config) (*Verifier, error) {
	if config.Now == nil {
		config.Now = time.Now
	}
	v := &Verifier{
		now: config.Now,
		verified: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_evidence_verified_total",
			Help: "Documents that trust policies looked at, by form and by result: accepted, or why not.",
		}, []string{"form", "result"}),
	}
	if config.Metrics != nil {
		if err := config.Metrics.Register(v.verified); err != nil {
			return nil, fmt.Errorf("register evidence metrics: %w", err)
		}
	}
	v.Replace(policies)
	return v, nil
}

// Replace puts other policies in force. Documents accepted before are to be verified again with
// VerifyAt, with the time at which each was first seen.
func (v *Verifier) Replace(policies []*Policy) { v.policies.Store(&policies) }

// Policies returns the policies in force. The caller must not change the slice.
func (v *Verifier) Policies() []*Policy { return *v.policies.Load() }

// Verify is VerifyAt for a document seen now.
func (v *Verifier) Verify(ctx context.Context, raw []byte, want Want) (*Proof, error) {
	return v.VerifyAt(ctx, raw, want, v.now())
}

// VerifyAt says who vouches for a document that was first seen at the given time. The answer depends on
// nothing but its arguments and the policies in force. The error wraps ErrRefused and says what is wrong,
// under each policy; errors.Is tells the reasons apart. Only ctx ending yields another error.
func (v *Verifier) VerifyAt(ctx context.Context, raw []byte, want Want, seen time.Time) (*Proof, error) {
	form, proof, err := v.verify(ctx, raw, want, seen)
	switch {
	case err == nil:
		v.verified.WithLabelValues(string(form), "accepted").Inc()
	case errors.Is(err, ErrRefused):
		v.verified.WithLabelValues(string(form), reasonOf(err)).Inc()
	}
	return proof, err
}

func (v *Verifier) verify(ctx context.Context, raw []byte, want Want, seen time.Time) (Kind, *Proof, error) {
	if err := want.check(); err != nil {
		return Bare, nil, err
	}
	doc, err := open(raw)
	if err != nil {
		return Bare, nil, err
	}
	if doc.kind == Bare {
		return Bare, &Proof{Kind: Bare, Body: raw}, nil
	}
	proof, err := v.judge(ctx, doc, want, seen)
	return doc.kind, proof, err
}

// judge asks every policy, so that a document counts for all that trust it.
func (v *Verifier) judge(ctx context.Context, doc *document, want Want, seen time.Time) (*Proof, error) {
	policies := v.Policies()
	if len(policies) == 0 {
		return nil, refuse(ErrUntrusted, "the document is signed, and there is no trust_policy that could say by whom")
	}
	var proof *Proof
	var refusals []error
	for _, p := range policies {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		accepted, err := p.accept(ctx, doc, want, seen)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				return nil, err
			}
			refusals = append(refusals, fmt.Errorf("trust policy %q: %w", p.name, err))
			continue
		}
		if proof == nil {
			g := accepted.grant
			proof = &Proof{
				Kind: doc.kind, Signer: g.signer, Issuer: g.issuer, Fields: g.fields,
				Subjects: accepted.statement.subjects, Matched: accepted.statement.matching(want.Digests),
				PredicateType: accepted.statement.predicateType, VerifiedAt: accepted.at, Body: accepted.statement.body,
			}
		}
		proof.TrustPolicies = append(proof.TrustPolicies, p.name)
		proof.grants = append(proof.grants, accepted.grant)
		if accepted.at.Before(proof.VerifiedAt) {
			proof.VerifiedAt = accepted.at
		}
	}
	if proof == nil {
		return nil, join(refusals)
	}
	return proof, nil
}

// maxDigests is more than an image has names: config, manifest, indexes and the same of mirrors.
const maxDigests = 256

func (w Want) check() error {
	if len(w.Digests) == 0 {
		return refuse(ErrDigest, "no digest was asked for")
	}
	if len(w.Digests) > maxDigests {
		return refuse(ErrDigest, "%d digests were asked for, the limit is %d", len(w.Digests), maxDigests)
	}
	for _, d := range w.Digests {
		if !isDigest(d) {
			return refuse(ErrDigest, "%q is no digest: it must be \"sha256:\" and 64 lower-case hex digits", clip(d))
		}
	}
	return nil
}
