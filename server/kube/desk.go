package kube

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// item is something to look at again.
type item struct {
	kind string // one of the following
	// name is namespace/name of a pod, the name of a static resource, or for orphan the ID of an entry.
	name string
}

const (
	podItem        = "pod"
	staticItem     = "static"
	federationItem = "federation"
	orphanItem     = "orphan"
)

// desk is the work of one term as the cluster's registrar.
type desk struct {
	*Registrar
	sees  *sight
	queue workqueue.TypedRateLimitingInterface[item]
	// reports are the names of reports that are to be taken in.
	reports workqueue.TypedRateLimitingInterface[string]
	// told wakes the writer of statuses.
	told chan struct{}

	// mu guards the following. Only the worker writes have and holders; event handlers write rules.
	mu    sync.Mutex
	rules []*rule // in the order in which they count
	// have are the entries of this cluster as they are stored, by ID.
	have map[string]*types.Entry
	// holders are what the entries are for, by item.
	holders map[item]*holder
	// due are the resources whose status may have changed: a rule's name, or a static item.
	due map[item]bool
}

// holder is a pod or a static resource, with what became of its entries.
type holder struct {
	ids      map[string]bool
	outcomes map[string]*outcome // by the name of the rule; a static resource's own is ""
}

// outcome is what became of one rule for one pod.
type outcome struct {
	id     string // of the entry; empty if there is none to be
	broken error  // it could not be rendered
	masked bool   // a rule before this one, or somebody else, has a similar entry
	failed error  // it could not be written
}

// The rate at which what failed is tried again.
const (
	retryFirst = 200 * time.Millisecond
	retryMost  = time.Minute
	// masked entries are looked at again this much later: somebody may have deleted the other.
	maskedAgain = time.Minute
)

func newDesk(r *Registrar) *desk {
	d := &desk{
		Registrar: r, told: make(chan struct{}, 1),
		queue:   workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[item](retryFirst, retryMost)),
		reports: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryMost)),
		have:    map[string]*types.Entry{}, holders: map[item]*holder{}, due: map[item]bool{},
	}
	d.sees = newSight(d)
	return d
}

// run works until ctx ends.
func (d *desk) run(ctx context.Context) {
	if !d.sees.open(ctx) {
		return
	}
	defer d.sees.close()
	d.m.sight.Set(1)
	defer d.m.sight.Set(0)
	for ctx.Err() == nil && !d.take(ctx) {
		// The server is this process, so this is rare: a full disk, say.
		select {
		case <-time.After(5 * time.Second):
		case <-ctx.Done():
		}
	}
	var owned sync.WaitGroup
	owned.Go(func() { d.writeStatuses(ctx) })
	owned.Go(func() { d.resync(ctx) })
	owned.Go(func() { d.publish(ctx) })
	owned.Go(func() { d.takeReports(ctx) })
	owned.Go(func() { d.makeEvents(ctx) })
	stop := context.AfterFunc(ctx, func() {
		d.queue.ShutDown()
		d.reports.ShutDown()
	})
	defer stop()
	d.work(ctx)
	owned.Wait()
}

// take learns what entries there are and puts everything on the queue. It reports whether that worked.
func (d *desk) take(ctx context.Context) bool {
	stored, err := d.listEntries(ctx)
	if err != nil {
		d.log.WithError(err).Warn("entries could not be listed; trying again")
		return false
	}
	holders := d.sees.holders()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.have = stored
	claimed := map[string]bool{}
	for _, h := range d.holders {
		for id := range h.ids {
			if stored[id] == nil {
				delete(h.ids, id)
			}
			claimed[id] = true
		}
	}
	for id := range stored {
		if claimed[id] {
			continue
		}
		key, known := holders[d.cfg.keyOf(id)]
		if !known {
			d.queue.Add(item{orphanItem, id})
			continue
		}
		h := d.holders[key]
		if h == nil {
			h = &holder{ids: map[string]bool{}}
			d.holders[key] = h
		}
		h.ids[id] = true
	}
	for _, key := range holders {
		d.queue.Add(key)
	}
	d.queue.Add(item{kind: federationItem})
	return true
}

// keyOf is the part of an entry's ID that says what it is for: a pod's UID, or a static resource's hash.
func (c *Config) keyOf(id string) string {
	rest := strings.TrimPrefix(id, c.prefix())
	if strings.HasPrefix(rest, "static.") {
		return rest
	}
	_, uid, _ := strings.Cut(rest, ".")
	return uid
}

