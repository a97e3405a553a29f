// Package vcenter is a vCenter of VMware's own simulator, over HTTPS, and the inside of its virtual machines:
// for each, what the kernel would show of the machine, and a vmtoolsd that reads its guestinfo.
//
// The stand-in for vmtoolsd asks over a Unix socket that only has the guestinfo of its own machine, as the
// hypervisor answers each machine for itself. It is the test's own binary: its TestMain calls Guest first.
package vcenter

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/simulator"
	_ "github.com/vmware/govmomi/vapi/simulator" // the simulator's tags
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Username and Password let anybody in who has both.
const Username, Password = "assay", "s3cret"

// channel names the socket of the hypervisor, and with it says that this process is to be vmtoolsd.
const channel = "GUEST_CHANNEL"

// Guest ends the process as vmtoolsd would, if it is one.
func Guest() {
	if socket := os.Getenv(channel); socket != "" {
		os.Exit(info(socket, os.Args[1:]))
	}
}

// info does what "vmtoolsd --cmd 'info-get KEY'" and "vmtoolsd --cmd 'info-set KEY VALUE'" do.
func info(socket string, args []string) int {
	if len(args) != 2 || args[0] != "--cmd" {
		return 64
	}
	words := strings.Fields(args[1])
	set := len(words) == 3 && words[0] == "info-set"
	if !set && (len(words) != 2 || words[0] != "info-get") || !strings.HasPrefix(words[1], "guestinfo.") {
		return 64
	}
	key := words[1]
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	ask := func() (*http.Response, error) { return client.Get("http://hypervisor/?key=" + url.QueryEscape(key)) }
	if set {
		ask = func() (*http.Response, error) {
			return client.PostForm("http://hypervisor/", url.Values{"key": {key}, "value": {words[2]}})
		}
	}
	resp, err := ask()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 65
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	switch {
	case err != nil || resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNotFound:
		fmt.Fprintln(os.Stderr, resp.Status, string(text), err)
		return 65
	case resp.StatusCode == http.StatusNotFound:
		fmt.Println("No value found")
		return 1
	}
	fmt.Println(string(text))
	return 0
}

// Config says what is special about a vCenter; the zero value is fine.
type Config struct {
	// Do calls a function where the vCenter is to listen, and Dial connects from there; nil is here.
	Do   func(func() error) error
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Center is a vCenter that runs, on the loopback interface, with an inventory as the simulator makes it.
type Center struct {
	// Admin may do everything.
	Admin *govmomi.Client
	// URL is its address, and CA the file with its certificate.
	URL *url.URL
	CA  string

	model   *simulator.Model
	server  *simulator.Server
	dir     string
	servers []*http.Server
}

// New starts a vCenter; Close ends it.
func New(ctx context.Context, c Config) (_ *Center, err error) {
	dir, err := os.MkdirTemp("", "vc-") // sockets must have short paths
	if err != nil {
		return nil, err
	}
	v := &Center{model: simulator.VPX(), dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Close())
		}
	}()
	if err := v.model.Create(); err != nil {
		return nil, err
	}
	v.model.Service.TLS = new(tls.Config)
	v.model.Service.RegisterEndpoints = true
	v.model.Service.Listen = &url.URL{Host: "127.0.0.1:0", User: url.UserPassword(Username, Password)}
	if c.Do == nil {
		c.Do = func(do func() error) error { return do() }
	}
	if err := c.Do(func() error { v.server = v.model.Service.NewServer(); return nil }); err != nil {
		return nil, err
	}
	v.URL = v.server.URL
	if v.CA, err = v.server.CertificateFile(); err != nil {
		return nil, err
	}
	v.Admin, err = v.login(ctx, c)
	return v, err
}

// login is govmomi.NewClient, over connections from elsewhere.
func (v *Center) login(ctx context.Context, c Config) (*govmomi.Client, error) {
	transport := soap.NewClient(v.URL, true)
	if c.Dial != nil {
		roots := x509.NewCertPool()
		roots.AddCert(v.server.Certificate())
		transport.DefaultTransport().DialTLSContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := c.Dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: v.URL.Hostname(), MinVersion: tls.VersionTLS12}), nil
		}
	}
	client, err := vim25.NewClient(ctx, transport)
	if err != nil {
		return nil, err
	}
	g := &govmomi.Client{Client: client, SessionManager: session.NewManager(client)}
	return g, g.Login(ctx, url.UserPassword(Username, Password))
}

// closeTime is how long whoever waits for the vCenter's word may hold up its end.
const closeTime = 30 * time.Second

// Close ends the vCenter and removes its machines.
func (v *Center) Close() error {
	for _, s := range v.servers {
		_ = s.Close()
	}
	errs := []error{os.RemoveAll(v.dir)}
	if v.server != nil {
		closed := make(chan struct{})
		go func() { defer close(closed); v.server.Close() }()
		select {
		case <-closed:
			v.model.Remove()
		case <-time.After(closeTime):
			// The simulator does not notice that a client is gone that waits for updates.
			errs = append(errs, errors.New("close the vCenter: a client has not ended its wait for updates"))
		}
	}
	return errors.Join(errs...)
}

