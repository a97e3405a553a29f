package audit

import (
	"errors"
	"os"
	"syscall"
)

// reserveBytes is how much room there is behind the end of the file right after it was reserved; it is
// topped up when half is used.
const reserveBytes = 8 << 20

// fallocKeepSize is FALLOC_FL_KEEP_SIZE of linux/falloc.h: the file does not get longer.
const fallocKeepSize = 0x01

// reserve is room on the disk that belongs to the file beyond its end.
type reserve struct {
	left int  // bytes; an estimate, as somebody else may append too
	none bool // this file cannot have any
}

// refill takes as much room as it gets. A disk that has none leaves what was reserved before, and a
// file that cannot have any (a pipe, a file system that does not know how) gets along without.
func (r *reserve) refill(file *os.File) {
	stat, err := file.Stat()
	if err != nil || !stat.Mode().IsRegular() {
		r.none = true
		return
	}
	for size := reserveBytes; size >= reserveBytes/16; size /= 2 {
		err := syscall.Fallocate(int(file.Fd()), fallocKeepSize, stat.Size(), int64(size))
		if err == nil {
			r.left = max(r.left, size)
			return
		}
		if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
			r.none = true
			return
		}
	}
}

// used says that n bytes were appended, and tops up what is left when it comes down to a half, and
// from there on, if there was no room, at each sixteenth.
func (r *reserve) used(file *os.File, n int) {
	if file == nil || n <= 0 || r.none {
		return
	}
	const step = reserveBytes / 16
	before := r.left
	r.left = max(0, before-n)
	if r.left == 0 || r.left < reserveBytes/2 && before/step != r.left/step {
		r.refill(file)
	}
}

// giveBack lets go of the room behind the end.
func (r *reserve) giveBack(file *os.File) {
	*r = reserve{}
	if stat, err := file.Stat(); err == nil && stat.Mode().IsRegular() {
		_ = file.Truncate(stat.Size()) // not longer, not shorter; what is behind goes
	}
}
