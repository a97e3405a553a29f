// Package server is the server's side of all: every part must be proved, in one conversation and for one key.
package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/all"
)

// spends is the type whose evidence is used up by judging it, which is why it is judged last: a part that is
// not proved must not cost the token.
const spends = "join_token"

// Kind returns the server's side of all, whose parts can be the given kinds.
func Kind(parts []attestor.JudgeKind) attestor.JudgeKind {
	known := all.KnownJudges(parts)
	return attestor.JudgeKind{
		Type:   all.Type,
		Config: func() any { return all.NewServerConfig(known) },
		Open: func(config any, needs attestor.Needs) (attestor.Judge, error) {
			return open(config, needs, parts)
		},
	}
}

type part struct {
	kind  string
	judge attestor.Judge
}

type combination struct {
	name, id string
	same     [][]string
	parts    []part // in the order of judging
	// bound are the types of the parts that are bound to a node by having been seen with it. Parts that same
	// holds together need not be: a certificate that names its TPM can be renewed.
	bound map[string]bool
}

type judge struct {
	combinations map[string]*combination
	types        []string
	log          logrus.FieldLogger
}

func open(config any, needs attestor.Needs, kinds []attestor.JudgeKind) (attestor.Judge, error) {
	c, ok := config.(*all.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("all configuration is a %T", config)
	}
	if wrong := c.DecodeParts(); wrong.HasErrors() {
		return nil, wrong
	}
	if len(c.Combinations) == 0 {
		return nil, errors.New("there is no combination block")
	}
	j := &judge{combinations: map[string]*combination{}, types: []string{all.Type}, log: needs.Log}
	if j.log == nil {
		j.log = logrus.New()
	}
	for i := range c.Combinations {
		one, err := openCombination(&c.Combinations[i], needs, kinds)
		if err == nil && j.combinations[one.name] != nil {
			err = errors.New("it is there twice")
		}
		if err != nil {
			return nil, fmt.Errorf("combination %q: %w", c.Combinations[i].Name, err)
		}
		j.combinations[one.name] = one
		for _, p := range one.parts {
			if !slices.Contains(j.types, p.kind) {
				j.types = append(j.types, p.kind)
			}
		}
	}
	return j, nil
}

func openCombination(c *all.Combination, needs attestor.Needs, kinds []attestor.JudgeKind) (*combination, error) {
	if !all.IsCombination(c.Name) {
		return nil, errors.New("its name must be lower-case letters, digits, - and _")
	}
	if err := all.CheckParts(c.Parts); err != nil {
		return nil, err
	}
	out := &combination{name: c.Name, id: c.ID, same: c.Same}
	if out.id == "" {
		out.id = c.Parts[0].Type
	}
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
			out.parts = append(out.parts, part{p.Type, opened})
		}
	}
	has := func(kind string) bool {
		return slices.ContainsFunc(out.parts, func(p part) bool { return p.kind == kind })
	}
	if !has(out.id) {
		return nil, fmt.Errorf("id_from: %q is none of its parts", out.id)
	}
	for _, list := range c.Same {
		if len(list) < 2 {
			return nil, errors.New("same: each list needs two selectors or more, as [\"tpm:ek\", \"x509pop:san:ek\"]")
		}
		for _, s := range list {
			if kind, rest, _ := strings.Cut(s, ":"); rest == "" || !has(kind) {
				return nil, fmt.Errorf("same: %q is no selector without its value, of one of the parts", s)
			}
		}
	}
	out.bind()
	slices.SortStableFunc(out.parts, func(a, b part) int {
		switch {
		case a.kind == b.kind:
			return 0
		case a.kind == spends:
			return 1
		case b.kind == spends:
			return -1
		}
		return 0
	})
	return out, nil
}

// bind finds the parts that same does not hold together with the one that names the agent. If there are any,
// they and that one are bound to each other.
func (c *combination) bind() {
	held := map[string]bool{c.id: true}
	for grown := true; grown; {
		grown = false
		for _, list := range c.same {
			touches := slices.ContainsFunc(list, func(s string) bool { return held[kindOf(s)] })
			for _, s := range list {
				if touches && !held[kindOf(s)] {
					held[kindOf(s)], grown = true, true
				}
			}
		}
	}
	c.bound = map[string]bool{}
	for _, p := range c.parts {
		if !held[p.kind] {
			c.bound[p.kind], c.bound[c.id] = true, true
		}
	}
}

func kindOf(selector string) string {
	kind, _, _ := strings.Cut(selector, ":")
	return kind
}

// SelectorTypes are this type and those of the parts.
func (j *judge) SelectorTypes() []string { return j.types }

// Judge judges every part.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	return j.decide(ctx, payload, ask, func(p attestor.Judge, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
		return p.Judge(ctx, payload, ask)
	})
}

