// Package external is about attestors that are plugins of SPIRE: programs of their own, run by package
// Here are the keys of their blocks, which the key managers and upstream authorities of that sort have too.
package external

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/assay-id/assay/attestor"
)

// Type is the label of the blocks. The type on the wire and of selectors is the plugin's name.
const Type = "external"

// Config is the configuration block. But for name and plugin_env the keys are SPIRE's.
type Config struct {
	// Name is the plugin's name: the type of its selectors and of its evidence.
	Name string `hcl:"name"`
	// Cmd is the program, Args what it gets, Checksum the SHA-256 that it must have.
	Cmd      string   `hcl:"plugin_cmd"`
	Args     []string `hcl:"plugin_args,optional"`
	Checksum string   `hcl:"plugin_checksum"`
	// Env are the only variables of the environment that it gets: NAME passes ours on, NAME=value sets one.
	Env []string `hcl:"plugin_env,optional"`
	// Identity lets it have an identity of the server, with which it could pose as the server.
	Identity bool `hcl:"plugin_identity,optional"`
	// Data is its configuration, text in the plugin's own syntax.
	Data string `hcl:"plugin_data,optional"`
}

// AttestorType implements attestor.Named.
func (c *Config) AttestorType() string { return c.Name }

var (
	name     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)
	variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(=|$)`)
)

// reserved are types whose selectors mean something that a plugin has no say in.
var reserved = []string{Type, "spiffe_id", "join_token", "scan", "prov", "sig", "claim", "image"}

// Check says what is wrong with a key of a block.
func (c *Config) Check(say func(key, summary, detail string)) {
	switch {
	case !name.MatchString(c.Name) || len(c.Name) > attestor.MaxTypeLength:
		say("name", "Invalid name", fmt.Sprintf("%q cannot be the type of a selector: it needs letters, digits, '_', '.' and '-', %d at most.", c.Name, attestor.MaxTypeLength))
	case slices.Contains(reserved, c.Name):
		say("name", "Reserved name", fmt.Sprintf("Selectors of type %q are not a plugin's to give; choose another name.", c.Name))
	}
	for _, one := range c.Env {
		if !variable.MatchString(one) || strings.ContainsRune(one, 0) {
			say("plugin_env", "Invalid variable", fmt.Sprintf("%q is neither NAME nor NAME=value.", strings.SplitN(one, "=", 2)[0]))
		}
	}
	if _, err := ParseChecksum(c.Checksum); err != nil {
		say("plugin_checksum", "Invalid checksum", err.Error()+".")
	}
}

// Probe says what is wrong with the program that a block names. Opening it says so too.
func (c *Config) Probe(say func(key, summary, detail string)) {
	want, err := ParseChecksum(c.Checksum)
	if err != nil {
		return // Check says so
	}
	got, err := Checksum(c.Path())
	switch {
	case os.IsNotExist(err):
		say("plugin_cmd", "Missing program", fmt.Sprintf("There is no file %s.", c.Path()))
	case err != nil:
		say("plugin_cmd", "Unusable program", err.Error()+".")
	case got != want:
		say("plugin_checksum", "Wrong checksum", (&ChecksumError{Path: c.Path(), Want: want, Got: got}).Error()+".")
	}
}

// Path is where the program is.
func (c *Config) Path() string {
	if full, err := filepath.Abs(c.Cmd); err == nil {
		return full
	}
	return c.Cmd
}

// MaxSelectors is how many selectors are taken of one answer.
const MaxSelectors = 1000

// Selectors makes selectors of the values that a plugin answered. Their type is the plugin's name whatever the
// value says, and one that cannot be a selector makes the answer a wrong one.
func Selectors(name string, values []string) ([]attestor.Selector, error) {
	if len(values) > MaxSelectors {
		return nil, fmt.Errorf("plugin %q answered %d selectors, the limit is %d", name, len(values), MaxSelectors)
	}
	selectors := make([]attestor.Selector, 0, len(values))
	for _, value := range values {
		s := attestor.Selector{Type: name, Value: value}
		if err := s.Check(); err != nil {
			return nil, fmt.Errorf("plugin %q answered no selector: %w", name, err)
		}
		selectors = append(selectors, s)
	}
	return selectors, nil
}
