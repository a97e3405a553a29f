package report

import (
	"bytes"
	"fmt"
	"unicode/utf8"
)

// Limits of what is read. They bound work and memory, not truth: no known report comes near them.
const (
	// MaxSize is the largest document that is read, in bytes.
	MaxSize = 32 << 20
	// MaxDepth is how deep arrays and objects may lie in each other.
	MaxDepth = 64
	// MaxFindings is how many findings or statements one document may hold.
	MaxFindings = 200_000
	// maxMembers is how many members one object may have. The check for duplicates remembers them all,
	// so that without a bound a document of nothing but keys would cost many times its size.
	maxMembers = 10_000
	// fewMembers is up to where comparing a key with all before it beats a map.
	fewMembers = 24
)

// member is one member of the outermost object of a document: its key and where its value lies.
type member struct {
	key   string
	value []byte
}

// checker walks a document once and finds all that is wrong with it as JSON (RFC 8259), so that what
// reads it afterwards need not look for errors. It is stricter than encoding/json where two readers
// could understand the same bytes differently: duplicate keys, also those that are only equal once
// unescaped, invalid UTF-8, and \u escapes that are half of a pair.
type checker struct {
	b    []byte
	i    int
	keys [][]byte // of all objects that are open, innermost last
	top  []member
}

// check returns the members of the document's outermost object, or an error that says in which line
// the document is not what it should be. A document that is not an object has no members and is fine
// as JSON: the caller says what it wanted.
func check(data []byte) ([]member, error) {
	switch {
	case len(data) > MaxSize:
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", ErrTooLarge, len(data), MaxSize)
	case bytes.HasPrefix(data, []byte("\xef\xbb\xbf")):
		return nil, fmt.Errorf("document starts with a byte order mark, which JSON must not (RFC 8259 section 8.1)")
	case !utf8.Valid(data):
		return nil, fmt.Errorf("document is not valid UTF-8")
	}
	c := &checker{b: data}
	c.space()
	if c.i == len(data) {
		return nil, fmt.Errorf("document is empty")
	}
	if err := c.value(0); err != nil {
		return nil, err
	}
	c.space()
	if c.i != len(data) {
		return nil, c.fail("something follows the end of the document")
	}
	return c.top, nil
}

func (c *checker) fail(format string, args ...any) error {
	line := 1 + bytes.Count(c.b[:min(c.i, len(c.b))], []byte{'\n'})
	return fmt.Errorf("line %d, byte %d: %s", line, c.i, fmt.Sprintf(format, args...))
}

// peek is the byte at the cursor, 0 at the end of the document: no value begins with it.
func (c *checker) peek() byte {
	if c.i < len(c.b) {
		return c.b[c.i]
	}
	return 0
}

func (c *checker) space() {
	for c.i < len(c.b) && isSpace(c.b[c.i]) {
		c.i++
	}
}

func isSpace(b byte) bool { return b == ' ' || b == '\n' || b == '\t' || b == '\r' }

// value checks the value at the cursor; depth is how many arrays and objects it lies in.
func (c *checker) value(depth int) error {
	switch b := c.peek(); {
	case b == '{' || b == '[':
		if depth == MaxDepth {
			return c.fail("nested deeper than %d", MaxDepth)
		}
		if b == '{' {
			return c.object(depth + 1)
		}
		return c.array(depth + 1)
	case b == '"':
		_, err := c.str()
		return err
	case b == '-' || isDigit(b):
		return c.number()
	case b == 't':
		return c.word("true")
	case b == 'f':
		return c.word("false")
	case b == 'n':
		return c.word("null")
	case c.i >= len(c.b):
		return c.fail("document ends in the middle")
	default:
		return c.fail("a value cannot begin with %q", b)
	}
}

func (c *checker) word(w string) error {
	if !bytes.HasPrefix(c.b[c.i:], []byte(w)) {
		return c.fail("want %s, or this is not JSON", w)
	}
	c.i += len(w)
	return nil
}

// number follows the grammar of RFC 8259 section 6.
func (c *checker) number() error {
	if c.peek() == '-' {
		c.i++
	}
	switch {
	case c.peek() == '0':
		c.i++
	case !c.digits():
		return c.fail("a number needs digits")
	}
	if c.peek() == '.' {
		if c.i++; !c.digits() {
			return c.fail("a number needs digits after its point")
		}
	}
	if b := c.peek(); b == 'e' || b == 'E' {
		c.i++
		if b := c.peek(); b == '+' || b == '-' {
			c.i++
		}
		if !c.digits() {
			return c.fail("a number needs digits in its exponent")
		}
	}
	return nil
}

func (c *checker) digits() bool {
	start := c.i
	for isDigit(c.peek()) {
		c.i++
	}
	return c.i > start
}

func isDigit(b byte) bool { return b >= '0' && b <= '9' }

func (c *checker) array(depth int) error {
	c.i++
	c.space()
	if c.peek() == ']' {
		c.i++
		return nil
	}
	for {
		if err := c.value(depth); err != nil {
			return err
		}
		c.space()
		switch c.peek() {
		case ',':
			c.i++
			c.space()
		case ']':
			c.i++
			return nil
		default:
			return c.fail("want , or ] after a value of an array")
		}
	}
}

