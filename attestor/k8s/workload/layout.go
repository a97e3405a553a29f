package workload

import (
	"strings"

	"github.com/assay-id/assay/attestor/cgroup"
)

// layout knows how Kubernetes and its runtimes name the cgroups of pods and containers:
//
//	/kubepods/burstable/pod<uid>/<id>                              cgroupfs driver
//	/kubepods.slice/…/kubepods-burstable-pod<uid_>.slice/cri-containerd-<id>.scope
//	…/crio-<id>.scope, …/docker-<id>.scope, …/crio-<id>            systemd driver, CRI-O, Docker
//	…/kubepods-besteffort-pod<uid_>.slice:cri-containerd:<id>      systemd driver, cgroupfs runtime
//	/../../pod<uid>/<id>, /../cri-containerd-<id>.scope            seen from a cgroup namespace beside it
//
// A node that is itself a container (kind) has its own path before that.
type layout struct{}

// Cgroup finds the outermost pod in a cgroup path, and the outermost container in that. Everything below
// belongs to the container, whose processes may name it as they like. What is below a user's own cgroups
// is of that user's making.
func (layout) Cgroup(path string) (cgroup.Name, bool) {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	up := 0
	for up < len(parts) && parts[up] == ".." {
		up++
	}
	if up > 0 && up < len(parts) {
		if id := containerOf(parts[up]); id != "" {
			return cgroup.Name{ID: id, Prefix: "/" + strings.Join(parts[:up+1], "/")}, false
		}
	}
	for i, part := range parts {
		if part == "user.slice" {
			return cgroup.Name{}, false
		}
		uid, rest := podOf(part)
		if uid == "" {
			continue
		}
		name := cgroup.Name{Pod: uid}
		if rest != "" { // pod and container in one part
			if id := rest[strings.LastIndexByte(rest, ':')+1:]; cgroup.IsID(id) {
				name.ID, name.Prefix = id, "/"+strings.Join(parts[:i+1], "/")
			}
			return name, false
		}
		for k := i + 1; k < len(parts); k++ {
			if id := containerOf(parts[k]); id != "" {
				name.ID, name.Prefix = id, "/"+strings.Join(parts[:k+1], "/")
				break
			}
		}
		return name, false
	}
	return cgroup.Name{}, false
}

// podOf reads the part of a cgroup path that names a pod, and returns what follows its slice's name.
func podOf(part string) (uid, rest string) {
	if name, ok := strings.CutPrefix(part, "pod"); ok {
		if isUID(name) {
			return name, ""
		}
		return "", ""
	}
	name, rest, ok := strings.Cut(part, ".slice")
	if !ok || !strings.Contains(name, "kubepods") || rest != "" && rest[0] != ':' {
		return "", ""
	}
	i := strings.LastIndex(name, "-pod")
	if i < 0 {
		return "", ""
	}
	// systemd takes a dash for a level of its hierarchy.
	if uid = strings.ReplaceAll(name[i+len("-pod"):], "_", "-"); isUID(uid) {
		return uid, rest
	}
	return "", ""
}

// isUID reports whether s is the UID of a pod: a UUID, or for a static pod the MD5 of its manifest.
func isUID(s string) bool {
	if len(s) != 36 && len(s) != 32 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		dash := len(s) == 36 && (i == 8 || i == 13 || i == 18 || i == 23)
		if dash != (c == '-') || !dash && (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// containerOf reads the part that names a container. CRI-O's monitor, crio-conmon-<id>, is not in it.
func containerOf(part string) string {
	id := strings.TrimSuffix(part, ".scope")
	for _, runtime := range []string{"cri-containerd-", "crio-", "docker-"} {
		if rest, ok := strings.CutPrefix(id, runtime); ok {
			id = rest
			break
		}
	}
	if cgroup.IsID(id) {
		return id
	}
	return ""
}

// Mount reads the file in which a container leaves its last words, which the kubelet keeps at
// …/pods/<uid>/containers/<name>/<number>.
func (layout) Mount(root, target string) cgroup.Name {
	if target != "/dev/termination-log" {
		return cgroup.Name{}
	}
	parts := strings.Split(root, "/")
	for i := len(parts) - 4; i >= 1; i-- {
		if parts[i-1] == "pods" && isUID(parts[i]) && parts[i+1] == "containers" && parts[i+2] != "" {
			return cgroup.Name{Pod: parts[i], Container: parts[i+2]}
		}
	}
	return cgroup.Name{}
}