// resync compares everything now and then, in case somebody changed an entry by hand.
func (d *desk) resync(ctx context.Context) {
	tick := time.NewTicker(d.cfg.Resync)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.take(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// maxBatch is how many items are worked on at a time: their entries share writes to the disk.
const maxBatch = 200

func (d *desk) work(ctx context.Context) {
	for {
		first, down := d.queue.Get()
		if down {
			return
		}
		batch := []item{first}
		for len(batch) < maxBatch && d.queue.Len() > 0 {
			next, down := d.queue.Get()
			if down {
				break
			}
			batch = append(batch, next)
		}
		d.reconcile(ctx, batch)
		for _, it := range batch {
			d.queue.Done(it)
		}
	}
}

// reconcile brings what is stored for the items to what should be.
func (d *desk) reconcile(ctx context.Context, batch []item) {
	started := time.Now()
	todo := newDifference(d)
	d.mu.Lock()
	for _, it := range batch {
		switch it.kind {
		case podItem:
			d.planPod(it, todo)
		case staticItem:
			d.planStatic(it, todo)
		case orphanItem:
			todo.remove(it, it.name)
		}
	}
	d.mu.Unlock()
	todo.write(ctx)
	for _, it := range batch {
		if it.kind == federationItem {
			todo.note(it, d.federate(ctx))
		}
	}
	for _, it := range batch {
		switch todo.again[it] {
		case retry:
			d.queue.AddRateLimited(it)
		case later:
			d.queue.Forget(it)
			d.queue.AddAfter(it, maskedAgain)
		default:
			d.queue.Forget(it)
		}
	}
	d.wakeStatuses()
	d.m.rounds.Observe(time.Since(started).Seconds())
}

// planPod works out what a pod should have. d.mu is held.
func (d *desk) planPod(it item, todo *difference) {
	want := map[string]*types.Entry{}
	outcomes := map[string]*outcome{}
	pod := d.sees.pod(it.name)
	if pod != nil && !d.cfg.ignored(pod.Namespace) && pod.Spec.NodeName != "" && !ended(pod) {
		d.planLiving(pod, want, outcomes)
	}
	d.settle(it, want, outcomes, todo)
}

// ended reports whether nothing of a pod will run any more. A pod that is being deleted still runs.
func ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

func (d *desk) planLiving(pod *corev1.Pod, want map[string]*types.Entry, outcomes map[string]*outcome) {
	node := d.sees.node(pod.Spec.NodeName)
	namespace := d.sees.namespace(pod.Namespace)
	if node == nil || namespace == nil {
		return // there will be an event when it is known
	}
	similar := map[string]bool{}
	applied := false // a rule that is no fallback did
	for _, r := range d.rules {
		if r.broken != nil || !r.namespaces.Matches(labelsOf(namespace)) || !r.pods.Matches(labelsOf(pod)) || r.spec.Fallback && applied {
			continue
		}
		o := &outcome{}
		outcomes[r.name] = o
		var services []string
		if r.spec.AutoPopulateDNSNames {
			services = d.sees.services(pod)
		}
		e, err := d.cfg.entryFor(r, pod, node, services)
		if err != nil {
			o.broken = err
			continue
		}
		applied = applied || !r.spec.Fallback
		if key := similarity(e); similar[key] {
			o.masked = true
		} else {
			similar[key] = true
			o.id, want[e.GetId()] = e.GetId(), e
		}
	}
}

// similarity is what no two entries may have in common.
func similarity(e *types.Entry) string {
	var b strings.Builder
	b.WriteString(e.GetSpiffeId().GetPath() + "\x00" + e.GetParentId().GetPath())
	for _, s := range e.GetSelectors() {
		b.WriteString("\x00" + s.GetType() + ":" + s.GetValue())
	}
	return b.String()
}

// planStatic works out what a ClusterStaticEntry should have. d.mu is held.
func (d *desk) planStatic(it item, todo *difference) {
	want := map[string]*types.Entry{}
	outcomes := map[string]*outcome{}
	if u := d.sees.static(it.name); u != nil {
		var spec staticSpec
		var e *types.Entry
		err := readSpec(u, &spec)
		if err == nil {
			e, err = d.cfg.staticEntry(it.name, &spec)
		}
		// A resource of another class is another registrar's to complain about.
		if d.cfg.classed(spec.ClassName) {
			o := &outcome{broken: err}
			if err == nil {
				o.id, want[e.GetId()] = e.GetId(), e
			}
			outcomes[""] = o
		}
	}
	d.settle(it, want, outcomes, todo)
}

// settle notes what an item should have, and what is to be done about it. d.mu is held.
func (d *desk) settle(it item, want map[string]*types.Entry, outcomes map[string]*outcome, todo *difference) {
	before := d.holders[it]
	if before == nil {
		before = &holder{}
	}
	now := &holder{ids: map[string]bool{}, outcomes: outcomes}
	for id := range before.ids {
		if want[id] == nil {
			now.ids[id] = true // until it is deleted
			todo.remove(it, id)
		}
	}
	for id, e := range want {
		now.ids[id] = true
		todo.put(it, e)
	}
	d.dueStatuses(it, before.outcomes, outcomes)
	if len(now.ids) == 0 && len(outcomes) == 0 {
		delete(d.holders, it)
		return
	}
	d.holders[it] = now
}

// setRule puts a rule in force, or takes it away if r is nil.
func (d *desk) setRule(name string, r *rule) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rules = slices.DeleteFunc(d.rules, func(o *rule) bool { return o.name == name })
	if r != nil {
		d.rules = append(d.rules, r)
		slices.SortFunc(d.rules, before)
		d.due[item{ruleItem, name}] = true
		if r.broken != nil {
			d.log.WithFields(logrus.Fields{"resource": "ClusterSPIFFEID/" + name, "err": r.broken}).Warn("the resource cannot be used; its pods get no entries of it")
		}
	}
	d.m.rules.Set(float64(len(d.rules)))
}

// look puts pods on the queue.
func (d *desk) look(pods ...*corev1.Pod) {
	for _, pod := range pods {
		d.queue.Add(podKey(pod))
	}
}

func podKey(pod *corev1.Pod) item {
	return item{podItem, cache.ObjectName{Namespace: pod.Namespace, Name: pod.Name}.String()}
}
