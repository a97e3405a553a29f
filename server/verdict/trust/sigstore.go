package trust

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	sigbundle "github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
)

// This file is the only one that knows sigstore-go.

// bundle is a Sigstore bundle, v0.1 to v0.3
// (https://github.com/sigstore/protobuf-specs/blob/main/protos/sigstore_bundle.proto).
type bundle struct {
	parsed *sigbundle.Bundle
	// digest is what a bundle without an envelope signs, as "sha256:…".
	digest string
	// byKey says that the signer is a key and not a certificate.
	byKey bool
}

func openBundle(raw []byte) (doc *document, err error) {
	defer guard("read Sigstore bundle", &err)
	parsed := &sigbundle.Bundle{}
	if err := parsed.UnmarshalJSON(raw); err != nil {
		return nil, refuse(ErrMalformed, "the Sigstore bundle is unreadable: %w", oneLine(err))
	}
	doc = &document{kind: Bundle, bundle: &bundle{parsed: parsed}}
	doc.bundle.byKey = parsed.GetVerificationMaterial().GetPublicKey() != nil
	if e := parsed.GetDsseEnvelope(); e != nil {
		doc.envelope = &envelope{payloadType: e.GetPayloadType(), payload: e.GetPayload()}
		// A bundle has exactly one, although DSSE would allow more (sigstore_bundle.proto, dsse_envelope).
		if n := len(e.GetSignatures()); n != 1 {
			return nil, refuse(ErrSignature, "the envelope in the Sigstore bundle has %d signatures, and must have one", n)
		}
		s := e.GetSignatures()[0]
		doc.envelope.signatures = []signature{{keyID: s.GetKeyid(), sig: s.GetSig()}}
		return doc, nil
	}
	m := parsed.GetMessageSignature().GetMessageDigest()
	algorithm := map[protocommon.HashAlgorithm]string{
		protocommon.HashAlgorithm_SHA2_256: "sha256",
		protocommon.HashAlgorithm_SHA2_384: "sha384",
		protocommon.HashAlgorithm_SHA2_512: "sha512",
	}[m.GetAlgorithm()]
	doc.bundle.digest = algorithm + ":" + hex.EncodeToString(m.GetDigest())
	if !isDigest(doc.bundle.digest) {
		return nil, refuse(ErrMalformed, "the Sigstore bundle signs neither an envelope nor a SHA-2 digest")
	}
	return doc, nil
}

// statement is what a bundle without an envelope says: this digest is signed.
func (b *bundle) statement() *statement {
	return &statement{predicateType: SignaturePredicate, subjects: []string{b.digest}}
}

// sigstoreRoot is a trusted root file: the certificate authorities and logs of one Sigstore.
type sigstoreRoot struct {
	material *root.TrustedRoot
	hash     [sha256.Size]byte
}

func loadRoot(file []byte) (r *sigstoreRoot, err error) {
	defer guard("read trusted root", &err)
	material, err := root.NewTrustedRootFromJSON(file)
	if err != nil {
		return nil, oneLine(err)
	}
	if len(material.FulcioCertificateAuthorities()) == 0 {
		return nil, fmt.Errorf("it names no certificate authority")
	}
	return &sigstoreRoot{material: material, hash: sha256.Sum256(file)}, nil
}

// logs, stamps and certificateLogs say what the root can verify.
func (r *sigstoreRoot) logs() int            { return len(r.material.RekorLogs()) }
func (r *sigstoreRoot) stamps() int          { return len(r.material.TimestampingAuthorities()) }
func (r *sigstoreRoot) certificateLogs() int { return len(r.material.CTLogs()) }

// sigstoreTerms are what a bundle is verified with, but for who may have signed.
type sigstoreTerms struct {
	root                   *sigstoreRoot
	entries, stamps, certs int
}

// termsKey is the same for terms that come to the same verdict.
type termsKey struct {
	root                   [sha256.Size]byte
	entries, stamps, certs int
}

func (t sigstoreTerms) key() termsKey {
	return termsKey{t.root.hash, t.entries, t.stamps, t.certs}
}

// verdictOfBundle is what verification under some terms found.
type verdictOfBundle struct {
	leaf *x509.Certificate
	at   time.Time // the earliest of the verified timestamps
	last time.Time // the latest of them
	err  error
}

// verifyBundle verifies the signature, the certificate at the time of signing, the log entries and
// timestamps, all offline. Who signed and what it is about is for the caller to compare. Policies with
// the same terms share one verification.
func (d *document) verifyBundle(terms sigstoreTerms) verdictOfBundle {
	key := terms.key()
	if v, done := d.verdicts[key]; done {
		return v
	}
	v := d.bundle.verify(terms)
	if d.verdicts == nil {
		d.verdicts = map[termsKey]verdictOfBundle{}
	}
	d.verdicts[key] = v
	return v
}

func (b *bundle) verify(terms sigstoreTerms) (v verdictOfBundle) {
	defer guard("verify Sigstore bundle", &v.err)
	// A certificate lives for minutes, so a time from somebody who is trusted is needed always.
	options := []verify.VerifierOption{verify.WithObserverTimestamps(terms.stamps), verify.WithoutStatementPredicate()}
	if terms.entries > 0 {
		options = append(options, verify.WithTransparencyLog(terms.entries))
	}
	if terms.certs > 0 {
		options = append(options, verify.WithSignedCertificateTimestamps(terms.certs))
	}
	verifier, err := verify.NewVerifier(terms.root.material, options...)
	if err != nil {
		return verdictOfBundle{err: fmt.Errorf("make Sigstore verifier: %w", err)}
	}
	// The identity and the subjects are compared by accept, with rules that the library does not have.
	about := verify.WithoutArtifactUnsafe()
	if b.digest != "" {
		algorithm, sum, _ := strings.Cut(b.digest, ":")
		bytes, err := hex.DecodeString(sum)
		if err != nil {
			return verdictOfBundle{err: refuse(ErrMalformed, "the digest in the Sigstore bundle is unreadable")}
		}
		about = verify.WithArtifactDigest(algorithm, bytes)
	}
	result, err := verifier.Verify(b.parsed, verify.NewPolicy(about, verify.WithoutIdentitiesUnsafe()))
	if err != nil {
		return verdictOfBundle{err: refuse(ErrSignature, "the Sigstore bundle does not verify: %w", oneLine(err))}
	}
	content, err := b.parsed.VerificationContent()
	if err != nil || content.Certificate() == nil {
		return verdictOfBundle{err: refuse(ErrSignature, "the Sigstore bundle holds no certificate")}
	}
	v.leaf = content.Certificate()
	for _, t := range result.VerifiedTimestamps {
		if v.at.IsZero() || t.Timestamp.Before(v.at) {
			v.at = t.Timestamp
		}
		if t.Timestamp.After(v.last) {
			v.last = t.Timestamp
		}
	}
	if v.at.IsZero() {
		return verdictOfBundle{err: refuse(ErrTime, "nobody vouches for when the Sigstore bundle was signed")}
	}
	v.at, v.last = v.at.UTC(), v.last.UTC()
	return v
}

// guard turns a panic of the library into a refusal: it parses formats of many makers, and a push by one
// caller must not end the server for all.
func guard(doing string, err *error) {
	if r := recover(); r != nil {
		*err = refuse(ErrMalformed, "%s: it cannot be read (%v)", doing, clip(fmt.Sprint(r)))
	}
}

// oneLine shortens what the library says, some of which quotes the input.
func oneLine(err error) error {
	return fmt.Errorf("%s", clip(strings.Join(strings.Fields(err.Error()), " ")))
}
