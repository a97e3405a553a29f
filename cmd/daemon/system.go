package daemon

import (
	"io/fs"
	"math"
	"net"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// notified reports whether systemd asked to be told.
func notified() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// notify tells systemd about a change of state, if it asked to be told (sd_notify(3)): one datagram
// to the socket in NOTIFY_SOCKET, whose first byte is @ if it is abstract.
func (d *Daemon) notify(state string) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	if name[0] == '@' {
		name = "\x00" + name[1:]
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err == nil {
		_, err = conn.Write([]byte(state))
		_ = conn.Close()
	}
	if err != nil {
		d.Log.WithError(err).Warn("cannot tell systemd " + state)
	}
}

// watchdogPeriod is how often systemd wants a sign of life, 0 for never (sd_watchdog_enabled(3)).
func watchdogPeriod(self int, pid, usec string) time.Duration {
	if pid != "" && pid != strconv.Itoa(self) {
		return 0
	}
	n, err := strconv.ParseInt(usec, 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64/int64(time.Microsecond) {
		return 0
	}
	return time.Duration(n) * time.Microsecond
}

// memoryShare is how much of a container's memory limit the Go heap may take before the collector
// works harder; the rest is for stacks and what is mapped.
const memoryShare = 0.9

// limitMemory makes the garbage collector know the memory limit of the process's cgroup, version 2 or
// 1, so that it collects before the kernel kills. GOMEMLIMIT in the environment has precedence.
func limitMemory(root fs.FS) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if limit := cgroupLimit(root); limit > 0 {
		debug.SetMemoryLimit(int64(float64(limit) * memoryShare))
	}
}

// cgroupLimit returns the smallest memory limit on the way from the process's cgroup to the root, in
// bytes, or 0 if there is none.
func cgroupLimit(root fs.FS) int64 {
	text, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0
	}
	smallest := int64(math.MaxInt64)
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		base, file := "sys/fs/cgroup", "memory.max"
		if parts[1] == "memory" {
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		} else if parts[0] != "0" {
			continue
		}
		for dir := path.Clean("/" + parts[2]); ; dir = path.Dir(dir) {
			if value, err := fs.ReadFile(root, path.Join(base, dir, file)); err == nil {
				// Version 1 writes nearly the largest number for no limit, version 2 "max".
				if n, err := strconv.ParseInt(strings.TrimSpace(string(value)), 10, 64); err == nil && n > 0 && n < 1<<60 {
					smallest = min(smallest, n)
				}
			}
			if dir == "/" {
				break
			}
		}
	}
	if smallest == math.MaxInt64 {
		return 0
	}
	return smallest
}
