// Package backup copies the server's store while it runs, by schedule and on demand, says what is
// damaged in a data directory, and puts a copy in the place of a store that is lost.
//
// A copy (a backup, a snapshot) is a store's file as of one revision. It holds everything but the
// signing keys: those are in a file of their own (server/ca/keys), which keeps a previous generation
// of itself, and whoever has a copy of the store alone can sign nothing.
//
// # Snapshots
//
// They are files in a folder of the data directory, named after the time, the revision and the first
// digits of the store's identity, without which a revision means nothing:
//
//	snapshots/store-20260301T120000Z-r0000000042-1a2b3c4d.db
//
// One is made when something was committed since the last, at most as often as the interval says, and
// is read back as a whole before it counts: a snapshot of a store that has been damaged is thrown
// away, loudly, and takes the place of no good one. The newest are kept. The folder never takes the
// room that the store and the audit log need.
//
// # After a restore
//
// The store has a new identity, so every agent and every view takes a full picture of it. What was
// committed after the copy is lost: entries, agents that attested since (they attest again by
// themselves where their attestor allows it), and bans. The audit log has all of it.
//
// # Why it is so
//
// A server that finds its store damaged does not start: half a table is worse than none, and an empty
// one is a new trust domain under the old name. It says what is damaged, which snapshot is the newest
// good one, and the command that goes back to it; the decision is an operator's.
package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/durable"
	"github.com/assay-id/assay/server/store/kv"
)

// StoreFile and SnapshotsDir are where things are in a data directory.
const (
	StoreFile    = "store.db"
	SnapshotsDir = "snapshots"
)

// Store is what is copied; *boltkv.Store is one.
type Store interface {
	ID() string
	Rev(ctx context.Context) (kv.Rev, error)
	Size() (int64, error)
	Backup(ctx context.Context, w io.Writer) (kv.Rev, error)
}

// Config is what Snapshots can do without.
type Config struct {
	// Interval is how often a snapshot is made if something changed; 0: never by itself.
	Interval time.Duration
	// Keep is how many are kept, the newest. Default: 24.
	Keep int

	Now     func() time.Time      // default time.Now
	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: nothing is registered
}

// Snapshots makes copies of one store in one folder. It is safe for concurrent use.
type Snapshots struct {
	store Store
	dir   string
	cfg   Config

	mu sync.Mutex // held while a snapshot is made

	taken *prometheus.CounterVec
	last  prometheus.Gauge
}

// ErrNoRoom says that a snapshot was not made because the disk has too little room for it.
var ErrNoRoom = errors.New("too little room on the disk for a snapshot")

// New returns the Snapshots of a store in the folder, which is made when it is needed.
func New(store Store, dir string, cfg Config) (*Snapshots, error) {
	if cfg.Keep <= 0 {
		cfg.Keep = 24
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		cfg.Log = silent
	}
	s := &Snapshots{
		store: store, dir: dir, cfg: cfg,
		taken: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_server_snapshots_total",
			Help: "Snapshots of the store, by result: ok, failed, damaged (the store itself is).",
		}, []string{"result"}),
		last: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_server_snapshot_timestamp_seconds",
			Help: "When the store was last found to be in a good snapshot, in Unix seconds; 0 until then.",
		}),
	}
	for _, result := range []string{"ok", "failed", "damaged"} {
		s.taken.WithLabelValues(result) // alerts are about increases, and there is none from nothing to one
	}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{s.taken, s.last} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("register metrics of snapshots: %w", err)
			}
		}
	}
	return s, nil
}

// Snapshot is one copy in the folder.
type Snapshot struct {
	Path string
	// Made is when, by the server's clock, in whole seconds; a clock that was set back does not make
	// a snapshot older than the one before it.
	Made time.Time
	Rev  kv.Rev
	// StoreID is the beginning of the identity of the store that it was made of.
	StoreID string
	Size    int64 // bytes
	// Damage is what is wrong with it, nil for a good one or one that was not looked at.
	Damage error
}

// retryAfter is how soon a snapshot that failed is tried again.
const retryAfter = time.Minute

