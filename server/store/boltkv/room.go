package boltkv

import (
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.etcd.io/bbolt"
)

// room remembers whether the last write found room on the disk.
type room struct {
	mu    sync.Mutex // guards the two below
	full  error      // why the last write did not, nil if it did
	tried time.Time  // when Room last tried
}

// probeEvery is how often a store without room is written to just to see whether there is some again.
const probeEvery = time.Second

// probeSize is about what a usual commit takes, so that a page that happens to be free is not taken for
// room.
const probeSize = 64 << 10

var probeKey = []byte("probe") // in meta; it means nothing

func (r *room) register(metrics promauto.Factory, dir string) {
	metrics.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_store_full",
		Help: "1 while the store has no room to write: changes are refused, everything else goes on.",
	}, func() float64 {
		if r.state() != nil {
			return 1
		}
		return 0
	})
	metrics.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_store_free_bytes",
		Help: "Room on the disk that the store's file is on.",
	}, func() float64 {
		free, _ := FreeBytes(dir) // 0 when it was moved away under us
		return float64(free)
	})
}

func (r *room) state() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.full
}

func (r *room) missed(full error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.full = full
}

func (r *room) found() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.full = nil
}

// due reports whether it is time to try again.
func (r *room) due() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.full == nil || time.Since(r.tried) < probeEvery {
		return false
	}
	r.tried = time.Now()
	return true
}

// Room returns nil if there was room for what was last written, else an error that is kv.ErrFull.
// While there is none it writes a little every second at most, so that it gets to know when there
// is room again though nobody else writes.
func (s *Store) Room() error {
	if !s.room.due() {
		return s.room.state()
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	s.writing.Lock()
	defer s.writing.Unlock()
	if broken := s.broken.Load(); broken != nil {
		return broken.err
	}
	err := s.guard(func() error {
		err := s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(probeKey, make([]byte, probeSize)) })
		if err != nil {
			return fmt.Errorf("probe store: %w", err)
		}
		if err := s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Delete(probeKey) }); err != nil {
			return fmt.Errorf("probe store: %w", err)
		}
		return nil
	})
	if err != nil {
		return s.settle(err)
	}
	s.room.found()
	return nil
}

// FreeBytes returns how much room there is on the disk that holds the directory, for those who are
// not its superuser.
func FreeBytes(dir string) (uint64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("look for room in %s: %w", dir, err)
	}
	return st.Bavail * uint64(st.Bsize), nil //nolint:gosec // a block has a size
}
