package attestor

import (
	"fmt"
	"io"
	"os"
)

// ReadFile reads a file that the operator named: a key, a certificate, a list of authorities. One that is larger
// than limit, in bytes, is an error, so that a wrong path costs no memory. The text of an error names the path.
func ReadFile(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) > limit {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, limit)
	}
	return text, nil
}
