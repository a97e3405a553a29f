package kube

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// sight is what is seen of the cluster: informers, and what puts their news on the desk's queue.
type sight struct {
	desk    *desk
	typed   informers.SharedInformerFactory
	untyped dynamicinformer.DynamicSharedInformerFactory

	pods, nodes, namespaces, slices  cache.SharedIndexInformer
	rules, statics, trusts, findings cache.SharedIndexInformer

	// spaces has a token when the namespaces are not what they were.
	spaces chan struct{}

	// mu guards complained, when each informer's trouble was last told.
	mu         sync.Mutex
	complained map[string]time.Time
}

// The indexes.
const (
	byNode = "node"
	byPod  = "pod"
)

func newSight(d *desk) *sight {
	s := &sight{
		desk:    d,
		typed:   informers.NewSharedInformerFactoryWithOptions(d.cluster.Core, 0, informers.WithTransform(slim)),
		untyped: dynamicinformer.NewDynamicSharedInformerFactory(d.cluster.Dynamic, 0),
		spaces:  make(chan struct{}, 1), complained: map[string]time.Time{},
	}
	s.pods, s.nodes = s.typed.Core().V1().Pods().Informer(), s.typed.Core().V1().Nodes().Informer()
	s.namespaces, s.slices = s.typed.Core().V1().Namespaces().Informer(), s.typed.Discovery().V1().EndpointSlices().Informer()
	s.rules, s.statics = s.untyped.ForResource(spiffeIDs).Informer(), s.untyped.ForResource(staticEntries).Informer()
	s.trusts = s.untyped.ForResource(federations).Informer()
	if d.cfg.ReportSource != "" {
		s.findings = s.untyped.ForResource(vulnerabilities).Informer()
	}
	return s
}

// slim drops what nothing here looks at: it is most of what a pod or a node weighs.
func slim(object any) (any, error) {
	switch o := object.(type) {
	case *corev1.Pod:
		o.ManagedFields = nil
		o.Status = corev1.PodStatus{
			Phase: o.Status.Phase, ContainerStatuses: images(o.Status.ContainerStatuses),
			InitContainerStatuses:      images(running(o.Status.InitContainerStatuses)), // sidecars are among them
			EphemeralContainerStatuses: images(running(o.Status.EphemeralContainerStatuses)),
		}
	case *corev1.Node:
		o.ManagedFields, o.Status = nil, corev1.NodeStatus{}
	case *corev1.Namespace:
		o.ManagedFields = nil
	case *discoveryv1.EndpointSlice:
		o.ManagedFields, o.Ports = nil, nil
		for i := range o.Endpoints {
			o.Endpoints[i] = discoveryv1.Endpoint{TargetRef: o.Endpoints[i].TargetRef}
		}
	}
	return object, nil
}

// running leaves out what has ended, and of these kinds is not started again.
func running(all []corev1.ContainerStatus) []corev1.ContainerStatus {
	return slices.DeleteFunc(all, func(s corev1.ContainerStatus) bool { return s.State.Terminated != nil })
}

// images keeps of the containers' statuses which image each runs.
func images(all []corev1.ContainerStatus) []corev1.ContainerStatus {
	var some []corev1.ContainerStatus
	for _, s := range all {
		some = append(some, corev1.ContainerStatus{Name: s.Name, ImageID: s.ImageID})
	}
	return some
}

// open starts to look, and returns when everything was seen once. It reports whether that was so before ctx
// ended.
func (s *sight) open(ctx context.Context) bool {
	if err := s.prepare(); err != nil {
		s.desk.log.WithError(err).Error("the cluster cannot be looked at")
		return false
	}
	s.typed.Start(ctx.Done())
	s.untyped.Start(ctx.Done())
	need := []cache.InformerSynced{s.pods.HasSynced, s.nodes.HasSynced, s.namespaces.HasSynced, s.slices.HasSynced,
		s.rules.HasSynced, s.statics.HasSynced, s.trusts.HasSynced}
	// Reports are evidence, and no entry waits for them.
	if !cache.WaitForCacheSync(ctx.Done(), need...) {
		return false
	}
	s.desk.log.WithFields(logrus.Fields{"pods": len(s.pods.GetStore().ListKeys()), "rules": len(s.rules.GetStore().ListKeys())}).Info("the cluster is in sight")
	return true
}

func (s *sight) close() {
	s.typed.Shutdown()
	s.untyped.Shutdown()
}

