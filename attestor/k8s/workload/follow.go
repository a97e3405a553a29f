package workload

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/url"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/assay-id/assay/attestor/cgroup"
)

const (
	// probeEvery is how often who did not answer is tried.
	probeEvery = time.Second
	// pollEvery is how often the kubelet is asked for changes while the API server tells none.
	pollEvery = 5 * time.Second
)

// Watch follows the runtime's events and the API server's pods. It names the processes of a pod whose
// selectors changed, and everybody when who was away is back: who asked meanwhile got less than there is.
// It returns nil when ctx ends.
func (w *workload) Watch(ctx context.Context, changed func(pids ...int)) error {
	w.pods.mu.Lock()
	w.pods.changed = func(uids ...string) { w.podsChanged(changed, uids) }
	w.pods.mu.Unlock()
	if w.spaces != nil {
		w.spaces.mu.Lock()
		w.spaces.changed = func(name string) {
			w.pods.stir()
			w.wake(changed, func(k *known) bool { return k.podSpace == name })
		}
		w.spaces.mu.Unlock()
	}
	var group errgroup.Group
	if w.runtime != nil {
		group.Go(func() error { w.followRuntime(ctx, changed); return nil })
		group.Go(func() error { w.warm(ctx); return nil })
	}
	if w.api != nil {
		group.Go(func() error {
			pods := &table{api: w.api, path: "/api/v1/pods", query: url.Values{"fieldSelector": {"spec.nodeName=" + w.node}}}
			pods.keep(ctx, keeper{replace: w.pods.replace, event: w.pods.event, live: w.pods.setLive}, w.apiSeen.observe)
			return nil
		})
	}
	if w.spaces != nil {
		group.Go(func() error {
			spaces := &table{api: w.api, path: "/api/v1/namespaces", metadata: true}
			spaces.keep(ctx, keeper{replace: w.spaces.replace, event: w.spaces.event, live: func(bool) {}}, w.apiSeen.observe)
			return nil
		})
	}
	group.Go(func() error { w.mend(ctx, changed); return nil })
	return group.Wait()
}

// warm learns of the containers that run as the agent starts, one after the other. All of them come at once where
// an agent takes the place of another, and would wait for a runtime that answers them in turn.
func (w *workload) warm(ctx context.Context) {
	running, err := w.runtime.running(ctx)
	if err != nil {
		return // they are asked about as they come
	}
	for _, c := range running {
		at := cgroup.Place{Name: cgroup.Name{ID: c.GetId(), Pod: c.GetLabels()[labelPodUID]}}
		if ctx.Err() != nil || w.runtime.health.isAway() {
			return
		}
		// Nobody has asked: what is not clear is left to who does, with the process that asks.
		w.mu.Lock()
		known := w.known[at.ID] != nil || w.fetching[at.ID] != nil || len(w.known) >= maxContainers
		w.mu.Unlock()
		if known || at.Pod == "" {
			continue
		}
		if k, err := w.fetch(ctx, at, w.proc); err == nil && !k.told && k.first.ID == at.ID {
			w.mu.Lock()
			if w.known[at.ID] == nil {
				w.remember(k)
			}
			w.mu.Unlock()
		}
	}
}

// podsChanged names the processes of pods.
func (w *workload) podsChanged(changed func(...int), uids []string) {
	w.again(changed) // who asked for a pod that nobody knew
	wake := w.toWake(changed, func(k *known) bool { return slices.Contains(uids, k.podUID) })
	defer wake()
	// Of a pod that is gone nothing need be remembered; its containers have new IDs if it comes again.
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, k := range w.known {
		if slices.Contains(uids, k.podUID) && w.pods.get(k.podUID) == nil {
			delete(w.known, id)
		}
	}
}

// wake names the processes of containers.
func (w *workload) wake(changed func(...int), of func(*known) bool) { w.toWake(changed, of)() }

// toWake is wake later: of the containers as they are known now.
func (w *workload) toWake(changed func(...int), of func(*known) bool) (wake func()) {
	var pids []int
	many := false
	w.mu.Lock()
	for _, k := range w.known {
		if !of(k) {
			continue
		}
		many = many || k.many
		for pid := range k.pids {
			pids = append(pids, pid)
		}
	}
	w.mu.Unlock()
	return func() {
		switch {
		case many:
			changed()
		case len(pids) > 0:
			slices.Sort(pids)
			changed(slices.Compact(pids)...)
		}
	}
}

