package workload

import (
	"fmt"
	"strings"

	"github.com/assay-id/assay/attestor/cgroup"
)

// locator knows how Docker and Podman name the cgroups and mounts of containers.
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
func (l *locator) locate(proc string, pid int) (cgroup.Place, error) {
	return cgroup.Locate(proc, pid, l)
}

// Cgroup finds the outermost part of a cgroup path that names a container. Everything below it belongs
// to the container, whose processes may name it as they like (an engine inside a container does); an
// inner name is never looked at. Pods are another attestor's, unless they were asked for.
func (l *locator) Cgroup(path string) (name cgroup.Name, foreign bool) {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if !l.pods && len(l.matchers) == 0 {
		for _, part := range parts {
			if strings.Contains(part, "kubepods") {
				return cgroup.Name{}, true
			}
		}
	}
	for i, part := range parts {
		found := builtIn(part)
		if len(l.matchers) > 0 {
			found = l.matched(parts, i)
		}
		if found != "" {
			return cgroup.Name{ID: found, Prefix: "/" + strings.Join(parts[:i+1], "/")}, false
		}
	}
	return cgroup.Name{}, false
}

// matched returns the ID at part i if a configured matcher fits the whole path with its <id> there.
func (l *locator) matched(parts []string, i int) string {
	for _, matcher := range l.matchers {
		if len(matcher) != len(parts) || matcher[i] != "<id>" || !cgroup.IsID(parts[i]) {
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
			if id, ok := strings.CutPrefix(name, engine); ok && cgroup.IsID(id) {
				return id
			}
		}
		return ""
	}
	if id := strings.TrimPrefix(part, "libpod-"); cgroup.IsID(id) {
		return id
	}
	return ""
}

// Mount finds the container ID in the files that an engine mounts over /etc/hostname and its neighbors.
func (l *locator) Mount(root, target string) cgroup.Name {
	switch target {
	case "/etc/hostname", "/etc/hosts", "/etc/resolv.conf":
		return cgroup.Name{ID: ownerOf(root)}
	}
	return cgroup.Name{}
}

// ownerOf finds the ID in …/containers/<id>/… (Docker) and …/overlay-containers/<id>/… (Podman).
func ownerOf(root string) string {
	parts := strings.Split(root, "/")
	for i, part := range parts[:len(parts)-1] {
		if (part == "containers" || strings.HasSuffix(part, "-containers")) && cgroup.IsID(parts[i+1]) {
			return parts[i+1]
		}
	}
	return ""
}
