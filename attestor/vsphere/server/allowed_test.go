package server

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/vsphere"
)

const uuid = "421a9e3f-5c00-1122-3344-5566778899aa"

func TestAllowed(t *testing.T) {
	type spoil func(c *vsphere.VCenter, vm *mo.VirtualMachine, at *place)
	in := func(accepted, is string) spoil {
		return func(c *vsphere.VCenter, _ *mo.VirtualMachine, at *place) {
			c.Folders, at.folder = []string{"/other", accepted}, is
		}
	}
	secured := func(keys ...string) spoil {
		return func(c *vsphere.VCenter, vm *mo.VirtualMachine, _ *place) {
			c.RequireSecureRPC = true
			for _, key := range keys {
				vm.Config.ExtraConfig = append(vm.Config.ExtraConfig, &types.OptionValue{Key: key, Value: "true"})
			}
		}
	}
	for name, c := range map[string]struct {
		spoil spoil
		says  string // empty: it may be attested
	}{
		"one that is as it should be": {func(*vsphere.VCenter, *mo.VirtualMachine, *place) {}, ""},
		"a template":                  {func(_ *vsphere.VCenter, vm *mo.VirtualMachine, _ *place) { vm.Config.Template = true }, "is a template"},
		"one that is suspended": {func(_ *vsphere.VCenter, vm *mo.VirtualMachine, _ *place) {
			vm.Runtime.PowerState = types.VirtualMachinePowerStateSuspended
		}, "not powered on"},
		"one that is off": {func(_ *vsphere.VCenter, vm *mo.VirtualMachine, _ *place) {
			vm.Runtime.PowerState = types.VirtualMachinePowerStatePoweredOff
		}, "not powered on"},
		"one without instance UUID":       {func(_ *vsphere.VCenter, vm *mo.VirtualMachine, _ *place) { vm.Config.InstanceUuid = "" }, "no instance UUID"},
		"one whose instance UUID is none": {func(_ *vsphere.VCenter, vm *mo.VirtualMachine, _ *place) { vm.Config.InstanceUuid = "../" + uuid }, "no instance UUID"},
		"the folder itself":               {in("/DC/vm/prod", "/DC/vm/prod"), ""},
		"a folder below":                  {in("/DC/vm/prod", "/DC/vm/prod/web"), ""},
		"any folder":                      {in("/", "/DC/vm"), ""},
		"a folder above":                  {in("/DC/vm/prod", "/DC/vm"), "none of the accepted folders"},
		"a folder that begins alike":      {in("/DC/vm/prod", "/DC/vm/prod-not"), "none of the accepted folders"},
		"another folder":                  {in("/DC/vm/prod", "/DC/vm/dev"), "none of the accepted folders"},
		"no folder":                       {in("/DC/vm/prod", ""), "none of the accepted folders"},
		"an accepted cluster": {func(c *vsphere.VCenter, _ *mo.VirtualMachine, at *place) {
			c.Clusters, at.cluster = []string{"a", "b"}, "b"
		}, ""},
		"another cluster": {func(c *vsphere.VCenter, _ *mo.VirtualMachine, at *place) {
			c.Clusters, at.cluster = []string{"a", "b"}, "c"
		}, "none of the accepted clusters"},
		"no cluster":                    {func(c *vsphere.VCenter, _ *mo.VirtualMachine, _ *place) { c.Clusters = []string{"a"} }, "none of the accepted clusters"},
		"guestinfo that is root's":      {secured(readRPC, writeRPC), ""},
		"guestinfo that all may write":  {secured(readRPC), "read or write guestinfo"},
		"guestinfo that all may read":   {secured(writeRPC), "read or write guestinfo"},
		"guestinfo that is everybody's": {secured(), "read or write guestinfo"},
	} {
		config := vsphere.VCenter{Folders: []string{"/"}}
		vm := mo.VirtualMachine{
			Config:  &types.VirtualMachineConfigInfo{InstanceUuid: strings.ToUpper(uuid)},
			Runtime: types.VirtualMachineRuntimeInfo{PowerState: types.VirtualMachinePowerStatePoweredOn},
		}
		var at place
		c.spoil(&config, &vm, &at)
		err := (&center{config: config}).allowed(&vm, at)
		if (err == nil) != (c.says == "") || err != nil && (!errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: error is %v, want %q", name, err, c.says)
		}
	}
}

// TestEvidenceThatIsNoneIsAskedNobodyAbout has no vCenter: what is taken for evidence is refused for that.
func TestEvidenceThatIsNoneIsAskedNobodyAbout(t *testing.T) {
	nonce := make([]byte, vsphere.NonceSize)
	for name, c := range map[string]struct {
		evidence vsphere.Evidence
		says     string
	}{
		"evidence that is some": {vsphere.Evidence{BIOSUUID: uuid, Nonce: nonce}, "no vCenter"},
		"a pattern":             {vsphere.Evidence{BIOSUUID: "*", Nonce: nonce}, "no UUID"},
		"a UUID and more":       {vsphere.Evidence{BIOSUUID: uuid + "0", Nonce: nonce}, "no UUID"},
		"no UUID":               {vsphere.Evidence{Nonce: nonce}, "no UUID"},
		"a short nonce":         {vsphere.Evidence{BIOSUUID: uuid, Nonce: nonce[1:]}, "no nonce"},
		"a long nonce":          {vsphere.Evidence{BIOSUUID: uuid, Nonce: append(nonce, 0)}, "no nonce"},
		"no nonce":              {vsphere.Evidence{BIOSUUID: uuid}, "no nonce"},
	} {
		payload, err := json.Marshal(c.evidence)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := new(judge).Judge(t.Context(), payload, nil); !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error is %v, want %q", name, err, c.says)
		}
	}
}
