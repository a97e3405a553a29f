// Package boltkv keeps a kv.Store in one file, with bbolt. It is the default store.
//
// The file has three buckets. "items" holds the keys, "log" the commits by revision, "meta" what the
// store knows about itself:
//
//	items  key                        -> revision (8 bytes, big endian), CRC-32C (4), value
//	log    revision (8, big endian)   -> the commit's operations, CRC-32C (format.go)
//	meta   "format"                   -> 1 byte
//	       "id"                       -> the store's random identity
//	       "compacted"                -> revision up to which the log is forgotten (8)
//
// The revision of the last commit is the sequence number of the items bucket, which lies in the root
// page that every commit rewrites anyway.
//
// Why it is so:
//
//   - Watchers read the log bucket, woken by one broadcast channel. There is no queue per watcher
//     that could overflow, a slow watcher costs nothing, and a restart loses nothing.
//   - Commits that wait while another one is on its way to the disk form a group and share its two
//     fsyncs (bbolt needs one for the data and one for the meta page). There is no timer and no
//     goroutine: whoever finds nobody leading leads.
//   - bbolt makes a transaction visible to readers a moment before its last fsync. Reads here wait
//     for that fsync, so nobody ever acts on a commit that a power cut could take back.
//   - NoFreelistSync: with a synced freelist every commit would write the list of all free pages,
//     which after the compaction of a big log is hundreds of kilobytes for one small write. The
//     price is one walk over the file at open, and there the file is walked anyway to find damage.
//     FreelistMapType for the same reason: an array is searched and shifted linearly.
//   - InitialMmapSize reserves address space, not memory or disk. Growing a mapping must wait for
//     all open reads (a backup may take minutes) while it holds up all writes; with room for 4 GiB
//     from the start that does not happen.
package boltkv

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/assay-id/assay/server/store/durable"
	"github.com/assay-id/assay/server/store/kv"
)

var (
	// ErrLocked says that another process has the file open.
	ErrLocked = errors.New("store is in use")
	// ErrDamaged says that the file is not what this package once wrote.
	ErrDamaged = errors.New("store is damaged")
	// ErrReadOnly says that the store was opened for reading alone.
	ErrReadOnly = errors.New("store is open for reading only")
)

var (
	itemsBucket  = []byte("items")
	logBucket    = []byte("log")
	metaBucket   = []byte("meta")
	formatKey    = []byte("format")
	idKey        = []byte("id")
	compactedKey = []byte("compacted")
)

const (
	format = 1
	// mapSize is what is reserved of the address space (see above).
	mapSize64 = 4 << 30
	mapSize32 = 64 << 20
)

// Config is what a Store can do without.
type Config struct {
	// LockTimeout is how long Open waits for another process to let go of the file. Default: 2s.
	LockTimeout time.Duration
	// MaxBytes is the size in bytes the file may grow to; over it Commit returns kv.ErrFull.
	// 0: what the disk has.
	MaxBytes int
	// Metrics gets the histograms of commit time and group size. nil: they are kept to ourselves.
	Metrics prometheus.Registerer
	// ReadOnly opens a store that is there, for reading alone: nothing about the file is changed, and
	// Commit and Compact return ErrReadOnly.
	ReadOnly bool
}

// Store is a kv.Store in one file. It is safe for concurrent use.
type Store struct {
	path string
	id   string
	db   *bbolt.DB
	file *os.File // bbolt's

	// life is held for reading by whoever uses db, and for writing to close it.
	// Lock order: life, writing, mu.
	life   sync.RWMutex
	closed bool // life guards it

	// writing is held during a write transaction of bbolt.
	writing sync.Mutex

	// mu guards the four below.
	mu      sync.Mutex
	durable kv.Rev        // the last revision that is on stable storage
	wake    chan struct{} // closed, and replaced, when durable or broken changes or the store closes
	queue   []*request    // commits that wait for the next group
	leading bool          // somebody is on the way to the disk or appointed to go next

	looked   atomic.Int64 // bytes, see touched
	readOnly bool
	room     room

	// broken is set once when the file can no longer be trusted; nothing is done after that.
	broken atomic.Pointer[brokenError]

	commitSeconds prometheus.Histogram
	groupSize     prometheus.Histogram
}

type brokenError struct{ err error }

var _ kv.Store = (*Store)(nil)

