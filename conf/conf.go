// Package conf turns the server's and the agent's HCL files into Go values, and says everything that
// is wrong with a file at once, each mistake with its file, line and columns and what to do about it:
//
//	server.hcl:5,3-12: Unsupported argument; An argument named "bnd_port" is not expected here. Did you mean "bind_port"?
//
// Keys are named as SPIRE's where the meaning is the same, so that an operator's hands know them. The
// two samples beside this file, server.hcl and agent.hcl, document every key; a test holds them to
// the structs, both ways.
//
// Why it is so: the commands "run" and "validate" share these functions, so a file that validates is
// a file that runs. Attestors' blocks are decoded here as well, into the structs that their kinds
// hand over, so that a mistyped key in one of them is reported before anything starts. A flag on the
// command line takes the place of a key and is checked as the key is.
package conf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Options are what a command line may say about loading a file.
type Options struct {
	// ExpandEnv replaces $NAME and ${NAME} by environment variables before the file is parsed. A
	// variable's value is data: it cannot add keys or end a string.
	ExpandEnv bool
	// Getenv looks up a variable for ExpandEnv; nil means os.LookupEnv.
	Getenv func(name string) (value string, ok bool)
	// Set are values from flags, which take the place of keys in the file.
	Set []Setting
	// Named decode blocks that are other packages' business. Nil: they are left undecoded.
	Named []NamedKind
	// Try opens every attestor, and forgets it again, to find what no look at the file finds: a file that
	// is missing, a key that does not fit its certificate. "validate" does; "run" opens them anyway.
	Try bool
	// TryBundle says why the file that trust_bundle_path names is of no use, if Try is set. Nil: nobody knows.
	TryBundle func(td spiffeid.TrustDomain, path, format string) error
	// TryCredentials says why the file that registry_credentials_path names is of no use, if Try is set. Nil:
	// nobody knows.
	TryCredentials func(path string) error
	// TrySecret says why the file that seal_credential_path names is of no use, if Try is set. That it is missing does
	// not count: it may be where only the running server has it. Nil: nobody knows.
	TrySecret func(path string) error
	// TryUpstream says why an authority above is of no use, if Try is set and nobody else has to be asked. Nil: nobody knows.
	TryUpstream func(Chosen) error
	// CheckNamed compares the decoded blocks with each other, once all of them are right by themselves.
	CheckNamed func([]Named) []NamedProblem
}

// Setting is a flag that takes the place of a key.
type Setting struct {
	// Key is the path of the key, for example "server.bind_port".
	Key string
	// Value is its text.
	Value string
	// Flag is what the operator typed, for example "-serverPort", to name in complaints.
	Flag string
}

// Mistakes are everything that is wrong with a file. It is never empty when returned as an error.
type Mistakes []Mistake

// Mistake is one thing that is wrong.
type Mistake struct {
	// Where is "file:line,column-column", or the flag that brought the value, or the file's name
	// if nothing nearer is known.
	Where string
	// Summary is the kind of mistake in a few words, as HCL's own complaints have them.
	Summary string
	// Detail is a sentence that says what is wrong and what to do.
	Detail string

	order int // position in the file
}

// String returns the mistake as one line.
func (m Mistake) String() string { return m.Where + ": " + m.Summary + "; " + m.Detail }

// maxTold is how many mistakes are told of: more than that have few causes.
const maxTold = 25

// Error returns one line per mistake, in the order of the file, as far as anybody would read.
func (m Mistakes) Error() string {
	var lines []string
	for _, mistake := range m[:min(len(m), maxTold)] {
		lines = append(lines, mistake.String())
	}
	if more := len(m) - maxTold; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more; mend these first.", more))
	}
	return strings.Join(lines, "\n")
}

// loader reads one file. Its methods collect mistakes and go on.
type loader struct {
	path    string
	options Options
	source  []byte
	body    *hclsyntax.Body
	flags   map[string]string // key to the flag that set it
	wrong   Mistakes
}