// prepare adds the indexes, the handlers and what tells of trouble.
func (s *sight) prepare() error {
	if err := s.pods.AddIndexers(cache.Indexers{byNode: func(o any) ([]string, error) {
		return []string{o.(*corev1.Pod).Spec.NodeName}, nil
	}}); err != nil {
		return fmt.Errorf("index pods: %w", err)
	}
	if err := s.slices.AddIndexers(cache.Indexers{byPod: func(o any) ([]string, error) {
		var keys []string
		for _, one := range podsOf(o.(*discoveryv1.EndpointSlice)) {
			keys = append(keys, one.key)
		}
		return keys, nil
	}}); err != nil {
		return fmt.Errorf("index endpoint slices: %w", err)
	}
	for _, w := range []struct {
		what     string
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{"pods", s.pods, news(s.podNews)}, {"nodes", s.nodes, news(s.nodeNews)}, {"namespaces", s.namespaces, news(s.namespaceNews)},
		{"endpointslices", s.slices, news(s.sliceNews)}, {"clusterspiffeids", s.rules, news(s.ruleNews)},
		{"clusterstaticentries", s.statics, news(s.staticNews)}, {"clusterfederatedtrustdomains", s.trusts, news(s.federationNews)},
		{"vulnerabilityreports", s.findings, news(s.reportNews)},
	} {
		if w.informer == nil {
			continue
		}
		if _, err := w.informer.AddEventHandler(w.handler); err != nil {
			return fmt.Errorf("watch %s: %w", w.what, err)
		}
		if err := w.informer.SetWatchErrorHandler(func(_ *cache.Reflector, err error) { s.trouble(w.what, err) }); err != nil {
			return fmt.Errorf("watch %s: %w", w.what, err)
		}
	}
	return nil
}

// trouble tells of a watch that does not work, at most once a minute each.
func (s *sight) trouble(what string, err error) {
	s.mu.Lock()
	quiet := time.Since(s.complained[what]) < time.Minute
	if !quiet {
		s.complained[what] = time.Now()
	}
	s.mu.Unlock()
	s.desk.m.trouble.WithLabelValues(what).Inc()
	if quiet {
		return
	}
	log := s.desk.log.WithFields(logrus.Fields{"resource": what, "err": err})
	switch {
	case apierrors.IsNotFound(err):
		log.Warn("the cluster has no such resource: apply the CRDs, and it is seen")
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		log.Warn("the server may not watch the resource: its role needs get, list and watch")
	default:
		log.Warn("the watch ended and is begun anew; what is stored stays")
	}
}

// handlers make one function of the three ways in which something can change.
type handlers[T runtime.Object] func(before, after T)

// news returns a handler that calls fn with what was and what is; one of the two is nil for what is new or
// gone.
func news[T runtime.Object](fn func(before, after T)) cache.ResourceEventHandler {
	return handlers[T](fn)
}

func (h handlers[T]) OnAdd(o any, _ bool) {
	var none T
	h(none, o.(T))
}

func (h handlers[T]) OnUpdate(before, after any) { h(before.(T), after.(T)) }

func (h handlers[T]) OnDelete(o any) {
	var none T
	if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = gone.Obj
	}
	if last, ok := o.(T); ok {
		h(last, none)
	}
}

func (s *sight) podNews(before, after *corev1.Pod) {
	switch {
	case after == nil:
		s.desk.look(before)
	case before != nil && before.UID == after.UID && before.Status.Phase == after.Status.Phase &&
		equality.Semantic.DeepEqual(before.Labels, after.Labels) &&
		equality.Semantic.DeepEqual(before.Annotations, after.Annotations) &&
		equality.Semantic.DeepEqual(before.Spec, after.Spec):
		// Statuses change all the time and are in no template.
	default:
		s.desk.look(after)
	}
}

func (s *sight) nodeNews(before, after *corev1.Node) {
	if before != nil && after != nil && before.UID == after.UID &&
		equality.Semantic.DeepEqual(before.Labels, after.Labels) &&
		equality.Semantic.DeepEqual(before.Annotations, after.Annotations) &&
		equality.Semantic.DeepEqual(before.Spec, after.Spec) {
		return // a heartbeat
	}
	s.desk.look(podsIn(s.pods, byNode, nameOf(before, after))...)
}

func (s *sight) namespaceNews(before, after *corev1.Namespace) {
	if before != nil && after != nil && equality.Semantic.DeepEqual(before.Labels, after.Labels) {
		return
	}
	s.desk.look(podsIn(s.pods, cache.NamespaceIndex, nameOf(before, after))...)
	s.desk.dueRules()
	select {
	case s.spaces <- struct{}{}:
	default:
	}
}

func (s *sight) sliceNews(before, after *discoveryv1.EndpointSlice) {
	var was, is []target
	if before != nil {
		was = podsOf(before)
	}
	if after != nil {
		is = podsOf(after)
	}
	// A pod that was made anew under its name, as those of StatefulSets are, is another pod.
	for _, one := range was {
		if !slices.Contains(is, one) {
			s.desk.queue.Add(item{podItem, one.key})
		}
	}
	for _, one := range is {
		if !slices.Contains(was, one) {
			s.desk.queue.Add(item{podItem, one.key})
		}
	}
}

