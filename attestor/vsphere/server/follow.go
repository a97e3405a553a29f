package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/types"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/vsphere"
)

// firstPause and maxPause bound the wait before vCenter is tried again.
const firstPause, maxPause = time.Second, time.Minute

// followed are the properties whose changes are told: vMotion moves the host, an operator the rest.
var followed = []string{"name", "parent", "resourcePool", "runtime.host", "runtime.powerState", "customValue", "config.instanceUuid", "config.guestId"}

// Follow follows every vCenter. It returns nil when ctx ends.
func (j *judge) Follow(ctx context.Context, agents attestor.Admitted) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, v := range j.centers {
		group.Go(func() error { return v.follow(ctx, agents) })
	}
	return group.Wait()
}

// follow lets vCenter tell of its virtual machines, by the property collector, and tells of those that are
// nodes: new selectors when one is moved or renamed, and that it is gone when it was removed. Of tags the
// property collector knows nothing, so they are asked for now and then.
func (v *center) follow(ctx context.Context, agents attestor.Admitted) error {
	pause := firstPause
	seen := &sight{paths: paths{}}
	for ctx.Err() == nil {
		err := v.followOnce(ctx, agents, seen, func() { pause = firstPause })
		if ctx.Err() != nil {
			break
		}
		v.log.WithError(err).WithField("pause", pause).Warn("vCenter cannot be followed; selectors of nodes stay as they are until it can")
		attestor.Pause(ctx, pause)
		pause = min(2*pause, maxPause)
	}
	return nil //nolint:nilerr // the end of its context is how it ends, not a fault
}

// paths are those of the virtual machines that were seen.
type paths map[types.ManagedObjectReference]string

// sight is what was seen, by who follows changes and who asks for tags.
type sight struct {
	mu    sync.Mutex // guards paths
	paths paths
}

// followOnce follows over a session of its own until that ends. Those of before that are not there any
// more when vCenter has told of all there are, have left meanwhile.
func (v *center) followOnce(ctx context.Context, agents attestor.Admitted, seen *sight, heard func()) error {
	c, manager, err := v.vcenter.dial(ctx)
	if err != nil {
		return err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
		defer cancel()
		_ = manager.Logout(clean)
	}()
	all, err := view.NewManager(c).CreateContainerView(ctx, c.ServiceContent.RootFolder, []string{"VirtualMachine"}, true)
	if err != nil {
		return fmt.Errorf("view virtual machines: %w", err)
	}
	seen.mu.Lock()
	before := maps.Clone(seen.paths)
	seen.mu.Unlock()
	group, ctx := errgroup.WithContext(ctx)
	stop := make(chan struct{})
	if v.config.Tags {
		group.Go(func() error { v.askForTags(ctx, c, agents, seen, stop); return nil })
	}
	group.Go(func() error {
		defer close(stop)
		filter := new(property.WaitFilter).Add(all.Reference(), "VirtualMachine", followed, all.TraversalSpec())
		now, swept := paths{}, false
		var failed error
		err := property.WaitForUpdates(ctx, property.DefaultCollector(c), filter, func(updates []types.ObjectUpdate) bool {
			heard()
			for _, update := range updates {
				failed = v.updated(ctx, c, agents, now, update)
				seen.mu.Lock()
				if path := now[update.Obj]; path != "" {
					seen.paths[update.Obj] = path
				} else if swept {
					delete(seen.paths, update.Obj)
				}
				seen.mu.Unlock()
				if failed != nil {
					return true
				}
			}
			if swept || filter.Truncated {
				return false
			}
			swept = true
			for ref, path := range before {
				if now[ref] == "" {
					if failed = v.left(ctx, c, agents, ref, path); failed != nil {
						return true
					}
					seen.mu.Lock()
					delete(seen.paths, ref)
					seen.mu.Unlock()
				}
			}
			return false
		})
		if failed != nil {
			return failed
		}
		return err
	})
	return group.Wait()
}