func (c *checker) object(depth int) error {
	c.i++
	c.space()
	if c.peek() == '}' {
		c.i++
		return nil
	}
	mine := len(c.keys)
	var seen map[string]struct{} // once the object has more than fewMembers
	for {
		if c.peek() != '"' {
			return c.fail("want a key")
		}
		key, err := c.str()
		if err != nil {
			return err
		}
		if seen, err = c.unique(c.keys[mine:], seen, key); err != nil {
			return err
		}
		c.keys = append(c.keys, key)
		c.space()
		if c.peek() != ':' {
			return c.fail("want : after the key %s", quoted(key))
		}
		c.i++
		c.space()
		start := c.i
		if err := c.value(depth); err != nil {
			return err
		}
		if depth == 1 {
			c.top = append(c.top, member{key: string(key), value: c.b[start:c.i]})
		}
		c.space()
		switch c.peek() {
		case ',':
			c.i++
			c.space()
		case '}':
			c.i++
			c.keys = c.keys[:mine]
			return nil
		default:
			return c.fail("want , or } after the value of %s", quoted(key))
		}
	}
}

// unique refuses a key that is among the earlier ones of its object. Which of two values counts is
// for each JSON reader to choose, so that a scanner's operator and we might not see the same report.
func (c *checker) unique(earlier [][]byte, seen map[string]struct{}, key []byte) (map[string]struct{}, error) {
	double := false
	switch n := len(earlier); {
	case n < fewMembers:
		for _, k := range earlier {
			double = double || bytes.Equal(k, key)
		}
	case n >= maxMembers:
		return nil, c.fail("an object has more than %d members", maxMembers)
	default:
		if seen == nil {
			seen = make(map[string]struct{}, 4*fewMembers)
			for _, k := range earlier {
				seen[string(k)] = struct{}{}
			}
		}
		if _, double = seen[string(key)]; !double {
			seen[string(key)] = struct{}{}
		}
	}
	if double {
		return nil, c.fail("the key %s is there twice", quoted(key))
	}
	return seen, nil
}

// ordinary marks the bytes that stand for themselves in a string: neither quote, nor backslash, nor control.
var ordinary = func() (t [256]bool) {
	for i := range t {
		t[i] = i >= 0x20 && i != '"' && i != '\\'
	}
	return t
}()

// str checks the string at the cursor and returns what it says, unescaped.
func (c *checker) str() ([]byte, error) {
	c.i++
	start, escaped := c.i, false
	for {
		for c.i < len(c.b) && ordinary[c.b[c.i]] {
			c.i++
		}
		switch c.peek() {
		case '"':
			s := c.b[start:c.i]
			c.i++
			if escaped {
				s = unescape(s)
			}
			return s, nil
		case '\\':
			escaped = true
			if err := c.escape(); err != nil {
				return nil, err
			}
		default:
			if c.i >= len(c.b) {
				return nil, c.fail("document ends in a string")
			}
			return nil, c.fail("a string holds the control character %#02x unescaped", c.b[c.i])
		}
	}
}

// escape checks the escape at the cursor, both halves of it where it needs two (RFC 8259 section 7).
func (c *checker) escape() error {
	c.i++
	switch c.peek() {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		c.i++
		return nil
	case 'u':
	default:
		return c.fail("a string holds an escape that JSON does not know")
	}
	first, ok := hex4(c.b[c.i+1:])
	if !ok {
		return c.fail(`\u needs four hex digits`)
	}
	c.i += 5
	if first < 0xd800 || first > 0xdfff {
		return nil
	}
	if first < 0xdc00 && bytes.HasPrefix(c.b[c.i:], []byte(`\u`)) {
		if second, ok := hex4(c.b[c.i+2:]); ok && second >= 0xdc00 && second <= 0xdfff {
			c.i += 6
			return nil
		}
	}
	return c.fail(`\u%04x is half of a character`, first)
}

func hex4(b []byte) (rune, bool) {
	if len(b) < 4 {
		return 0, false
	}
	var r rune
	for _, d := range b[:4] {
		switch {
		case isDigit(d):
			r = r<<4 | rune(d-'0')
		case d >= 'a' && d <= 'f':
			r = r<<4 | rune(d-'a'+10)
		case d >= 'A' && d <= 'F':
			r = r<<4 | rune(d-'A'+10)
		default:
			return 0, false
		}
	}
	return r, true
}

// plainEscapes are the escapes of one character that do not stand for themselves.
var plainEscapes = map[byte]byte{'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

// unescape returns what a checked string says.
func unescape(s []byte) []byte {
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); {
		if s[i] != '\\' {
			out = append(out, s[i])
			i++
			continue
		}
		if s[i+1] != 'u' {
			b := s[i+1]
			if p, ok := plainEscapes[b]; ok {
				b = p
			}
			out = append(out, b)
			i += 2
			continue
		}
		r, _ := hex4(s[i+2:])
		i += 6
		if r >= 0xd800 && r <= 0xdfff {
			second, _ := hex4(s[i+2:])
			r = 0x10000 + (r-0xd800)<<10 + (second - 0xdc00)
			i += 6
		}
		out = utf8.AppendRune(out, r)
	}
	return out
}

// quoted is a key as a sentence shows it.
func quoted(key []byte) string { return fmt.Sprintf("%q", clean(string(key), 64)) }
