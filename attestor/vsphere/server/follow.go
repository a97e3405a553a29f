package server

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/assay-id/assay/attestor"
)

// firstPause and maxPause bound the wait before vCenter is tried again.
const firstPause, maxPause = time.Second, time.Minute

// followed are the properties whose changes are told: vMotion moves the host, an operator the rest.
var followed = []string{"name", "parent", "resourcePool", "runtime.host", "runtime.powerState", "customValue", "config.instanceUuid", "config.guestId"}

// Follow lets vCenter tell of its virtual machines, by the property collector, and tells of those that are
// nodes: new selectors when one is moved or renamed, and that it is gone when it was removed. It returns
// nil when ctx ends.
func (j *judge) Follow(ctx context.Context, agents attestor.Admitted) error {
	pause := firstPause
	seen := paths{}
	for ctx.Err() == nil {
		err := j.followOnce(ctx, agents, seen, func() { pause = firstPause })
		if ctx.Err() != nil {
			break
		}
		j.log.WithError(err).WithField("pause", pause).Warn("vCenter cannot be followed; selectors of nodes stay as they are until it can")
		wait := time.NewTimer(pause/2 + rand.N(pause)) //nolint:gosec // jitter is no secret
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
		}
		pause = min(2*pause, maxPause)
	}
	return nil //nolint:nilerr // the end of its context is how it ends, not a fault
}

// paths are those of the virtual machines that were seen.
type paths map[types.ManagedObjectReference]string

// followOnce follows over a session of its own until that ends. Those of before that are not there any
// more when vCenter has told of all there are, have left meanwhile.
func (j *judge) followOnce(ctx context.Context, agents attestor.Admitted, before paths, heard func()) error {
	c, manager, err := j.vcenter.dial(ctx)
	if err != nil {
		return err
	}
	bye := func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
	}
	defer func() {
		clean, cancel := bye()
		defer cancel()
		_ = manager.Logout(clean)
	}()
	all, err := view.NewManager(c).CreateContainerView(ctx, c.ServiceContent.RootFolder, []string{"VirtualMachine"}, true)
	if err != nil {
		return fmt.Errorf("view virtual machines: %w", err)
	}
	filter := new(property.WaitFilter).Add(all.Reference(), "VirtualMachine", followed, all.TraversalSpec())
	now, swept := paths{}, false
	var failed error
	err = property.WaitForUpdates(ctx, property.DefaultCollector(c), filter, func(updates []types.ObjectUpdate) bool {
		heard()
		for _, update := range updates {
			if failed = j.updated(ctx, c, agents, now, update); failed != nil {
				return true
			}
		}
		if swept || filter.Truncated {
			return false
		}
		swept = true
		for ref, path := range before {
			if now[ref] == "" {
				if failed = j.left(ctx, c, agents, ref, path); failed != nil {
					return true
				}
			}
		}
		clear(before)
		return false
	})
	maps.Copy(before, now)
	if failed != nil {
		return failed
	}
	return err
}

// left tells of a virtual machine that left the view.
func (j *judge) left(ctx context.Context, c *vim25.Client, agents attestor.Admitted, ref types.ManagedObjectReference, path string) error {
	if path == "" || !known(agents, path) {
		return nil
	}
	// One that the account may no longer see leaves the view too, but is not gone.
	if _, err := entity(ctx, c, ref); !fault.Is(err, &types.ManagedObjectNotFound{}) {
		j.log.WithError(err).WithField("vm", ref.Value).Warn("a virtual machine that is a node has left vCenter's view, but was not removed; its selectors stay as they are")
		return nil
	}
	return agents.Evict(ctx, path)
}

// updated tells of one virtual machine.
func (j *judge) updated(ctx context.Context, c *vim25.Client, agents attestor.Admitted, names paths, update types.ObjectUpdate) error {
	if update.Kind == types.ObjectUpdateKindLeave {
		path := names[update.Obj]
		delete(names, update.Obj)
		return j.left(ctx, c, agents, update.Obj, path)
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
	ctx, cancel := context.WithTimeout(ctx, vcenterTime)
	defer cancel()
	vm, err := readVM(ctx, c, update.Obj)
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
	selectors, err := j.describe(ctx, c, &vm, at)
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