// Open opens the store in the file at path, or makes a new one there, with its directory if that is
// missing. The file is readable by its owner only. The whole file is checked: one that was cut short
// or overwritten is refused with ErrDamaged and the place of the first damage. It returns ErrLocked
// if another process still has the file open after LockTimeout.
func Open(path string, cfg Config) (*Store, error) {
	if cfg.LockTimeout <= 0 {
		cfg.LockTimeout = 2 * time.Second
	}
	dir := filepath.Dir(path)
	if !cfg.ReadOnly {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open store %s: make directory: %w", path, err)
		}
		if err := checkDirectory(dir); err != nil {
			return nil, fmt.Errorf("open store %s: %w", path, err)
		}
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			if err := create(path, cfg); err != nil {
				return nil, fmt.Errorf("make store %s: %w", path, err)
			}
		}
	}
	s := &Store{path: path, readOnly: cfg.ReadOnly, wake: make(chan struct{})}
	metrics := promauto.With(cfg.Metrics)
	s.commitSeconds = metrics.NewHistogram(prometheus.HistogramOpts{
		Name:    "assay_store_commit_seconds",
		Help:    "Time to bring one group of commits to stable storage.",
		Buckets: prometheus.ExponentialBuckets(0.00025, 2, 14),
	})
	s.groupSize = metrics.NewHistogram(prometheus.HistogramOpts{
		Name:    "assay_store_group_commits",
		Help:    "Commits that shared one write to stable storage.",
		Buckets: prometheus.ExponentialBuckets(1, 2, 11),
	})
	metrics.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_store_bytes",
		Help: "Size of the store's file.",
	}, func() float64 {
		size, _ := s.Size() // 0 when it was moved away under us
		return float64(size)
	})
	s.room.register(metrics, dir)
	if err := s.guard(func() error { return s.open(cfg, false) }); err != nil {
		_ = s.letGo()
		return nil, err
	}
	return s, nil
}

// create makes an empty store under another name first, so that there is never half a store at path:
// neither a crash nor a full disk in between can leave one, and a file that was truncated is not
// mistaken for a new one.
func create(path string, cfg Config) error {
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, ".new-store-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) //nolint:errcheck // it is there under its real name
	if err := temp.Close(); err != nil {
		return err
	}
	s := &Store{path: temp.Name(), wake: make(chan struct{})}
	err = s.guard(func() error {
		if err := s.open(cfg, true); err != nil {
			return err
		}
		return s.db.Close()
	})
	if err != nil {
		_ = s.letGo()
		return err
	}
	// Link, unlike Rename, does not replace a store that another process made meanwhile.
	if err := os.Link(temp.Name(), path); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return durable.SyncDir(dir)
}

// letGo closes a file that bbolt cannot be asked to close: it may have panicked and hold its own
// locks for ever. Closing alone does not unlock the file, as long as it is mapped.
func (s *Store) letGo() error {
	if s.file == nil {
		return nil
	}
	_ = syscall.Flock(int(s.file.Fd()), syscall.LOCK_UN) // fails if it is closed already
	if err := s.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close store %s: %w", s.path, err)
	}
	return nil
}

// checkDirectory refuses a directory in which anybody could put another file in the store's place.
func checkDirectory(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("check directory: %w", err)
	}
	mode := info.Mode()
	if mode.Perm()&0o002 != 0 && mode&os.ModeSticky == 0 {
		return fmt.Errorf("directory %s can be written by everybody (mode %04o): run chmod o-w %s", dir, mode.Perm(), dir)
	}
	return nil
}

// open opens the file; fresh says that it is an empty one to make a store in.
func (s *Store) open(cfg Config, fresh bool) error {
	mapSize := int64(mapSize32)
	if strconv.IntSize == 64 {
		mapSize = mapSize64
	}
	if cfg.ReadOnly {
		mapSize = 0
	}
	db, err := bbolt.Open(s.path, 0o600, &bbolt.Options{
		NoFreelistSync:  true,
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: int(mapSize),
		MaxSize:         cfg.MaxBytes,
		NoStatistics:    true,
		ReadOnly:        cfg.ReadOnly,
		// bbolt locks the file after this; as it is the same open file, it already has the lock.
		OpenFile: func(path string, flag int, mode os.FileMode) (*os.File, error) {
			file, err := os.OpenFile(path, flag|syscall.O_NOFOLLOW, mode)
			if err != nil {
				return nil, fmt.Errorf("open store: %w", err)
			}
			s.file = file
			return file, s.admit(cfg.LockTimeout, fresh)
		},
	})
	if err == nil {
		s.db = db
		if err = s.prepare(); err == nil {
			s.touchedBy(touchBytes) // the checks looked at everything
		} else {
			err = errors.Join(err, db.Close())
		}
	}
	if err == nil {
		return nil
	}
	if full := asFull(err); full != nil {
		return fmt.Errorf("open store: %w", full)
	}
	return err
}