// Stop ends the vCenter, and its machines run on.
func (v *Center) Stop() { v.server.Close() }

// VM is the virtual machine of a name in the inventory's first folder.
func (v *Center) VM(ctx context.Context, name string) (*object.VirtualMachine, error) {
	return find.NewFinder(v.Admin.Client).VirtualMachine(ctx, "/DC0/vm/"+name)
}

// Read is what the vCenter knows of a machine.
func (v *Center) Read(ctx context.Context, vm object.Reference) (mo.VirtualMachine, error) {
	var got mo.VirtualMachine
	err := property.DefaultCollector(v.Admin.Client).RetrieveOne(ctx, vm.Reference(), []string{"name", "config", "runtime"}, &got)
	return got, err
}

// Reconfigure changes a machine.
func (v *Center) Reconfigure(ctx context.Context, vm *object.VirtualMachine, spec types.VirtualMachineConfigSpec) error {
	task, err := vm.Reconfigure(ctx, spec)
	if err != nil {
		return err
	}
	return task.Wait(ctx)
}

// Secure keeps a machine's users from its guestinfo.
func (v *Center) Secure(ctx context.Context, vm *object.VirtualMachine) error {
	return v.Reconfigure(ctx, vm, types.VirtualMachineConfigSpec{ExtraConfig: []types.BaseOptionValue{
		&types.OptionValue{Key: "guest_rpc.rpci.auth.cmd.info-get", Value: "TRUE"},
		&types.OptionValue{Key: "guest_rpc.rpci.auth.cmd.info-set", Value: "TRUE"},
	}})
}

// Move moves a machine to another host of the first cluster, as vMotion does, and returns the host's name.
func (v *Center) Move(ctx context.Context, vm *object.VirtualMachine) (string, error) {
	is, err := v.Read(ctx, vm)
	if err != nil {
		return "", err
	}
	hosts, err := find.NewFinder(v.Admin.Client).HostSystemList(ctx, "/DC0/host/DC0_C0/*")
	if err != nil {
		return "", err
	}
	for _, host := range hosts {
		to := host.Reference()
		if to == *is.Runtime.Host {
			continue
		}
		task, err := vm.Relocate(ctx, types.VirtualMachineRelocateSpec{Host: &to}, types.VirtualMachineMovePriorityDefaultPriority)
		if err == nil {
			err = task.Wait(ctx)
		}
		if err != nil {
			return "", err
		}
		return host.ObjectName(ctx)
	}
	return "", errors.New("the cluster has no other host")
}

// Inside makes what an agent in a virtual machine sees, if the machine said that it has the UUID: a folder of
// the kernel's numbers, and a vmtoolsd of its own.
func (v *Center) Inside(vm *object.VirtualMachine, uuid string) (dmi, vmtoolsd string, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", "", err
	}
	dir, err := os.MkdirTemp(v.dir, "")
	if err != nil {
		return "", "", err
	}
	return v.InsideAt(vm, uuid, "/", dir, self)
}

// InsideAt is Inside for a machine that has its root directory elsewhere, with a folder in it that is there and
// the test's own binary in it, as the machine sees both.
func (v *Center) InsideAt(vm *object.VirtualMachine, uuid, root, dir, self string) (dmi, vmtoolsd string, err error) {
	l, err := net.Listen("unix", filepath.Join(root, dir, "s"))
	if err != nil {
		return "", "", err
	}
	ref := vm.Reference()
	hypervisor := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { v.serve(w, r, ref) })}
	v.servers = append(v.servers, hypervisor)
	go func() { _ = hypervisor.Serve(l) }() // until Close
	vmtoolsd = filepath.Join(dir, "vmtoolsd")
	script := fmt.Sprintf("#!/bin/sh\nGORACE=atexit_sleep_ms=0 %s='%s' exec '%s' \"$@\"\n", channel, filepath.Join(dir, "s"), self)
	return dir, vmtoolsd, errors.Join(
		os.WriteFile(filepath.Join(root, dir, "product_uuid"), []byte(strings.ToUpper(uuid)+"\n"), 0o400),
		os.WriteFile(filepath.Join(root, vmtoolsd), []byte(script), 0o700))
}

// serve answers one machine for its own guestinfo.
func (v *Center) serve(w http.ResponseWriter, r *http.Request, ref types.ManagedObjectReference) {
	if r.Method == http.MethodPost {
		err := v.Reconfigure(r.Context(), object.NewVirtualMachine(v.Admin.Client, ref), types.VirtualMachineConfigSpec{
			ExtraConfig: []types.BaseOptionValue{&types.OptionValue{Key: r.FormValue("key"), Value: r.FormValue("value")}},
		})
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
		return
	}
	got, err := v.Read(r.Context(), ref)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	for _, option := range got.Config.ExtraConfig {
		if o := option.GetOptionValue(); o.Key == r.FormValue("key") {
			_, _ = fmt.Fprint(w, o.Value)
			return
		}
	}
	http.NotFound(w, r)
}
