package attestor

import "fmt"

// refusal keeps the text of a refusal free of the text of ErrEvidence: callers see it, and SPIRE's
// agents and scripts know some of these texts word by word.
type refusal struct{ err error }

func (r refusal) Error() string   { return r.err.Error() }
func (r refusal) Unwrap() []error { return []error{ErrEvidence, r.err} }

// Refusef returns an error that is ErrEvidence and whose text is the formatted one and nothing else.
// Like fmt.Errorf it wraps what %w is given. The text reaches the caller, so it must not tell them
// more about the server than their own evidence does.
func Refusef(format string, args ...any) error {
	return refusal{fmt.Errorf(format, args...)}
}
