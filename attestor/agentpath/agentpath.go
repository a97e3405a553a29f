// Package agentpath makes the paths of agents' SPIFFE IDs out of templates that operators write, as
// "{{ .PluginName }}/{{ .Hostname }}": the agent_path_template of SPIRE's node attestors.
//
// Why it is so: what is put into a template comes out of evidence, and an ID that evidence can shape is
// somebody else's ID. So a value may fill a segment of the path, or a part of one, and never make two of it:
// the path is rendered a second time with every slash taken out of the values, and must have as many segments
// as the first. What else makes no SPIFFE ID, dots alone among it, is refused where the ID is made.
package agentpath

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // a function that SPIRE's templates have; it names things
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"text/template"
)

// maxPath is more than a SPIFFE ID has, in bytes.
const maxPath = 2048

// functions are those of SPIRE's templates that a path has a use for, with the same order of arguments.
var functions = template.FuncMap{
	"lower":      strings.ToLower,
	"upper":      strings.ToUpper,
	"trim":       strings.TrimSpace,
	"trimPrefix": func(prefix, s string) string { return strings.TrimPrefix(s, prefix) },
	"trimSuffix": func(suffix, s string) string { return strings.TrimSuffix(s, suffix) },
	"replace":    func(from, to, s string) string { return strings.ReplaceAll(s, from, to) },
	"contains":   func(part, s string) bool { return strings.Contains(s, part) },
	"hasPrefix":  func(prefix, s string) bool { return strings.HasPrefix(s, prefix) },
	"hasSuffix":  func(suffix, s string) bool { return strings.HasSuffix(s, suffix) },
	"join":       func(by string, list []string) string { return strings.Join(list, by) },
	"splitList":  func(by, s string) []string { return strings.Split(s, by) },
	"first":      func(list []string) (string, error) { return at(list, 0) },
	"last":       func(list []string) (string, error) { return at(list, len(list)-1) },
	"default": func(fallback, s string) string {
		if s == "" {
			return fallback
		}
		return s
	},
	"sha1sum": func(s string) string {
		sum := sha1.Sum([]byte(s)) //nolint:gosec // see the import
		return hex.EncodeToString(sum[:])
	},
	"sha256sum": func(s string) string {
		sum := sha256.Sum256([]byte(s))
		return hex.EncodeToString(sum[:])
	},
}

func at(list []string, i int) (string, error) {
	if i < 0 || i >= len(list) {
		return "", errors.New("the list is empty")
	}
	return list[i], nil
}

// Template is a parsed template.
type Template struct{ parsed *template.Template }

// Parse reads a template.
func Parse(text string) (*Template, error) {
	parsed, err := template.New("agent_path_template").Option("missingkey=error").Funcs(functions).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return &Template{parsed}, nil
}

// Path renders the template with values, which are strings, lists of strings or numbers, and returns the path
// below /spire/agent/, without a slash in front. Its errors say nothing of the values: they reach the agent.
func (t *Template) Path(values map[string]any) (string, error) {
	path, err := t.render(values)
	if err != nil {
		return "", err
	}
	flat := make(map[string]any, len(values))
	for name, value := range values {
		switch v := value.(type) {
		case string:
			value = flatten(v)
		case []string:
			list := make([]string, len(v))
			for i, s := range v {
				list[i] = flatten(s)
			}
			value = list
		}
		flat[name] = value
	}
	other, err := t.render(flat)
	if err != nil {
		return "", err
	}
	if strings.Count(path, "/") != strings.Count(other, "/") {
		return "", errors.New("make agent ID: a value with a slash in it would shape the path")
	}
	return strings.TrimPrefix(path, "/"), nil
}

func flatten(s string) string { return strings.ReplaceAll(s, "/", "-") }

func (t *Template) render(values map[string]any) (string, error) {
	var out limited
	if err := t.parsed.Execute(&out, values); err != nil {
		return "", errors.New("make agent ID: agent_path_template does not fit this evidence")
	}
	return out.String(), nil
}

// limited refuses more than a path has.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxPath {
		return 0, errors.New("the path is too long")
	}
	return l.Buffer.Write(p)
}