// open reads and parses the file. It returns nil and the mistakes if nothing can be made of it.
func open(path string, options Options, kind fileKind) (*loader, error) {
	l := &loader{path: path, options: options, flags: map[string]string{}}
	source, err := readFile(path)
	if err != nil {
		next := "name the file with " + kind.flag
		switch {
		case errors.Is(err, fs.ErrPermission):
			next = "give this user the right to read it"
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
			next = "raise the number of files that this process may have open (ulimit -n, LimitNOFILE in its unit)"
		}
		return nil, Mistakes{{Where: path, Summary: "Unreadable configuration file", Detail: fmt.Sprintf("%s; %s.", reason(err), next)}}
	}
	if options.ExpandEnv {
		source = l.expandEnv(source)
	}
	l.source = source
	if at := invalidText(source); at >= 0 {
		line, column := 1+bytes.Count(source[:at], []byte("\n")), at-bytes.LastIndexByte(source[:at], '\n')
		return nil, Mistakes{{Where: fmt.Sprintf("%s:%d,%d", path, line, column), Summary: "Invalid character encoding", Detail: "This is no text in UTF-8; is it the right file?"}}
	}
	file, diags := hclsyntax.ParseConfig(source, path, hcl.InitialPos)
	l.add(diags)
	body, ok := file.Body.(*hclsyntax.Body)
	if diags.HasErrors() || !ok {
		if !ok || foreign(body, l.wrong[0].Summary) {
			// What the parser says of the first word would lead nobody anywhere.
			return nil, Mistakes{{Where: l.wrong[0].Where, Summary: "No HCL", Detail: otherFormat(source) + "; is it the right file? It must be as " + kind.sample + "."}}
		}
		// What follows a syntax error is guesswork, and complaints about guesses mislead.
		return nil, l.mistakes()
	}
	l.body = body
	return l, nil
}

// fileKind is what is particular about a kind of file: the flag that names one, and a sample.
type fileKind struct{ flag, sample string }

// foreign says that a file has nothing that the parser knows, by what came of it and the first complaint.
func foreign(body *hclsyntax.Body, complaint string) bool {
	return (complaint == "Argument or block definition required" || complaint == "Invalid block definition") && len(body.Attributes) == 0 &&
		!slices.ContainsFunc(body.Blocks, func(b *hclsyntax.Block) bool { return len(b.Body.Attributes)+len(b.Body.Blocks) > 0 })
}

// otherFormat says what a file looks like that has nothing of HCL.
func otherFormat(source []byte) string {
	text := bytes.TrimSpace(source)
	switch {
	case bytes.HasPrefix(text, []byte("{")), bytes.HasPrefix(text, []byte("[")):
		return "This looks like JSON, and nothing in it is HCL"
	case bytes.HasPrefix(text, []byte("---")), yamlKey.Match(text):
		return "This looks like YAML, and nothing in it is HCL"
	}
	return "Nothing in this file is HCL"
}

// yamlKey is how a file in YAML begins: a word and a colon.
var yamlKey = regexp.MustCompile(`^(#[^\n]*\n\s*)*[A-Za-z0-9_-]+:(\s|$)`)

// invalidText returns where the first byte is that is no UTF-8, or that no text has, or -1.
func invalidText(source []byte) int {
	for at := 0; at < len(source); {
		r, size := utf8.DecodeRune(source[at:])
		if r == utf8.RuneError && size == 1 || r == 0 {
			return at
		}
		at += size
	}
	return -1
}

// maxFile is far more than any honest file; a block device or /dev/zero must not fill the memory.
const maxFile = 4 << 20

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	switch {
	case info.IsDir():
		return nil, errors.New("it is a directory")
	case info.Size() > maxFile:
		return nil, fmt.Errorf("it is %d bytes large, the limit is %d", info.Size(), maxFile)
	}
	return os.ReadFile(path)
}

// reason returns the part of a file error that an operator needs; the path is said elsewhere.
func reason(err error) string {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err.Error()
	}
	return err.Error()
}

// decode fills the struct from the file, then applies the flags.
func (l *loader) decode(into any) {
	l.add(gohcl.DecodeBody(l.body, nil, into))
	for _, s := range l.options.Set {
		l.flags[s.Key] = s.Flag
		if err := set(into, strings.Split(s.Key, "."), s.Value); err != nil {
			l.say(s.Key, "Unsuitable value", "%s.", err)
		}
	}
}

