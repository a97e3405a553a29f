// Package workload is the k8s attestor in the agent.
//
// A process's container is found by its cgroup. The container runtime, asked by the container's ID over its
// own socket, says which pod and which image it is, and which process is its first, with whose cgroup the
// asking one's is compared. The API server tells of the node's pods before they start and of every change
// of their labels; where it cannot be asked, the kubelet is.
//
// Why it is so: the runtime knows a container before its first process runs, while the kubelet tells of it
// up to seconds later, which is what others wait for by asking again and again. What was once learned of a
// container cannot change, so a known container costs no call, whoever is away.
package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/cgroup"
	"github.com/assay-id/assay/attestor/k8s"
)

const (
	// maxContainers is how many containers are remembered.
	maxContainers = 4096
	// maxPIDs is how many processes of one container are remembered, to be named when it changes.
	maxPIDs = 256
	// untilTold is how long to wait before the kubelet is asked again for a container that has just started.
	untilTold = 300 * time.Millisecond
	// maxTries is how often a container is looked at anew for one process while it changes.
	maxTries = 3
)

// Kind returns the k8s attestor.
func Kind() attestor.WorkloadKind {
	return attestor.WorkloadKind{
		Type:   k8s.Type,
		Config: func() any { return new(k8s.Config) },
		Open:   open,
	}
}

type workload struct {
	log      logrus.FieldLogger
	now      func() time.Time
	node     string
	podsOnly bool
	runtime  *runtime // nil: it is not asked
	pods     *pods
	api      *rest // nil: it is not asked
	apiSeen  *health
	spaces   *spaces // nil: namespaces' labels are not asked for
	proc     string  // where procfs is, for what is learned before anybody asks
	// partial says that somebody got less than there is because who knows it was away.
	partial atomic.Bool

	// mu guards the two below and what is behind them. It is taken before that of pods.
	mu       sync.Mutex
	known    map[string]*known
	fetching map[string]*fetching
}

// known is what was learned of a container.
type known struct {
	container
	first cgroup.Place // of its first process; not set if the runtime does not tell
	// told says that the kubelet told of it, not the runtime.
	told bool
	// pids are the processes that were attested; many says that there were more than fit.
	pids map[int]struct{}
	many bool
	// of and space are what made is made from.
	of    *pod
	space *space
	made  []attestor.Selector
}

// fetching is a question under way. Whoever else wants to know waits for its end.
type fetching struct {
	done chan struct{}
	k    *known
	err  error
}

// open needs nobody to be there: runtime, kubelet and API server may start after the agent.
func open(config any, needs attestor.Needs) (attestor.Workload, error) {
	c, ok := config.(*k8s.Config)
	if !ok {
		return nil, fmt.Errorf("k8s configuration is a %T", config)
	}
	needs = needs.Filled()
	log, now := needs.Log, needs.Now
	asked, err := openRuntime(c, log, now)
	if err != nil {
		return nil, err
	}
	kubelet, err := openKubelet(c, log)
	if err != nil {
		return nil, err
	}
	api, err := openAPIServer(c)
	if err != nil {
		return nil, err
	}
	w := &workload{
		log: log, now: now, node: nodeName(c), podsOnly: c.DisableContainerSelectors, runtime: asked, api: api, proc: "/proc",
		known: map[string]*known{}, fetching: map[string]*fetching{},
	}
	switch {
	case api == nil && kubelet == nil:
		return nil, errors.New("nobody to ask about pods: there is no api_server (KUBERNETES_SERVICE_HOST is not set), and the kubelet is turned off")
	case api == nil && c.EnableNamespaceLabels:
		return nil, errors.New("enable_namespace_labels needs an api_server")
	case api != nil && w.node == "" && c.APIServer == "" && kubelet != nil && !c.EnableNamespaceLabels:
		log.Warnf("the node's name is not known, so changes of pods are learned from the kubelet, some seconds later: set node_name, or the variable %s from spec.nodeName",
			firstOf(c.NodeNameEnv, k8s.DefaultNodeNameEnv))
		w.api = nil
	case api != nil && w.node == "":
		return nil, fmt.Errorf("the API server is asked for this node's pods, and so must be told its name: set node_name, or the variable %s from spec.nodeName",
			firstOf(c.NodeNameEnv, k8s.DefaultNodeNameEnv))
	}
	kubeletSeen := &health{
		log: log, now: now, name: "kubelet", back: make(chan struct{}, 1),
		loss: "pods that neither it nor the API server has told of before get no k8s selectors but those that the runtime knows",
	}
	w.apiSeen = &health{
		log: log, now: now, name: "API server", back: make(chan struct{}, 1),
		loss: "changes of pods are learned from the kubelet, some seconds later",
	}
	w.pods = newPods(log, kubelet, kubeletSeen)
	if c.EnableNamespaceLabels {
		w.spaces = newSpaces(log)
	}
	return w, nil
}

