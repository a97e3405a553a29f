package boltkv

import (
	"syscall"

	"go.etcd.io/bbolt"
)

// The mapped file counts as memory of the process where it was looked at, although the kernel needs
// no room of its own for it: a store of 100 MB makes a server look 100 MB larger, and one walk over
// the file (at open, or to read everything) is enough. So from time to time, after about as much was
// looked at as follows, the kernel is told to forget which pages those were. They stay in the page
// cache; looking at one again costs half a microsecond.
const (
	touchBytes = 16 << 20
	// One look at a page maps up to 16 around it that are in the page cache (fault-around), as those
	// that were written lately are.
	pageGuess = 32 << 10
)

// touched counts bytes that were read from the map. It must be called in a read transaction, which
// keeps the map where it is.
func (s *Store) touched(n int) {
	if s.looked.Add(int64(n)) < touchBytes {
		return
	}
	s.looked.Store(0)
	size, err := s.Size()
	if err != nil {
		return // the file was moved away; it is only a matter of looks
	}
	_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, s.db.Info().Data, uintptr(size), syscall.MADV_DONTNEED) //nolint:gosec // not negative
}

// touchedBy is touched for those who have no read transaction.
func (s *Store) touchedBy(n int) {
	_ = s.guard(func() error {
		return s.db.View(func(*bbolt.Tx) error {
			s.touched(n)
			return nil
		})
	})
}