// Run makes snapshots until ctx ends, and returns nil. What goes wrong is logged and tried again.
func (s *Snapshots) Run(ctx context.Context) error {
	if s.cfg.Interval <= 0 {
		<-ctx.Done()
		return nil
	}
	wait := s.firstWait()
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		wait = s.cfg.Interval
		if _, err := s.take(ctx, false); err != nil && ctx.Err() == nil {
			wait = min(wait, retryAfter)
			log := s.cfg.Log.WithError(err).WithField("folder", s.dir)
			if errors.Is(err, boltkv.ErrDamaged) {
				log.Error("THE STORE IS DAMAGED: the server goes on from memory and will not start again from it; " +
					"stop it and restore the newest good snapshot (assay-server snapshot list)")
			} else {
				log.Warn("cannot make a snapshot of the store, will try again")
			}
		}
	}
}

// firstWait is until the interval since the newest snapshot is over. A store that was restored has
// none of its own yet.
func (s *Snapshots) firstWait() time.Duration {
	all, err := List(s.dir)
	if err != nil || len(all) == 0 || all[0].StoreID != shortID(s.store.ID()) {
		return 0
	}
	return min(max(0, all[0].Made.Add(s.cfg.Interval).Sub(s.cfg.Now())), s.cfg.Interval)
}

// Take makes a snapshot now, also if nothing was committed since the last. It returns ErrNoRoom, or
// boltkv.ErrDamaged if the store turns out to be.
func (s *Snapshots) Take(ctx context.Context) (Snapshot, error) { return s.take(ctx, true) }

// Backup writes a copy of the store as of now.
func (s *Snapshots) Backup(ctx context.Context, w io.Writer) error {
	_, err := s.store.Backup(ctx, w)
	return err
}

func (s *Snapshots) take(ctx context.Context, always bool) (made Snapshot, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := List(s.dir)
	if err != nil {
		return Snapshot{}, fmt.Errorf("make snapshot: %w", err)
	}
	rev, err := s.store.Rev(ctx)
	if err != nil {
		return Snapshot{}, fmt.Errorf("make snapshot: %w", err)
	}
	if !always && len(all) > 0 && all[0].Rev == rev && all[0].StoreID == shortID(s.store.ID()) {
		s.last.Set(float64(s.cfg.Now().Unix()))
		return all[0], nil
	}
	made, err = s.write(ctx, all)
	switch {
	case errors.Is(err, boltkv.ErrDamaged):
		s.taken.WithLabelValues("damaged").Inc()
	case err != nil:
		s.taken.WithLabelValues("failed").Inc()
	}
	if err != nil {
		return Snapshot{}, fmt.Errorf("make snapshot: %w", err)
	}
	s.taken.WithLabelValues("ok").Inc()
	s.last.Set(float64(s.cfg.Now().Unix()))
	s.cfg.Log.WithFields(logrus.Fields{"path": made.Path, "rev": uint64(made.Rev), "bytes": made.Size}).Info("snapshot made")
	s.prune(append([]Snapshot{made}, all...))
	return made, nil
}

// spare is room that is left to others on top of twice the copy: the store, the audit log.
const spare = 16 << 20

