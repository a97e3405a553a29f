package peer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// stat is the part of /proc/<pid>/stat that matters here.
type stat struct {
	state byte   // R, S, D, Z, …
	start uint64 // clock ticks after boot
}

// running reports whether the process has not exited: a zombie and a dead one have.
func (s stat) running() bool { return s.state != 'Z' && s.state != 'X' && s.state != 'x' }

// statOf reads the stat of the process whose /proc directory dir is. Once that process is reaped the
// kernel answers ESRCH for good, also when its number has gone to another process.
func statOf(dir int) (stat, error) {
	fd, err := unix.Openat(dir, "stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return stat{}, err
	}
	defer func() { _ = unix.Close(fd) }()
	buf := make([]byte, 1024)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return stat{}, err
	}
	return parseStat(buf[:n])
}

// parseStat reads the line of /proc/<pid>/stat. The second field is the program's name in
// parentheses and may hold anything, parentheses and blanks included, so counting starts after the
// last one.
func parseStat(line []byte) (stat, error) {
	end := bytes.LastIndexByte(line, ')')
	if end < 0 {
		return stat{}, errors.New("parse stat: no program name")
	}
	fields := strings.Fields(string(line[end+1:]))
	if len(fields) < 20 || len(fields[0]) != 1 {
		return stat{}, errors.New("parse stat: too few fields")
	}
	start, err := strconv.ParseUint(fields[19], 10, 64) // field 22 of the line
	if err != nil {
		return stat{}, fmt.Errorf("parse stat: start time: %w", err)
	}
	return stat{state: fields[0][0], start: start}, nil
}

// ids returns the effective user and group ID of a process.
func ids(proc string, pid int) (uid, gid uint32, err error) {
	text, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "status"))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return 0, 0, ErrDead
		}
		return 0, 0, err
	}
	found := 0
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		var to *uint32
		switch name {
		case "Uid":
			to = &uid
		case "Gid":
			to = &gid
		default:
			continue
		}
		fields := strings.Fields(value) // real, effective, saved, file system
		if len(fields) < 2 {
			return 0, 0, fmt.Errorf("parse status: %s", name)
		}
		n, err := strconv.ParseUint(fields[1], 10, 32)
		if err != nil {
			return 0, 0, fmt.Errorf("parse status: %s: %w", name, err)
		}
		*to = uint32(n)
		found++
	}
	if found != 2 {
		return 0, 0, errors.New("parse status: owner is missing")
	}
	return uid, gid, nil
}
