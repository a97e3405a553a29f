// Package workload is the docker attestor in the agent.
//
// A process's container is found by its cgroup and proved by comparing that cgroup with the one of
// the container's first process, as the engine names it. The container's image is asked for by the ID
// that the engine wrote down when the container was created, never by a name.
//
// Why it is so: a name such as app:latest can be moved to another image while the container runs, and
// then names what does not run; and labels given on the command line overwrite the image's, so only
// the image itself says what its builder wrote.
//
// A container's image, labels and variables cannot change, so what was once learned of a container
// holds until it ends: a known container costs no call, and keeps its selectors while the engine is
// down or restarts.
package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/cgroup"
	"github.com/assay-id/assay/attestor/docker"
)

const (
	// maxContainers is how many containers are remembered; one takes some 10 KiB at most times.
	maxContainers = 4096
	// maxPIDs is how many processes of one container are remembered for its events.
	maxPIDs = 256
	// maxTries is how often a container is learned anew for one process while events keep coming.
	maxTries = 3
	// relearnAfter is how old what is known must be to be doubted, when a process in a cgroup of that
	// name turns out not to be in the container: a hostile one must not keep the engine busy.
	relearnAfter = time.Second
)

// Kind returns the docker attestor.
func Kind() attestor.WorkloadKind {
	return attestor.WorkloadKind{
		Type:   docker.Type,
		Config: func() any { return new(docker.Config) },
		Open:   open,
	}
}

type workload struct {
	log      logrus.FieldLogger
	now      func() time.Time
	engine   *engine
	locator  *locator
	describe describer

	mu       sync.Mutex // guards the two below and what is behind them
	known    map[string]*known
	fetching map[string]*fetching
}

// fetching is a question under way. Whoever else wants to know waits for its end.
type fetching struct {
	done chan struct{} // closed at the end
	err  error         // why it failed; set before
}

// known is what was learned of a container.
type known struct {
	learned   time.Time
	first     cgroup.Place // of the container's first process
	imageID   string
	selectors []attestor.Selector
	// pids are the processes that were attested; many says that there were more than fit.
	pids map[int]struct{}
	many bool
}

// open needs no engine: it may be started after the agent.
func open(config any, needs attestor.Needs) (attestor.Workload, error) {
	c, ok := config.(*docker.Config)
	if !ok {
		return nil, fmt.Errorf("docker configuration is a %T", config)
	}
	needs = needs.Filled()
	log, now := needs.Log, needs.Now
	locator, err := newLocator(c.CgroupMatchers, c.KubernetesPods)
	if err != nil {
		return nil, err
	}
	engine, err := newEngine(c, log, now)
	if err != nil {
		return nil, err
	}
	return &workload{
		log: log, now: now, engine: engine, locator: locator,
		describe: describer{env: !c.DisableEnv, claimEnv: slices.Clone(c.ClaimEnv)},
		known:    make(map[string]*known), fetching: make(map[string]*fetching),
	}, nil
}

// Abstains says that variables are turned off.
func (w *workload) Abstains(want attestor.Selector) string {
	if want.Type == docker.Type && strings.HasPrefix(want.Value, "env:") && !w.describe.env {
		return "no container shows docker:env as long as disable_env_selectors is true in agent.hcl"
	}
	return ""
}

// Attest returns what is proved about the process's container, nothing if it is in none that the
// engine knows.
func (w *workload) Attest(ctx context.Context, p attestor.Process) ([]attestor.Selector, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	at, err := w.locator.locate(p.Proc, p.PID)
	if err != nil {
		return nil, fmt.Errorf("find container of process: %w", err)
	}
	if at.ID == "" {
		return nil, nil
	}
	for range maxTries {
		k, err := w.learn(ctx, at.ID, p.Proc)
		if errors.Is(err, errNotKnown) {
			w.log.WithFields(logrus.Fields{"pid": p.PID, "container": at.ID}).Debug("engine does not know the container: another engine's")
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("ask engine about container %.12s: %w", at.ID, err)
		}
		if !at.Inside(k.first) {
			if w.now().Sub(k.learned) < relearnAfter {
				break
			}
			w.forget(at.ID, k) // it may be of before a restart
			continue
		}
		if w.note(at.ID, k, p) {
			return slices.Clone(k.selectors), nil
		}
	}
	return nil, fmt.Errorf("process is in a cgroup named after container %.12s, but not in that container's cgroup", at.ID)
}

