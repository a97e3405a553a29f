// Package clock sets the wall clock of one running process, and of no other: a test of the built binaries
// needs no hook in them, and the machine's clock stays as it is.
//
// A Go program asks the vDSO for the time, code that the kernel maps into every process. The first page
// that is written to becomes the process's own; so what is put there instead, the system call and an
// addition, is seen by it alone. The clock that timers use, CLOCK_MONOTONIC, is left alone, as it is
// when an operator or a time server sets the clock of a machine.
package clock

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Clock is the wall clock of one process.
type Clock struct {
	mem    *os.File
	offset int64 // address of the seconds that are added
}

// Of takes over the wall clock of a process, which goes right until it is set.
func Of(pid int) (*Clock, error) {
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("set the clock of a process: no code for %s", runtime.GOARCH)
	}
	start, end, err := mapped(pid)
	if err != nil {
		return nil, err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	c := &Clock{mem: mem}
	if err := c.patch(pid, start, end); err != nil {
		return nil, errors.Join(fmt.Errorf("set the clock of process %d: %w", pid, err), mem.Close())
	}
	return c, nil
}

// Set makes the process's wall clock go ahead of the machine's by so much, or behind it.
func (c *Clock) Set(ahead time.Duration) error {
	_, err := c.mem.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(int64(ahead/time.Second))), c.offset)
	return err
}

// Close leaves the clock as it was set.
func (c *Clock) Close() error { return c.mem.Close() }

// mapped returns where a process has its vDSO.
func mapped(pid int) (start, end int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		if !strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
			return 0, 0, fmt.Errorf("parse %q: %w", line, err)
		}
		return start, end, nil
	}
	return 0, 0, fmt.Errorf("process %d has no vDSO", pid)
}

// code is clock_gettime as a system call, whose answer for CLOCK_REALTIME is added to. The seconds to add
// stand behind it, on a boundary of eight bytes so that they are written all at once.
var code = []byte{
	0xb8, 0xe4, 0x00, 0x00, 0x00, // mov eax, 228
	0x0f, 0x05, // syscall
	0x85, 0xff, // test edi, edi
	0x75, 0x0a, // jne to the ret
	0x48, 0x8b, 0x0d, seconds - 18, 0x00, 0x00, 0x00, // mov rcx, [rip + what is between]
	0x48, 0x01, 0x0e, // add [rsi], rcx
	0xc3,       // ret
	0xcc, 0xcc, // never reached
	0, 0, 0, 0, 0, 0, 0, 0,
}

// seconds is where in the code they are.
const seconds = 24

func (c *Clock) patch(pid int, start, end int64) error {
	file, err := elf.NewFile(io.NewSectionReader(c.mem, start, end-start))
	if err != nil {
		return fmt.Errorf("read the vDSO: %w", err)
	}
	symbols, err := file.DynamicSymbols()
	if err != nil {
		return fmt.Errorf("read the vDSO: %w", err)
	}
	at := map[string]elf.Symbol{}
	for _, s := range symbols {
		at[s.Name] = s
	}
	// The code goes where a function was that nobody calls who has the other; Go does not.
	ask, unused := at["__vdso_clock_gettime"], at["__vdso_gettimeofday"]
	if ask.Value == 0 || unused.Value == 0 || ask.Size < 5 || unused.Size < 64 {
		return fmt.Errorf("the vDSO is not as expected: %+v, %+v", ask, unused)
	}
	place := (start + int64(unused.Value) + 15) &^ 15
	from := start + int64(ask.Value)
	jump := binary.LittleEndian.AppendUint32([]byte{0xe9}, uint32(int32(place-(from+5))))
	return stopped(pid, start, end, func() error {
		if _, err := c.mem.WriteAt(code, place); err != nil {
			return err
		}
		c.offset = place + seconds
		_, err := c.mem.WriteAt(jump, from)
		return err
	})
}

// stopped calls do while no thread of the process runs or is inside the vDSO.
func stopped(pid int, start, end int64, do func() error) error {
	for range 100 {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			return err
		}
		inside, err := within(pid, start, end)
		if err == nil && !inside {
			err = do()
		}
		if err = errors.Join(err, syscall.Kill(pid, syscall.SIGCONT)); err != nil || !inside {
			return err
		}
	}
	return errors.New("a thread is always asking for the time")
}

// within waits until all threads have stopped, and reports whether one did so at an address between start
// and end.
func within(pid int, start, end int64) (bool, error) {
	for {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
		if err != nil {
			return false, err
		}
		running := len(threads) == 0
		for _, path := range threads {
			text, err := os.ReadFile(path)
			if err != nil {
				return false, err
			}
			// The number of a system call and its arguments or -1, then stack pointer and program counter;
			// or "running".
			fields := strings.Fields(string(text))
			if len(fields) < 3 {
				running = true
				break
			}
			pc, err := strconv.ParseUint(fields[len(fields)-1], 0, 64)
			if err != nil {
				return false, fmt.Errorf("parse %s: %w", path, err)
			}
			if uint64(start) <= pc && pc < uint64(end) {
				return true, nil
			}
		}
		if !running {
			return false, nil
		}
		runtime.Gosched()
	}
}
