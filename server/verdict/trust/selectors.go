package trust

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/verdict/report"
)

// provenance is what a statement says about how an image was made.
type provenance struct {
	kind                         string // "slsa-v1", "slsa-v0.2", or empty
	builder                      string
	sourceURI, sourceCommit, ref string
}

// slsaKinds are the predicate types that are read for provenance, with their words in selectors.
var slsaKinds = map[string]string{
	"https://slsa.dev/provenance/v1":   "slsa-v1",
	"https://slsa.dev/provenance/v0.2": "slsa-v0.2",
}

// made reads what a verified statement says about how the image was made, if it is one that does under
// this policy.
func (p *Policy) made(g *grant, s *statement) error {
	g.made = isOneOf(s.predicateType, p.speaksMade)
	if !g.made {
		return nil
	}
	if kind := slsaKinds[s.predicateType]; kind != "" {
		doc, err := report.ParseStatement(s.body)
		if err != nil {
			return refuse(ErrMalformed, "the provenance is unreadable: %w", err)
		}
		if from := doc.Provenance; from != nil {
			g.about = provenance{
				kind: kind, builder: entire(from.BuilderID),
				sourceURI: entire(from.SourceURI), sourceCommit: entire(from.SourceCommit), ref: entire(from.Ref),
			}
		}
	}
	if p.builders != nil && !p.builders.match(g.about.builder) {
		return refuse(ErrIdentity, "the builder is %q, and not %s", clip(g.about.builder), p.builders)
	}
	if len(p.mapped) == 0 || len(s.predicate) == 0 {
		return nil
	}
	decoder := json.NewDecoder(bytes.NewReader(s.predicate))
	decoder.UseNumber() // an ID of 20 digits must not become 1e+19
	var predicate any
	if err := decoder.Decode(&predicate); err != nil {
		return refuse(ErrMalformed, "the predicate is unreadable: %w", err)
	}
	g.mapped = map[string][]string{}
	for _, m := range p.mapped {
		if values := m.find(predicate); len(values) > 0 {
			g.mapped[m.field] = values
		}
	}
	return nil
}

// entire returns a text of report's, or nothing if report may have changed or shortened it so that it
// could be printed: that would be another text, which somebody else may own.
func entire(s string) string {
	const cut = 1<<10 - utf8.UTFMax // report cuts at 1 KiB, before the character that crosses it
	if len(s) > cut || strings.ContainsRune(s, utf8.RuneError) {
		return ""
	}
	return s
}

// Selectors returns what the proof gives to the image: sig:* for every policy that vouches, and prov:* for
// those whose statement says how the image was made. A bare document gives nothing.
//
// A value that cannot be a selector (control characters, too long) is left out, never changed: a changed
// one could equal another.
func (p *Proof) Selectors() attestor.Set {
	var all []attestor.Selector
	add := func(kind, word, value string) {
		if value == "" {
			return
		}
		s := attestor.Selector{Type: kind, Value: word + ":" + value}
		if s.Check() == nil {
			all = append(all, s)
		}
	}
	for _, g := range p.grants {
		add("sig", "policy", g.policy)
		add("sig", "signer", g.signer)
		add("sig", "issuer", g.issuer)
		if !g.made {
			continue
		}
		add("prov", "policy", g.policy)
		add("prov", "type", g.about.kind)
		add("prov", "builder", g.about.builder)
		source, commit, ref := g.source()
		add("prov", "source", source)
		add("prov", "commit", commit)
		add("prov", "ref", ref)
		for _, f := range provFields {
			add("prov", f.word, g.fields[f.field])
		}
		for _, field := range sortedKeys(g.mapped) {
			word := "pred." + field
			if field == componentField {
				word = componentField
			}
			for _, value := range g.mapped[field] {
				add("prov", word, value)
			}
		}
	}
	return attestor.NewSet(all...)
}

