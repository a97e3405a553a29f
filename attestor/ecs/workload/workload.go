// Package workload is the ecs attestor in the agent: a process is in a container by its cgroup, and the
// container is of a task because ECS says so, not because the container's labels do.
//
// On a container instance it is the host's ECS agent that is asked. It answers at a port that any user could
// listen at while it is away, so it is looked up whose the listening socket is. In Fargate there is no host to
// ask; the agent is a container of the task itself, and asks the task's metadata service about its neighbors.
//
// Why it is so: the labels that the ECS agent gives its containers are there for anybody to give who may start
// containers. The cgroups of containers, in contrast, are made by root at places where no other user can make
// one, and only there they are looked for: a user's own cgroup of the same name is below that user's slice.
//
// What ECS says of a container does not change while it exists, so it is remembered.
package workload

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/cgroup"
	"github.com/assay-id/assay/attestor/ecs"
)

const (
	// maxContainers is how many containers are remembered, and maxMissed how many processes that are to be
	// attested again.
	maxContainers, maxMissed = 4096, 4096
	// defaultTimeout is how long one answer may take.
	defaultTimeout = 2 * time.Second
	// missedPause is how soon a process is attested again whose container was not known yet, and missedTime how
	// long that goes on: the ECS agent may learn of a container a moment after the container has started.
	missedPause, missedTime = 2 * time.Second, time.Minute
)

// Kind returns the ecs attestor.
func Kind() attestor.WorkloadKind {
	return attestor.WorkloadKind{Type: ecs.Type, Config: func() any { return new(ecs.WorkloadConfig) }, Open: open}
}

type workload struct {
	log     logrus.FieldLogger
	now     func() time.Time
	layout  layout
	source  string // the address to ask
	timeout time.Duration
	sidecar bool
	// listener says what is wrong with whoever listens at the address; nil where nobody else could.
	listener func() error

	mu     sync.Mutex // guards the two below
	known  map[string][]attestor.Selector
	missed map[int]missed
}

// missed is a process that was not attested, though it may be one day.
type missed struct {
	since time.Time
	proc  string
}

func open(config any, needs attestor.Needs) (attestor.Workload, error) {
	c, ok := config.(*ecs.WorkloadConfig)
	if !ok {
		return nil, fmt.Errorf("ecs configuration is a %T", config)
	}
	needs = needs.Filled()
	w := &workload{
		log: needs.Log, now: needs.Now, timeout: defaultTimeout, sidecar: c.Sidecar, layout: layout{sidecar: c.Sidecar},
		known: map[string][]attestor.Selector{}, missed: map[int]missed{},
	}
	if c.Timeout != "" {
		timeout, err := time.ParseDuration(c.Timeout)
		if err != nil || timeout <= 0 {
			return nil, fmt.Errorf("timeout: %q is no length of time, as 2s is", c.Timeout)
		}
		w.timeout = timeout
	}
	key := "introspection_endpoint"
	switch {
	case c.Sidecar && c.IntrospectionEndpoint != "":
		return nil, errors.New("introspection_endpoint is the ECS agent's of a host, which a sidecar does not ask")
	case c.Sidecar:
		key, w.source = "metadata_uri", c.MetadataURI
		if w.source == "" {
			key, w.source = "ECS_CONTAINER_METADATA_URI_V4", awsapi.TaskMetadataURI()
		}
		if w.source == "" {
			return nil, errors.New("sidecar: this is no container of an ECS task: ECS_CONTAINER_METADATA_URI_V4 is not set")
		}
	case c.MetadataURI != "":
		return nil, errors.New("metadata_uri is for a sidecar: set sidecar too, or remove it")
	default:
		if w.source = c.IntrospectionEndpoint; w.source == "" {
			w.source = ecs.DefaultIntrospection
		}
		u, err := url.Parse(w.source)
		if err != nil || strings.Trim(u.Path, "/") != "" || u.Port() == "" || !strings.HasPrefix(u.Hostname(), "127.") {
			return nil, fmt.Errorf("introspection_endpoint: %q is no address like %s; whose socket it is can be seen of this host's alone", w.source, ecs.DefaultIntrospection)
		}
		w.listener = func() error { return checkListener("/proc/self/net", u.Port(), uint32(os.Geteuid())) } //nolint:gosec // a user ID fits
	}
	if err := awsapi.CheckLocal(key, w.source); err != nil {
		return nil, err
	}
	w.source = strings.TrimSuffix(w.source, "/")
	return w, nil
}

