// Package server is the server's side of vsphere: it finds the virtual machine in vCenter, writes a nonce
// into it, and believes who could read it.
//
// Why it is so: what a machine says of itself, its UUID, is copied with it, so it is only where to look.
// There must be exactly one virtual machine of that UUID, it must run, and it must be where the operator
// allows; then what vCenter writes into that one is read by nobody outside of it. After the answer all of
// this is looked at again. By default any user of a guest can read guestinfo; where the machine's
// configuration does not forbid that, its evidence is good once, as an EC2 identity document is.
package server

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/vsphere"
)

const (
	// challengeTime is how long a guest may take to read its nonce.
	challengeTime = 20 * time.Second
	// cleanTime is how long removing the nonce may take afterwards.
	cleanTime = 10 * time.Second
	// maxValues bounds the selectors out of tags and custom attributes.
	maxValues = 128
)

// Kind returns the server's side of vsphere.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: vsphere.Type, Config: func() any { return new(vsphere.ServerConfig) }, Open: open}
}

type judge struct {
	config      vsphere.ServerConfig
	vcenter     *vcenter
	trustDomain string
	log         logrus.FieldLogger

	mu   sync.Mutex // guards busy
	busy map[types.ManagedObjectReference]bool
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*vsphere.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("vsphere configuration is a %T", config)
	}
	if len(c.Folders) == 0 {
		return nil, errors.New(`folders is empty: name the folders whose virtual machines are accepted, as "/DC/vm/production", or "/" for all`)
	}
	for _, folder := range c.Folders {
		if !strings.HasPrefix(folder, "/") || folder != "/" && strings.HasSuffix(folder, "/") {
			return nil, fmt.Errorf("folders: %q is no inventory path like \"/DC/vm/production\"", folder)
		}
	}
	v, err := newVCenter(*c)
	if err != nil {
		return nil, err
	}
	log := needs.Log
	if log == nil {
		log = logrus.New()
	}
	return &judge{config: *c, vcenter: v, trustDomain: needs.TrustDomain.Name(), log: log, busy: map[types.ManagedObjectReference]bool{}}, nil
}

// Judge finds the virtual machine, challenges it and describes it.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence vsphere.Evidence
	if err := vsphere.Decode(payload, &evidence); err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	if !vsphere.IsUUID(evidence.BIOSUUID) || len(evidence.Nonce) != vsphere.NonceSize {
		return attestor.Proof{}, attestor.Refusef("read evidence: it has no UUID or no nonce that is one")
	}
	c, err := j.vcenter.get(ctx)
	if err != nil {
		return attestor.Proof{}, err
	}
	ref, _, _, err := j.find(ctx, c, evidence.BIOSUUID)
	if err != nil {
		return attestor.Proof{}, err
	}
	if !j.take(ref) {
		return attestor.Proof{}, attestor.Refusef("the virtual machine is being attested already")
	}
	defer j.release(ref)
	if err := j.challenge(ctx, c, ref, evidence, ask); err != nil {
		return attestor.Proof{}, err
	}
	again, vm, at, err := j.find(ctx, c, evidence.BIOSUUID)
	if err != nil {
		return attestor.Proof{}, err
	}
	if again != ref {
		return attestor.Proof{}, attestor.Refusef("another virtual machine has the UUID by now")
	}
	selectors, err := j.describe(ctx, c, &vm, at)
	if err != nil {
		return attestor.Proof{}, err
	}
	return attestor.Proof{Path: pathOf(c, vm.Config.InstanceUuid), Selectors: selectors, CanReattest: secure(&vm)}, nil
}

func pathOf(c *vim25.Client, instance string) string {
	return strings.Join([]string{vsphere.Type, c.ServiceContent.About.InstanceUuid, instance}, "/")
}

func secure(vm *mo.VirtualMachine) bool { return strings.EqualFold(extra(vm, secureRPC), "TRUE") }

// find returns the one virtual machine of a UUID if it may be attested.
func (j *judge) find(ctx context.Context, c *vim25.Client, uuid string) (types.ManagedObjectReference, mo.VirtualMachine, place, error) {
	var none types.ManagedObjectReference
	var vm mo.VirtualMachine
	refs, err := byUUID(ctx, c, uuid)
	if err != nil {
		return none, vm, place{}, err
	}
	switch len(refs) {
	case 0:
		return none, vm, place{}, attestor.Refusef("vCenter has no virtual machine with this UUID")
	case 1:
	default:
		return none, vm, place{}, attestor.Refusef("vCenter has %d virtual machines with this UUID; give clones UUIDs of their own", len(refs))
	}
	if vm, err = readVM(ctx, c, refs[0]); err != nil {
		return none, vm, place{}, err
	}
	at, err := locate(ctx, c, &vm)
	if err != nil {
		return none, vm, place{}, err
	}
	if err := j.allowed(&vm, at); err != nil {
		return none, vm, place{}, err
	}
	return refs[0], vm, at, nil
}