// ruleNews puts a rule in force and looks at all pods: which of them it selects is for the plan to say.
func (s *sight) ruleNews(before, after *unstructured.Unstructured) {
	switch {
	case after == nil:
		s.desk.setRule(before.GetName(), nil)
	case before != nil && before.GetGeneration() == after.GetGeneration() && before.GetUID() == after.GetUID():
		return // its status
	default:
		r := readRule(after)
		if !s.desk.cfg.classed(r.spec.ClassName) {
			r = nil
		}
		s.desk.setRule(after.GetName(), r)
	}
	for _, o := range s.pods.GetStore().List() {
		s.desk.look(o.(*corev1.Pod))
	}
	s.desk.wakeStatuses()
}

func (s *sight) staticNews(before, after *unstructured.Unstructured) {
	if before != nil && after != nil && before.GetGeneration() == after.GetGeneration() && before.GetUID() == after.GetUID() {
		return
	}
	s.desk.queue.Add(item{staticItem, nameOf(before, after)})
}

func (s *sight) federationNews(before, after *unstructured.Unstructured) {
	if before != nil && after != nil && before.GetGeneration() == after.GetGeneration() && before.GetUID() == after.GetUID() {
		return
	}
	s.desk.queue.Add(item{kind: federationItem})
}

// object is one of the API's.
type object interface {
	comparable
	GetName() string
}

// nameOf returns the name of what changed, of which one side may be missing.
func nameOf[T object](before, after T) string {
	var none T
	if after != none {
		return after.GetName()
	}
	return before.GetName()
}

// target is a pod that a service sends to.
type target struct {
	key string // namespace/name
	uid types.UID
}

// podsOf returns the pods that a service's slice sends to.
func podsOf(e *discoveryv1.EndpointSlice) []target {
	var all []target
	for _, p := range e.Endpoints {
		if p.TargetRef != nil && p.TargetRef.Kind == "Pod" {
			all = append(all, target{cache.ObjectName{Namespace: e.Namespace, Name: p.TargetRef.Name}.String(), p.TargetRef.UID})
		}
	}
	return all
}

func podsIn(i cache.SharedIndexInformer, index, value string) []*corev1.Pod {
	found, err := i.GetIndexer().ByIndex(index, value)
	if err != nil {
		return nil // there is no such index, which prepare would have said
	}
	var pods []*corev1.Pod
	for _, o := range found {
		pods = append(pods, o.(*corev1.Pod))
	}
	return pods
}

// seen returns what an informer has under a key.
func seen[T any](i cache.SharedIndexInformer, key string) (found T) {
	o, ok, err := i.GetStore().GetByKey(key)
	if err == nil && ok {
		found, _ = o.(T)
	}
	return found
}

func (s *sight) pod(key string) *corev1.Pod    { return seen[*corev1.Pod](s.pods, key) }
func (s *sight) node(name string) *corev1.Node { return seen[*corev1.Node](s.nodes, name) }
func (s *sight) namespace(name string) *corev1.Namespace {
	return seen[*corev1.Namespace](s.namespaces, name)
}
func (s *sight) static(n string) *unstructured.Unstructured {
	return seen[*unstructured.Unstructured](s.statics, n)
}

// services returns the names of the services that send to a pod, sorted.
func (s *sight) services(pod *corev1.Pod) []string {
	found, err := s.slices.GetIndexer().ByIndex(byPod, cache.ObjectName{Namespace: pod.Namespace, Name: pod.Name}.String())
	if err != nil {
		return nil
	}
	var names []string
	for _, o := range found {
		e := o.(*discoveryv1.EndpointSlice)
		for _, p := range e.Endpoints {
			if name := e.Labels[discoveryv1.LabelServiceName]; name != "" && p.TargetRef != nil && p.TargetRef.UID == pod.UID {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// holders returns what there is in the cluster that entries are for, by the part of an entry's ID that says
// so; see Config.keyOf.
func (s *sight) holders() map[string]item {
	all := map[string]item{}
	for _, o := range s.pods.GetStore().List() {
		pod := o.(*corev1.Pod)
		all[string(pod.UID)] = podKey(pod)
	}
	for _, name := range s.statics.GetStore().ListKeys() {
		all[s.desk.cfg.keyOf(s.desk.cfg.staticEntryID(name))] = item{staticItem, name}
	}
	return all
}

// labelsOf returns an object's labels as a selector takes them.
func labelsOf(o interface{ GetLabels() map[string]string }) labels.Set { return o.GetLabels() }