// Attest returns what is proved about the process's pod and container, nothing if it is in none.
func (w *workload) Attest(ctx context.Context, p attestor.Process) ([]attestor.Selector, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	at, err := cgroup.Locate(p.Proc, p.PID, layout{})
	if err != nil {
		return nil, fmt.Errorf("find container of process: %w", err)
	}
	if at.ID == "" && at.Container != "" && w.runtime != nil { // only its mounts tell
		if at.ID, err = w.runtime.byName(ctx, at.Pod, at.Container); err != nil && !errors.Is(err, errNotKnown) {
			return nil, fmt.Errorf("ask runtime about container %s of pod %s: %w", at.Container, at.Pod, err)
		}
	}
	if at.ID == "" {
		return nil, nil
	}
	for range maxTries {
		k, err := w.learn(ctx, at, p.Proc)
		if errors.Is(err, errNotKnown) {
			w.log.WithFields(logrus.Fields{"pid": p.PID, "container": at.ID}).Debug("container is not one of Kubernetes")
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("ask about container %.12s: %w", at.ID, err)
		}
		if k.first.Own != nil && !at.Inside(k.first) || at.Pod != "" && at.Pod != k.podUID {
			return nil, fmt.Errorf("process is in a cgroup named after container %.12s, but not in that container's cgroup", at.ID)
		}
		pod, err := w.pods.find(ctx, k.podUID, k.fits)
		switch {
		case errors.Is(err, errNobody) && !k.told:
			w.partial.Store(true)
			pod = w.unknown(k)
		case err != nil:
			w.partial.Store(true)
			return nil, fmt.Errorf("find pod %s/%s: %w", k.podSpace, k.podName, err)
		}
		var sp *space
		if w.spaces != nil {
			if sp, err = w.spaces.find(ctx, k.podSpace); err != nil {
				w.log.WithError(err).WithField("namespace", k.podSpace).Debug("labels of namespace are not known")
				w.partial.Store(true)
			}
		}
		if made, ok := w.note(k, p, pod, sp); ok {
			return made, nil
		}
	}
	return nil, errors.New("what is known of the container keeps changing")
}

// fits reports whether a pod is the container's: its name must be the one that the runtime was given.
func (k *known) fits(p *pod) bool { return k.podSpace == p.namespace && k.podName == p.name }

// unknown stands for a pod of which only the runtime knows. Its labels were those of its start, and may
// have been taken away since, so they do not count.
func (w *workload) unknown(k *known) *pod {
	var list selectorList
	list.identity(k.podSpace, k.podName, k.podUID)
	list.add(k8s.Type, "node-name", w.node)
	return &pod{selectors: list}
}

