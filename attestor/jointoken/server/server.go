// Package server is the server's side of join token attestation: it burns the token.
package server

import (
	"context"
	"errors"
	"fmt"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/jointoken"
)

// Kind returns the server's side of join_token.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{
		Type:   jointoken.Type,
		Config: func() any { return new(jointoken.ServerConfig) },
		Open:   open,
	}
}

type judge struct{ tokens attestor.TokenBurner }

func open(_ any, needs attestor.Needs) (attestor.Judge, error) {
	if needs.Tokens == nil {
		return nil, errors.New("join_token has no store of tokens")
	}
	return judge{needs.Tokens}, nil
}

// Judge burns the token and places the agent at join_token/<token>. A payload that cannot be a token
// is answered like an unknown one, with SPIRE's text: what tokens look like is nobody's business.
func (j judge) Judge(ctx context.Context, payload []byte, _ attestor.Ask) (attestor.Proof, error) {
	token := string(payload)
	if jointoken.Check(token) != nil {
		return attestor.Proof{}, attestor.Refusef("join token does not exist or has already been used")
	}
	if err := ctx.Err(); err != nil { // do not burn the token of somebody who has hung up
		return attestor.Proof{}, err
	}
	switch err := j.tokens.BurnToken(ctx, token); {
	case errors.Is(err, attestor.ErrEvidence), errors.Is(err, attestor.ErrUsed):
		return attestor.Proof{}, err // its text is SPIRE's, and reaches the caller as it is
	case err != nil:
		return attestor.Proof{}, fmt.Errorf("burn join token: %w", err)
	}
	return attestor.Proof{Path: jointoken.Type + "/" + token}, nil
}