// JudgeFor judges every part, for one key.
func (j *judge) JudgeFor(ctx context.Context, payload []byte, key attestor.KeyHash, ask attestor.Ask) (attestor.Proof, error) {
	return j.decide(ctx, payload, ask, func(p attestor.Judge, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
		return attestor.Decide(ctx, p, payload, key, ask)
	})
}

type decide func(p attestor.Judge, payload []byte, ask attestor.Ask) (attestor.Proof, error)

func (j *judge) decide(ctx context.Context, payload []byte, ask attestor.Ask, one decide) (attestor.Proof, error) {
	var none attestor.Proof
	if err := ctx.Err(); err != nil {
		return none, err
	}
	c, payloads, err := j.parse(payload)
	if err != nil {
		return none, attestor.Refusef("read evidence: %w", err)
	}
	proof := attestor.Proof{CanReattest: true}
	found := []attestor.Selector{{Type: all.Type, Value: "combination:" + c.name}}
	for _, p := range c.parts {
		proved, err := one(p.judge, payloads[p.kind], through(p.kind, ask))
		switch {
		case errors.Is(err, attestor.ErrEvidence):
			return none, attestor.Refusef("part %s: %w", p.kind, err)
		case err != nil:
			return none, fmt.Errorf("part %s: %w", p.kind, err)
		}
		if !strings.HasPrefix(proved.Path, p.kind+"/") {
			// A template of the operator's has left the attestor's place: it must not look like another's.
			proved.Path = p.kind + "/" + proved.Path
		}
		proof.CanReattest = proof.CanReattest && proved.CanReattest
		if c.bound[p.kind] {
			proof.Parts = append(proof.Parts, proved.Path)
		}
		if p.kind == c.id {
			proof.Path = strings.Join([]string{all.Type, c.name, proved.Path}, "/")
		}
		found = append(found, attestor.Selector{Type: all.Type, Value: all.PartSelector + proved.Path})
		for _, s := range proved.Selectors {
			if s.Type != p.kind {
				return none, fmt.Errorf("part %s: it answered a selector of type %q", p.kind, s.Type)
			}
			found = append(found, s)
		}
	}
	set := attestor.NewSet(found...)
	if err := c.together(set); err != nil {
		return none, attestor.Refusef("the parts are not of one machine: %w", err)
	}
	proof.Selectors = set.All()
	return proof, nil
}

// parse reads the payload: the parts must be those of the combination, each once.
func (j *judge) parse(payload []byte) (*combination, map[string][]byte, error) {
	if len(payload) > attestor.MaxEvidence {
		return nil, nil, errors.New("it is too large")
	}
	var evidence all.Evidence
	if err := attestor.Decode(payload, &evidence); err != nil {
		return nil, nil, err
	}
	c := j.combinations[evidence.Combination]
	if c == nil {
		return nil, nil, errors.New("this server has no such combination")
	}
	payloads := map[string][]byte{}
	for _, piece := range evidence.Parts {
		if len(piece.Payload) == 0 || payloads[piece.Type] != nil {
			return nil, nil, errors.New("a part is empty or there twice")
		}
		payloads[piece.Type] = piece.Payload
	}
	for _, p := range c.parts {
		if payloads[p.kind] == nil {
			return nil, nil, fmt.Errorf("part %s is missing", p.kind)
		}
	}
	if len(payloads) != len(c.parts) {
		return nil, nil, errors.New("it has parts that the combination has not")
	}
	return c, payloads, nil
}

// through asks a part's challenges in the conversation of all.
func through(kind string, ask attestor.Ask) attestor.Ask {
	return func(ctx context.Context, challenge []byte) ([]byte, error) {
		question, err := json.Marshal(all.Challenge{Type: kind, Challenge: challenge})
		if err != nil {
			return nil, err
		}
		said, err := ask(ctx, question)
		if err != nil {
			return nil, err
		}
		if len(said) > attestor.MaxEvidence {
			return nil, attestor.Refusef("read answer: it is too large")
		}
		var response all.Response
		if err := attestor.Decode(said, &response); err != nil {
			return nil, attestor.Refusef("read answer: %w", err)
		}
		if response.Type != kind {
			return nil, attestor.Refusef("read answer: it is another part's")
		}
		return response.Answer, nil
	}
}

// together says which values the parts should have in common and have not, or nil.
func (c *combination) together(set attestor.Set) error {
	for _, list := range c.same {
		var common []string
		for i, prefix := range list {
			var values []string
			for _, text := range set.Strings() {
				if value, ok := strings.CutPrefix(text, prefix+":"); ok {
					values = append(values, value)
				}
			}
			if i == 0 {
				common = values
				continue
			}
			common = slices.DeleteFunc(common, func(v string) bool { return !slices.Contains(values, v) })
		}
		if len(common) == 0 {
			return fmt.Errorf("%s have no value in common", strings.Join(list, " and "))
		}
	}
	return nil
}