// Attest returns what ECS says of the process's container, nothing if it is in none of ECS's.
func (w *workload) Attest(ctx context.Context, p attestor.Process) ([]attestor.Selector, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	at, err := cgroup.Locate(p.Proc, p.PID, w.layout)
	if err != nil {
		return nil, fmt.Errorf("find container of process: %w", err)
	}
	if at.ID == "" || at.Prefix == "" { // mounts, which anybody can make in a namespace of his own, say nothing here
		return nil, nil
	}
	w.mu.Lock()
	known := w.known[at.ID]
	w.mu.Unlock()
	if known != nil {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	found, err := w.ask(ctx, at)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil || found == nil {
		w.miss(p)
		return nil, err
	}
	delete(w.missed, p.PID)
	if len(w.known) >= maxContainers {
		clear(w.known) // it costs one more question each
	}
	w.known[at.ID] = found
	return found, nil
}

// miss remembers a process to be attested again. The caller holds mu.
func (w *workload) miss(p attestor.Process) {
	if _, ok := w.missed[p.PID]; !ok && len(w.missed) < maxMissed {
		w.missed[p.PID] = missed{w.now(), p.Proc}
	}
}

// Watch has processes attested again whose container was not known, or that could not be asked about.
func (w *workload) Watch(ctx context.Context, changed func(pids ...int)) error {
	tick := time.NewTicker(missedPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if again := w.again(); len(again) > 0 {
				changed(again...)
			}
		}
	}
}

// again are the processes that are to be attested again, without those that ended or were tried long enough.
func (w *workload) again() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	var pids []int
	for pid, m := range w.missed {
		_, err := os.Lstat(filepath.Join(m.proc, strconv.Itoa(pid)))
		if err != nil || w.now().Sub(m.since) > missedTime {
			delete(w.missed, pid)
			continue
		}
		pids = append(pids, pid)
	}
	return pids
}

// ask asks ECS about a container; no selectors and no error is that it is none of ECS's.
func (w *workload) ask(ctx context.Context, at cgroup.Place) ([]attestor.Selector, error) {
	var said ecs.Metadata
	var err error
	if w.sidecar {
		err = awsapi.Local(ctx, "the task metadata service", w.source+"/task", &said)
	} else {
		said, err = w.introspect(ctx, at.ID)
	}
	if errors.Is(err, awsapi.ErrNotThere) && at.Pod == "" {
		return nil, nil // an engine's container, but not one of a task's
	}
	if err != nil {
		return nil, fmt.Errorf("ask ECS about container %.12s: %w", at.ID, err)
	}
	task, err := ecs.ParseTask(said.TaskARN)
	if err != nil {
		return nil, fmt.Errorf("read what ECS says of container %.12s: %w", at.ID, err)
	}
	if task.Cluster == "" {
		task.Cluster = ecs.LastPart(said.Cluster)
	}
	if at.Pod != "" && at.Pod != task.ID {
		return nil, fmt.Errorf("container %.12s is in the cgroup of a task, and ECS says that it is of another", at.ID)
	}
	var is *ecs.Container
	for i, c := range said.Containers {
		if c.DockerID != at.ID {
			continue
		}
		if is != nil {
			return nil, fmt.Errorf("ECS names container %.12s twice", at.ID)
		}
		is = &said.Containers[i]
	}
	if is == nil {
		if w.sidecar {
			return nil, nil // started a moment ago, or not by ECS
		}
		return nil, fmt.Errorf("ECS answers about another container than %.12s", at.ID)
	}
	return describe(said, task, *is)
}

// introspect asks the host's ECS agent. Whoever it is that answers must be root, before and after.
func (w *workload) introspect(ctx context.Context, id string) (ecs.Metadata, error) {
	if err := w.listener(); err != nil {
		return ecs.Metadata{}, err
	}
	var said struct {
		ARN        string          `json:"Arn"`
		Family     string          `json:"Family"`
		Version    string          `json:"Version"`
		Containers []ecs.Container `json:"Containers"`
	}
	if err := awsapi.Local(ctx, "the ECS agent", w.source+"/v1/tasks?dockerid="+url.QueryEscape(id), &said); err != nil {
		return ecs.Metadata{}, err
	}
	m := ecs.Metadata{TaskARN: said.ARN, Family: said.Family, Revision: said.Version, Containers: said.Containers}
	if task, err := ecs.ParseTask(said.ARN); err == nil && task.Cluster == "" {
		var host struct {
			Cluster string `json:"Cluster"`
		}
		if err := awsapi.Local(ctx, "the ECS agent", w.source+"/v1/metadata", &host); err != nil {
			return ecs.Metadata{}, err
		}
		m.Cluster = host.Cluster
	}
	return m, w.listener()
}

// describe makes the selectors. A part that is missing or cannot be one makes none.
func describe(said ecs.Metadata, task ecs.Task, is ecs.Container) ([]attestor.Selector, error) {
	var found []attestor.Selector
	for _, part := range []struct{ key, value string }{
		{"account_id", task.Account}, {"region", task.Region}, {"cluster", task.Cluster}, {"task-arn", task.ARN},
		{"family", said.Family}, {"revision", said.Revision}, {"container", is.Name},
		{"service", said.ServiceName}, {"launch-type", said.LaunchType}, {"image-id", is.ImageID},
	} {
		s := attestor.Selector{Type: ecs.Type, Value: part.key + ":" + part.value}
		if part.value != "" && s.Check() == nil {
			found = append(found, s)
		}
	}
	return attestor.NewSet(found...).All(), nil
}
