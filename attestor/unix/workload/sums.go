package workload

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// maxSums is how many hashes are remembered; an entry is about 200 bytes.
	maxSums = 1024
	// settled is how long a file must have been left alone before its hash is remembered: two
	// changes within one tick of the file system's clock (up to 2 s on FAT, 10 ms elsewhere) leave
	// the same time stamp.
	settled = 3 * time.Second
	// piece is how many bytes are hashed between two looks at the context: a few milliseconds.
	piece = 4 << 20
)

// fileID is a file's identity and state. The status-change time is set by the kernel alone, so a file
// whose fileID is the same has the same bytes.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func identify(file *os.File) (fileID, error) {
	var stat syscall.Stat_t
	conn, err := file.SyscallConn()
	if err != nil {
		return fileID{}, err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = syscall.Fstat(int(fd), &stat) }); err != nil {
		return fileID{}, err
	}
	if failed != nil {
		return fileID{}, failed
	}
	return idOf(&stat)
}

// identifyPath is identify of whatever is at a path now.
func identifyPath(path string) (fileID, error) {
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		return fileID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return idOf(&stat)
}

func idOf(stat *syscall.Stat_t) (fileID, error) {
	if stat.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return fileID{}, errors.New("not a regular file")
	}
	//nolint:unconvert // the field widths differ between architectures
	return fileID{
		dev: uint64(stat.Dev), ino: uint64(stat.Ino), size: stat.Size,
		mtime: stat.Mtim, ctime: stat.Ctim,
	}, nil
}

// sums remembers the SHA-256 of files. Each file is hashed by one caller at a time; the others wait
// for it, so that a hundred instances started together cost one hash.
type sums struct {
	now func() time.Time

	mu      sync.Mutex // guards the two below
	known   map[fileID]string
	hashing map[fileID]chan struct{} // closed when the one who hashes is done, well or not
}

func newSums(now func() time.Time) *sums {
	return &sums{now: now, known: make(map[fileID]string), hashing: make(map[fileID]chan struct{})}
}

// of returns the lower-case hex SHA-256 of an open file whose identity is id.
func (s *sums) of(ctx context.Context, file *os.File, id fileID) (string, error) {
	for {
		s.mu.Lock()
		if sum, ok := s.known[id]; ok {
			s.mu.Unlock()
			return sum, nil
		}
		busy, ok := s.hashing[id]
		if !ok {
			done := make(chan struct{})
			s.hashing[id] = done
			s.mu.Unlock()
			sum, err := s.hash(ctx, file, id)
			s.mu.Lock()
			delete(s.hashing, id)
			s.mu.Unlock()
			close(done)
			return sum, err
		}
		s.mu.Unlock()
		select {
		case <-busy: // known now, or it is our turn
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

func (s *sums) hash(ctx context.Context, file *os.File, id fileID) (string, error) {
	digest := sha256.New()
	for { // in pieces: hashing gigabytes takes longer than a caller may want to wait
		if err := ctx.Err(); err != nil {
			return "", err
		}
		_, err := io.CopyN(digest, file, piece)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
	}
	after, err := identify(file)
	if err != nil {
		return "", err
	}
	if after != id {
		return "", fmt.Errorf("%s changed while it was read", file.Name())
	}
	sum := hex.EncodeToString(digest.Sum(nil))
	if s.now().Sub(time.Unix(id.ctime.Unix())) >= settled {
		s.remember(id, sum)
	}
	return sum, nil
}

func (s *sums) remember(id fileID, sum string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for old := range s.known {
		if len(s.known) < maxSums {
			break
		}
		delete(s.known, old) // any will do: it costs one more hash
	}
	s.known[id] = sum
}
