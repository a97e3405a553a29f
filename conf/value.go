package conf

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// set gives the field with the given path of hcl tags a value from its text.
func set(into any, path []string, text string) error {
	v := reflect.ValueOf(into).Elem()
	for _, name := range path {
		if v.Kind() == reflect.Pointer {
			if v.IsNil() {
				v.Set(reflect.New(v.Type().Elem()))
			}
			v = v.Elem()
		}
		field, ok := tagged(v.Type(), name)
		if !ok {
			return fmt.Errorf("there is no key %s", strings.Join(path, "."))
		}
		v = v.FieldByIndex(field.Index)
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		v.SetInt(int64(n))
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		v.SetBool(b)
	default:
		return fmt.Errorf("key %s cannot be set by a flag", strings.Join(path, "."))
	}
	return nil
}

func tagged(t reflect.Type, name string) (reflect.StructField, bool) {
	for field := range t.Fields() {
		if tag, _, _ := strings.Cut(field.Tag.Get("hcl"), ","); tag == name {
			return field, true
		}
	}
	return reflect.StructField{}, false
}

// required says so if a text is empty.
func (l *loader) required(key, value, why string) {
	if value == "" {
		// A key whose value could not be decoded has been complained about.
		if r := find(l.body, strings.Split(key, ".")); r != nil {
			for _, m := range l.wrong {
				if m.order > r.Start.Byte && m.order < r.End.Byte {
					return
				}
			}
		}
		name := key[strings.LastIndexByte(key, '.')+1:]
		l.say(key, "Missing required argument", "The argument %q is required: %s.", name, why)
	}
}

// duration parses "1h30m"; empty is the default. The result is at least min.
func (l *loader) duration(key, text string, byDefault, min time.Duration) time.Duration {
	if text == "" {
		return byDefault
	}
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		l.say(key, "Invalid duration", "%q is no duration: write a number and a unit, as in \"90s\", \"5m\" or \"1h30m\".", text)
		return byDefault
	case d < 0:
		l.say(key, "Invalid duration", "%q is negative.", text)
		return byDefault
	case d < min:
		l.say(key, "Invalid duration", "%q is too short: it must be at least %s.", text, min)
		return byDefault
	}
	return d
}

// number checks lower and upper bounds of a number; nil is the default.
func (l *loader) number(key string, n *int, byDefault, low, high int) int {
	if n == nil {
		return byDefault
	}
	if *n < low || *n > high {
		l.say(key, "Invalid number", "%d is out of range: it must be from %d to %d.", *n, low, high)
		return byDefault
	}
	return *n
}

func (l *loader) port(key string, n *int, byDefault, low int) int {
	if n != nil && (*n < low || *n > 65535) {
		l.say(key, "Invalid port", "%d is no TCP port: it must be from %d to 65535.", *n, low)
		return byDefault
	}
	return l.number(key, n, byDefault, low, 65535)
}

func (l *loader) trustDomain(key, text string) spiffeid.TrustDomain {
	if text == "" {
		l.required(key, text, "it names the trust domain, for example \"example.org\"")
		return spiffeid.TrustDomain{}
	}
	td, err := spiffeid.TrustDomainFromString(text)
	if err != nil {
		next := "write one as in \"example.org\""
		if lower := strings.ToLower(text); lower != text {
			if _, err := spiffeid.TrustDomainFromString(lower); err == nil {
				next = fmt.Sprintf("write %q", lower)
			}
		}
		l.say(key, "Invalid trust domain", "%q: %s; %s.", text, err, next)
	}
	return td
}

func (l *loader) ids(key string, texts []string) []spiffeid.ID {
	var ids []spiffeid.ID
	for _, text := range texts {
		id, err := spiffeid.FromString(text)
		switch {
		case err != nil:
			l.say(key, "Invalid SPIFFE ID", "%q: %s; write it as in \"spiffe://example.org/admin\".", text, err)
		case id.Path() == "":
			l.say(key, "Invalid SPIFFE ID", "%q is a trust domain; the ID of a workload has a path.", text)
		default:
			ids = append(ids, id)
		}
	}
	return ids
}

// oneOf checks that a text is one of a few; empty is the first of them.
func (l *loader) oneOf(key, text string, allowed ...string) string {
	if text == "" {
		return allowed[0]
	}
	if !slices.Contains(allowed, text) {
		l.say(key, "Invalid value", "%q is unknown; there are %s.", text, quoted(allowed))
		return allowed[0]
	}
	return text
}

