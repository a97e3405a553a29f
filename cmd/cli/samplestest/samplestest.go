// Package samplestest holds the commented samples in conf to the attestors that a command links: the
// two commands that take such a file share it in their tests.
package samplestest

import (
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// setting is the start of a key that is commented out: no space after the sign, as there is before
// prose.
var setting = regexp.MustCompile(`(?m)^(\s*)#([a-z}])`)

// Run checks that the blocks of a role in a sample, as "node_attestor", are those of the given kinds,
// that each documents every key of its kind and no other, and that their values are of the right type.
func Run(t *testing.T, sample, role string, kinds map[string]func() any) {
	t.Helper()
	text, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	file, diags := hclsyntax.ParseConfig(setting.ReplaceAll(text, []byte("$1$2")), sample, hcl.InitialPos)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	documented := map[string]bool{}
	for _, block := range file.Body.(*hclsyntax.Body).Blocks { // hclsyntax makes nothing else
		if block.Type != role {
			continue
		}
		kind := block.Labels[0]
		documented[kind] = true
		config, ok := kinds[kind]
		if !ok {
			t.Errorf("%s has a %s %q that the command does not link", sample, role, kind)
			continue
		}
		t.Run(role+" "+kind+" documents every key", func(t *testing.T) {
			into := config()
			if diags := gohcl.DecodeBody(block.Body, nil, into); diags.HasErrors() {
				t.Error(diags)
			}
			if c, ok := into.(interface{ DecodeParts() hcl.Diagnostics }); ok {
				if diags := c.DecodeParts(); diags.HasErrors() {
					t.Error(diags)
				}
			}
			compare(t, reflect.TypeOf(into).Elem(), block.Body)
		})
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(kinds)), slices.Sorted(maps.Keys(documented))); diff != "" {
		t.Errorf("kinds of %s that the command links (-) and that %s documents (+):\n%s", role, sample, diff)
	}
}

// compare holds the keys of a struct, and of the first block of each kind in it, to those of the sample.
func compare(t *testing.T, config reflect.Type, body *hclsyntax.Body) {
	t.Helper()
	for field := range config.Fields() {
		if strings.HasSuffix(field.Tag.Get("hcl"), ",remain") {
			return // the keys are another's, and documented there
		}
	}
	if diff := cmp.Diff(keys(config), inSample(body), cmp.Transformer("nil", none)); diff != "" {
		t.Errorf("keys of the struct (-) and of the sample (+):\n%s", diff)
	}
	for field := range config.Fields() {
		name, role, _ := strings.Cut(field.Tag.Get("hcl"), ",")
		inner := field.Type
		for inner.Kind() == reflect.Slice || inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		i := slices.IndexFunc(body.Blocks, func(b *hclsyntax.Block) bool { return b.Type == name })
		if role == "block" && inner.Kind() == reflect.Struct && i >= 0 {
			compare(t, inner, body.Blocks[i].Body)
		}
	}
}

// inSample returns the keys of a block and the types of those in it.
func inSample(body *hclsyntax.Body) []string {
	found := slices.Collect(maps.Keys(body.Attributes))
	for _, b := range body.Blocks {
		found = append(found, b.Type)
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// none makes no keys and an absent list of keys the same.
func none(list []string) string { return strings.Join(list, " ") }

func keys(config reflect.Type) []string {
	var out []string
	for field := range config.Fields() {
		if name, role, _ := strings.Cut(field.Tag.Get("hcl"), ","); name != "" && role != "label" {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}