// add takes over what the HCL library complains about, with a next step where we know one.
func (l *loader) add(diags hcl.Diagnostics) {
	for _, d := range diags {
		if d.Severity != hcl.DiagError {
			continue
		}
		detail := strings.TrimPrefix(oneLine(d.Detail), "Unsuitable value: ")
		if detail == "value must be known" {
			continue // an expression that was complained about already has no value
		}
		m := Mistake{Where: l.path, Summary: d.Summary, Detail: detail}
		if d.Subject != nil {
			m.Where, m.order = d.Subject.String(), d.Subject.Start.Byte
			if d.Subject.CanSliceBytes(l.source) {
				if step, known := nextStep[string(d.Subject.SliceBytes(l.source))]; known && strings.HasPrefix(d.Summary, "Unsupported") {
					m.Detail += " " + step
				}
			}
		}
		if d.Summary == "Variables not allowed" {
			m.Detail += " With -expandEnv, $NAME and ${NAME} are replaced by environment variables."
		}
		l.wrong = append(l.wrong, m)
	}
}

// say records a mistake about the value of a key, at the key's place in the file or as its flag's. A
// key that is not in the file is complained about at the block it would be in.
func (l *loader) say(key, summary, format string, args ...any) {
	m := Mistake{Where: l.path, Summary: summary, Detail: fmt.Sprintf(format, args...)}
	if flag, ok := l.flags[key]; ok {
		m.Where = flag
	} else if r := find(l.body, strings.Split(key, ".")); r != nil {
		m.Where, m.order = r.String(), r.Start.Byte
	}
	l.wrong = append(l.wrong, m)
}

// noBlock complains about a missing block, unless there is one under a mistyped name.
func (l *loader) noBlock(name, need string) {
	for _, m := range l.wrong {
		if m.Summary == "Unsupported block type" || m.Summary == "Duplicate "+name+" block" {
			return
		}
	}
	l.say(name, "Missing "+name+" block", "%s", need)
}

// unlessFlag runs do if the key was not set by a flag.
func (l *loader) unlessFlag(key string, do func()) {
	if l.flags[key] == "" {
		do()
	}
}

// find returns the place of the value of a key, or of the innermost block on the way to it.
func find(body *hclsyntax.Body, path []string) *hcl.Range {
	if body == nil {
		return nil
	}
	if attr, ok := body.Attributes[path[0]]; ok {
		return attr.Expr.Range().Ptr()
	}
	for _, block := range body.Blocks {
		if block.Type != path[0] {
			continue
		}
		rest := path[1:]
		for _, label := range block.Labels {
			if len(rest) == 0 || rest[0] != label {
				rest = nil
				break
			}
			rest = rest[1:]
		}
		if rest == nil {
			continue
		}
		if len(rest) > 0 {
			if r := find(block.Body, rest); r != nil {
				return r
			}
		}
		return block.DefRange().Ptr()
	}
	return nil
}

// mistakes returns what was recorded as an error, in the order of the file, or nil.
func (l *loader) mistakes() error {
	if len(l.wrong) == 0 {
		return nil
	}
	slices.SortStableFunc(l.wrong, func(a, b Mistake) int { return a.order - b.order })
	return slices.CompactFunc(l.wrong, func(a, b Mistake) bool { return a == b })
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// absolute returns a path that means the same wherever the daemon goes.
func absolute(path string) string {
	if path == "" {
		return ""
	}
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path
}

// nextStep says what to do about names that SPIRE's files have and ours do not.
var nextStep = map[string]string{
	"plugins":                     `Each attestor has a block of its own at the top level: node_attestor "join_token" { … }, workload_attestor "unix" { … }, key_manager "disk" { … }. The command "migrate" makes such a file of one of SPIRE's.`,
	"plugin_data":                 "Its keys go directly into the attestor's block.",
	"plugin_cmd":                  `A plugin of its own goes into a block of type "external", with its name as name.`,
	"plugin_checksum":             `A plugin of its own goes into a block of type "external", with its name as name.`,
	"NodeAttestor":                `Write node_attestor "type" { … } at the top level.`,
	"WorkloadAttestor":            `Write workload_attestor "type" { … } at the top level.`,
	"UpstreamAuthority":           `Write upstream_authority "type" { … } at the top level.`,
	"KeyManager":                  `Write key_manager "type" { … } at the top level.`,
	"DataStore":                   "The store is a file in data_dir; it needs no configuration.",
	"audit_log_enabled":           "The audit log is always on; audit_log_file says where it goes.",
	"experimental":                "What is experimental in SPIRE is a plain key here or is not needed.",
	"profiling_enabled":           "Use the debug command instead.",
	"trust_bundle_unix_socket":    "Use trust_bundle_path or an https trust_bundle_url.",
	"use_sync_authorized_entries": "The agent chooses the newest protocol that the server speaks.",
}