// admit looks at the file before bbolt does: it locks it, sees to its permissions and checks every
// page, unless it is to be a fresh one.
func (s *Store) admit(timeout time.Duration, fresh bool) error {
	info, err := s.file.Stat()
	switch {
	case err != nil:
		return fmt.Errorf("open store: %w", err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("open store %s: it is no regular file", s.path)
	}
	if err := lock(s.file, syscall.LOCK_EX, timeout); err != nil || fresh {
		return err
	}
	if info, err = s.file.Stat(); err != nil { // who had the lock may have written
		return fmt.Errorf("open store: %w", err)
	}
	if now, err := os.Lstat(s.path); err != nil || !os.SameFile(info, now) { // or restored a backup
		return fmt.Errorf("open store %s: it was replaced by another file at this moment; try again", s.path)
	}
	if info.Mode().Perm()&^0o600 != 0 && !s.readOnly {
		// A restored copy often is readable by all.
		if err := s.file.Chmod(0o600); err != nil {
			return fmt.Errorf("open store: restrict permissions: %w", err)
		}
	}
	if info.Size() == 0 {
		return fmt.Errorf("%w: %s: it is empty; restore a backup, or remove the file to begin anew", ErrDamaged, s.path)
	}
	if err := checkFile(s.file, info.Size()); err != nil {
		return fmt.Errorf("%w: %s: %w; restore a backup", ErrDamaged, s.path, err)
	}
	return nil
}

// lock takes the lock that bbolt would take, so that nothing is read while another server writes.
func lock(file *os.File, how int, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		err := syscall.Flock(int(file.Fd()), how|syscall.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, syscall.EINTR):
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return fmt.Errorf("lock store %s: %w", file.Name(), err)
		case time.Now().After(deadline):
			return fmt.Errorf("%w: another assay-server is using %s", ErrLocked, file.Name())
		}
		time.Sleep(20 * time.Millisecond) // flock with a deadline does not exist
	}
}

// prepare makes the buckets of a new store, and reads identity and revision.
func (s *Store) prepare() error {
	err := s.db.View(func(tx *bbolt.Tx) error { return s.load(tx) })
	if !errors.Is(err, errEmpty) || s.readOnly {
		return err
	}
	return s.db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{itemsBucket, logBucket, metaBucket} {
			if _, err := tx.CreateBucket(name); err != nil {
				return fmt.Errorf("make bucket %s: %w", name, err)
			}
		}
		if err := tx.Bucket(metaBucket).Put(formatKey, []byte{format}); err != nil {
			return fmt.Errorf("write format: %w", err)
		}
		if err := renew(tx); err != nil {
			return err
		}
		return s.load(tx)
	})
}

var errEmpty = errors.New("empty file")

// renew gives the store a new identity.
func renew(tx *bbolt.Tx) error {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return fmt.Errorf("make store ID: %w", err)
	}
	if err := tx.Bucket(metaBucket).Put(idKey, []byte(hex.EncodeToString(id))); err != nil {
		return fmt.Errorf("write store ID: %w", err)
	}
	return nil
}

func (s *Store) load(tx *bbolt.Tx) error {
	meta, items, log := tx.Bucket(metaBucket), tx.Bucket(itemsBucket), tx.Bucket(logBucket)
	if meta == nil || items == nil || log == nil {
		if name, _ := tx.Cursor().First(); name == nil {
			return errEmpty
		}
		return fmt.Errorf("open store %s: this is a bbolt file of another program", s.path)
	}
	switch f := meta.Get(formatKey); {
	case len(f) != 1:
		return fmt.Errorf("%w: %s: no format number", ErrDamaged, s.path)
	case f[0] > format:
		return fmt.Errorf("open store %s: it has format %d, written by a newer version of assay-server; this one knows formats up to %d", s.path, f[0], format)
	}
	s.id = string(meta.Get(idKey))
	s.durable = revision(tx)
	last := compacted(tx)
	if k, _ := log.Cursor().Last(); len(k) == 8 {
		last = kv.Rev(binary.BigEndian.Uint64(k))
	}
	if s.id == "" || last != s.durable {
		return fmt.Errorf("%w: %s: its log ends at revision %d, its items at %d", ErrDamaged, s.path, last, s.durable)
	}
	return nil
}

