package daemon

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"

	"golang.org/x/sys/unix"
)

// Go collects garbage when as much of it has piled up as there is that lives. A daemon with a few
// megabytes that live then collects hundreds of times a second under load, each time at the price of
// looking at everything: measured, a tenth of the CPU of a signature. Letting a fixed amount pile up costs
// that much memory, under load, and nothing where more lives anyway.

// allowGarbage lets room bytes of garbage pile up before they are collected, or as much as lives if that
// is more. GOGC in the environment has precedence, and the memory limit stays above all.
func allowGarbage(room uint64) {
	if room == 0 || os.Getenv("GOGC") != "" {
		return
	}
	t := &tuner{room: room, percent: 100}
	t.tune()
}

// tuner sets GOGC after each collection: a sentinel that nothing points to is found dead by it.
type tuner struct {
	room    uint64
	percent int // only tune touches this, and tune runs after tune
}

type sentinel struct{ _ *sentinel } // with a pointer, so that it is not put together with others

func (t *tuner) tune() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if percent := garbagePercent(live[0].Value.Uint64(), t.room); percent != t.percent {
		t.percent = percent
		debug.SetGCPercent(percent)
	}
	runtime.AddCleanup(new(sentinel), func(t *tuner) { t.tune() }, t)
}

// Bounds of GOGC. Go's default is right where much lives; beyond the upper one collections are rare
// enough.
const (
	leastPercent = 100
	mostPercent  = 1000
	// percentStep keeps GOGC from being set, for which everything stops for an instant, for nothing.
	percentStep = 25
)

// garbagePercent returns the GOGC that lets room bytes pile up on top of those that live.
func garbagePercent(live, room uint64) int {
	percent := uint64(mostPercent)
	if live > 0 {
		percent = min(room*100/live, mostPercent)
	}
	return int(max(percent-percent%percentStep, leastPercent))
}

// forgetStart gives back what only the start needed: the garbage it made, of which reading a large store
// makes more than a day of work, and the pages of the program itself that it went through. Those stay in
// the page cache and are shared with whoever else runs the program, but they count as this process's
// memory for as long as they are mapped; one that is needed again is mapped again in half a microsecond.
func forgetStart() {
	debug.FreeOSMemory()
	forgetProgram("/proc/self/maps", "/proc/self/exe", func(from, to uintptr) error {
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED)
		if errno != 0 {
			return errno
		}
		return nil
	})
}

// forgetProgram calls forget for each part of the program's file that is mapped and was never writable:
// such a page is the file's, and forgetting it loses nothing. It stops at the first error, because all
// this is only a matter of looks.
func forgetProgram(maps, program string, forget func(from, to uintptr) error) {
	path, err := os.Readlink(program)
	if err != nil {
		return
	}
	file, err := os.Open(maps)
	if err != nil {
		return
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		// proc_pid_maps(5): address range, permissions, offset, device, inode, path
		span, rest, _ := strings.Cut(lines.Text(), " ")
		mode, rest, _ := strings.Cut(rest, " ")
		if (mode != "r-xp" && mode != "r--p") || !strings.HasSuffix(rest, " "+path) {
			continue
		}
		var from, to uintptr
		if n, err := fmt.Sscanf(span, "%x-%x", &from, &to); n != 2 || err != nil || to <= from {
			return
		}
		if forget(from, to) != nil {
			return
		}
	}
}
