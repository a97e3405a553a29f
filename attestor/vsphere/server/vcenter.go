package server

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/vsphere"
)

const (
	// vcenterTime is how long vCenter may take for one request.
	vcenterTime = 30 * time.Second
	// maxPassword is the largest password file in bytes.
	maxPassword = 4 << 10
	// maxDepth bounds the way from a virtual machine up to the root of the inventory.
	maxDepth = 64
	// readRPC and writeRPC are the settings of a virtual machine that keep its users but root from reading
	// guestinfo, and from writing it.
	readRPC, writeRPC = "guest_rpc.rpci.auth.cmd.info-get", "guest_rpc.rpci.auth.cmd.info-set"
)

// vmProperties are what is asked of a virtual machine.
var vmProperties = []string{"name", "parent", "resourcePool", "runtime.host", "runtime.powerState", "customValue", "config"}

// vcenter is a connection to vCenter, logged in anew whenever its session has ended.
type vcenter struct {
	config vsphere.VCenter
	url    *url.URL

	mu      sync.Mutex // guards the two below
	client  *vim25.Client
	session *session.Manager
}

func newVCenter(c vsphere.VCenter) (*vcenter, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" && u.Path != "/sdk" {
		return nil, fmt.Errorf("vcenter_url: %q is no address like https://vcenter.example.org; the account goes into username and password_file", c.URL)
	}
	if c.Username == "" {
		return nil, errors.New("username is empty")
	}
	if _, err := password(c.PasswordFile); err != nil {
		return nil, fmt.Errorf("password_file: %w", err)
	}
	if c.CAPath != "" {
		if err := soap.NewClient(u, false).SetRootCAs(c.CAPath); err != nil {
			return nil, fmt.Errorf("ca_path: %w", err)
		}
	}
	return &vcenter{config: c, url: &url.URL{Scheme: "https", Host: u.Host, Path: "/sdk"}}, nil
}

// password is read at each login, so that it can be changed in place.
func password(path string) (string, error) {
	text, err := attestor.ReadFile(path, maxPassword)
	if err != nil {
		return "", err
	}
	trimmed := strings.TrimRight(string(text), "\r\n")
	if trimmed == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return trimmed, nil
}

// dial logs in.
func (v *vcenter) dial(ctx context.Context) (*vim25.Client, *session.Manager, error) {
	secret, err := password(v.config.PasswordFile)
	if err != nil {
		return nil, nil, fmt.Errorf("read password: %w", err)
	}
	transport := soap.NewClient(v.url, false)
	if v.config.CAPath != "" {
		if err := transport.SetRootCAs(v.config.CAPath); err != nil {
			return nil, nil, fmt.Errorf("read authorities: %w", err)
		}
	}
	client, err := vim25.NewClient(ctx, transport)
	if err != nil {
		return nil, nil, fmt.Errorf("connect to vCenter: %w", err)
	}
	if client.ServiceContent.About.InstanceUuid == "" {
		return nil, nil, errors.New("connect to vCenter: it has no instance UUID; a single ESXi host will not do")
	}
	manager := session.NewManager(client)
	if err := manager.Login(ctx, url.UserPassword(v.config.Username, secret)); err != nil {
		return nil, nil, fmt.Errorf("log in at vCenter: %w", err)
	}
	return client, manager, nil
}

