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

const (
	// maxCgroup and maxMountinfo bound what is read of a process, in bytes.
	maxCgroup    = 64 << 10
	maxMountinfo = 4 << 20
	// idLength is the length of a container ID in hex.
	idLength = 64
)

// errTwoContainers says that a process is in cgroups of different containers, so in none for sure.
var errTwoContainers = errors.New("cgroups name two containers")

// place is where a process is, as far as its cgroups tell.
type place struct {
	// id is the container's ID, empty for a process that is in none.
	id string
	// hierarchy and prefix are the cgroup that names the container: the hierarchy's controllers
	// (empty for cgroup v2) and the path up to and including the part with the ID. Both are empty
	// if the ID was found in the mounts.
	hierarchy, prefix string
	// own are the process's cgroup paths by hierarchy.
	own map[string]string
}

// locator finds the container that a process claims to be in. Cgroup paths can be made by others than
// the engine (a user may create any name below the cgroup that systemd delegates to him), so what it
// finds is a claim until it was compared with the cgroup of the container's own first process.
type locator struct {
	matchers [][]string
	pods     bool
}

// newLocator parses the configured matchers; none means the built-in layouts.
func newLocator(matchers []string, pods bool) (*locator, error) {
	l := &locator{pods: pods}
	for _, text := range matchers {
		parts := strings.Split(strings.Trim(text, "/"), "/")
		ids := 0
		for _, part := range parts {
			switch {
			case part == "<id>":
				ids++
			case part == "":
				return nil, fmt.Errorf("container_id_cgroup_matchers: %q has an empty part", text)
			case part != "*" && strings.ContainsAny(part, "*<>"):
				return nil, fmt.Errorf("container_id_cgroup_matchers: %q: * and <id> must be a whole part", text)
			}
		}
		if ids != 1 {
			return nil, fmt.Errorf("container_id_cgroup_matchers: %q must have one <id>", text)
		}
		l.matchers = append(l.matchers, parts)
	}
	return l, nil
}

// locate reads where a process is. A process that is gone is os.ErrNotExist.
func (l *locator) locate(proc string, pid int) (place, error) {
	text, err := readProc(proc, pid, "cgroup", maxCgroup)
	if err != nil {
		return place{}, err
	}
	at, pod, err := l.inCgroups(text)
	if err != nil || at.id != "" || pod || !at.blind() {
		return at, err
	}
	text, err = readProc(proc, pid, "mountinfo", maxMountinfo)
	if err != nil {
		return place{}, err
	}
	at.id, err = l.inMounts(text)
	return at, err
}

// blind reports whether the cgroups say nothing: the process is at the root of all that the agent
// sees, as the processes of the agent's own container are when the agent runs in one.
func (p place) blind() bool {
	for _, hierarchy := range []string{"", "name=systemd"} {
		if path, ok := p.own[hierarchy]; ok && path != "/" {
			return false
		}
	}
	return true
}

// inCgroups reads /proc/PID/cgroup, see cgroups(7): "number:controllers:path" a line. It reports
// whether the process is in a Kubernetes pod, of which nothing is said.
func (l *locator) inCgroups(text string) (at place, pod bool, err error) {
	at.own = make(map[string]string)
	rank := 0
	for line := range strings.Lines(text) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || !strings.HasPrefix(fields[2], "/") {
			continue
		}
		hierarchy, path := fields[1], fields[2]
		at.own[hierarchy] = path
		id, prefix, kube := l.match(path)
		pod = pod || kube
		if id == "" {
			continue
		}
		if at.id != "" && at.id != id {
			return place{own: at.own}, false, errTwoContainers
		}
		// Some hierarchies may be used by others for their own ends; the unified one and systemd's
		// are what engines care for.
		if r := rankOf(hierarchy); r > rank {
			rank, at.id, at.hierarchy, at.prefix = r, id, hierarchy, prefix
		}
	}
	if pod {
		return place{own: at.own}, true, nil
	}
	return at, false, nil
}

func rankOf(hierarchy string) int {
	switch hierarchy {
	case "":
		return 3
	case "name=systemd":
		return 2
	}
	return 1
}

