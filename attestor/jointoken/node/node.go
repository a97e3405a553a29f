// Package node is the agent's side of join token attestation: it presents the token.
package node

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/jointoken"
)

// Kind returns the agent's side of join_token.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{
		Type:   jointoken.Type,
		Config: func() any { return new(jointoken.AgentConfig) },
		Open:   open,
	}
}

type presenter struct{ token string }

// open accepts an agent without a token: one that has been attested before needs none.
func open(_ any, needs attestor.Needs) (attestor.Node, error) {
	token := strings.TrimSpace(needs.JoinToken) // a token file ends in a newline
	if token != "" {
		if err := jointoken.Check(token); err != nil {
			return nil, fmt.Errorf("read join token: %w", err)
		}
	}
	return presenter{token}, nil
}

// Evidence returns the token as it is. The server asks no challenge.
func (p presenter) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	if p.token == "" {
		return nil, nil, errors.New("no join token: make one with `assay-server token generate` and pass it to this agent")
	}
	return []byte(p.token), nil, nil
}
