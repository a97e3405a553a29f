package workload

import (
	"regexp"
	"slices"
	"strings"

	"github.com/assay-id/assay/attestor/cgroup"
)

// layout knows where the cgroups of ECS's containers are. It fits whole paths: nothing is looked for below the
// places where only root can make a cgroup.
type layout struct{ sidecar bool }

// form is the path of a container's cgroup, part by part; one of the parts names the container, and one may
// name its task.
type form []*regexp.Regexp

func parts(patterns ...string) form {
	var f form
	for _, p := range patterns {
		p = strings.ReplaceAll(p, "ID", `(?P<id>[0-9a-f]{64})`)
		p = strings.ReplaceAll(p, "TASK", `(?P<task>[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})`)
		f = append(f, regexp.MustCompile("^"+p+"$"))
	}
	return f
}

var (
	// onHosts are those of a container instance: with limits for tasks by systemd and by cgroupfs, and without.
	onHosts = []form{
		parts(`ecstasks\.slice`, `ecstasks-TASK\.slice`, `docker-ID\.scope`),
		parts(`ecs`, `TASK`, `ID`),
		parts(`ecs`, `[A-Za-z0-9_-]+`, `TASK`, `ID`),
		parts(`system\.slice`, `docker-ID\.scope`),
		parts(`docker`, `ID`),
	}
	// inTasks are those of Fargate, where a container is named after its task.
	inTasks = []form{parts(`ecs`, `TASK`, `(?P<id>[0-9a-f]{32}-[0-9]{1,20})`)}
)

// Cgroup finds the container that a path names. In a cgroup namespace of its own, as an agent in a container has
// it, paths begin with one ".." for each step up from the agent's cgroup; what follows are a whole path, or as
// many of its last parts as there were steps.
func (l layout) Cgroup(path string) (cgroup.Name, bool) {
	rest := strings.Split(strings.TrimPrefix(path, "/"), "/")
	up := 0
	for up < len(rest) && rest[up] == ".." {
		up++
	}
	rest = rest[up:]
	forms := onHosts
	if l.sidecar {
		forms = inTasks
	}
	for _, f := range forms {
		if len(rest) == up && up < len(f) {
			f = f[len(f)-up:]
		}
		if name, ok := f.match(rest); ok {
			name.Prefix = path
			return name, false
		}
	}
	return cgroup.Name{}, false
}

// match reports whether the form fits the parts, and whom they name.
func (f form) match(rest []string) (cgroup.Name, bool) {
	if len(rest) != len(f) {
		return cgroup.Name{}, false
	}
	var name cgroup.Name
	for i, pattern := range f {
		found := pattern.FindStringSubmatch(rest[i])
		if found == nil {
			return cgroup.Name{}, false
		}
		if at := slices.Index(pattern.SubexpNames(), "id"); at > 0 {
			name.ID = found[at]
		}
		if at := slices.Index(pattern.SubexpNames(), "task"); at > 0 {
			name.Pod = found[at]
		}
	}
	return name, name.ID != ""
}

// Mount says nothing: of the processes of its own container the agent says nothing.
func (layout) Mount(string, string) cgroup.Name { return cgroup.Name{} }
