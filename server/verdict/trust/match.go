package trust

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/zclconf/go-cty/cty"
)

const (
	maxPattern  = 1 << 10
	maxPatterns = 256
)

// pattern is what a value is compared with: a few texts, of which one must be equal, and regular
// expressions, of which one must match the whole value.
type pattern struct {
	exact map[string]bool
	whole []*regexp.Regexp
	text  []string // as written, for sentences
}

// newPattern makes a pattern of a value in the file: a text, a number, true or false, or a list of them.
// A text that begins with ^ is a regular expression and must end with $, so that nobody takes
// "https://github.com/acme" in a regular expression for all of the value. However it is built, it is
// matched against the whole value: ^a|b$ does not match "ax".
func newPattern(v cty.Value) (*pattern, error) {
	texts, err := texts(v)
	if err != nil {
		return nil, err
	}
	p := &pattern{exact: map[string]bool{}, text: texts}
	for _, t := range texts {
		switch {
		case t == "":
			return nil, fmt.Errorf("an empty text matches nothing; leave it out or name the value")
		case len(t) > maxPattern:
			return nil, fmt.Errorf("%q is %d bytes long, the limit is %d", clip(t), len(t), maxPattern)
		case !strings.HasPrefix(t, "^"):
			p.exact[t] = true
			continue
		case !strings.HasSuffix(t, "$"):
			return nil, fmt.Errorf("%q begins with ^ as a regular expression does, and must then end with $, so that it says all of the value", clip(t))
		}
		// Compiled alone first, so that what is wrong is said of what was written.
		if _, err := regexp.Compile(t); err != nil {
			return nil, fmt.Errorf("%q is no regular expression: %w", clip(t), err)
		}
		whole, err := regexp.Compile(`^(?:` + t + `)$`)
		if err != nil {
			return nil, fmt.Errorf("%q is no regular expression: %w", clip(t), err)
		}
		p.whole = append(p.whole, whole)
	}
	return p, nil
}

// texts reads what the file has for a pattern.
func texts(v cty.Value) ([]string, error) {
	if v == cty.NilVal || v.IsNull() {
		return nil, fmt.Errorf("a value is missing: write a text, a list of texts, or a regular expression as in \"^…$\"")
	}
	if one, ok := scalar(v); ok {
		return []string{one}, nil
	}
	if !v.CanIterateElements() || v.Type().IsMapType() || v.Type().IsObjectType() {
		return nil, fmt.Errorf("write a text or a list of texts")
	}
	var list []string
	for it := v.ElementIterator(); it.Next(); {
		_, element := it.Element()
		one, ok := scalar(element)
		if !ok {
			return nil, fmt.Errorf("the list holds something that is no text")
		}
		list = append(list, one)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("an empty list matches nothing; leave it out or name a value")
	}
	if len(list) > maxPatterns {
		return nil, fmt.Errorf("the list has %d values, the limit is %d", len(list), maxPatterns)
	}
	return list, nil
}

// scalar returns a text, number or truth value as text: 71096353 means "71096353".
func scalar(v cty.Value) (string, bool) {
	if v == cty.NilVal || v.IsNull() || !v.IsWhollyKnown() {
		return "", false
	}
	switch v.Type() {
	case cty.String:
		return v.AsString(), true
	case cty.Number:
		return v.AsBigFloat().Text('f', -1), true
	case cty.Bool:
		return fmt.Sprint(v.True()), true
	}
	return "", false
}

// match reports whether the value is one of those meant.
func (p *pattern) match(value string) bool {
	if p.exact[value] {
		return true
	}
	for _, r := range p.whole {
		if r.MatchString(value) {
			return true
		}
	}
	return false
}

func (p *pattern) String() string { return orList(p.text) }

// strangers are values that no pattern for whom to trust has reason to match.
var strangers = []string{
	"https://stranger.invalid/a/b/.github/workflows/c.yml@refs/heads/d",
	"https://github.com/stranger-invalid/b/.github/workflows/c.yml@refs/heads/d",
	"https://gitlab.com/stranger-invalid/b//.gitlab-ci.yml@refs/heads/d",
	"stranger@stranger.invalid",
	"https://stranger.invalid",
	"stranger-invalid",
}

// anybody reports whether the pattern matches people nobody heard of.
func (p *pattern) anybody() bool {
	return slices.ContainsFunc(strangers, p.match)
}

// scope says which repositories something is limited to: exact names, "registry/team/*" for one more
// part, "registry/team/**" for one or more. Empty is any.
type scope []string

// checkScope says what is wrong with the patterns.
func checkScope(patterns []string) error {
	if len(patterns) > maxPatterns {
		return fmt.Errorf("there are %d patterns, the limit is %d", len(patterns), maxPatterns)
	}
	for _, p := range patterns {
		name, _, stars := cutStars(p)
		if p == "**" {
			continue // any repository
		}
		// A colon is the registry's port, or a tag that does not belong here.
		tag := strings.Contains(lastPart(name), ":") && (strings.Contains(name, "/") || !stars)
		if name == "" || tag || len(p) > maxPattern || strings.ContainsAny(name, "* \t\r\n@") ||
			strings.HasPrefix(name, "/") || strings.HasSuffix(name, "/") || strings.Contains(name, "//") {
			return fmt.Errorf("%q is no repository: write registry/name without tag and digest, or registry/team/* for one more part, registry/team/** for any number, ** for all", clip(p))
		}
	}
	return nil
}

func lastPart(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// cutStars takes the stars off the end of a pattern.
func cutStars(p string) (base, star string, ok bool) {
	if p == "**" || p == "*" {
		return "", p, true
	}
	for _, star := range []string{"/**", "/*"} {
		if base, ok := strings.CutSuffix(p, star); ok {
			return base, star[1:], true
		}
	}
	return p, "", false
}

// has reports whether the repository is within the scope.
func (s scope) has(repository string) bool {
	if len(s) == 0 {
		return true
	}
	for _, p := range s {
		if under(p, repository) {
			return true
		}
	}
	return false
}

// under reports whether the name is what the pattern means.
func under(p, name string) bool {
	base, star, stars := cutStars(p)
	if !stars {
		return p == name
	}
	rest := name
	if base != "" {
		var ok bool
		if rest, ok = strings.CutPrefix(name, base+"/"); !ok {
			return false
		}
	}
	return rest != "" && (star == "**" || !strings.Contains(rest, "/"))
}