// askForTags looks whether the tags of nodes have changed, until stop is closed, and tells of those whose have.
func (v *center) askForTags(ctx context.Context, c *vim25.Client, agents attestor.Admitted, seen *sight, stop <-chan struct{}) {
	ticker := time.NewTicker(v.tagsEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-stop:
			return
		case <-ctx.Done():
			return
		}
		if err := v.tagsOnce(ctx, c, agents, seen); err != nil && ctx.Err() == nil {
			v.log.WithError(err).Warn("tags of virtual machines cannot be read; those of nodes stay as they are until they can")
		}
	}
}

func (v *center) tagsOnce(ctx context.Context, c *vim25.Client, agents attestor.Admitted, seen *sight) error {
	ctx, cancel := context.WithTimeout(ctx, vcenterTime)
	defer cancel()
	sets := maps.Collect(agents.Each())
	nodes := paths{}
	seen.mu.Lock()
	for ref, path := range seen.paths {
		if _, ok := sets[path]; ok && path != "" {
			nodes[ref] = path
		}
	}
	seen.mu.Unlock()
	if len(nodes) == 0 {
		return nil
	}
	attached, err := v.vcenter.attached(ctx, c, slices.Collect(maps.Keys(nodes))...)
	if err != nil {
		return err
	}
	for ref, path := range nodes {
		var now, had []string
		for _, tag := range attached[ref] {
			s := attestor.Selector{Type: vsphere.Type, Value: "tag:" + tag[0] + ":" + tag[1]}
			if s.Check() == nil {
				now = append(now, s.String())
			}
		}
		for _, s := range sets[path].Strings() {
			if strings.HasPrefix(s, vsphere.Type+":tag:") {
				had = append(had, s)
			}
		}
		slices.Sort(now)
		if slices.Equal(slices.Compact(now), had) {
			continue
		}
		if err := v.refresh(ctx, c, agents, ref, path); err != nil {
			return err
		}
	}
	return nil
}

// left tells of a virtual machine that left the view.
func (v *center) left(ctx context.Context, c *vim25.Client, agents attestor.Admitted, ref types.ManagedObjectReference, path string) error {
	if path == "" || !known(agents, path) {
		return nil
	}
	// One that the account may no longer see leaves the view too, but is not gone.
	if _, err := entity(ctx, c, ref); !fault.Is(err, &types.ManagedObjectNotFound{}) {
		v.log.WithError(err).WithField("vm", ref.Value).Warn("a virtual machine that is a node has left vCenter's view, but was not removed; its selectors stay as they are")
		return nil
	}
	return agents.Evict(ctx, path)
}

// updated tells of one virtual machine.
func (v *center) updated(ctx context.Context, c *vim25.Client, agents attestor.Admitted, names paths, update types.ObjectUpdate) error {
	if update.Kind == types.ObjectUpdateKindLeave {
		path := names[update.Obj]
		delete(names, update.Obj)
		return v.left(ctx, c, agents, update.Obj, path)
	}
	for _, change := range update.ChangeSet {
		if instance, ok := change.Val.(string); ok && change.Name == "config.instanceUuid" {
			names[update.Obj] = pathOf(c, instance)
		}
	}
	path := names[update.Obj]
	if path == "" || !known(agents, path) {
		return nil
	}
	return v.refresh(ctx, c, agents, update.Obj, path)
}

// refresh tells of a virtual machine that is a node as it is now.
func (v *center) refresh(ctx context.Context, c *vim25.Client, agents attestor.Admitted, ref types.ManagedObjectReference, path string) error {
	ctx, cancel := context.WithTimeout(ctx, vcenterTime)
	defer cancel()
	vm, err := readVM(ctx, c, ref)
	if fault.Is(err, &types.ManagedObjectNotFound{}) {
		return nil // that it left is told next
	}
	if err != nil {
		return err
	}
	at, err := locate(ctx, c, &vm)
	if err != nil {
		return err
	}
	selectors, err := v.describe(ctx, c, &vm, at)
	if err != nil {
		return err
	}
	return agents.Update(ctx, path, selectors)
}

// known reports whether the node at a path is admitted; about others there is nothing to tell.
func known(agents attestor.Admitted, path string) bool {
	for one := range agents.Each() {
		if one == path {
			return true
		}
	}
	return false
}
