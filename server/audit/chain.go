package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// Every line ends with the hash of the line before it, as the file has that: "prev", the SHA-256 in hex of
// its bytes without the newline. So a line that is changed, taken out or put in breaks the chain at the
// next one, and Verify says where. The chain goes on over a restart, and over a rotation into the next
// file.
//
// Why it is so: it needs no key, which whoever can change the file could use too. What a chain does not
// show is that its end was cut off, or that all of it was written anew; for that its last hash must be
// known elsewhere. The server says it in its own log whenever it opens the file, and Verify tells it.

// Words in the place of a hash.
const (
	prevNone    = "none"    // the first line there ever was
	prevUnknown = "unknown" // the file before it could not be read
)

// chain is the hash that the next line bears.
type chain struct {
	prev string
	// half is what the file has after its last newline: the beginning of a line that was torn off, which is
	// the line before the next.
	half []byte
}

func hashOf(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// link puts the hash into a line that is ready but for it: "{…}\n".
func (c *chain) link(text []byte, torn bool) []byte {
	prev := c.prev
	if torn {
		prev = hashOf(c.half)
	}
	text = append(text[:len(text)-2], `,"prev":"`...)
	text = append(text, prev...)
	return append(text, '"', '}', '\n')
}

// wrote takes in that the first n bytes of a text are in the file, which begins with a newline if the line
// before was torn.
func (c *chain) wrote(text []byte, n int, torn bool) {
	if n == 0 {
		return
	}
	line := text[:n]
	if torn {
		line = line[1:]
	}
	if n == len(text) {
		c.prev, c.half = hashOf(line[:len(line)-1]), nil
		return
	}
	c.half = bytes.Clone(line)
}

// lastLine returns the last line of a file without its newline, and whether it has none. A file that
// cannot be read has none that is known.
func lastLine(path string) (line []byte, torn, known bool, err error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return nil, true, false, nil // append-only for us: an empty line at worst
	}
	if err != nil {
		return nil, false, false, err
	}
	defer func() { _ = file.Close() }()
	stat, err := file.Stat()
	if err != nil {
		return nil, false, false, err
	}
	if !stat.Mode().IsRegular() || stat.Size() == 0 {
		return nil, false, true, nil
	}
	// Backwards, piece by piece, to the newline before the last line.
	var tail []byte
	for at := stat.Size(); at > 0; {
		n := min(at, 64<<10)
		at -= n
		piece := make([]byte, n, int(n)+len(tail))
		if _, err := file.ReadAt(piece, at); err != nil {
			return nil, false, false, err
		}
		tail = append(piece, tail...)
		if i := bytes.LastIndexByte(tail[:len(tail)-1], '\n'); i >= 0 {
			tail = tail[i+1:]
			break
		}
	}
	if line, whole := bytes.CutSuffix(tail, []byte("\n")); whole {
		return line, false, true, nil
	}
	return tail, true, true, nil
}

// Verified is what Verify found.
type Verified struct {
	// Lines is how many lines there are, Chained how many of them bear the hash of the one before.
	Lines, Chained int
	// First is the hash that the first line bears: of the last line of the file before, "none" or "unknown".
	// Last is the hash of the last line, which the next file begins with.
	First, Last string
	// Broken are the places where something was changed, taken out or put in, at most 100 of them.
	Broken []Break
	// Torn are numbers of lines that a crash left half, at most 100 of them.
	Torn []int
}

// Break is a place where the chain does not hold.
type Break struct {
	// Line is the number of the line that bears a wrong hash, from 1: it or the one before it is not what
	// was written there.
	Line int
	Text string
}

const maxBreaks = 100

// Verify reads an audit log and checks its chain. after is the hash that the first line must bear, empty
// for any.
func Verify(r io.Reader, after string) (*Verified, error) {
	v := &Verified{}
	in := bufio.NewReaderSize(r, 1<<20)
	say := func(format string, args ...any) {
		if len(v.Broken) < maxBreaks {
			v.Broken = append(v.Broken, Break{Line: v.Lines, Text: fmt.Sprintf(format, args...)})
		}
	}
	began := false
	for {
		line, err := in.ReadBytes('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read audit log: %w", err)
		}
		if len(line) > 0 {
			line = bytes.TrimSuffix(line, []byte("\n"))
			v.Lines++
			v.line(line, after, &began, say)
			v.Last = hashOf(line)
		}
		if err != nil {
			return v, nil //nolint:nilerr // the end
		}
	}
}

// line checks one line against the one before.
func (v *Verified) line(line []byte, after string, began *bool, say func(string, ...any)) {
	var fields struct {
		Prev *string `json:"prev"`
	}
	switch err := json.Unmarshal(line, &fields); {
	case err != nil:
		if len(v.Torn) < maxBreaks {
			v.Torn = append(v.Torn, v.Lines)
		}
		return
	case fields.Prev == nil && !*began:
		return // written before there was a chain
	case fields.Prev == nil:
		say("it bears no hash of the line before it, as all after the first do")
		return
	}
	v.Chained++
	first := !*began
	*began = true
	switch prev := *fields.Prev; {
	case first && v.Lines == 1:
		v.First = prev
		if after != "" && prev != after {
			say("it comes after a line with the hash %.12s…, not after %.12s…: a file between them is missing, or lines at the end of that before", prev, after)
		}
	case prev == prevUnknown:
		// The server could not read the file when it opened it.
	case prev == prevNone && first:
		v.First = prev
	case prev != v.Last:
		say("it comes after a line with the hash %.12s…, and the one before it has %.12s…", prev, v.Last)
	}
}