// learn returns what is known of a container, asking the engine if nothing is. One caller asks for a
// container at a time; the others take what it learns, or its error.
func (w *workload) learn(ctx context.Context, id, proc string) (*known, error) {
	for {
		w.mu.Lock()
		if k := w.known[id]; k != nil {
			w.mu.Unlock()
			return k, nil
		}
		other := w.fetching[id]
		if other == nil {
			mine := &fetching{done: make(chan struct{})}
			w.fetching[id] = mine
			w.mu.Unlock()
			var k *known
			k, mine.err = w.fetch(ctx, id, proc)
			w.mu.Lock()
			delete(w.fetching, id)
			if mine.err == nil {
				w.remember(id, k)
			}
			w.mu.Unlock()
			close(mine.done)
			return k, mine.err
		}
		w.mu.Unlock()
		select {
		case <-other.done:
			if other.err != nil && !errors.Is(other.err, context.Canceled) { // who hung up says nothing
				return nil, other.err
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// fetch asks the engine about a container and its image.
func (w *workload) fetch(ctx context.Context, id, proc string) (*known, error) {
	c, err := w.engine.container(ctx, id)
	if err != nil {
		return nil, err
	}
	if c.ID != id { // engines also find containers by name and by the beginning of an ID
		return nil, errNotKnown
	}
	if c.State == nil || c.State.Pid <= 0 {
		return nil, errors.New("container is not running")
	}
	k := &known{learned: w.now(), imageID: imageID(c), pids: make(map[int]struct{})}
	if k.first, err = w.locator.locate(proc, c.State.Pid); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, errors.New("container's first process is not to be seen: it has ended, or the agent has not the engine's view of processes")
		}
		return nil, fmt.Errorf("find cgroup of container's first process: %w", err)
	}
	if k.imageID == "" {
		k.selectors, err = w.describe.describe(c, nil)
		return k, err
	}
	img, err := w.engine.image(ctx, k.imageID)
	switch {
	case errors.Is(err, errNotKnown):
		// Podman lets go of the image of a running container. What is in it cannot be known any more,
		// and so neither which labels were given at run time.
		k.selectors, err = w.describe.describe(c, nil)
	case err != nil:
		return nil, fmt.Errorf("inspect image: %w", err)
	default:
		k.selectors, err = w.describe.describe(c, &img)
	}
	return k, err
}

// remember keeps what was learned. The caller holds mu.
func (w *workload) remember(id string, k *known) {
	for old := range w.known {
		if len(w.known) < maxContainers {
			break
		}
		delete(w.known, old) // any will do: it costs one more question
	}
	w.known[id] = k
}

// note remembers that a process of the container was attested, so that it can be named when something
// happens to the container. It reports false if something has happened since k was learned, and
// everybody known by then was woken.
func (w *workload) note(id string, k *known, p attestor.Process) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known[id] != k {
		return false
	}
	if _, ok := k.pids[p.PID]; ok {
		return true
	}
	if len(k.pids) >= maxPIDs {
		for pid := range k.pids {
			if _, err := os.Lstat(filepath.Join(p.Proc, strconv.Itoa(pid))); errors.Is(err, os.ErrNotExist) {
				delete(k.pids, pid)
			}
		}
	}
	if len(k.pids) >= maxPIDs {
		k.many = true
		return true
	}
	k.pids[p.PID] = struct{}{}
	return true
}

// forget drops k, unless something newer is known by now.
func (w *workload) forget(id string, k *known) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known[id] == k {
		delete(w.known, id)
	}
}
