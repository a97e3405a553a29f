package server

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8spsat"
)

const (
	// settle is how long after an admission the agents are looked through: by then it is recorded.
	settle = 2 * time.Second
	// lookThrough is how often they are looked through anyway.
	lookThrough = time.Minute
)

// Follow keeps the label selectors of admitted agents as the labels of their nodes and pods are, until ctx
// ends. It watches only what the configuration names labels of.
func (j *judge) Follow(ctx context.Context, agents attestor.Admitted) error {
	var group errgroup.Group
	for _, c := range j.clusters {
		if len(c.NodeLabels)+len(c.PodLabels) > 0 {
			group.Go(func() error { c.follow(ctx, agents); return nil })
		}
	}
	return group.Wait()
}

// labels is what is kept of a node or a pod.
type labels struct {
	metav1.TypeMeta
	metav1.ObjectMeta
}

// DeepCopyObject makes labels an object that informers take.
func (l *labels) DeepCopyObject() kruntime.Object {
	return &labels{ObjectMeta: *l.DeepCopy()}
}

// strip drops what is not asked about, so that thousands of nodes are held in little.
func strip(object any) (any, error) {
	switch o := object.(type) {
	case *corev1.Node:
		return &labels{ObjectMeta: metav1.ObjectMeta{Name: o.Name, UID: o.UID, Labels: o.Labels, ResourceVersion: o.ResourceVersion}}, nil
	case *corev1.Pod:
		return &labels{ObjectMeta: metav1.ObjectMeta{Name: o.Name, Namespace: o.Namespace, UID: o.UID, Labels: o.Labels, ResourceVersion: o.ResourceVersion}}, nil
	}
	return object, nil
}

// shelf is one kind of object as it is now.
type shelf struct {
	store  cache.Store
	synced func() bool
}

func (c *cluster) follow(ctx context.Context, agents attestor.Admitted) {
	changed := make(chan struct{}, 1)
	var running errgroup.Group
	defer func() { _ = running.Wait() }() // they return nothing
	watch := func(lw cache.ListerWatcher, kind kruntime.Object, keys []string) shelf {
		tell := func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
		store, controller := cache.NewInformerWithOptions(cache.InformerOptions{
			ListerWatcher: lw, ObjectType: kind, Transform: strip,
			Handler: cache.ResourceEventHandlerFuncs{
				AddFunc:    func(any) { tell() },
				DeleteFunc: func(any) { tell() },
				UpdateFunc: func(before, after any) {
					a, ok := before.(*labels)
					b, too := after.(*labels)
					if !ok || !too || !maps.Equal(chosen(a.Labels, keys), chosen(b.Labels, keys)) {
						tell()
					}
				},
			},
		})
		running.Go(func() error { controller.RunWithContext(ctx); return nil })
		return shelf{store, controller.HasSynced}
	}
	var nodes shelf
	var pods []shelf
	if len(c.NodeLabels) > 0 {
		nodes = watch(c.nodes(), &corev1.Node{}, c.NodeLabels)
	}
	if len(c.PodLabels) > 0 {
		for _, account := range c.ServiceAccounts {
			namespace, name, _ := strings.Cut(account, ":")
			pods = append(pods, watch(c.pods(namespace, name), &corev1.Pod{}, c.PodLabels))
		}
	}
	tick, soon := time.NewTicker(lookThrough), time.NewTimer(0)
	defer tick.Stop()
	defer soon.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-c.fresh:
			soon.Reset(settle)
			continue
		case <-soon.C:
		case <-tick.C:
		}
		if err := c.refresh(ctx, agents, nodes, pods); err != nil && ctx.Err() == nil {
			c.log.WithError(err).Warn("labels of agents' nodes are not up to date; it is tried again")
			soon.Reset(settle)
		}
	}
}

func chosen(all map[string]string, keys []string) map[string]string {
	some := map[string]string{}
	for _, key := range keys {
		if value, ok := all[key]; ok {
			some[key] = value
		}
	}
	return some
}

func (c *cluster) nodes() cache.ListerWatcher {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (kruntime.Object, error) {
			return c.core.Nodes().List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.core.Nodes().Watch(ctx, o)
		},
	}
}

func (c *cluster) pods(namespace, account string) cache.ListerWatcher {
	selector := fields.OneTermEqualSelector("spec.serviceAccountName", account).String()
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (kruntime.Object, error) {
			o.FieldSelector = selector
			return c.core.Pods(namespace).List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return c.core.Pods(namespace).Watch(ctx, o)
		},
	}
}

// refresh gives every agent of the cluster the labels as they are now. What is not known yet stays as it is;
// a node or a pod that is gone has no labels any more.
func (c *cluster) refresh(ctx context.Context, agents attestor.Admitted, nodes shelf, pods []shelf) error {
	nodeLabels, knowNodes := byUID(nodes)
	podLabels, knowPods := byUID(pods...)
	if !knowNodes && !knowPods {
		return nil
	}
	type change struct {
		path string
		list []attestor.Selector
	}
	var changes []change
	for path, has := range agents.Each() {
		if !has.Has(attestor.Selector{Type: k8spsat.Type, Value: prefixCluster + c.Name}) {
			continue
		}
		var values []string
		var node, pod string
		for _, s := range has.All() {
			switch {
			case strings.HasPrefix(s.Value, prefixNodeLabel) && knowNodes, strings.HasPrefix(s.Value, prefixPodLabel) && knowPods:
				continue // anew below
			case strings.HasPrefix(s.Value, prefixNodeUID):
				node = s.Value[len(prefixNodeUID):]
			case strings.HasPrefix(s.Value, prefixPodUID):
				pod = s.Value[len(prefixPodUID):]
			}
			values = append(values, s.Value)
		}
		if knowNodes {
			values = append(values, labelled(prefixNodeLabel, nodeLabels[node], c.NodeLabels)...)
		}
		if knowPods {
			values = append(values, labelled(prefixPodLabel, podLabels[pod], c.PodLabels)...)
		}
		if list := selectorsOf(values); !slices.Equal(list, has.All()) {
			changes = append(changes, change{path, list})
		}
	}
	var all error
	for _, one := range changes {
		all = errors.Join(all, agents.Update(ctx, one.path, one.list))
	}
	return all
}

// byUID returns the labels of what is on shelves, and whether all is known of them.
func byUID(shelves ...shelf) (map[string]map[string]string, bool) {
	found := map[string]map[string]string{}
	for _, s := range shelves {
		if s.store == nil || !s.synced() {
			return nil, false
		}
		for _, object := range s.store.List() {
			if o, ok := object.(*labels); ok {
				found[string(o.UID)] = o.Labels
			}
		}
	}
	return found, len(shelves) > 0
}
