package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/durable"
)

// ErrExists says that there is a store which Restore was not told to replace.
var ErrExists = errors.New("there is a store already")

// Restoring says what Restore does.
type Restoring struct {
	// From is the copy: a backup, a snapshot, or the file of a stopped server.
	From string
	// DataDir is where the server looks for its store.
	DataDir string
	// Force puts the copy in the place of a store that is there, which is kept under another name.
	Force bool
	// TrustDomain that the copy must belong to. Zero: any.
	TrustDomain spiffeid.TrustDomain
	Now         time.Time
}

// Restored says what Restore did.
type Restored struct {
	Path string
	// Aside is where the store that was there is now; empty: there was none.
	Aside string
	// Records are those of the copy.
	Records *records.Checked
}

// Restore puts a copy in the place of a data directory's store, whole or not at all, with an identity
// of its own. It refuses a copy that is damaged in any way or belongs to another trust domain, and
// returns boltkv.ErrLocked if a server is running there, and ErrExists if there is a store and no
// Force.
func Restore(ctx context.Context, r Restoring) (done *Restored, err error) {
	path := filepath.Join(r.DataDir, StoreFile)
	file, there := false, false // an empty file is no store
	switch info, err := os.Lstat(path); {
	case err == nil:
		file, there = true, info.Size() > 0
		unlock, err := boltkv.Lock(path)
		if errors.Is(err, boltkv.ErrLocked) {
			return nil, fmt.Errorf("%w: stop it first", err)
		}
		if err != nil {
			return nil, err
		}
		defer func() { _ = unlock() }()
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("restore store: %w", err)
	}
	if there && !r.Force {
		return nil, fmt.Errorf("%w at %s: with -force it is kept under another name and the copy takes its place", ErrExists, path)
	}
	hidden := filepath.Join(r.DataDir, fmt.Sprintf(".restoring-%d.db", os.Getpid()))
	defer os.Remove(hidden) //nolint:errcheck // it is there under its real name
	done = &Restored{Path: path}
	if done.Records, err = r.place(ctx, hidden); err != nil {
		return nil, err
	}
	if there {
		done.Aside = aside(path, r.Now)
		// A second name first: at no moment is there no store.
		if err := os.Link(path, done.Aside); err != nil {
			return nil, fmt.Errorf("keep the store that is there: %w", err)
		}
	}
	name := os.Rename
	if !file {
		// Nothing was there to lock. Link does not replace the store of a server that started meanwhile.
		name = os.Link
	}
	if err := name(hidden, path); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w at %s: a server made it just now", ErrExists, path)
	} else if err != nil {
		return nil, fmt.Errorf("restore store: %w", err)
	}
	if err := durable.SyncDir(r.DataDir); err != nil {
		return nil, fmt.Errorf("restore store: %w", err)
	}
	return done, nil
}

// place copies the copy beside the store's place and looks at all of it.
func (r *Restoring) place(ctx context.Context, hidden string) (*records.Checked, error) {
	from, err := os.Open(r.From)
	if err != nil {
		return nil, fmt.Errorf("restore store: %w", err)
	}
	defer from.Close()
	if info, err := from.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("restore store: %s is no regular file", r.From), err)
	}
	// What is wrong with the copy is told of the copy, not of a temporary file.
	if damages, err := boltkv.Inspect(r.From); err != nil {
		return nil, fmt.Errorf("restore store: %w", err)
	} else if len(damages) > 0 {
		return nil, fmt.Errorf("restore store: %w: %s: %w; take an older one", boltkv.ErrDamaged, r.From, damages[0])
	}
	_ = os.Remove(hidden) // of one that was killed, with this process ID
	if err := boltkv.Restore(hidden, io.Reader(from)); err != nil {
		return nil, err
	}
	store, err := boltkv.Open(hidden, boltkv.Config{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("restore store: %w", err)
	}
	c, err := records.Check(ctx, store)
	if err = errors.Join(err, store.Close()); err != nil {
		return nil, fmt.Errorf("restore store: %w", err)
	}
	switch {
	case len(c.Findings) > 0:
		return nil, fmt.Errorf("restore store: %w: %s: %s (and %d more); take an older one",
			records.ErrDamaged, r.From, c.Findings[0], len(c.Findings)-1)
	case !r.TrustDomain.IsZero() && c.TrustDomain != r.TrustDomain:
		return nil, fmt.Errorf("restore store: %s belongs to trust domain %q, not %q", r.From, c.TrustDomain.Name(), r.TrustDomain.Name())
	}
	return c, own(hidden, r.DataDir)
}

// own gives the file to whoever owns the directory, so that a restore by root leaves a store that the
// server's user can open.
func own(path, dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("restore store: %w", err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 {
		return nil
	}
	if err := os.Chown(path, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("restore store: %w", err)
	}
	return nil
}

// aside returns a free name for the store that is replaced.
func aside(path string, now time.Time) string {
	base := path + ".replaced-" + now.UTC().Format(timeFormat)
	name := base
	for i := 2; ; i++ {
		if _, err := os.Lstat(name); err != nil {
			return name
		}
		name = fmt.Sprintf("%s-%d", base, i)
	}
}
