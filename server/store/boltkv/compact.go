package boltkv

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"

	"github.com/assay-id/assay/server/store/durable"
	"github.com/assay-id/assay/server/store/kv"
)

// compactStep is how many revisions are forgotten in one transaction, so that commits get through in
// between.
const compactStep = 1000

// Compact forgets the log up to and including a revision, or up to the last one if that is smaller.
// The file does not shrink, but its room is used again.
func (s *Store) Compact(ctx context.Context, upTo kv.Rev) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		done, err := s.compactSome(upTo)
		if done || err != nil {
			return err
		}
	}
}

func (s *Store) compactSome(upTo kv.Rev) (done bool, err error) {
	if s.readOnly {
		return false, ErrReadOnly
	}
	if err := s.enter(); err != nil {
		return false, err
	}
	defer s.leave()
	s.writing.Lock()
	defer s.writing.Unlock()
	if broken := s.broken.Load(); broken != nil {
		return false, broken.err
	}
	err = s.guard(func() error {
		tx, err := s.db.Begin(true)
		if err != nil {
			return fmt.Errorf("compact store: %w", err)
		}
		defer tx.Rollback() //nolint:errcheck // after a commit there is nothing to roll back
		done, err = forget(tx, min(upTo, revision(tx)))
		if err != nil {
			return err
		}
		if err := tx.Commit(); err != nil {
			return fmt.Errorf("compact store: %w", err)
		}
		return nil
	})
	if err != nil {
		return false, s.settle(err)
	}
	return done, nil
}

// forget deletes the first compactStep records of the log that are not after upTo.
func forget(tx *bbolt.Tx, upTo kv.Rev) (done bool, err error) {
	was := compacted(tx)
	if upTo <= was {
		return true, nil
	}
	log := tx.Bucket(logBucket)
	until := min(upTo, was+compactStep)
	for rev := was + 1; rev <= until; rev++ {
		if err := log.Delete(logKey(rev)); err != nil {
			return false, fmt.Errorf("compact store: %w", err)
		}
	}
	mark := binary.BigEndian.AppendUint64(nil, uint64(until))
	if err := tx.Bucket(metaBucket).Put(compactedKey, mark); err != nil {
		return false, fmt.Errorf("compact store: %w", err)
	}
	return until == upTo, nil
}

// Backup writes a consistent copy of the store as of now, and returns the copy's revision. Reads and
// commits go on meanwhile.
func (s *Store) Backup(ctx context.Context, w io.Writer) (rev kv.Rev, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx, at kv.Rev) error {
		rev = at
		if _, err := tx.WriteTo(w); err != nil {
			return fmt.Errorf("back up store: %w", err)
		}
		return nil
	})
	return rev, err
}

// Restore makes the store at path from what Backup wrote. It refuses to overwrite a file. The
// restored store gets a new identity, so that nobody who saw what happened after the backup takes
// its revisions for the ones they know.
func Restore(path string, backup io.Reader) (err error) {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("restore store: %s exists already: move it away first", path)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("restore store: make directory: %w", err)
	}
	temp, err := os.CreateTemp(dir, ".restore-*") // mode 0600
	if err != nil {
		return fmt.Errorf("restore store: %w", err)
	}
	defer os.Remove(temp.Name()) //nolint:errcheck // it is there under its real name
	_, err = io.Copy(temp, backup)
	if err = errors.Join(err, temp.Close()); err != nil {
		return fmt.Errorf("restore store: %w", err)
	}
	s, err := Open(temp.Name(), Config{})
	if err != nil {
		return fmt.Errorf("restore store %s: %w", path, err)
	}
	err = s.guard(func() error {
		if err := s.db.Update(renew); err != nil {
			return err
		}
		return s.file.Sync() // bbolt synced what it wrote itself, not what was copied
	})
	if err = errors.Join(err, s.Close()); err != nil {
		return fmt.Errorf("restore store %s: %w", path, err)
	}
	// Link, unlike Rename, does not replace a store that a server made meanwhile.
	if err := os.Link(temp.Name(), path); err != nil {
		return fmt.Errorf("restore store: %w", err)
	}
	return durable.SyncDir(dir)
}
