package report

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// cursor reads values of a document that check has passed. Keys are compared byte for byte:
// encoding/json would also take "severity" for "Severity", and a document could then say one thing to
// a scanner's operator and another to us.
//
// The first error stays and turns every later read into nothing, so that readers ask once, at the end.
type cursor struct {
	b    []byte
	i    int
	path [][]byte // keys on the way to the value at hand, for sentences
	err  error
}

func at(value []byte) *cursor { return &cursor{b: value} }

func (c *cursor) fail(format string, args ...any) { c.failWith(fmt.Errorf(format, args...)) }

// failWith records an error at the value at hand, if it is one and the first.
func (c *cursor) failWith(err error) {
	if err == nil || c.err != nil {
		return
	}
	if len(c.path) > 0 {
		err = fmt.Errorf("%s: %w", clean(string(bytes.Join(c.path, []byte("."))), 200), err)
	}
	c.err = err
}

func (c *cursor) space() {
	for c.i < len(c.b) && isSpace(c.b[c.i]) {
		c.i++
	}
}

// kind is the first byte of the value at the cursor: one of { [ " t f n - or a digit.
func (c *cursor) kind() byte {
	if c.err != nil {
		return 'n'
	}
	c.space()
	return c.b[c.i]
}

var kinds = map[byte]string{'{': "an object", '[': "an array", '"': "text", 't': "true", 'f': "false", 'n': "null"}

func (c *cursor) want(what string) {
	found := "a number"
	if k, ok := kinds[c.kind()]; ok {
		found = k
	}
	c.fail("want %s, found %s", what, found)
}

// object calls f with each key of the object at the cursor; f reads the value or leaves it, and it is
// skipped. The answer is whether there was an object: null is none, anything else is an error.
func (c *cursor) object(f func(key []byte)) bool {
	switch c.kind() {
	case '{':
	case 'n':
		c.skip()
		return false
	default:
		c.want("an object")
		return false
	}
	c.i++
	for c.err == nil {
		c.space()
		if c.b[c.i] == ',' {
			c.i++
			c.space()
		}
		if c.b[c.i] == '}' {
			c.i++
			return true
		}
		key := c.bytes()
		c.space()
		c.i++ // the colon
		c.space()
		start := c.i
		c.path = append(c.path, key)
		f(key)
		c.path = c.path[:len(c.path)-1]
		if c.i == start {
			c.skip()
		}
	}
	return false
}

// array calls f at each value of the array at the cursor. The answer is whether there was an array.
func (c *cursor) array(f func()) bool {
	switch c.kind() {
	case '[':
	case 'n':
		c.skip()
		return false
	default:
		c.want("an array")
		return false
	}
	c.i++
	for c.err == nil {
		c.space()
		if c.b[c.i] == ',' {
			c.i++
			c.space()
		}
		if c.b[c.i] == ']' {
			c.i++
			return true
		}
		start := c.i
		f()
		if c.i == start {
			c.skip()
		}
	}
	return false
}

// text is the text at the cursor, cleaned and at most max bytes long, empty for null.
func (c *cursor) text(max int) string {
	switch c.kind() {
	case '"':
		return clean(string(c.bytes()), max)
	case 'n':
		c.skip()
	default:
		c.want("text")
	}
	return ""
}

// texts is the array of texts at the cursor.
func (c *cursor) texts(max int) []string {
	var all []string
	c.array(func() {
		if s := c.text(max); s != "" {
			all = append(all, s)
		}
		if len(all) > maxTexts {
			c.fail("more than %d texts", maxTexts)
		}
	})
	return all
}

// given says that the value at the cursor is anything but null, false, empty text or an empty list: how
// programs write that an option was used, of whatever type it is in their next version.
func (c *cursor) given() bool {
	switch c.kind() {
	case 'n', 'f':
		c.skip()
		return false
	case '"':
		return c.text(maxText) != ""
	case '[':
		given := false
		c.array(func() { given = true })
		return given
	default:
		c.skip()
		return true
	}
}

// scalar is a text, a number or a truth value as text; ok is false for anything else, which is skipped.
func (c *cursor) scalar(max int) (s string, ok bool) {
	switch c.kind() {
	case '"':
		return c.text(max), true
	case '{', '[', 'n':
		c.skip()
		return "", false
	default:
		return clean(string(c.raw()), max), true
	}
}

// is reads a truth value, false for null.
func (c *cursor) is() bool {
	switch c.kind() {
	case 't':
		c.skip()
		return true
	case 'f', 'n':
		c.skip()
	default:
		c.want("true or false")
	}
	return false
}

// number reads a number; ok is false for null.
func (c *cursor) number() (n float64, ok bool) {
	switch b := c.kind(); {
	case b == '-' || isDigit(b):
		n, err := strconv.ParseFloat(string(c.raw()), 64)
		if err != nil {
			c.fail("the number is out of range")
		}
		return n, err == nil
	case b == 'n':
		c.skip()
	default:
		c.want("a number")
	}
	return 0, false
}

// time reads a time, zero for null, empty text and the year 1 that some programs write for no time.
func (c *cursor) time() time.Time {
	s := strings.TrimSpace(c.text(maxWord))
	if s == "" {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		c.fail("%q is not a time (RFC 3339)", s)
		return time.Time{}
	}
	if t.Year() <= 1 {
		return time.Time{}
	}
	return t.UTC()
}

// digest reads "sha256:…", empty for null and empty text.
func (c *cursor) digest() string {
	s := c.text(maxText)
	if s == "" {
		return ""
	}
	d, err := digest(s)
	c.failWith(err)
	return d
}

// bytes is what the string at the cursor says.
func (c *cursor) bytes() []byte {
	c.i++
	start, escaped := c.i, false
	for c.b[c.i] != '"' {
		if c.b[c.i] == '\\' {
			escaped = true
			c.i++
		}
		c.i++
	}
	s := c.b[start:c.i]
	c.i++
	if escaped {
		return unescape(s)
	}
	return s
}

// raw is the value at the cursor as it is written.
func (c *cursor) raw() []byte {
	c.space()
	start := c.i
	c.skip()
	return c.b[start:c.i]
}

// skip goes past the value at the cursor.
func (c *cursor) skip() {
	if c.err != nil {
		return
	}
	c.space()
	for depth := 0; ; {
		switch b := c.b[c.i]; b {
		case '"':
			c.i++
			for {
				for ordinary[c.b[c.i]] {
					c.i++
				}
				if c.b[c.i] == '"' {
					break
				}
				c.i += 2
			}
			c.i++
		case '{', '[':
			depth++
			c.i++
		case '}', ']':
			depth--
			c.i++
		case ',', ':', ' ', '\n', '\t', '\r':
			c.i++
			continue
		default:
			for c.i < len(c.b) && !endsWord[c.b[c.i]] {
				c.i++
			}
		}
		if depth == 0 {
			return
		}
	}
}

// endsWord marks what may follow a number, true, false or null.
var endsWord = [256]bool{',': true, '}': true, ']': true, ' ': true, '\n': true, '\t': true, '\r': true}
