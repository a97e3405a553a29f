package conf

import (
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"

	"github.com/assay-id/assay/attestor"
)

// typeBlock is a block whose label chooses what its keys mean: node_attestor "x509pop" { … }.
type typeBlock struct {
	Type  string    `hcl:"type,label"`
	Where hcl.Range `hcl:",def_range"`
	Keys  hcl.Body  `hcl:",remain"`
}

// kinds are what a binary links of one role: each type with the maker of its configuration.
type kinds struct {
	role   string // as in "node attestor"
	types  []string
	config map[string]func() any
}

func (k *kinds) add(kind string, config func() any) {
	if k.config == nil {
		k.config = map[string]func() any{}
	}
	k.types = append(k.types, kind)
	k.config[kind] = config
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
		switch {
		case !known:
			at("Unknown "+k.role, fmt.Sprintf("This program has no %s %q; there are %s.", k.role, b.Type, quoted(slices.Sorted(slices.Values(k.types)))))
			continue
		case seen[b.Type]:
			at("Duplicate "+k.role, fmt.Sprintf("The %s %q is configured twice; keep one of the blocks.", k.role, b.Type))
			continue
		}
		seen[b.Type] = true
		value := config()
		l.add(gohcl.DecodeBody(b.Keys, nil, value))
		taken(b.Type, value)
	}
}

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