// match finds the outermost part of a cgroup path that names a container. Everything below it belongs
// to the container, whose processes may name it as they like (an engine inside a container does); an
// inner name is never looked at.
func (l *locator) match(path string) (id, prefix string, pod bool) {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if !l.pods && len(l.matchers) == 0 {
		for _, part := range parts {
			if strings.Contains(part, "kubepods") {
				return "", "", true
			}
		}
	}
	for i, part := range parts {
		found := builtIn(part)
		if len(l.matchers) > 0 {
			found = l.matched(parts, i)
		}
		if found != "" {
			return found, "/" + strings.Join(parts[:i+1], "/"), false
		}
	}
	return "", "", false
}

// matched returns the ID at part i if a configured matcher fits the whole path with its <id> there.
func (l *locator) matched(parts []string, i int) string {
	for _, matcher := range l.matchers {
		if len(matcher) != len(parts) || matcher[i] != "<id>" || !isID(parts[i]) {
			continue
		}
		fits := true
		for k, want := range matcher {
			fits = fits && (want == "*" || want == "<id>" || want == parts[k])
		}
		if fits {
			return parts[i]
		}
	}
	return ""
}

// builtIn reads a part of a cgroup path as engines name it: docker-<id>.scope and libpod-<id>.scope
// with the systemd driver, <id> (below /docker, or wherever --cgroup-parent says) and libpod-<id>
// with cgroupfs. Podman's monitor, libpod-conmon-<id>.scope, is not in the container.
func builtIn(part string) string {
	if name, scope := strings.CutSuffix(part, ".scope"); scope {
		for _, engine := range []string{"docker-", "libpod-"} {
			if id, ok := strings.CutPrefix(name, engine); ok && isID(id) {
				return id
			}
		}
		return ""
	}
	if id := strings.TrimPrefix(part, "libpod-"); isID(id) {
		return id
	}
	return ""
}

// isID reports whether s is a full container ID: 64 lower-case hex digits and nothing else.
func isID(s string) bool {
	if len(s) != idLength {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// inMounts finds the container ID in /proc/PID/mountinfo, see proc_pid_mountinfo(5): in the root of a
// mounted cgroup, or in that of the files an engine mounts over /etc/hostname and its neighbors.
func (l *locator) inMounts(text string) (string, error) {
	found := ""
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(line, " - ")
		if !ok {
			continue
		}
		fields := strings.Fields(left)
		kind, _, _ := strings.Cut(right, " ")
		if len(fields) < 5 {
			continue
		}
		root, target := fields[3], fields[4]
		id := ""
		switch {
		case kind == "cgroup" || kind == "cgroup2":
			id, _, _ = l.match(root)
		case target == "/etc/hostname" || target == "/etc/hosts" || target == "/etc/resolv.conf":
			id = ownerOf(root)
		}
		if id == "" {
			continue
		}
		if found != "" && found != id {
			return "", errors.New("mounts name two containers")
		}
		found = id
	}
	return found, nil
}

// ownerOf finds the ID in …/containers/<id>/… (Docker) and …/overlay-containers/<id>/… (Podman).
func ownerOf(root string) string {
	parts := strings.Split(root, "/")
	for i, part := range parts[:len(parts)-1] {
		if (part == "containers" || strings.HasSuffix(part, "-containers")) && isID(parts[i+1]) {
			return parts[i+1]
		}
	}
	return ""
}

// inside reports whether a process at p is in the container whose first process is at first. Both must
// be in the very same cgroup that names the container; where the cgroup does not name it, in or below
// the first process's.
func (p place) inside(first place) bool {
	if p.prefix != "" {
		return first.id == p.id && first.hierarchy == p.hierarchy && first.prefix == p.prefix
	}
	compared := false
	for _, hierarchy := range []string{"", "name=systemd"} {
		mine, ok := p.own[hierarchy]
		theirs, too := first.own[hierarchy]
		if ok != too {
			return false
		}
		if !ok {
			continue
		}
		compared = true
		if mine != theirs && !strings.HasPrefix(mine, strings.TrimSuffix(theirs, "/")+"/") {
			return false
		}
	}
	return compared
}

func readProc(proc string, pid int, name string, limit int64) (string, error) {
	file, err := os.Open(filepath.Join(proc, strconv.Itoa(pid), name))
	if err != nil {
		return "", err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, limit+1))
	if errors.Is(err, syscall.ESRCH) { // what procfs says when the process ended after the open
		return "", fmt.Errorf("%w: %w", os.ErrNotExist, err)
	}
	if err != nil {
		return "", err
	}
	if int64(len(text)) > limit {
		return "", fmt.Errorf("%s of process is larger than %d bytes", name, limit)
	}
	return string(text), nil
}
