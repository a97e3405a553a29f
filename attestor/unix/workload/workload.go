// Package workload is the unix attestor in the agent.
//
// Why it is so: user and group are those that the kernel vouched for when the caller connected, not
// those that /proc shows now. A caller can hand its connection to a child and execute a set-user-ID
// program in its own place; what /proc shows then is not who is asking.
package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/procfs"
	"github.com/assay-id/assay/attestor/unix"
)

const (
	// maxStatus is the largest /proc/PID/status in bytes: 65,536 groups of ten digits and the rest.
	maxStatus = 1 << 20
	// maxGroups is how many supplementary groups become selectors.
	maxGroups = 1024
)

// Kind returns the unix attestor.
func Kind() attestor.WorkloadKind {
	return attestor.WorkloadKind{
		Type:   unix.Type,
		Config: func() any { return new(unix.Config) },
		Open:   open,
	}
}

type workload struct {
	config unix.Config
	log    logrus.FieldLogger
	users  *names
	groups *names
	sums   *sums
}

func open(config any, needs attestor.Needs) (attestor.Workload, error) {
	c, ok := config.(*unix.Config)
	if !ok {
		return nil, fmt.Errorf("unix configuration is a %T", config)
	}
	needs = needs.Filled()
	log, now := needs.Log, needs.Now
	return &workload{
		config: *c,
		log:    log,
		users:  newNames("/etc/passwd"),
		groups: newNames("/etc/group"),
		sums:   newSums(now),
	}, nil
}

// Attest returns what is proved about the process. As in SPIRE, an executable that was asked for and
// cannot be read is an error: who turned discover_workload_path on relies on it.
func (w *workload) Attest(ctx context.Context, p attestor.Process) ([]attestor.Selector, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	groups, err := supplementaryGroups(p)
	if err != nil {
		return nil, fmt.Errorf("read groups of process: %w", err)
	}
	var found []attestor.Selector
	add := func(key, value string) {
		s := attestor.Selector{Type: unix.Type, Value: key + ":" + value}
		if s.Check() == nil { // a path may be too long or hold control characters
			found = append(found, s)
		}
	}
	add("uid", decimal(p.UID))
	if name, ok := w.name(w.users, p.UID); ok {
		add("user", name)
	}
	add("gid", decimal(p.GID))
	if name, ok := w.name(w.groups, p.GID); ok {
		add("group", name)
	}
	for _, gid := range groups {
		add("supplementary_gid", decimal(gid))
		if name, ok := w.name(w.groups, gid); ok {
			add("supplementary_group", name)
		}
	}
	if w.config.DiscoverWorkloadPath {
		if err := w.executable(ctx, p, add); err != nil {
			return nil, err
		}
	}
	return attestor.NewSet(found...).All(), nil
}

// Abstains says that path and hash have to be asked for.
func (w *workload) Abstains(want attestor.Selector) string {
	name, _, _ := strings.Cut(want.Value, ":")
	switch {
	case want.Type != unix.Type, name != "path" && name != "sha256":
	case !w.config.DiscoverWorkloadPath:
		return fmt.Sprintf("no process shows %s:%s as long as workload_attestor \"unix\" in agent.hcl has no discover_workload_path = true", unix.Type, name)
	case name == "sha256" && w.config.WorkloadSizeLimit < 0:
		return "no process shows unix:sha256 as long as workload_size_limit in agent.hcl is negative"
	}
	return ""
}

// executable adds the selectors of the file that the process runs. The file is opened once, through
// the kernel's own link, so path and hash are of the same file however the path changes meanwhile.
func (w *workload) executable(ctx context.Context, p attestor.Process, add func(key, value string)) error {
	file, err := os.Open(filepath.Join(p.Proc, strconv.Itoa(p.PID), "exe"))
	if err != nil {
		return fmt.Errorf("open executable: %w", err)
	}
	defer file.Close()
	id, err := identify(file)
	if err != nil {
		return fmt.Errorf("read executable: %w", err)
	}
	path, err := pathOf(file)
	if err != nil {
		return fmt.Errorf("read path of executable: %w", err)
	}
	if path != "" {
		add("path", path)
	}
	limit := w.config.WorkloadSizeLimit
	if limit < 0 {
		return nil
	}
	if limit > 0 && id.size > limit {
		w.log.WithFields(logrus.Fields{"pid": p.PID, "size": id.size, "limit": limit}).
			Debug("executable is over workload_size_limit, so it has no sha256 selector")
		return nil
	}
	sum, err := w.sums.of(ctx, file, id)
	if err != nil {
		return fmt.Errorf("hash executable: %w", err)
	}
	add("sha256", sum)
	return nil
}

// pathOf returns the path of an open file as the kernel has it, empty if it was deleted or replaced: such
// a file has no path any more, and whatever is there now is not what runs.
func pathOf(file *os.File) (string, error) {
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(file.Fd())))
	if err != nil || !strings.HasSuffix(path, " (deleted)") {
		return path, err
	}
	// The kernel's mark, unless the file is really called so.
	open, err := file.Stat()
	if err != nil {
		return "", err
	}
	if there, err := os.Stat(path); err == nil && os.SameFile(open, there) {
		return path, nil
	}
	return "", nil
}

func (w *workload) name(names *names, id uint32) (string, bool) {
	name, ok, err := names.of(id)
	if err != nil {
		w.log.WithError(err).Debug("names are not known")
	}
	return name, ok
}

// supplementaryGroups reads the Groups line of /proc/PID/status.
func supplementaryGroups(p attestor.Process) ([]uint32, error) {
	text, err := procfs.Read(p.Proc, p.PID, "status", maxStatus)
	if err != nil {
		return nil, err
	}
	return parseGroups(text)
}

func parseGroups(status string) ([]uint32, error) {
	for line := range strings.Lines(status) {
		list, found := strings.CutPrefix(line, "Groups:")
		if !found {
			continue
		}
		var groups []uint32
		for field := range strings.FieldsSeq(list) {
			gid, err := strconv.ParseUint(field, 10, 32)
			if err != nil {
				return nil, errors.New("a group is not a number")
			}
			if len(groups) == maxGroups {
				return nil, fmt.Errorf("more than %d supplementary groups", maxGroups)
			}
			groups = append(groups, uint32(gid))
		}
		return groups, nil
	}
	return nil, errors.New("status has no line of groups")
}

func decimal(id uint32) string { return strconv.FormatUint(uint64(id), 10) }
