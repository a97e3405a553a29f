package trust

import (
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
)

// document is what came in, taken apart but not believed.
type document struct {
	kind Kind
	// envelope is the DSSE envelope, alone or within a bundle; nil for a bundle that signs a digest.
	envelope *envelope
	bundle   *bundle

	// What follows is made when first needed and the same for all policies.
	signed    *message
	statement *statement
	broken    error
	verdicts  map[termsKey]verdictOfBundle
}

// open finds out what a document is. What looks signed is never taken for bare.
func open(raw []byte) (*document, error) {
	if len(raw) > MaxDocument {
		return nil, refuse(ErrTooLarge, "the document is %d bytes large, the limit is %d", len(raw), MaxDocument)
	}
	top, err := topOf(raw)
	if err != nil {
		return nil, err
	}
	has := func(key string) bool { _, ok := top[key]; return ok }
	switch {
	case has("verificationMaterial"), has("dsseEnvelope"), has("messageSignature"):
		return openBundle(raw)
	case has("payload") && (has("payloadType") || has("signatures")):
		e, err := parseEnvelope(top)
		if err != nil {
			return nil, err
		}
		return &document{kind: DSSE, envelope: e}, nil
	}
	return &document{kind: Bare}, nil
}

// message returns what the envelope's signatures are over.
func (d *document) message() *message {
	if d.signed == nil {
		d.signed = &message{bytes: pae(d.envelope.payloadType, d.envelope.payload)}
	}
	return d.signed
}

// content returns the statement of a document whose signature was verified.
func (d *document) content() (*statement, error) {
	if d.statement == nil && d.broken == nil {
		if d.envelope != nil {
			d.statement, d.broken = parseStatement(d.envelope)
		} else {
			d.statement = d.bundle.statement()
		}
	}
	return d.statement, d.broken
}

// SignaturePredicate is the predicate type of cosign's signatures, and what a signature over a bare digest
// counts as.
const SignaturePredicate = "https://sigstore.dev/cosign/sign/v1"

const (
	maxSubjects       = 1024
	maxSubjectDigests = 32
)

// statement is the part of an in-toto statement that trust is about.
type statement struct {
	predicateType string
	subjects      []string // as "sha256:…", sorted
	body          []byte   // nil for a signature over a bare digest
	predicate     []byte
}

// parseStatement reads an in-toto statement v0.1 or v1
// (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md).
func parseStatement(e *envelope) (*statement, error) {
	const what = "the statement"
	if e.payloadType != inTotoPayload {
		return nil, refuse(ErrMalformed, "the payload is of type %q; what is signed must be an in-toto statement (%s), for only that names an image",
			clip(e.payloadType), inTotoPayload)
	}
	m, err := topOf(e.payload)
	if err != nil {
		return nil, err
	}
	form, err := m.text("_type", what)
	if err != nil {
		return nil, err
	}
	if form != "https://in-toto.io/Statement/v1" && form != "https://in-toto.io/Statement/v0.1" {
		return nil, refuse(ErrMalformed, "the payload is no in-toto statement v0.1 or v1: its _type is %q", clip(form))
	}
	s := &statement{body: e.payload, predicate: m["predicate"]}
	if s.predicateType, err = m.text("predicateType", what); err != nil {
		return nil, err
	}
	if s.predicateType == "" {
		return nil, refuse(ErrMalformed, "the statement has no predicateType")
	}
	var subjects []json.RawMessage
	if err := json.Unmarshal(m["subject"], &subjects); err != nil || len(subjects) == 0 {
		return nil, refuse(ErrMalformed, "the statement has no subject: it is about nothing")
	}
	if len(subjects) > maxSubjects {
		return nil, refuse(ErrTooLarge, "the statement has %d subjects, the limit is %d", len(subjects), maxSubjects)
	}
	for _, raw := range subjects {
		digests, err := parseSubject(raw)
		if err != nil {
			return nil, err
		}
		s.subjects = append(s.subjects, digests...)
	}
	s.subjects = sortedUnique(s.subjects)
	return s, nil
}

// parseSubject returns the digests of a subject in the algorithms that name images. Others are left out.
func parseSubject(raw json.RawMessage) ([]string, error) {
	const what = "a subject of the statement"
	m, err := objectOf(raw, what)
	if err != nil {
		return nil, err
	}
	var set map[string]string
	if err := json.Unmarshal(m["digest"], &set); err != nil || len(set) == 0 {
		return nil, refuse(ErrMalformed, "%s has no digest", what)
	}
	if len(set) > maxSubjectDigests {
		return nil, refuse(ErrTooLarge, "%s has %d digests, the limit is %d", what, len(set), maxSubjectDigests)
	}
	var digests []string
	for algorithm, value := range set {
		if digestBytes[algorithm] == 0 {
			continue
		}
		d := algorithm + ":" + value
		if !isDigest(d) {
			return nil, refuse(ErrMalformed, "%s has the digest %q, which is no lower-case hex of the right length", what, clip(d))
		}
		digests = append(digests, d)
	}
	return digests, nil
}

// digestBytes are the algorithms that name what a statement is about, and how long their sums are.
var digestBytes = map[string]int{"sha256": 32, "sha384": 48, "sha512": 64}

// isDigest reports whether the text is an algorithm, a colon and lower-case hex of the right length.
func isDigest(d string) bool {
	algorithm, sum, _ := strings.Cut(d, ":")
	n := digestBytes[algorithm]
	if n == 0 || len(sum) != 2*n || strings.ToLower(sum) != sum {
		return false
	}
	_, err := hex.DecodeString(sum)
	return err == nil
}

// matching returns the subjects that were asked for.
func (s *statement) matching(want []string) []string {
	var both []string
	for _, d := range s.subjects {
		if slices.Contains(want, d) {
			both = append(both, d)
		}
	}
	return both
}
