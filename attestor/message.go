package attestor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

// Decode reads one JSON message of the other side and nothing after it. The error does not echo the message, as the
// parser's own would.
func Decode(message []byte, into any) error {
	if json.Unmarshal(message, into) != nil {
		return errors.New("message is not the JSON it should be")
	}
	return nil
}

// Challenge asks a challenge and reads the answer, both as JSON; answer is a pointer. An answer that is too large or
// no JSON is refused, with ErrEvidence.
func Challenge(ctx context.Context, ask Ask, challenge, answer any) error {
	question, err := json.Marshal(challenge)
	if err != nil {
		return fmt.Errorf("encode challenge: %w", err)
	}
	said, err := ask(ctx, question)
	if err != nil {
		return fmt.Errorf("ask challenge: %w", err)
	}
	if len(said) > MaxEvidence {
		return Refusef("read answer: it is too large")
	}
	if err := Decode(said, answer); err != nil {
		return Refusef("read answer: %w", err)
	}
	return nil
}
