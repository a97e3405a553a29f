// Package workload is the systemd attestor in the agent.
//
// Why it is so: a process's cgroup says which unit it is in, and only root, or whom systemd gave a part
// of the tree to, can put it elsewhere. So the path is read as systemd wrote it, the first part that is
// no slice is the unit and nothing below counts, the system's manager must know that unit and say that
// this is its cgroup, and the process must still be there afterwards. Asking the manager which unit a
// PID is in would do all that in one call, but not for the same process: by then the number may be
// another's.
package workload

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/systemd"
)

const (
	// maxFragment is the largest unit file, in bytes, that is hashed.
	maxFragment = 1 << 20
	// maxDropIns is how many drop-ins become selectors.
	maxDropIns = 64
)

// Kind returns the systemd attestor.
func Kind() attestor.WorkloadKind {
	return attestor.WorkloadKind{
		Type:   systemd.Type,
		Config: func() any { return systemd.Defaults() },
		Open:   open,
	}
}

// manager answers questions about units.
type manager interface {
	unit(ctx context.Context, name string) (unit, error)
}

type workload struct {
	slices  []string
	manager manager
	address string
	log     logrus.FieldLogger
	// failed says that somebody could not be answered; Watch wakes everybody then.
	failed atomic.Bool
}

func open(config any, needs attestor.Needs) (attestor.Workload, error) {
	c, ok := config.(*systemd.Config)
	if !ok {
		return nil, fmt.Errorf("systemd configuration is a %T", config)
	}
	if len(c.Slices) == 0 {
		return nil, errors.New("slices is empty, so that no unit could be attested; leave it out for system.slice")
	}
	for _, name := range c.Slices {
		if !strings.HasSuffix(name, ".slice") || !isUnitName(name) {
			return nil, fmt.Errorf("slices: %q is no name of a slice, as system.slice is", name)
		}
		if name == "user.slice" || strings.HasPrefix(name, "user-") {
			return nil, fmt.Errorf("slices: units in %s are made by users; none of them proves anything", name)
		}
	}
	return &workload{slices: c.Slices, manager: newBus(c.BusAddress), address: c.BusAddress, log: needs.Filled().Log}, nil
}

// Attest returns what is proved about the process: nothing for one that is in no unit of the
// configured slices.
func (w *workload) Attest(ctx context.Context, p attestor.Process) ([]attestor.Selector, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	at, err := locate(p.Proc, p.PID)
	if err != nil {
		return nil, fmt.Errorf("find unit of process: %w", err)
	}
	if at.unit == "" || !slices.ContainsFunc(at.slices, func(s string) bool { return slices.Contains(w.slices, s) }) {
		return nil, nil
	}
	u, err := w.manager.unit(ctx, at.unit)
	if err != nil {
		if !errors.Is(err, errNoUnit) {
			w.failed.Store(true)
		}
		return nil, err
	}
	if u.cgroup == "" || at.path != u.cgroup && !strings.HasPrefix(at.path, u.cgroup+"/") {
		return nil, fmt.Errorf("the process is at %q, the cgroup of %s is %q", at.path, at.unit, u.cgroup)
	}
	again, err := locate(p.Proc, p.PID)
	if err != nil {
		return nil, fmt.Errorf("find unit of process again: %w", err)
	}
	if again.path != at.path {
		return nil, fmt.Errorf("the process went from %q to %q meanwhile", at.path, again.path)
	}
	return describe(at, u, p.PID), nil
}

// describe makes the selectors.
func describe(at place, u unit, pid int) []attestor.Selector {
	var found []attestor.Selector
	add := func(key, value string) {
		s := attestor.Selector{Type: systemd.Type, Value: key + ":" + value}
		if value != "" && s.Check() == nil { // a path may be too long or hold control characters
			found = append(found, s)
		}
	}
	add("id", u.id)
	add("fragment_path", u.fragment)
	for _, s := range at.slices {
		add("slice", s)
	}
	add("template", template(u.id))
	add("invocation_id", u.invocation)
	add("transient", fmt.Sprint(u.transient))
	if strings.HasSuffix(at.unit, ".service") {
		if u.user == "" && !u.dynamic {
			u.user = "root"
		}
		add("user", u.user)
		add("exec_main", fmt.Sprint(pid > 0 && int(u.mainPID) == pid))
	}
	// What the manager loaded is what counts, so files that have changed since are not looked at.
	if !u.stale {
		add("fragment_sha256", sum(u.fragment))
		if len(u.dropIns) == 0 {
			add("dropin", "none")
		}
		for _, path := range u.dropIns[:min(len(u.dropIns), maxDropIns)] {
			add("dropin", path)
		}
	}
	return attestor.NewSet(found...).All()
}

// sum returns the SHA-256 of a unit file, or nothing if it cannot be read or is none.
func sum(path string) string {
	if path == "" {
		return ""
	}
	// Not to wait for a writer, should it be a pipe.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer file.Close()
	if stat, err := file.Stat(); err != nil || !stat.Mode().IsRegular() || stat.Size() > maxFragment {
		return ""
	}
	text, err := io.ReadAll(io.LimitReader(file, maxFragment+1))
	if err != nil || len(text) > maxFragment {
		return ""
	}
	digest := sha256.Sum256(text)
	return hex.EncodeToString(digest[:])
}