// get returns a client whose session is alive.
func (v *vcenter) get(ctx context.Context) (*vim25.Client, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.client != nil {
		if alive, err := v.session.UserSession(ctx); err == nil && alive != nil {
			return v.client, nil
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	client, manager, err := v.dial(ctx)
	if err != nil {
		return nil, err
	}
	v.client, v.session = client, manager
	return client, nil
}

// byUUID finds the virtual machines of a BIOS UUID, all of them: clones and restored copies share it, and
// FindByUuid would quietly name one.
func byUUID(ctx context.Context, c *vim25.Client, uuid string) ([]types.ManagedObjectReference, error) {
	found, err := object.NewSearchIndex(c).FindAllByUuid(ctx, nil, uuid, true, new(false))
	if err != nil {
		return nil, fmt.Errorf("find virtual machine: %w", err)
	}
	refs := make([]types.ManagedObjectReference, len(found))
	for i, one := range found {
		refs[i] = one.Reference()
	}
	return refs, nil
}

func readVM(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference) (mo.VirtualMachine, error) {
	var vm mo.VirtualMachine
	if err := property.DefaultCollector(c).RetrieveOne(ctx, ref, vmProperties, &vm); err != nil {
		return vm, fmt.Errorf("read virtual machine: %w", err)
	}
	if vm.Config == nil {
		return vm, errors.New("read virtual machine: vCenter does not show its configuration; has the account read access?")
	}
	return vm, nil
}

// setExtra sets values in a virtual machine's extra configuration, which the guest sees; an empty value
// removes it.
func setExtra(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference, values map[string]string) error {
	var options []types.BaseOptionValue
	for key, value := range values {
		options = append(options, &types.OptionValue{Key: key, Value: value})
	}
	task, err := object.NewVirtualMachine(c, ref).Reconfigure(ctx, types.VirtualMachineConfigSpec{ExtraConfig: options})
	if err == nil {
		err = task.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("write guestinfo (the account needs VirtualMachine.Config.AdvancedConfig): %w", err)
	}
	return nil
}

// getExtra reads a value of it, empty if there is none.
func getExtra(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference, key string) (string, error) {
	vm := mo.VirtualMachine{}
	if err := property.DefaultCollector(c).RetrieveOne(ctx, ref, []string{"config.extraConfig"}, &vm); err != nil {
		return "", fmt.Errorf("read guestinfo: %w", err)
	}
	if vm.Config == nil {
		return "", nil
	}
	return extra(&vm, key), nil
}

func extra(vm *mo.VirtualMachine, key string) string {
	for _, option := range vm.Config.ExtraConfig {
		if o := option.GetOptionValue(); o.Key == key {
			text, _ := o.Value.(string)
			return text
		}
	}
	return ""
}

// place is where a virtual machine is in the inventory.
type place struct {
	datacenter, folder, cluster, host, pool string
}

// locate finds the names of all that a virtual machine is in.
func locate(ctx context.Context, c *vim25.Client, vm *mo.VirtualMachine) (place, error) {
	var at place
	var err error
	if vm.Parent != nil {
		var names []string
		if names, at.datacenter, err = ancestors(ctx, c, *vm.Parent); err != nil {
			return at, err
		}
		at.folder = "/" + path.Join(names...)
	}
	if vm.Runtime.Host != nil {
		var host mo.ManagedEntity
		if host, err = entity(ctx, c, *vm.Runtime.Host); err != nil {
			return at, err
		}
		at.host = host.Name
		if host.Parent != nil && host.Parent.Type == "ClusterComputeResource" {
			cluster, err := entity(ctx, c, *host.Parent)
			if err != nil {
				return at, err
			}
			at.cluster = cluster.Name
		}
	}
	if vm.ResourcePool != nil {
		pool, err := entity(ctx, c, *vm.ResourcePool)
		if err != nil {
			return at, err
		}
		at.pool = pool.Name
	}
	return at, nil
}

func entity(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference) (mo.ManagedEntity, error) {
	var e mo.ManagedEntity
	if err := property.DefaultCollector(c).RetrieveOne(ctx, ref, []string{"name", "parent"}, &e); err != nil {
		return e, fmt.Errorf("read %s: %w", ref.Type, err)
	}
	// vCenter writes a slash within a name, and some others, as %2f.
	if name, err := url.PathUnescape(e.Name); err == nil && !strings.Contains(name, "/") {
		e.Name = name
	}
	return e, nil
}

// ancestors returns the names from below the root folder down to ref, and that of the datacenter among
// them.
func ancestors(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference) (names []string, datacenter string, err error) {
	for range maxDepth {
		e, err := entity(ctx, c, ref)
		if err != nil {
			return nil, "", err
		}
		if e.Parent == nil {
			slices.Reverse(names)
			return names, datacenter, nil
		}
		names = append(names, e.Name)
		if ref.Type == "Datacenter" {
			datacenter = e.Name
		}
		ref = *e.Parent
	}
	return nil, "", errors.New("the inventory has no root")
}

// attached returns the tags of virtual machines as category and name.
func (v *vcenter) attached(ctx context.Context, c *vim25.Client, refs ...types.ManagedObjectReference) (map[types.ManagedObjectReference][][2]string, error) {
	secret, err := password(v.config.PasswordFile)
	if err != nil {
		return nil, fmt.Errorf("read password: %w", err)
	}
	client := rest.NewClient(c)
	if err := client.Login(ctx, url.UserPassword(v.config.Username, secret)); err != nil {
		return nil, fmt.Errorf("log in for tags: %w", err)
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
		defer cancel()
		_ = client.Logout(clean)
	}()
	manager := tags.NewManager(client)
	objects := make([]mo.Reference, len(refs))
	for i, ref := range refs {
		objects[i] = ref
	}
	all, err := manager.GetAttachedTagsOnObjects(ctx, objects)
	if err != nil {
		return nil, fmt.Errorf("read tags: %w", err)
	}
	categories := map[string]string{}
	found := map[types.ManagedObjectReference][][2]string{}
	for _, one := range all {
		for _, tag := range one.Tags[:min(len(one.Tags), maxValues)] {
			if _, known := categories[tag.CategoryID]; !known {
				category, err := manager.GetCategory(ctx, tag.CategoryID)
				if err != nil {
					return nil, fmt.Errorf("read category of tag: %w", err)
				}
				categories[tag.CategoryID] = category.Name
			}
			ref := one.ObjectID.Reference()
			found[ref] = append(found[ref], [2]string{categories[tag.CategoryID], tag.Name})
		}
	}
	return found, nil
}