// write makes the copy under a hidden name, reads it back, and gives it its name.
func (s *Snapshots) write(ctx context.Context, all []Snapshot) (Snapshot, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return Snapshot{}, fmt.Errorf("make folder: %w", err)
	}
	s.sweep()
	size, err := s.store.Size()
	if err != nil {
		return Snapshot{}, err
	}
	free, err := boltkv.FreeBytes(s.dir)
	if err != nil {
		return Snapshot{}, err
	}
	if need := 2*uint64(size) + spare; free < need { //nolint:gosec // a size is not negative
		return Snapshot{}, fmt.Errorf("%w: %d bytes are free, %d are wanted so that the store can grow", ErrNoRoom, free, need)
	}
	temp, err := os.CreateTemp(s.dir, hidden+"*") // mode 0600
	if err != nil {
		return Snapshot{}, err
	}
	defer os.Remove(temp.Name()) //nolint:errcheck // it is gone once renamed
	rev, err := s.store.Backup(ctx, temp)
	if err == nil {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err != nil {
		return Snapshot{}, err
	}
	if err := whole(temp.Name()); err != nil {
		return Snapshot{}, err
	}
	made := s.cfg.Now().UTC().Truncate(time.Second)
	if len(all) > 0 && !made.After(all[0].Made) {
		made = all[0].Made.Add(time.Second)
	}
	info, err := os.Stat(temp.Name())
	if err != nil {
		return Snapshot{}, err
	}
	snapshot := Snapshot{Made: made, Rev: rev, StoreID: shortID(s.store.ID()), Size: info.Size()}
	snapshot.Path = filepath.Join(s.dir, snapshot.name())
	if err := os.Rename(temp.Name(), snapshot.Path); err != nil {
		return Snapshot{}, err
	}
	return snapshot, durable.SyncDir(s.dir)
}

// whole returns an error that is boltkv.ErrDamaged unless the file is a store from end to end.
func whole(path string) error {
	damages, err := boltkv.Inspect(path)
	if err != nil {
		return err
	}
	if len(damages) > 0 {
		return fmt.Errorf("%w: %w", boltkv.ErrDamaged, damages[0])
	}
	return nil
}

// hidden begins the names of snapshots that are being made.
const hidden = ".making-"

// sweep removes what a server that was killed left behind.
func (s *Snapshots) sweep() {
	left, err := filepath.Glob(filepath.Join(s.dir, hidden+"*"))
	if err != nil {
		return // the pattern is ours
	}
	for _, path := range left {
		_ = os.Remove(path)
	}
}

// prune removes the oldest.
func (s *Snapshots) prune(all []Snapshot) {
	for _, old := range all[min(s.cfg.Keep, len(all)):] {
		if err := os.Remove(old.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.cfg.Log.WithError(err).Warn("cannot remove an old snapshot")
		}
	}
}

const timeFormat = "20060102T150405Z"

var namePattern = regexp.MustCompile(`^store-(\d{8}T\d{6}Z)-r(\d{10,20})-([0-9a-f]{1,8})\.db$`)

func (s *Snapshot) name() string {
	return fmt.Sprintf("store-%s-r%010d-%s.db", s.Made.UTC().Format(timeFormat), s.Rev, s.StoreID)
}

func shortID(id string) string { return id[:min(8, len(id))] }

// List returns the snapshots in a folder, the newest first; none if there is no folder. It goes by
// their names and does not look inside.
func List(dir string) ([]Snapshot, error) {
	found, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var all []Snapshot
	for _, f := range found {
		part := namePattern.FindStringSubmatch(f.Name())
		if part == nil {
			continue
		}
		made, err := time.Parse(timeFormat, part[1])
		if err != nil {
			continue
		}
		rev, err := strconv.ParseUint(part[2], 10, 64)
		if err != nil {
			continue
		}
		info, err := f.Info()
		if err != nil {
			continue // just pruned
		}
		all = append(all, Snapshot{Path: filepath.Join(dir, f.Name()), Made: made, Rev: kv.Rev(rev), StoreID: part[3], Size: info.Size()})
	}
	slices.SortFunc(all, func(a, b Snapshot) int {
		return cmp.Or(b.Made.Compare(a.Made), cmp.Compare(b.Rev, a.Rev))
	})
	return all, nil
}

// Verify reads each snapshot from end to end and notes what is wrong with it. It leaves out those that
// the server has removed since they were listed: one that is gone is not damaged.
func Verify(all []Snapshot) []Snapshot {
	var there []Snapshot
	for _, s := range all {
		s.Damage = whole(s.Path)
		if !errors.Is(s.Damage, fs.ErrNotExist) {
			there = append(there, s)
		}
	}
	return there
}

// newestGood returns the first snapshot that is whole.
func newestGood(all []Snapshot) (Snapshot, bool) {
	for _, s := range all {
		if whole(s.Path) == nil {
			return s, true
		}
	}
	return Snapshot{}, false
}
