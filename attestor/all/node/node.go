// Package node is the agent's side of all: it gathers the evidence of every part, and hands each challenge to
// the part that it is for.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/all"
)

// Kind returns the agent's side of all, whose parts can be the given kinds.
func Kind(parts []attestor.NodeKind) attestor.NodeKind {
	known := all.KnownNodes(parts)
	return attestor.NodeKind{
		Type:   all.Type,
		Config: func() any { return all.NewAgentConfig(known) },
		Open: func(config any, needs attestor.Needs) (attestor.Node, error) {
			return open(config, needs, parts)
		},
	}
}

type part struct {
	kind string
	node attestor.Node
}

type node struct {
	combination string
	parts       []part
}

func open(config any, needs attestor.Needs, kinds []attestor.NodeKind) (attestor.Node, error) {
	c, ok := config.(*all.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("all configuration is a %T", config)
	}
	if wrong := c.DecodeParts(); wrong.HasErrors() {
		return nil, wrong
	}
	if !all.IsCombination(c.Combination) {
		return nil, fmt.Errorf("combination: %q is no name of lower-case letters, digits, - and _", c.Combination)
	}
	if err := all.CheckParts(c.Parts); err != nil {
		return nil, err
	}
	n := &node{combination: c.Combination}
	for i := range c.Parts {
		p := &c.Parts[i]
		for _, kind := range kinds {
			if kind.Type != p.Type {
				continue
			}
			opened, err := kind.Open(p.Config(), needs)
			if err != nil {
				return nil, fmt.Errorf("part %q: %w", p.Type, err)
			}
			n.parts = append(n.parts, part{p.Type, opened})
		}
	}
	return n, nil
}

// Evidence gathers that of every part.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	return n.gather(ctx, func(p attestor.Node) ([]byte, attestor.Ask, error) { return p.Evidence(ctx) })
}

// EvidenceFor gathers that of every part for a key.
func (n *node) EvidenceFor(ctx context.Context, key attestor.KeyHash) ([]byte, attestor.Ask, error) {
	return n.gather(ctx, func(p attestor.Node) ([]byte, attestor.Ask, error) { return attestor.Gather(ctx, p, key) })
}

func (n *node) gather(ctx context.Context, one func(attestor.Node) ([]byte, attestor.Ask, error)) ([]byte, attestor.Ask, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	evidence := all.Evidence{Combination: n.combination}
	answers := map[string]attestor.Ask{}
	for _, p := range n.parts {
		payload, answer, err := one(p.node)
		if err != nil {
			return nil, nil, fmt.Errorf("gather %s evidence: %w", p.kind, err)
		}
		evidence.Parts = append(evidence.Parts, all.Piece{Type: p.kind, Payload: payload})
		answers[p.kind] = answer
	}
	payload, err := json.Marshal(evidence)
	if err != nil {
		return nil, nil, err
	}
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) { return answer(ctx, answers, challenge) }, nil
}

func answer(ctx context.Context, answers map[string]attestor.Ask, message []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(message) > attestor.MaxEvidence {
		return nil, errors.New("challenge is too large")
	}
	var challenge all.Challenge
	if err := attestor.Decode(message, &challenge); err != nil {
		return nil, fmt.Errorf("decode challenge: %w", err)
	}
	answer, known := answers[challenge.Type]
	if !known || answer == nil {
		return nil, errors.New("challenge is for no part that knows one")
	}
	said, err := answer(ctx, challenge.Challenge)
	if err != nil {
		return nil, fmt.Errorf("part %s: %w", challenge.Type, err)
	}
	return json.Marshal(all.Response{Type: challenge.Type, Answer: said})
}
