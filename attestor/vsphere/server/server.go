// Package server is the server's side of vsphere: it finds the virtual machine in vCenter, writes a nonce
// into it, and believes who could read it.
//
// Why it is so: what a machine says of itself, its UUID, is copied with it, so it is only where to look.
// There must be exactly one virtual machine of that UUID, it must run, and it must be where the operator
// allows. What vCenter writes into that one is read by nobody in another machine, but by whoever may look at
// its configuration in vCenter; so the guest writes its answer back into guestinfo, which nobody does without
// being in it, or allowed to change it. The answer is for the key that the agent asks a certificate for.
// Afterwards all of this is looked at again. By default any user of a guest can read and write guestinfo;
// where the machine's configuration does not forbid that, its evidence is good once, as an EC2 identity
// document is.
package server

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
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
	// answerTime is how long what the guest wrote may take to be seen in vCenter, answerPause the wait between looks.
	answerTime, answerPause = 5 * time.Second, 200 * time.Millisecond
	// minTags and defaultTags are how often tags are asked for.
	minTags, defaultTags = time.Second, time.Minute
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
	centers []*center

	mu   sync.Mutex // guards busy
	busy map[vm]bool
}

// center is one vCenter with what is accepted of it.
type center struct {
	config      vsphere.VCenter
	vcenter     *vcenter
	tagsEvery   time.Duration
	trustDomain string
	log         logrus.FieldLogger
}

// vm is a virtual machine of all vCenters.
type vm struct {
	center *center
	ref    types.ManagedObjectReference
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*vsphere.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("vsphere configuration is a %T", config)
	}
	all, err := c.All()
	if err != nil {
		return nil, err
	}
	j := &judge{busy: map[vm]bool{}}
	for _, one := range all {
		v, err := openCenter(one, needs)
		if err != nil && one.Name != "" {
			err = fmt.Errorf("vcenter %q: %w", one.Name, err)
		}
		if err != nil {
			return nil, err
		}
		j.centers = append(j.centers, v)
	}
	return j, nil
}

func openCenter(c vsphere.VCenter, needs attestor.Needs) (*center, error) {
	if len(c.Folders) == 0 {
		return nil, errors.New(`folders is empty: name the folders whose virtual machines are accepted, as "/DC/vm/production", or "/" for all`)
	}
	for _, folder := range c.Folders {
		if !strings.HasPrefix(folder, "/") || folder != "/" && strings.HasSuffix(folder, "/") {
			return nil, fmt.Errorf("folders: %q is no inventory path like \"/DC/vm/production\"", folder)
		}
	}
	out := &center{config: c, trustDomain: needs.TrustDomain.Name(), log: needs.Log, tagsEvery: defaultTags}
	if c.TagsInterval != "" {
		every, err := time.ParseDuration(c.TagsInterval)
		if err != nil || every < minTags {
			return nil, fmt.Errorf("tags_interval: %q is no time of %s or more", c.TagsInterval, minTags)
		}
		out.tagsEvery = every
	}
	if out.log == nil {
		out.log = logrus.New()
	}
	if c.Name != "" {
		out.log = out.log.WithField("vcenter", c.Name)
	}
	var err error
	out.vcenter, err = newVCenter(c)
	return out, err
}

// guestAnswers reports whether the guest must write its answer.
func (v *center) guestAnswers() bool { return v.config.GuestAnswers == nil || *v.config.GuestAnswers }

// Judge believes evidence that is for no key.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	return j.JudgeFor(ctx, payload, attestor.KeyHash{}, ask)
}

// JudgeFor finds the virtual machine, challenges it and describes it.
func (j *judge) JudgeFor(ctx context.Context, payload []byte, key attestor.KeyHash, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence vsphere.Evidence
	if err := attestor.Decode(payload, &evidence); err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	if !vsphere.IsUUID(evidence.BIOSUUID) || len(evidence.Nonce) != vsphere.NonceSize {
		return attestor.Proof{}, attestor.Refusef("read evidence: it has no UUID or no nonce that is one")
	}
	v, c, err := j.where(ctx, evidence)
	if err != nil {
		return attestor.Proof{}, err
	}
	ref, _, _, err := v.find(ctx, c, evidence.BIOSUUID)
	if err != nil {
		return attestor.Proof{}, err
	}
	if !j.take(vm{v, ref}) {
		return attestor.Proof{}, attestor.Refusef("the virtual machine is being attested already")
	}
	defer j.release(vm{v, ref})
	if err := v.challenge(ctx, c, ref, evidence, key, ask); err != nil {
		return attestor.Proof{}, err
	}
	again, is, at, err := v.find(ctx, c, evidence.BIOSUUID)
	if err != nil {
		return attestor.Proof{}, err
	}
	if again != ref {
		return attestor.Proof{}, attestor.Refusef("another virtual machine has the UUID by now")
	}
	selectors, err := v.describe(ctx, c, &is, at)
	if err != nil {
		return attestor.Proof{}, err
	}
	return attestor.Proof{Path: pathOf(c, is.Config.InstanceUuid), Selectors: selectors, CanReattest: v.secure(&is)}, nil
}