// allowed says why a virtual machine may not be attested, or nil.
func (j *judge) allowed(vm *mo.VirtualMachine, at place) error {
	inFolder := slices.ContainsFunc(j.config.Folders, func(folder string) bool {
		return folder == "/" || at.folder == folder || strings.HasPrefix(at.folder, folder+"/")
	})
	switch {
	case vm.Config.Template:
		return attestor.Refusef("the virtual machine is a template")
	case vm.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn:
		return attestor.Refusef("the virtual machine is not powered on")
	case vm.Config.InstanceUuid == "" || !vsphere.IsUUID(strings.ToLower(vm.Config.InstanceUuid)):
		return attestor.Refusef("the virtual machine has no instance UUID")
	case !inFolder:
		return attestor.Refusef("the virtual machine is in none of the accepted folders")
	case len(j.config.Clusters) > 0 && !slices.Contains(j.config.Clusters, at.cluster):
		return attestor.Refusef("the virtual machine is in none of the accepted clusters")
	case j.config.RequireSecureRPC && !secure(vm):
		return attestor.Refusef("any user of the virtual machine can read guestinfo; set %s = \"TRUE\"", secureRPC)
	}
	return nil
}

// take lets one attestation of a virtual machine run at a time: a stranger who knows its UUID can start
// one, but not read or change another's nonce.
func (j *judge) take(ref types.ManagedObjectReference) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.busy[ref] {
		return false
	}
	j.busy[ref] = true
	return true
}

func (j *judge) release(ref types.ManagedObjectReference) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.busy, ref)
}

// challenge writes a nonce into the virtual machine, asks for it, and removes it whatever comes of that.
func (j *judge) challenge(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference, e vsphere.Evidence, ask attestor.Ask) error {
	nonce, session := make([]byte, vsphere.NonceSize), make([]byte, 16)
	_, _ = rand.Read(nonce)
	_, _ = rand.Read(session)
	key := vsphere.KeyPrefix + hex.EncodeToString(session)
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
		defer cancel()
		if err := setExtra(clean, c, ref, key, ""); err != nil {
			j.log.WithError(err).WithField("vm", ref.Value).Warn("a nonce that is used up cannot be removed from the virtual machine")
		}
	}()
	if err := setExtra(ctx, c, ref, key, base64.StdEncoding.EncodeToString(nonce)); err != nil {
		return err
	}
	question, err := json.Marshal(vsphere.Challenge{Key: key})
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, challengeTime)
	defer cancel()
	said, err := ask(limited, question)
	switch {
	case err != nil && ctx.Err() == nil && limited.Err() != nil:
		return attestor.Refusef("the virtual machine did not answer within %s", challengeTime)
	case err != nil:
		return fmt.Errorf("ask challenge: %w", err)
	case len(said) > attestor.MaxEvidence:
		return attestor.Refusef("read answer: it is too large")
	}
	var response vsphere.Response
	if err := vsphere.Decode(said, &response); err != nil {
		return attestor.Refusef("read answer: %w", err)
	}
	if !hmac.Equal(response.MAC, vsphere.MAC(nonce, e.Nonce, key, j.trustDomain, e.BIOSUUID)) {
		return attestor.Refusef("verify answer: it was not made with the nonce that is in the virtual machine")
	}
	return nil
}

// describe makes the selectors.
func (j *judge) describe(ctx context.Context, c *vim25.Client, vm *mo.VirtualMachine, at place) ([]attestor.Selector, error) {
	var found []attestor.Selector
	add := func(key, value string) {
		s := attestor.Selector{Type: vsphere.Type, Value: key + ":" + value}
		if value != "" && s.Check() == nil { // a name is no reason to refuse a proved machine
			found = append(found, s)
		}
	}
	add("vcenter", c.ServiceContent.About.InstanceUuid)
	add("datacenter", at.datacenter)
	add("cluster", at.cluster)
	add("host", at.host)
	add("folder", at.folder)
	add("resource-pool", at.pool)
	add("vm-name", vm.Name)
	add("instance-uuid", vm.Config.InstanceUuid)
	add("moid", vm.Self.Value)
	add("guest-id", vm.Config.GuestId)
	add("secure-rpc", fmt.Sprint(secure(vm)))
	add("vtpm", fmt.Sprint(hasTPM(vm)))
	if len(vm.CustomValue) > 0 && c.ServiceContent.CustomFieldsManager != nil {
		fields, err := object.NewCustomFieldsManager(c).Field(ctx)
		if err != nil {
			return nil, fmt.Errorf("read custom attributes: %w", err)
		}
		for _, value := range vm.CustomValue[:min(len(vm.CustomValue), maxValues)] {
			text, ok := value.(*types.CustomFieldStringValue)
			if def := fields.ByKey(value.GetCustomFieldValue().Key); ok && def != nil {
				add("custom-attr", def.Name+":"+text.Value)
			}
		}
	}
	if j.config.Tags {
		attached, err := j.vcenter.attached(ctx, c, vm.Self)
		if err != nil {
			return nil, err
		}
		for _, tag := range attached {
			add("tag", tag[0]+":"+tag[1])
		}
	}
	return attestor.NewSet(found...).All(), nil
}

func hasTPM(vm *mo.VirtualMachine) bool {
	return slices.ContainsFunc(vm.Config.Hardware.Device, func(d types.BaseVirtualDevice) bool {
		_, is := d.(*types.VirtualTPM)
		return is
	})
}