// provFields are the words of prov:* that only a certificate can state.
var provFields = []struct{ word, field string }{
	{"signer", FieldBuildSignerURI},
	{"source-id", FieldSourceID},
	{"owner-id", FieldSourceOwnerID},
	{"trigger", FieldBuildTrigger},
	{"runner", FieldRunnerEnvironment},
	{"visibility", FieldSourceVisibility},
	{"env", FieldDeploymentEnvironment},
}

// source returns where the image comes from, as the certificate says if it says anything, else as the
// statement does. Never some of one and some of the other.
func (g *grant) source() (uri, commit, ref string) {
	uri, commit, ref = g.fields[FieldSourceURI], g.fields[FieldSourceDigest], g.fields[FieldSourceRef]
	if uri != "" || commit != "" || ref != "" {
		return uri, commit, ref
	}
	return g.about.sourceURI, g.about.sourceCommit, g.about.ref
}

// componentField is the mapped field with a word of its own.
const componentField = "component"

const (
	maxMappings = 64
	maxValues   = 32 // of one mapped field
	maxSteps    = 32
)

// mapping names a value of the predicate.
type mapping struct {
	field string
	steps []string
}

var (
	fieldForm = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,63}$`)
	stepForm  = regexp.MustCompile(`^(?:\.([A-Za-z0-9_@/-]+)|\["((?:[^"\\]|\\.)+)"\]|\[([0-9]{1,9})\])`)
)

// parsePath reads predicate.a.b, with ["a.b"] for keys that hold a dot and [0] for elements of a list.
func parsePath(path string) ([]string, bool) {
	rest, ok := strings.CutPrefix(path, "predicate")
	if !ok || rest == "" || len(path) > maxPattern {
		return nil, false
	}
	var steps []string
	for rest != "" {
		m := stepForm.FindStringSubmatch(rest)
		if m == nil || len(steps) == maxSteps {
			return nil, false
		}
		rest = rest[len(m[0]):]
		step := m[1] + m[3]
		if m[2] != "" {
			var err error
			if step, err = strconv.Unquote(`"` + m[2] + `"`); err != nil {
				return nil, false
			}
		}
		steps = append(steps, step)
	}
	return steps, true
}

func (c *complaints) mapping(p *Policy, b *MapBlock) {
	if len(b.Paths) > maxMappings {
		c.say("", "there are %d fields, the limit is %d.", len(b.Paths), maxMappings)
		return
	}
	for _, field := range sortedKeys(b.Paths) {
		if !fieldForm.MatchString(field) {
			c.say(field, "%q cannot be a field's name: use 1 to 64 letters, digits, dashes and underscores, beginning with a letter.", clip(field))
			continue
		}
		steps, ok := parsePath(b.Paths[field])
		if !ok {
			c.say(field, `%q is no path: write it as in "predicate.buildDefinition.externalParameters.component" or "predicate.labels[\"org.example/tier\"]".`, clip(b.Paths[field]))
			continue
		}
		p.mapped = append(p.mapped, mapping{field, steps})
	}
}

// find returns the text, number or truth value at the path, or those of the list there.
func (m mapping) find(predicate any) []string {
	at := predicate
	for _, step := range m.steps {
		switch v := at.(type) {
		case map[string]any:
			at = v[step]
		case []any:
			i, err := strconv.Atoi(step)
			if err != nil || i < 0 || i >= len(v) {
				return nil
			}
			at = v[i]
		default:
			return nil
		}
	}
	if list, ok := at.([]any); ok {
		if len(list) > maxValues {
			return nil // a part of a list is another statement than the list
		}
		var values []string
		for _, v := range list {
			if s, ok := word(v); ok {
				values = append(values, s)
			}
		}
		return values
	}
	if s, ok := word(at); ok {
		return []string{s}
	}
	return nil
}

func word(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case json.Number:
		return v.String(), true
	case bool:
		return strconv.FormatBool(v), true
	}
	return "", false
}
