package conf

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
)

// typeBlock is a block whose label chooses what its keys mean: node_attestor "x509pop" { … }.
type typeBlock struct {
	Type  string    `hcl:"type,label"`
	Where hcl.Range `hcl:",def_range"`
	Keys  hcl.Body  `hcl:",remain"`
}

// compound is a configuration with blocks of other attestors in it, which it can decode.
type compound interface {
	DecodeParts() hcl.Diagnostics
}

// kinds are what a binary links of one role: each type with the maker of its configuration.
type kinds struct {
	role   string // as in "node attestor"
	types  []string
	config map[string]func() any
	try    map[string]func(config any) error
}

func (k *kinds) add(kind string, config func() any) {
	if k.config == nil {
		k.config = map[string]func() any{}
	}
	k.types = append(k.types, kind)
	k.config[kind] = config
}

// tried adds a type whose decoded configuration can be tried.
func (k *kinds) tried(kind string, config func() any, try func(config any) error) {
	k.add(kind, config)
	if k.try == nil {
		k.try = map[string]func(any) error{}
	}
	k.try[kind] = try
}

// decodeTypes decodes each block into the configuration of its kind. The result has the same order
// as the blocks that were right; taken tells of each its kind and its decoded configuration.
func (l *loader) decodeTypes(blocks []typeBlock, k kinds, taken func(kind string, config any)) {
	seen := map[string]bool{}
	for _, b := range blocks {
		at := func(summary, detail string) {
			l.wrong = append(l.wrong, Mistake{Where: b.Where.String(), Summary: summary, Detail: detail, order: b.Where.Start.Byte})
		}
		config, known := k.config[b.Type]
		if !known {
			at("Unknown "+k.role, fmt.Sprintf("This program has no %s %q; there are %s.", k.role, b.Type, quoted(slices.Sorted(slices.Values(k.types)))))
			continue
		}
		value := config()
		wrong := gohcl.DecodeBody(b.Keys, nil, value)
		if c, ok := value.(compound); ok && !wrong.HasErrors() {
			wrong = append(wrong, c.DecodeParts()...)
		}
		named := attestor.TypeOf(b.Type, value)
		if seen[named] {
			at("Duplicate "+k.role, fmt.Sprintf("The %s %q is configured twice; keep one of the blocks.", k.role, named))
			continue
		}
		seen[named] = true
		l.add(wrong)
		if c, ok := value.(checked); ok && !wrong.HasErrors() {
			before := len(l.wrong)
			say := func(key, summary, detail string) { l.atKey(b, key, summary, detail) }
			c.Check(say)
			if l.options.Try {
				c.Probe(say)
			}
			if len(l.wrong) > before {
				continue
			}
		}
		if try := k.try[b.Type]; l.options.Try && try != nil && !wrong.HasErrors() {
			if err := try(value); err != nil {
				at("Unusable "+k.role, sentence(err))
			}
		}
		taken(b.Type, value)
	}
}

// checked is a configuration that knows more of its keys than their kinds: what is wrong with them, and with what
// they lead to in the world.
type checked interface {
	Check(say func(key, summary, detail string))
	Probe(say func(key, summary, detail string))
}

// atKey records a mistake about a key of a block, at its value, or at the block if it is not there.
func (l *loader) atKey(b typeBlock, key, summary, detail string) {
	where := b.Where
	attributes, _ := b.Keys.JustAttributes() // what is no attribute was complained about
	if a := attributes[key]; a != nil {
		where = a.Expr.Range()
	}
	l.at(where, summary, oneLine(detail))
}

// tryOut is what opening something for trial came to. It is closed again, if it can be.
func tryOut(opened any, err error) error {
	if c, ok := opened.(io.Closer); ok && err == nil {
		return c.Close()
	}
	return err
}

// sentence is an error as a sentence.
func sentence(err error) string {
	text := oneLine(err.Error())
	if strings.HasSuffix(text, ".") {
		return text
	}
	return text + "."
}

// needs are those of an attestor that is only tried.
func (l *loader) needs(td spiffeid.TrustDomain, token string) attestor.Needs {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	return attestor.Needs{TrustDomain: td, Log: quiet, Now: time.Now, JoinToken: token, Tokens: noTokens{}, Trial: true}
}

// noTokens stands in for the server's tokens where nobody attests.
type noTokens struct{}

func (noTokens) BurnToken(context.Context, string) error { return attestor.ErrEvidence }

// one complains if there is more than one block of a role that may be there once.
func (l *loader) one(blocks []typeBlock, role, why string) {
	if len(blocks) > 1 {
		r := blocks[1].Where
		l.wrong = append(l.wrong, Mistake{
			Where: r.String(), Summary: "Duplicate " + role,
			Detail: fmt.Sprintf("There can be only one %s block: %s.", strings.ReplaceAll(role, " ", "_"), why), order: r.Start.Byte,
		})
	}
}

// Judge is a node attestor that the server accepts, with its decoded configuration.
type Judge struct {
	Kind   attestor.JudgeKind
	Config any
}

// Node is the node attestor that the agent proves itself with, with its decoded configuration.
type Node struct {
	Kind   attestor.NodeKind
	Config any
}

// Workload is a workload attestor of the agent, with its decoded configuration.
type Workload struct {
	Kind   attestor.WorkloadKind
	Config any
}
