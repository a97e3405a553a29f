// Package all is node attestation by several attestors together: a node is who it says if every one of them
// says so, about one machine. One attestor alone stays what it is, on the wire too; this is one more type,
// whose payload holds the payloads of its parts, and whose challenges are those of its parts, each with the
// part's type.
//
// Why it is so: that each part is proved does not say that they are proved of one machine. All parts are proved
// in one conversation, for one key, so nobody can add their part to somebody else's request. Whoever holds a
// part of each of two machines could still put them together. So an operator can name values that parts must
// have in common; and parts that none of these holds to the rest belong to the node that was first seen with
// them, which may not show others, and no other node may have one of them.
package all

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"

	"github.com/assay-id/assay/attestor"
)

// Type is the attestor's name in configuration, in evidence, in selectors and in agent IDs.
const Type = "all"

const (
	// MinParts and MaxParts bound how many parts a combination has.
	MinParts, MaxParts = 2, 6
	// PartSelector begins the selectors that name a node's parts.
	PartSelector = "part:"
)

// combinationForm is what a combination's name looks like: it becomes part of agents' IDs.
var combinationForm = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)

// IsCombination reports whether a text can be a combination's name.
func IsCombination(name string) bool { return combinationForm.MatchString(name) }

// Part is the configuration of one part: a block whose label is the attestor's type.
type Part struct {
	Type  string    `hcl:"type,label"`
	Where hcl.Range `hcl:",def_range"`
	Keys  hcl.Body  `hcl:",remain"`

	// config is what Keys were decoded into.
	config any
}

// Config returns what the part's keys were decoded into.
func (p *Part) Config() any { return p.config }

// AgentConfig is the agent's configuration block.
type AgentConfig struct {
	// Combination is the server's name for these parts together.
	Combination string `hcl:"combination"`
	Parts       []Part `hcl:"part,block"`

	known *Known
}

// ServerConfig is the server's configuration block.
type ServerConfig struct {
	Combinations []Combination `hcl:"combination,block"`

	known *Known
}

// Combination is one set of parts that proves a node.
type Combination struct {
	Name string `hcl:"name,label"`
	// ID is the part whose path names the agent; by default the first.
	ID string `hcl:"id_from,optional"`
	// Same are lists of selectors without their values, as "tpm:ek": the parts must have a value in common.
	Same  [][]string `hcl:"same,optional"`
	Parts []Part     `hcl:"part,block"`
}

// Known are the attestors that can be parts: each type with the maker of its configuration.
type Known struct{ configs map[string]func() any }

// KnownNodes and KnownJudges are those of a list of kinds.
func KnownNodes(kinds []attestor.NodeKind) *Known {
	k := &Known{map[string]func() any{}}
	for _, kind := range kinds {
		k.configs[kind.Type] = kind.Config
	}
	return k
}

// KnownJudges is KnownNodes of the server's side.
func KnownJudges(kinds []attestor.JudgeKind) *Known {
	k := &Known{map[string]func() any{}}
	for _, kind := range kinds {
		k.configs[kind.Type] = kind.Config
	}
	return k
}

// NewAgentConfig and NewServerConfig make configurations whose parts can be these.
func NewAgentConfig(known *Known) *AgentConfig { return &AgentConfig{known: known} }

// NewServerConfig is NewAgentConfig of the server's side.
func NewServerConfig(known *Known) *ServerConfig { return &ServerConfig{known: known} }

// DecodeParts decodes the blocks within, and says with their places what is wrong with them.
func (c *AgentConfig) DecodeParts() hcl.Diagnostics { return c.known.decode(c.Parts) }

// DecodeParts decodes the blocks within, and says with their places what is wrong with them.
func (c *ServerConfig) DecodeParts() hcl.Diagnostics {
	var wrong hcl.Diagnostics
	for i := range c.Combinations {
		wrong = append(wrong, c.known.decode(c.Combinations[i].Parts)...)
	}
	return wrong
}

func (k *Known) decode(parts []Part) hcl.Diagnostics {
	var wrong hcl.Diagnostics
	seen := map[string]bool{}
	for i := range parts {
		p := &parts[i]
		say := func(summary, format string, args ...any) {
			wrong = append(wrong, &hcl.Diagnostic{Severity: hcl.DiagError, Summary: summary, Detail: fmt.Sprintf(format, args...), Subject: &p.Where})
		}
		make, known := k.configs[p.Type]
		switch {
		case !known:
			say("Unknown node attestor", "This program has no node attestor %q that can be a part.", p.Type)
			continue
		case seen[p.Type]:
			say("Duplicate part", "The part %q is there twice; keep one of the blocks.", p.Type)
			continue
		}
		seen[p.Type] = true
		p.config = make()
		wrong = append(wrong, gohcl.DecodeBody(p.Keys, nil, p.config)...)
	}
	return wrong
}

// CheckParts says why parts are no combination, or nil.
func CheckParts(parts []Part) error {
	if n := len(parts); n < MinParts || n > MaxParts {
		return fmt.Errorf("there are %d part blocks; write %d to %d", n, MinParts, MaxParts)
	}
	for i, p := range parts {
		if p.config == nil || slices.ContainsFunc(parts[:i], func(o Part) bool { return o.Type == p.Type }) {
			return fmt.Errorf("part %q is unknown or there twice", p.Type)
		}
	}
	return nil
}

// Evidence is the payload: those of the parts.
type Evidence struct {
	Combination string  `json:"combination"`
	Parts       []Piece `json:"parts"`
}

// Piece is the payload of one part.
type Piece struct {
	Type    string `json:"type"`
	Payload []byte `json:"payload"`
}

// Challenge is one part's.
type Challenge struct {
	Type      string `json:"type"`
	Challenge []byte `json:"challenge"`
}

// Response is the part's answer to it.
type Response struct {
	Type   string `json:"type"`
	Answer []byte `json:"answer"`
}
