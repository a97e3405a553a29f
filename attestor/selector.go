package attestor

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Limits on one selector. SPIRE stores both parts in 255-byte columns; labels and environment
// variables of real containers are longer, so the value is allowed what an OCI label is.
const (
	MaxTypeLength  = 64
	MaxValueLength = 4096
)

// Selector is one proved thing about a node or a workload, for example docker:label:app:shop.
// Its text form is Type, a colon and Value; the value may contain colons, the type may not.
type Selector struct {
	Type  string
	Value string
}

// ParseSelector reads the text form "type:value". It refuses an empty part, a part over its limit
// and control characters, which have no place in a log line or a terminal.
func ParseSelector(text string) (Selector, error) {
	kind, value, found := strings.Cut(text, ":")
	if !found {
		return Selector{}, fmt.Errorf("selector %q: want type:value", clip(text))
	}
	s := Selector{Type: kind, Value: value}
	if err := s.Check(); err != nil {
		return Selector{}, err
	}
	return s, nil
}

// Check says what is wrong with a selector that came from outside, or nil.
func (s Selector) Check() error {
	switch {
	case s.Type == "":
		return errors.New("selector without a type")
	case s.Value == "":
		return fmt.Errorf("selector of type %q without a value", clip(s.Type))
	case len(s.Type) > MaxTypeLength:
		return fmt.Errorf("selector type is %d bytes long, the limit is %d", len(s.Type), MaxTypeLength)
	case len(s.Value) > MaxValueLength:
		return fmt.Errorf("selector value of type %q is %d bytes long, the limit is %d", s.Type, len(s.Value), MaxValueLength)
	case strings.ContainsRune(s.Type, ':'):
		return fmt.Errorf("selector type %q contains a colon", s.Type)
	case strings.ContainsFunc(s.Type, isControl), strings.ContainsFunc(s.Value, isControl):
		return fmt.Errorf("selector of type %q contains a control character", clip(s.Type))
	}
	return nil
}

// String returns the text form "type:value".
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Compare orders selectors by type, then value.
func (s Selector) Compare(o Selector) int {
	return cmp.Or(cmp.Compare(s.Type, o.Type), cmp.Compare(s.Value, o.Value))
}

func isControl(r rune) bool { return r < 0x20 || r == 0x7f }

// clip keeps a hostile string from filling an error message.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// Set is an immutable set of selectors, sorted and without duplicates. The zero value is empty.
type Set struct {
	sorted []Selector
}

// NewSet returns the set of the given selectors. The arguments are copied.
func NewSet(selectors ...Selector) Set {
	sorted := slices.Clone(selectors)
	slices.SortFunc(sorted, Selector.Compare)
	return Set{sorted: slices.Compact(sorted)}
}

// Union returns the selectors that are in any of the sets.
func Union(sets ...Set) Set {
	var all []Selector
	for _, s := range sets {
		all = append(all, s.sorted...)
	}
	return NewSet(all...)
}

// Len returns the number of selectors.
func (s Set) Len() int { return len(s.sorted) }

// All returns the selectors in order. The caller must not change the slice.
func (s Set) All() []Selector { return s.sorted }

// Has reports whether the selector is in the set.
func (s Set) Has(want Selector) bool {
	_, found := slices.BinarySearchFunc(s.sorted, want, Selector.Compare)
	return found
}

// In reports whether every selector of s is also in o. An empty set is in every set, so a caller
// that matches entries must have refused entries without selectors before.
func (s Set) In(o Set) bool {
	rest := o.sorted
	for _, want := range s.sorted {
		i, found := slices.BinarySearchFunc(rest, want, Selector.Compare)
		if !found {
			return false
		}
		rest = rest[i+1:]
	}
	return true
}

// Missing returns the selectors of s that are not in o.
func (s Set) Missing(o Set) []Selector {
	var missing []Selector
	for _, want := range s.sorted {
		if !o.Has(want) {
			missing = append(missing, want)
		}
	}
	return missing
}

// Equal reports whether both sets hold the same selectors.
func (s Set) Equal(o Set) bool { return slices.Equal(s.sorted, o.sorted) }

// Strings returns the text forms in order.
func (s Set) Strings() []string {
	texts := make([]string, len(s.sorted))
	for i, sel := range s.sorted {
		texts[i] = sel.String()
	}
	return texts
}

// Key returns a string that is the same for equal sets and different for others: a map key.
func (s Set) Key() string {
	var b strings.Builder
	for _, sel := range s.sorted {
		b.WriteString(sel.Type)
		b.WriteByte(':')
		b.WriteString(sel.Value)
		b.WriteByte(0) // Check refuses control characters, so this cannot be part of a selector
	}
	return b.String()
}