// mend asks again who did not answer, and tells everybody when they do.
func (w *workload) mend(ctx context.Context, changed func(...int)) {
	probe, poll := time.NewTicker(probeEvery), time.NewTicker(pollEvery)
	defer probe.Stop()
	defer poll.Stop()
	var runtimeBack chan struct{}
	if w.runtime != nil {
		runtimeBack = w.runtime.health.back
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-probe.C:
			if w.runtime != nil && w.runtime.health.isAway() {
				_ = w.runtime.probe(ctx) // what it finds comes through back
			}
			if w.pods.kubelet != nil && w.pods.health.isAway() && w.partial.Load() {
				_ = w.pods.ask(ctx) // likewise
			}
		case <-poll.C:
			w.mu.Lock()
			idle := len(w.known) == 0
			w.mu.Unlock()
			if !idle && w.pods.kubelet != nil && !w.pods.isLive() {
				_ = w.pods.ask(ctx) // its end is observed
			}
		case <-runtimeBack:
			w.forgetTold(changed)
			w.again(changed)
		case <-w.pods.health.back:
			w.again(changed)
		case <-w.apiSeen.back:
			w.again(changed)
		}
	}
}

// again tells everybody if somebody got less than there is.
func (w *workload) again(changed func(...int)) {
	if w.partial.Swap(false) {
		changed()
	}
}

// forgetTold drops what the kubelet told of containers in the runtime's place.
func (w *workload) forgetTold(changed func(...int)) {
	wake := w.toWake(changed, func(k *known) bool { return k.told })
	defer wake()
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, k := range w.known {
		if k.told {
			delete(w.known, id)
		}
	}
}

// followRuntime drops what is known of containers that ended.
func (w *workload) followRuntime(ctx context.Context, changed func(...int)) {
	pause := firstPause
	for ctx.Err() == nil {
		err := w.runtime.follow(ctx, func(id string, kind cri.ContainerEventType) {
			pause = firstPause
			if kind != cri.ContainerEventType_CONTAINER_STOPPED_EVENT && kind != cri.ContainerEventType_CONTAINER_DELETED_EVENT {
				return
			}
			wake := w.toWake(changed, func(k *known) bool { return k.id == id })
			w.mu.Lock()
			delete(w.known, id)
			w.mu.Unlock()
			wake()
		})
		if ctx.Err() != nil {
			return
		}
		if status.Code(err) == codes.Unimplemented {
			w.log.WithError(err).Debug("container runtime tells no events; containers are forgotten with their pods")
			pause = time.Minute // it may be replaced by a newer one
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, max(maxPause, pause))
	}
}

// spaces are the namespaces' labels.
type spaces struct {
	log interface{ Warn(args ...any) }
	// changed is told of each namespace whose labels changed.
	changed func(name string)

	mu     sync.Mutex // guards the two below
	byName map[string]*space
	moved  chan struct{}
}

type space struct{ labels map[string]string }

type wireSpace struct {
	Metadata struct {
		Name   string
		Labels map[string]string
	}
}

func newSpaces(log interface{ Warn(args ...any) }) *spaces {
	return &spaces{log: log, changed: func(string) {}, byName: map[string]*space{}, moved: make(chan struct{})}
}

// find waits until a namespace is known: pods are not made before their namespace.
func (s *spaces) find(ctx context.Context, name string) (*space, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	for {
		s.mu.Lock()
		found, moved := s.byName[name], s.moved
		s.mu.Unlock()
		if found != nil {
			return found, nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return nil, errors.New("the API server has not told of it")
		}
	}
}

func (s *spaces) replace() (func(json.RawMessage) error, func()) {
	fresh := map[string]*space{}
	item := func(object json.RawMessage) error {
		var n wireSpace
		if err := json.Unmarshal(object, &n); err != nil {
			return err
		}
		fresh[n.Metadata.Name] = &space{n.Metadata.Labels}
		return nil
	}
	return item, func() {
		s.mu.Lock()
		var names []string
		for name, n := range s.byName {
			if now := fresh[name]; now == nil || !maps.Equal(n.labels, now.labels) {
				names = append(names, name)
			} else {
				fresh[name] = n
			}
		}
		s.byName = fresh
		s.tell(names...)
	}
}

func (s *spaces) event(kind string, object json.RawMessage) error {
	var n wireSpace
	if err := json.Unmarshal(object, &n); err != nil {
		return err
	}
	name := n.Metadata.Name
	s.mu.Lock()
	before := s.byName[name]
	if kind == "DELETED" {
		delete(s.byName, name)
	} else if before != nil && maps.Equal(before.labels, n.Metadata.Labels) {
		s.mu.Unlock()
		return nil
	} else {
		s.byName[name] = &space{n.Metadata.Labels}
	}
	s.tell(name)
	return nil
}

// tell wakes who waits and unlocks mu.
func (s *spaces) tell(names ...string) {
	close(s.moved)
	s.moved = make(chan struct{})
	tell := s.changed
	s.mu.Unlock()
	for _, name := range names {
		tell(name)
	}
}
