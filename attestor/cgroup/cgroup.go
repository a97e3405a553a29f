// Package cgroup finds the container that a process claims to be in, from what the kernel says of it in
// /proc: its cgroups, and where these say nothing, its mounts. Which names belong to which kind of
// container is a Layout's to say; attestors bring their own.
//
// Cgroup paths can be made by others than a container engine (a user may create any name below the cgroup
// that systemd delegates to him), so what is found is a claim until it was compared, with Inside, with the
// cgroup of the container's own first process.
package cgroup

import (
	"errors"
	"strings"

	"github.com/assay-id/assay/attestor/procfs"
)

const (
	// maxCgroup and maxMountinfo bound what is read of a process, in bytes.
	maxCgroup    = 64 << 10
	maxMountinfo = 4 << 20
	// idLength is the length of a container ID in hex.
	idLength = 64
)

// ErrTwoContainers says that a process is in cgroups of different containers, so in none for sure.
var ErrTwoContainers = errors.New("cgroups name two containers")

// Name is what a cgroup's path, or a mount, says of the container that it belongs to.
type Name struct {
	// ID is the container's ID, empty if it is not named.
	ID string
	// Prefix is the path up to and including the part with the ID; empty for a mount.
	Prefix string
	// Pod is the UID of the container's pod, and Container its name within it, where they are told.
	Pod, Container string
}

// Layout knows how a kind of container is named.
type Layout interface {
	// Cgroup reads a cgroup path. It reports whether the path is another kind's, so that nothing may be
	// said of a process in it.
	Cgroup(path string) (n Name, foreign bool)
	// Mount reads the root and the target of a file mounted into the container.
	Mount(root, target string) Name
}

// Place is where a process is, as far as it can be told.
type Place struct {
	// Name is the container's; its ID is empty for a process that is in none.
	Name
	// Hierarchy is the one whose cgroup names the container: its controllers, empty for cgroup v2 and
	// where the mounts named it.
	Hierarchy string
	// Own are the process's cgroup paths by hierarchy.
	Own map[string]string
}

// Locate reads where a process is. A process that is gone is os.ErrNotExist.
func Locate(proc string, pid int, layout Layout) (Place, error) {
	text, err := procfs.Read(proc, pid, "cgroup", maxCgroup)
	if err != nil {
		return Place{}, err
	}
	at, foreign, err := Parse(text, layout)
	if err != nil || at.ID != "" || foreign || !at.blind() {
		return at, err
	}
	text, err = procfs.Read(proc, pid, "mountinfo", maxMountinfo)
	if err != nil {
		return Place{}, err
	}
	at.Name, err = ParseMounts(text, layout)
	return at, err
}

// blind reports whether the cgroups say nothing: the process is at the root of all that the agent
// sees, as the processes of the agent's own container are when the agent runs in one.
func (p Place) blind() bool {
	for _, hierarchy := range []string{"", "name=systemd"} {
		if path, ok := p.Own[hierarchy]; ok && path != "/" {
			return false
		}
	}
	return true
}

// Parse reads the text of /proc/PID/cgroup, see cgroups(7): "number:controllers:path" a line. It reports
// whether the process is in another kind's container, of which nothing is said.
func Parse(text string, layout Layout) (at Place, foreign bool, err error) {
	at.Own = make(map[string]string)
	rank := 0
	for line := range strings.Lines(text) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || !strings.HasPrefix(fields[2], "/") {
			continue
		}
		hierarchy, path := fields[1], fields[2]
		at.Own[hierarchy] = path
		name, other := layout.Cgroup(path)
		foreign = foreign || other
		if name.ID == "" {
			continue
		}
		if at.ID != "" && at.ID != name.ID {
			return Place{Own: at.Own}, false, ErrTwoContainers
		}
		// Some hierarchies may be used by others for their own ends; the unified one and systemd's
		// are what engines care for.
		if r := rankOf(hierarchy); r > rank {
			rank, at.Name, at.Hierarchy = r, name, hierarchy
		}
	}
	if foreign {
		return Place{Own: at.Own}, true, nil
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

// ParseMounts reads the text of /proc/PID/mountinfo, see proc_pid_mountinfo(5): the container is named in
// the root of a mounted cgroup, or in that of a file that its engine mounts.
func ParseMounts(text string, layout Layout) (Name, error) {
	found := Name{}
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
		var name Name
		if kind == "cgroup" || kind == "cgroup2" {
			name, _ = layout.Cgroup(root)
			name.Prefix = ""
		} else {
			name = layout.Mount(root, target)
		}
		if name == (Name{}) {
			continue
		}
		if differ(found.ID, name.ID) || differ(found.Pod, name.Pod) || differ(found.Container, name.Container) {
			return Name{}, errors.New("mounts name two containers")
		}
		found.ID, found.Pod, found.Container = either(found.ID, name.ID), either(found.Pod, name.Pod), either(found.Container, name.Container)
	}
	return found, nil
}

func differ(a, b string) bool { return a != "" && b != "" && a != b }

func either(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// Inside reports whether a process at p is in the container whose first process is at first. Both must
// be in the very same cgroup that names the container; where the cgroup does not name it, in or below
// the first process's.
func (p Place) Inside(first Place) bool {
	if p.Prefix != "" {
		return first.ID == p.ID && first.Hierarchy == p.Hierarchy && first.Prefix == p.Prefix
	}
	compared := false
	for _, hierarchy := range []string{"", "name=systemd"} {
		mine, ok := p.Own[hierarchy]
		theirs, too := first.Own[hierarchy]
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

// IsID reports whether s is a full container ID: 64 lower-case hex digits and nothing else.
func IsID(s string) bool {
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
