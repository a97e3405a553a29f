package admin

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/assay-id/assay/agent/admin/wire"
)

// containerID finds container IDs in cgroup paths, however runtime and cgroup driver dress them up:
// /docker/<id>, docker-<id>.scope, cri-containerd-<id>.scope, libpod-<id>.
var containerID = regexp.MustCompile(`[0-9a-f]{64}`)

// askedContainer is what an operator may type.
var askedContainer = regexp.MustCompile(`^[0-9a-f]{12,64}$`)

// clockTick is the unit of /proc/<pid>/stat: USER_HZ, which is 100 on every architecture Go has.
const clockTick = 10 * time.Millisecond

// cgroupOf returns the innermost container's ID in the process's cgroup, and the cgroup.
func cgroupOf(proc string, pid int) (container, cgroup string) {
	text, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return "", ""
	}
	for line := range strings.Lines(string(text)) {
		// hierarchy:controllers:path; cgroup v2 is hierarchy 0, and on hosts that have both, v1 is
		// where containers are.
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		if ids := containerID.FindAllString(parts[2], -1); len(ids) > 0 {
			return ids[len(ids)-1], parts[2]
		}
		// Where both are mounted, v2 may be unused: all processes are at its root then.
		if cgroup == "" || cgroup == "/" || parts[0] == "0" && parts[2] != "/" {
			cgroup = parts[2]
		}
	}
	return "", cgroup
}

// inContainer returns the PIDs of a container's processes, its first process first.
func inContainer(proc, id string) ([]int, error) {
	list, err := os.ReadDir(proc)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range list {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if c, _ := cgroupOf(proc, pid); strings.HasPrefix(c, id) {
			pids = append(pids, pid)
		}
	}
	// The one that is PID 1 in its namespace is what the container runs; others may be of an exec.
	slices.SortFunc(pids, func(a, b int) int {
		na, nb := nsPID(proc, a), nsPID(proc, b)
		if (na == 1) != (nb == 1) {
			if na == 1 {
				return -1
			}
			return 1
		}
		return a - b
	})
	return pids, nil
}

// nsPID returns the PID in the innermost namespace, 0 if unknown.
func nsPID(proc string, pid int) int {
	text, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "status"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "NSpid:"); ok {
			fields := strings.Fields(value)
			if len(fields) > 0 {
				n, _ := strconv.Atoi(fields[len(fields)-1])
				return n
			}
		}
	}
	return 0
}

// describe says what a person wants to know of a process to recognize it. What cannot be read stays
// empty.
func describe(proc string, pid int) *wire.Process {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	p := &wire.Process{Pid: int32(pid)} //nolint:gosec // PIDs are below 1<<22
	if ns := nsPID(proc, pid); ns != pid {
		p.NamespacePid = int32(ns) //nolint:gosec // as above
	}
	p.Exe, _ = os.Readlink(filepath.Join(dir, "exe"))
	if name, err := os.ReadFile(filepath.Join(dir, "comm")); err == nil {
		p.Name = strings.TrimSpace(string(name))
	}
	p.Container, p.Cgroup = cgroupOf(proc, pid)
	if at := startOf(proc, pid); !at.IsZero() {
		p.StartedAt = at.UnixMilli()
	}
	return p
}

// startOf returns when a process started, or the zero time.
func startOf(proc string, pid int) time.Time {
	line, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "stat"))
	if err != nil {
		return time.Time{}
	}
	fields := strings.Fields(string(line[bytes.LastIndexByte(line, ')')+1:]))
	if len(fields) < 20 {
		return time.Time{}
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return time.Time{}
	}
	text, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return time.Time{}
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "btime "); ok {
			boot, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil {
				return time.Time{}
			}
			return time.Unix(boot, 0).Add(time.Duration(ticks) * clockTick)
		}
	}
	return time.Time{}
}
