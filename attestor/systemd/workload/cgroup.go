package workload

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// maxCgroup bounds what is read of a process's cgroups, in bytes.
const maxCgroup = 64 << 10

// errTwoUnits says that a process is in cgroups of different units, so in none for sure.
var errTwoUnits = errors.New("cgroups name two units")

// place is the unit that a process's cgroup names.
type place struct {
	// path is the process's own cgroup path.
	path string
	// slices are the slices on the way to the unit, outermost first.
	slices []string
	// unit is the unit's name, with its type: the first part of the path that is no slice. What is
	// below it belongs to whoever runs in the unit, who may name it as they like: a user's own manager
	// runs in user@UID.service, and its "nginx.service" is one of those names.
	unit string
}

// locate reads which unit a process is in; the zero place is none.
func locate(proc string, pid int) (place, error) {
	file, err := os.Open(filepath.Join(proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return place{}, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxCgroup+1))
	if errors.Is(err, syscall.ESRCH) { // what procfs says when the process ended after the open
		return place{}, fmt.Errorf("%w: %w", os.ErrNotExist, err)
	}
	if err != nil {
		return place{}, err
	}
	if len(text) > maxCgroup {
		return place{}, fmt.Errorf("cgroup of process is larger than %d bytes", maxCgroup)
	}
	return parse(string(text))
}

// parse reads /proc/PID/cgroup, see cgroups(7): "number:controllers:path" a line. systemd keeps units
// in the unified hierarchy, in one of its own ("name=systemd"), or in both.
func parse(text string) (place, error) {
	var found place
	for line := range strings.Lines(text) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || fields[1] != "" && fields[1] != "name=systemd" {
			continue
		}
		at := split(fields[2])
		switch {
		case at.unit == "":
		case found.unit == "":
			found = at
		case found.path != at.path:
			return place{}, errTwoUnits
		}
	}
	return found, nil
}

// split takes a cgroup path apart. Names that could be mistaken for the kernel's own begin with one
// more underscore there.
func split(path string) place {
	if !strings.HasPrefix(path, "/") || strings.HasSuffix(path, " (deleted)") {
		return place{}
	}
	at := place{path: path}
	for part := range strings.SplitSeq(path[1:], "/") {
		name := strings.TrimPrefix(part, "_")
		if strings.HasSuffix(name, ".slice") && isUnitName(name) {
			at.slices = append(at.slices, name)
			continue
		}
		if isUnitName(name) {
			at.unit = name
			return at
		}
		break
	}
	return place{}
}

// kinds are the interfaces of the units that have processes, by the suffix of their names.
var kinds = map[string]string{
	"service": "Service", "scope": "Scope", "socket": "Socket", "mount": "Mount", "swap": "Swap", "slice": "Slice",
}

// isUnitName reports whether a name is one that systemd could have given, see systemd.unit(5).
func isUnitName(name string) bool {
	const maxUnitName = 255
	dot := strings.LastIndexByte(name, '.')
	if dot < 1 || len(name) > maxUnitName || kinds[name[dot+1:]] == "" {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune(":-_.\\@", rune(c)) {
			return false
		}
	}
	return name[0] != '@'
}

// template returns the template that an instance was made of: getty@.service of getty@tty1.service.
func template(unit string) string {
	at, dot := strings.IndexByte(unit, '@'), strings.LastIndexByte(unit, '.')
	if at < 1 || at+1 >= dot {
		return ""
	}
	return unit[:at+1] + unit[dot:]
}
