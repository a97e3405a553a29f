package keep

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse is Take's answer for a data directory that another process has.
var ErrInUse = errors.New("another agent uses it")

// turnPause is how often a directory that is another's is looked at: the lock of files has no deadline.
const turnPause = 10 * time.Millisecond

// Turn is the right to use a data directory, which one process has at a time. It ends with the process, however
// that ends.
type Turn struct{ dir *os.File }

// Take takes the data directory for this process, making it with mode 0700 if it is missing. Where another has
// it, the error is ErrInUse and names it.
//
// It is the directory itself that is locked: a file for that could not be made on a full disk.
func Take(dir string) (*Turn, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	switch err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case err == nil:
		return &Turn{f}, nil
	case errors.Is(err, unix.EWOULDBLOCK):
		err = fmt.Errorf("lock data directory %s: %w%s", dir, ErrInUse, holder(f))
	default:
		err = fmt.Errorf("lock data directory %s: %w", dir, err)
	}
	return nil, errors.Join(err, f.Close())
}

// Await takes the data directory as soon as no other process has it.
func Await(ctx context.Context, dir string) (*Turn, error) {
	tick := time.NewTicker(turnPause)
	defer tick.Stop()
	for {
		t, err := Take(dir)
		if !errors.Is(err, ErrInUse) {
			return t, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// End lets another have the directory.
func (t *Turn) End() { _ = t.dir.Close() } // the lock goes with the descriptor, whatever Close says

// holder says which process has the lock, by /proc/locks, or nothing where that is not to be known.
func holder(f *os.File) string {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return ""
	}
	text, err := os.ReadFile("/proc/locks")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		// 1: FLOCK  ADVISORY  WRITE 4711 fe:00:1234 0 EOF
		fields := strings.Fields(line)
		if len(fields) > 5 && fields[1] == "FLOCK" && strings.HasSuffix(fields[5], fmt.Sprintf(":%d", st.Ino)) && fields[4] != "0" {
			return ": process " + fields[4]
		}
	}
	return ""
}
