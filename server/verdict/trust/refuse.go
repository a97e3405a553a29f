package trust

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Why a document or a caller is refused. Each wraps ErrRefused.
var (
	ErrRefused = errors.New("evidence refused")
	// ErrTooLarge: more bytes, signatures or subjects than are looked at.
	ErrTooLarge = reason("too-large")
	// ErrMalformed: not in the form it claims to have.
	ErrMalformed = reason("malformed")
	// ErrSignature: no signature by a trusted key, or none that verifies.
	ErrSignature = reason("signature")
	// ErrWindow: signed by a key outside of the time in which it is used.
	ErrWindow = reason("key-window")
	// ErrRevoked: signed by a key that was revoked.
	ErrRevoked = reason("revoked-key")
	// ErrIdentity: signed by somebody else than those who are trusted.
	ErrIdentity = reason("identity")
	// ErrDigest: about another image.
	ErrDigest = reason("digest")
	// ErrPredicate: a kind of statement that the policy does not accept from its signers.
	ErrPredicate = reason("predicate-type")
	// ErrScope: for a repository outside of the policy's or the source's.
	ErrScope = reason("repository")
	// ErrTime: a time in the future, an expired token, a missing timestamp.
	ErrTime = reason("time")
	// ErrUntrusted: nobody is configured who could vouch for it.
	ErrUntrusted = reason("untrusted")
	// ErrAudience: a token that was made for somebody else.
	ErrAudience = reason("audience")
)

// reasonError is a sentinel below ErrRefused whose text is a metric label.
type reasonError struct{ word string }

func reason(word string) error { return &reasonError{word} }

func (r *reasonError) Error() string { return r.word }
func (r *reasonError) Unwrap() error { return ErrRefused }

// refusal is a sentence that is one of the reasons above.
type refusal struct {
	why  error
	text string
	also error // what the sentence was made of, for errors.Is; may be nil
}

func (r *refusal) Error() string { return r.text }

func (r *refusal) Unwrap() []error {
	if r.also == nil {
		return []error{r.why}
	}
	return []error{r.why, r.also}
}

// refuse returns a refusal for the given reason. Its text is the formatted one and nothing else; %w works
// as with fmt.Errorf, for one error.
func refuse(why error, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &refusal{why: why, text: err.Error(), also: errors.Unwrap(err)}
}

// join makes one error of what the policies say, in one line. Where all say the same it is said once.
func join(refusals []error) error {
	if len(refusals) == 1 {
		return refusals[0]
	}
	return &several{refusals}
}

type several struct{ errs []error }

func (s *several) Error() string {
	texts := make([]string, len(s.errs))
	for i, err := range s.errs {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (s *several) Unwrap() []error { return s.errs }

// reasonOf returns the word of the first reason in the error, for a metric.
func reasonOf(err error) string {
	for _, why := range []error{
		ErrTooLarge, ErrMalformed, ErrRevoked, ErrWindow, ErrTime, ErrDigest, ErrIdentity, ErrPredicate, ErrScope, ErrAudience,
		ErrSignature, ErrUntrusted,
	} {
		if errors.Is(err, why) {
			return why.Error()
		}
	}
	return "other"
}

// clip keeps a hostile string from filling an error message or confusing a terminal.
func clip(s string) string {
	const most = 120
	cut := false
	if len(s) > most {
		s, cut = strings.ToValidUTF8(s[:most], ""), true
	}
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return '?'
		}
		return r
	}, s)
	if cut {
		s += "…"
	}
	return s
}

// orList writes "a", "b" or "c".
func orList(words []string) string {
	q := make([]string, len(words))
	for i, w := range words {
		q[i] = fmt.Sprintf("%q", w)
	}
	switch len(q) {
	case 0:
		return "nothing"
	case 1:
		return q[0]
	}
	return strings.Join(q[:len(q)-1], ", ") + " or " + q[len(q)-1]
}

func sortedUnique(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}