// where finds the vCenter of a virtual machine: the one that the agent names, or the one that has it.
func (j *judge) where(ctx context.Context, e vsphere.Evidence) (*center, *vim25.Client, error) {
	var at *center
	var client *vim25.Client
	for _, v := range j.centers {
		if e.VCenter != "" && e.VCenter != v.config.Name {
			continue
		}
		c, err := v.vcenter.get(ctx)
		if err != nil {
			return nil, nil, err
		}
		if e.VCenter != "" || len(j.centers) == 1 {
			return v, c, nil
		}
		refs, err := byUUID(ctx, c, e.BIOSUUID)
		switch {
		case err != nil:
			return nil, nil, err
		case len(refs) == 0:
		case at != nil:
			return nil, nil, attestor.Refusef("more than one vCenter has a virtual machine with this UUID; give clones UUIDs of their own, or name the vcenter in the agent's file")
		default:
			at, client = v, c
		}
	}
	if at == nil {
		return nil, nil, attestor.Refusef("no vCenter of this server's has a virtual machine with this UUID, or is called so")
	}
	return at, client, nil
}

func pathOf(c *vim25.Client, instance string) string {
	return strings.Join([]string{vsphere.Type, c.ServiceContent.About.InstanceUuid, instance}, "/")
}

// secure reports whether only root in the guest can answer.
func (v *center) secure(vm *mo.VirtualMachine) bool {
	on := func(key string) bool { return strings.EqualFold(extra(vm, key), "TRUE") }
	return on(readRPC) && (!v.guestAnswers() || on(writeRPC))
}

// find returns the one virtual machine of a UUID if it may be attested.
func (v *center) find(ctx context.Context, c *vim25.Client, uuid string) (types.ManagedObjectReference, mo.VirtualMachine, place, error) {
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
	if err := v.allowed(&vm, at); err != nil {
		return none, vm, place{}, err
	}
	return refs[0], vm, at, nil
}

// allowed says why a virtual machine may not be attested, or nil.
func (v *center) allowed(vm *mo.VirtualMachine, at place) error {
	inFolder := slices.ContainsFunc(v.config.Folders, func(folder string) bool {
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
	case len(v.config.Clusters) > 0 && !slices.Contains(v.config.Clusters, at.cluster):
		return attestor.Refusef("the virtual machine is in none of the accepted clusters")
	case v.config.RequireSecureRPC && !v.secure(vm):
		return attestor.Refusef("any user of the virtual machine can read or write guestinfo; set %s and %s to \"TRUE\"", readRPC, writeRPC)
	}
	return nil
}

// take lets one attestation of a virtual machine run at a time: a stranger who knows its UUID can start
// one, but not read or change another's nonce.
func (j *judge) take(one vm) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.busy[one] {
		return false
	}
	j.busy[one] = true
	return true
}

func (j *judge) release(one vm) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.busy, one)
}

// challenge writes a nonce into the virtual machine, asks for it, and removes it whatever comes of that.
func (v *center) challenge(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference, e vsphere.Evidence, own attestor.KeyHash, ask attestor.Ask) error {
	nonce, session := make([]byte, vsphere.NonceSize), make([]byte, 16)
	_, _ = rand.Read(nonce)
	_, _ = rand.Read(session)
	question := vsphere.Challenge{Key: vsphere.KeyPrefix + hex.EncodeToString(session)}
	if v.guestAnswers() {
		question.Answer = vsphere.AnswerPrefix + hex.EncodeToString(session)
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
		defer cancel()
		gone := map[string]string{question.Key: ""}
		if text, err := getExtra(clean, c, ref, question.Answer); question.Answer != "" && (err != nil || text != "") {
			gone[question.Answer] = ""
		}
		if err := setExtra(clean, c, ref, gone); err != nil {
			v.log.WithError(err).WithField("vm", ref.Value).Warn("a nonce that is used up cannot be removed from the virtual machine")
		}
	}()
	if err := setExtra(ctx, c, ref, map[string]string{question.Key: base64.StdEncoding.EncodeToString(nonce)}); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, challengeTime)
	defer cancel()
	var response vsphere.Response
	err := attestor.Challenge(limited, ask, question, &response)
	switch {
	case err != nil && ctx.Err() == nil && limited.Err() != nil && !errors.Is(err, attestor.ErrEvidence):
		return attestor.Refusef("the virtual machine did not answer within %s", challengeTime)
	case err != nil:
		return err
	}
	want := vsphere.MAC(nonce, e.Nonce, question.Key, v.trustDomain, e.BIOSUUID, own)
	if !hmac.Equal(response.MAC, want) {
		return attestor.Refusef("verify answer: it was not made with the nonce that is in the virtual machine, or for another key")
	}
	if question.Answer == "" {
		return nil
	}
	return v.written(ctx, c, ref, question.Answer, want)
}

// written waits for what the guest has written to be seen: an honest one wrote it before it answered.
func (v *center) written(ctx context.Context, c *vim25.Client, ref types.ManagedObjectReference, key string, want []byte) error {
	end := time.NewTimer(answerTime)
	defer end.Stop()
	for {
		text, err := getExtra(ctx, c, ref, key)
		if err != nil {
			return err
		}
		if text != "" {
			got, err := base64.StdEncoding.DecodeString(text)
			if err != nil || !hmac.Equal(got, want) {
				return attestor.Refusef("verify answer: the virtual machine has written another")
			}
			return nil
		}
		select {
		case <-time.After(answerPause):
		case <-end.C:
			return attestor.Refusef("verify answer: the virtual machine has not written it into guestinfo (is isolation.tools.setinfo.disable set?)")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// describe makes the selectors.
func (v *center) describe(ctx context.Context, c *vim25.Client, vm *mo.VirtualMachine, at place) ([]attestor.Selector, error) {
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
	add("secure-rpc", fmt.Sprint(v.secure(vm)))
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
	if v.config.Tags {
		attached, err := v.vcenter.attached(ctx, c, vm.Self)
		if err != nil {
			return nil, err
		}
		for _, tag := range attached[vm.Self] {
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
