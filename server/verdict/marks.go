package verdict

import (
	"bufio"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/store/durable"
)

// marksFile is a second memory of the marks, beside the store: one line for each, the last one for an
// ID counts. A nil one remembers nothing.
//
// A line is the ID, a space and the record in base64. Half a line at the end is what a crash leaves and
// is left aside: what it was about was never acknowledged.
type marksFile struct {
	path string
	file *os.File
}

func openMarks(path string) (*marksFile, error) {
	if path == "" {
		return nil, nil // none is asked for
	}
	file, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open marks: %w", err)
	}
	return &marksFile{path: path, file: file}, nil
}

func (f *marksFile) close() error {
	if f == nil || f.file == nil {
		return nil
	}
	err := f.file.Close()
	f.file = nil
	return err
}

// merge puts what the file knows and the store does not, or knows as older, into the marks, and writes
// the file anew with each mark once.
func (f *marksFile) merge(marks map[string]*stored.EvidenceMark) error {
	if f == nil {
		return nil
	}
	lines := bufio.NewScanner(f.file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		id, text, ok := strings.Cut(lines.Text(), " ")
		raw, err := base64.RawStdEncoding.DecodeString(text)
		if !ok || err != nil {
			continue // half a line
		}
		var m stored.EvidenceMark
		if decodeBody(raw, &m) != nil {
			continue
		}
		if old := marks[id]; old == nil || old.GetTime() < m.GetTime() {
			marks[id] = &m
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read marks %s: %w", f.path, err)
	}
	return f.rewrite(marks)
}

func (f *marksFile) rewrite(marks map[string]*stored.EvidenceMark) error {
	next, err := os.CreateTemp(filepath.Dir(f.path), filepath.Base(f.path)+".*")
	if err != nil {
		return fmt.Errorf("write marks: %w", err)
	}
	defer func() { _ = os.Remove(next.Name()) }() // gone if it was renamed
	w := bufio.NewWriter(next)
	for id, m := range marks {
		line, err := markLine(id, m)
		if err != nil {
			return errors.Join(err, next.Close())
		}
		_, _ = w.WriteString(line) // Flush tells
	}
	if err := errors.Join(w.Flush(), next.Sync()); err != nil {
		return errors.Join(fmt.Errorf("write marks: %w", err), next.Close())
	}
	if err := os.Rename(next.Name(), f.path); err != nil {
		return errors.Join(fmt.Errorf("write marks: %w", err), next.Close())
	}
	old := f.file
	f.file = next // it is at its end; all writes go there
	return errors.Join(old.Close(), durable.SyncDir(filepath.Dir(f.path)))
}

// PEM writes lists of revoked certificates one after the other.
func PEM(lists [][]byte) []byte {
	var text []byte
	for _, der := range lists {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return text
}

// add remembers a mark; it returns when the line is on the disk.
func (f *marksFile) add(marks map[string]*stored.EvidenceMark) error {
	if f == nil || len(marks) == 0 {
		return nil
	}
	var text strings.Builder
	for id, m := range marks {
		line, err := markLine(id, m)
		if err != nil {
			return err
		}
		text.WriteString(line)
	}
	// A line that was torn must not swallow this one.
	if _, err := f.file.WriteString("\n" + text.String()); err != nil {
		return fmt.Errorf("write mark: %w", err)
	}
	if err := f.file.Sync(); err != nil {
		return fmt.Errorf("write mark: %w", err)
	}
	return nil
}

func markLine(id string, m *stored.EvidenceMark) (string, error) {
	raw, err := encodeBody(m)
	if err != nil {
		return "", err
	}
	return id + " " + base64.RawStdEncoding.EncodeToString(raw) + "\n", nil
}

// later raises a mark: what was remembered is never undercut.
func later(old, next *stored.EvidenceMark) *stored.EvidenceMark {
	if old == nil {
		return next
	}
	m := proto.CloneOf(next)
	m.Time, m.DbTime = max(old.GetTime(), next.GetTime()), max(old.GetDbTime(), next.GetDbTime())
	return m
}
