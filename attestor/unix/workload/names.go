package workload

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
)

// maxNamesFile is the largest passwd or group file, in bytes, that is read.
const maxNamesFile = 16 << 20

// names answers which name an ID has in a file in the form of /etc/passwd or /etc/group (both have
// the name first and the ID third). The file is read here and not by the C library, so that the agent
// links none and never waits for a directory server; it is read again when it changed.
type names struct {
	path string

	mu   sync.Mutex // guards the two below
	read fileID
	byID map[uint32]string
}

func newNames(path string) *names { return &names{path: path} }

// of returns the first name that the file gives the ID. When the file cannot be read, what it said
// before still holds.
func (n *names) of(id uint32) (string, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	err := n.refresh()
	name, ok := n.byID[id]
	return name, ok, err
}

func (n *names) refresh() error {
	// Nearly always nothing has changed; an image of the agent and nothing else has no such file at all.
	if seen, err := identifyPath(n.path); err != nil || n.byID != nil && seen == n.read {
		return err
	}
	file, err := os.Open(n.path)
	if err != nil {
		return err
	}
	defer file.Close()
	now, err := identify(file)
	if err != nil {
		return err
	}
	if n.byID != nil && now == n.read {
		return nil
	}
	if now.size > maxNamesFile {
		return fmt.Errorf("%s is larger than %d bytes", n.path, maxNamesFile)
	}
	byID, err := parseNames(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", n.path, err)
	}
	n.read, n.byID = now, byID
	return nil
}

func parseNames(r io.Reader) (map[uint32]string, error) {
	byID := make(map[uint32]string)
	lines := bufio.NewScanner(io.LimitReader(r, maxNamesFile))
	lines.Buffer(nil, maxNamesFile) // a group's line names all its members
	for lines.Scan() {
		fields := strings.SplitN(lines.Text(), ":", 4)
		if len(fields) < 3 || fields[0] == "" || strings.HasPrefix(fields[0], "#") {
			continue // also the "+" and "-" lines of NIS, which have no ID
		}
		id, err := strconv.ParseUint(fields[2], 10, 32)
		if err != nil {
			continue
		}
		if _, taken := byID[uint32(id)]; !taken {
			byID[uint32(id)] = fields[0]
		}
	}
	return byID, lines.Err()
}