func (l *loader) logLevel(key, text string) logrus.Level {
	if text == "" {
		return logrus.InfoLevel
	}
	level, err := logrus.ParseLevel(text)
	if err != nil {
		l.say(key, "Invalid log level", "%q is unknown; there are \"debug\", \"info\", \"warn\" and \"error\".", text)
		return logrus.InfoLevel
	}
	return level
}

func (l *loader) ip(key, text, byDefault string) string {
	if text == "" {
		return byDefault
	}
	if text == "localhost" {
		return "127.0.0.1"
	}
	if net.ParseIP(text) == nil {
		l.say(key, "Invalid address", "%q is no IP address to listen on, as \"0.0.0.0\", \"::\" and \"127.0.0.1\" are.", text)
		return byDefault
	}
	return text
}

// maxSocketPath is what fits a sockaddr_un with its closing zero.
const maxSocketPath = 107

func (l *loader) socket(key, text, byDefault string) string {
	if text == "" {
		return byDefault
	}
	path := absolute(strings.TrimPrefix(text, "unix://"))
	if len(path) > maxSocketPath {
		l.say(key, "Invalid socket path", "%q is %d bytes long, the system's limit is %d: choose a shorter directory.", path, len(path), maxSocketPath)
		return byDefault
	}
	return path
}

// directory returns an absolute path that is a directory or does not exist yet.
func (l *loader) directory(key, text, why string) string {
	if text == "" {
		l.required(key, text, why)
		return ""
	}
	path := absolute(text)
	if info, err := os.Stat(path); err == nil && !info.IsDir() {
		l.say(key, "Not a directory", "%q is a file; name a directory, which is made if it does not exist.", path)
	}
	return path
}

// existing returns the absolute path of a file that can be read now, or complains.
func (l *loader) existing(key, text, next string) string {
	if text == "" {
		return ""
	}
	path := absolute(text)
	file, err := os.Open(path)
	if err != nil {
		l.say(key, "Unreadable file", "%s: %s; %s.", path, reason(err), next)
		return path
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil && info.IsDir() {
		l.say(key, "Unreadable file", "%s: it is a directory; %s.", path, next)
	}
	return path
}

// inFile returns the absolute path of a file that will be written.
func (l *loader) inFile(key, text string) string {
	if text == "" || text == "-" {
		return text
	}
	path := absolute(text)
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		l.say(key, "Not a file", "%q is a directory; name a file in it, as %q.", path, filepath.Join(path, "assay.log"))
	}
	return path
}

func quoted(texts []string) string {
	switch len(texts) {
	case 0:
		return "none"
	case 1:
		return strconv.Quote(texts[0])
	}
	q := make([]string, len(texts))
	for i, text := range texts {
		q[i] = strconv.Quote(text)
	}
	return strings.Join(q[:len(q)-1], ", ") + " and " + q[len(q)-1]
}

var variable = regexp.MustCompile(`\$(?:\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z_][A-Za-z0-9_]*)`)

// expandEnv replaces variables by their values, written so that within a string they are exactly
// themselves: a value with quotes or line ends adds nothing to the configuration. A variable that
// is not set is a mistake, not an empty text.
func (l *loader) expandEnv(source []byte) []byte {
	lookup := l.options.Getenv
	if lookup == nil {
		lookup = os.LookupEnv
	}
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`, "\t", `\t`, "${", "$${", "%{", "%%{")
	var out []byte
	line, lineStart, last := 1, 0, 0
	for _, at := range variable.FindAllIndex(source, -1) {
		for i := last; i < at[0]; i++ {
			if source[i] == '\n' {
				line, lineStart = line+1, i+1
			}
		}
		out = append(out, source[last:at[0]]...)
		last = at[1]
		name := strings.Trim(string(source[at[0]:at[1]]), "${}")
		value, ok := lookup(name)
		if comment(source[lineStart:at[0]]) {
			value, ok = "", true
		}
		if !ok {
			l.wrong = append(l.wrong, Mistake{
				Where:   fmt.Sprintf("%s:%d,%d-%d", l.path, line, at[0]-lineStart+1, at[1]-lineStart+1),
				Summary: "Unset environment variable",
				Detail:  fmt.Sprintf("The file uses $%s, which is not in the environment; set it or run without -expandEnv.", name),
				order:   at[0],
			})
		}
		out = append(out, escape.Replace(value)...)
	}
	return append(out, source[last:]...)
}

// comment reports whether the text before a variable makes the rest of its line a comment.
func comment(before []byte) bool {
	s := strings.TrimSpace(string(before))
	return strings.HasPrefix(s, "#") || strings.HasPrefix(s, "//")
}
