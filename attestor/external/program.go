package external

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxProgram is how large a program may be, in bytes. The largest of SPIRE's neighbours is a sixth of it.
const maxProgram = 512 << 20

// ParseChecksum reads the SHA-256 that an operator wrote.
func ParseChecksum(text string) ([sha256.Size]byte, error) {
	var sum [sha256.Size]byte
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != len(sum) {
		return sum, fmt.Errorf("%q is no SHA-256: it has %d hexadecimal digits; sha256sum prints it", Clip(text), 2*len(sum))
	}
	copy(sum[:], raw)
	return sum, nil
}

// Checksum returns the SHA-256 of a program, and says what keeps a file from being one.
func Checksum(path string) ([sha256.Size]byte, error) { return ReadProgram(path, io.Discard) }

// ReadProgram copies a program and returns its checksum.
func ReadProgram(path string, to io.Writer) (sum [sha256.Size]byte, err error) {
	// O_NONBLOCK: a pipe in the program's place is an error, not a hang.
	from, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return sum, err
	}
	defer func() { _ = from.Close() }()
	stat, err := from.Stat()
	switch {
	case err != nil:
		return sum, err
	case !stat.Mode().IsRegular():
		return sum, fmt.Errorf("%s is not a regular file", path)
	case stat.Mode()&0o111 == 0:
		return sum, fmt.Errorf("%s is not executable", path)
	case stat.Size() > maxProgram:
		return sum, fmt.Errorf("%s is %d bytes large, the limit is %d", path, stat.Size(), maxProgram)
	}
	head := make([]byte, 4)
	if n, _ := from.ReadAt(head, 0); !bytes.Equal(head[:n], []byte("\x7fELF")) {
		return sum, fmt.Errorf("%s is no ELF program; what interprets a script would not be part of its checksum", path)
	}
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(to, hash), io.LimitReader(from, maxProgram+1))
	if err == nil && n > maxProgram {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxProgram)
	}
	hash.Sum(sum[:0])
	return sum, err
}

// ChecksumError says that a program is not the one that was meant.
type ChecksumError struct {
	Path      string
	Want, Got [sha256.Size]byte
}

// Error says what was found and what to do.
func (e *ChecksumError) Error() string {
	return fmt.Sprintf("%s has the SHA-256 %x, and plugin_checksum demands %x; if the program was replaced on purpose, change plugin_checksum", e.Path, e.Got, e.Want)
}

// Clip keeps a stranger's text from filling a message.
func Clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}