func revision(tx *bbolt.Tx) kv.Rev { return kv.Rev(tx.Bucket(itemsBucket).Sequence()) }

func compacted(tx *bbolt.Tx) kv.Rev {
	if v := tx.Bucket(metaBucket).Get(compactedKey); len(v) == 8 {
		return kv.Rev(binary.BigEndian.Uint64(v))
	}
	return 0
}

// ID returns the identity that the store got when it was made or restored.
func (s *Store) ID() string { return s.id }

// Rev returns the revision of the last commit.
func (s *Store) Rev(ctx context.Context) (kv.Rev, error) {
	var rev kv.Rev
	err := s.view(ctx, func(_ *bbolt.Tx, at kv.Rev) error {
		rev = at
		return nil
	})
	return rev, err
}

// Size returns the size of the file in bytes.
func (s *Store) Size() (int64, error) {
	info, err := os.Stat(s.path)
	if err != nil {
		return 0, fmt.Errorf("size of store: %w", err)
	}
	return info.Size(), nil
}

// Close waits for what is under way and closes the file. Watches and later calls return
// kv.ErrClosed. Closing twice is no error.
func (s *Store) Close() error {
	// Watchers that sleep hold no lock; woken at the end, they find the store closed.
	defer s.broadcast()
	s.life.Lock()
	defer s.life.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.broken.Load() != nil {
		return s.letGo()
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close store %s: %w", s.path, err)
	}
	return nil
}

// broadcast wakes everybody who waits for a change.
func (s *Store) broadcast() {
	s.mu.Lock()
	close(s.wake)
	s.wake = make(chan struct{})
	s.mu.Unlock()
}

// guard runs f, which touches the mapped file. A read error there is a fault, and damage shows as a
// panic of bbolt: both come back as ErrDamaged, and the store is not used any more, as nobody knows
// what bbolt left behind.
func (s *Store) guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = s.breakDown(fmt.Errorf("%w: %s: %v; restore a backup", ErrDamaged, s.path, p))
		}
	}()
	return f()
}

// breakDown records the first error that makes the file unusable, and returns it.
func (s *Store) breakDown(err error) error {
	if s.broken.CompareAndSwap(nil, &brokenError{err: err}) {
		s.broadcast()
	}
	return s.broken.Load().err
}

// enter begins a use of db. leave must follow if it returns nil.
func (s *Store) enter() error {
	s.life.RLock()
	switch broken := s.broken.Load(); {
	case s.closed:
		s.life.RUnlock()
		return kv.ErrClosed
	case broken != nil:
		s.life.RUnlock()
		return broken.err
	}
	return nil
}

func (s *Store) leave() { s.life.RUnlock() }

var errNotDurable = errors.New("not on stable storage yet")

// view runs f in a read transaction of the last durable revision.
func (s *Store) view(ctx context.Context, f func(tx *bbolt.Tx, at kv.Rev) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.enter(); err != nil {
			return err
		}
		s.mu.Lock()
		wake, durable := s.wake, s.durable
		s.mu.Unlock()
		err := s.guard(func() error {
			tx, err := s.db.Begin(false)
			if err != nil {
				return fmt.Errorf("read store: %w", err)
			}
			defer tx.Rollback() //nolint:errcheck // nothing was written
			at := revision(tx)
			if at > durable {
				// The meta page is written, but its fsync is still under way (or just done).
				return errNotDurable
			}
			return f(tx, at)
		})
		s.leave()
		if !errors.Is(err, errNotDurable) {
			return err
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// asFull returns kv.ErrFull with its reason if err says that there is no room, else nil. bbolt
// flattens some of its errors to text.
func asFull(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG),
		errors.Is(err, berrors.ErrMaxSizeReached),
		strings.Contains(err.Error(), syscall.ENOSPC.Error()),
		strings.Contains(err.Error(), syscall.EDQUOT.Error()):
		return fmt.Errorf("%w: %w", kv.ErrFull, err)
	}
	return nil
}