// learn returns what is known of a container, asking if nothing is. One caller asks for a container at a
// time; the others take what it learns, or its error.
func (w *workload) learn(ctx context.Context, at cgroup.Place, proc string) (*known, error) {
	for {
		w.mu.Lock()
		if k := w.known[at.ID]; k != nil {
			w.mu.Unlock()
			return k, nil
		}
		other := w.fetching[at.ID]
		if other == nil {
			mine := &fetching{done: make(chan struct{})}
			w.fetching[at.ID] = mine
			w.mu.Unlock()
			mine.k, mine.err = w.fetch(ctx, at, proc)
			w.mu.Lock()
			delete(w.fetching, at.ID)
			if mine.err == nil {
				w.remember(mine.k)
			}
			w.mu.Unlock()
			close(mine.done)
			return mine.k, mine.err
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

// fetch asks the runtime about a container, and the kubelet if the runtime does not answer.
func (w *workload) fetch(ctx context.Context, at cgroup.Place, proc string) (*known, error) {
	k := &known{pids: map[int]struct{}{}}
	err := errAway
	if w.runtime != nil {
		var c *container
		if c, err = w.runtime.container(ctx, at.ID); err == nil {
			k.container = *c
			if c.pid <= 0 {
				if at.Pod == "" {
					return nil, errors.New("runtime does not tell the container's first process, and the cgroup does not name its pod")
				}
				return k, nil
			}
			k.first, err = cgroup.Locate(proc, c.pid, layout{})
			if errors.Is(err, os.ErrNotExist) {
				return nil, errors.New("container's first process is not to be seen: it has ended, or the agent's pod lacks hostPID: true")
			}
			if err != nil {
				return nil, fmt.Errorf("find cgroup of container's first process: %w", err)
			}
			return k, nil
		}
		if !w.runtime.health.isAway() {
			return nil, err
		}
	}
	w.partial.Store(true)
	if at.Pod == "" {
		return nil, err
	}
	return w.ofKubelet(ctx, k, at)
}

// ofKubelet finds a container in what the kubelet tells of its pod, which for one that has just started may
// take a second or two.
func (w *workload) ofKubelet(ctx context.Context, k *known, at cgroup.Place) (*known, error) {
	told := func(p *pod) bool { _, ok := p.containers[at.ID]; return ok }
	p, err := w.pods.find(ctx, at.Pod, told)
	for errors.Is(err, errNoPod) && ctx.Err() == nil {
		if err := w.pods.pause(ctx, untilTold); err != nil {
			return nil, fmt.Errorf("find container in its pod: %w", errNoPod)
		}
		p, err = w.pods.find(ctx, at.Pod, told)
	}
	if err != nil {
		return nil, fmt.Errorf("find container in its pod: %w", err)
	}
	s := p.containers[at.ID]
	k.told = true
	k.container = container{id: at.ID, name: s.Name, podUID: at.Pod, podName: p.name, podSpace: p.namespace, reference: s.Image}
	if s.ImageID != "" {
		k.digests = []string{s.ImageID}
	}
	return k, nil
}

// remember keeps what was learned. The caller holds mu.
func (w *workload) remember(k *known) {
	for old := range w.known {
		if len(w.known) < maxContainers {
			break
		}
		delete(w.known, old) // any will do: it costs one more question
	}
	w.known[k.id] = k
}

// note remembers that a process was attested, so that it can be named when something happens to its pod,
// and returns its selectors. It reports false if something has happened since, and everybody known by then
// was woken.
func (w *workload) note(k *known, p attestor.Process, of *pod, sp *space) ([]attestor.Selector, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known[k.id] != k {
		return nil, false
	}
	if _, ok := k.pids[p.PID]; !ok {
		if len(k.pids) >= maxPIDs {
			for pid := range k.pids {
				if _, err := os.Lstat(filepath.Join(p.Proc, strconv.Itoa(pid))); errors.Is(err, os.ErrNotExist) {
					delete(k.pids, pid)
				}
			}
		}
		if len(k.pids) >= maxPIDs {
			k.many = true
		} else {
			k.pids[p.PID] = struct{}{}
		}
	}
	// The pod may have changed after it was found and before the process was noted.
	if of.uid != "" && w.pods.get(k.podUID) != of {
		return nil, false
	}
	if k.reference == "" {
		// The pod may be given another image later; this container was started with the one before.
		k.reference = of.images[k.name]
	}
	if k.of != of || k.space != sp || k.made == nil {
		k.of, k.space, k.made = of, sp, w.describe(k, of, sp)
	}
	return slices.Clone(k.made), true
}

// describe returns all selectors of a container.
func (w *workload) describe(k *known, of *pod, sp *space) []attestor.Selector {
	list := selectorList(slices.Clone(of.selectors))
	if k.podUID != of.uid && of.uid != "" { // a static pod: the kubelet's UID is the one that counts
		list = slices.DeleteFunc(list, func(s attestor.Selector) bool { return s.Value == "pod-uid:"+of.uid })
		list.add(k8s.Type, "pod-uid", k.podUID)
	}
	if sp != nil {
		for key, value := range sp.labels {
			list.add(k8s.Type, "ns-label", key, value)
		}
	}
	if w.podsOnly {
		return attestor.NewSet(list...).All()
	}
	list.add(k8s.Type, "container-name", k.name)
	list.images("container-image", k.reference)
	list.images("container-image", k.digests...)
	if k.imageID != "" {
		list.add(k8s.Type, "container-image", k.imageID)
		list.add(k8s.ImageType, "id", k.imageID)
	}
	list.add(k8s.ImageType, "platform", k.platform)
	for key, value := range k.imageLabels {
		list.add(k8s.ClaimType, "image", key, value)
	}
	return attestor.NewSet(list...).All()
}
