package vsphere_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/vsphere"
	"github.com/assay-id/assay/attestor/vsphere/node"
	"github.com/assay-id/assay/attestor/vsphere/server"
	"github.com/assay-id/assay/test/fake/vcenter"
)

// TestMain lets the test binary be vmtoolsd.
func TestMain(m *testing.M) {
	vcenter.Guest()
	os.Exit(m.Run())
}

// center is a vCenter of the test's own, whose errors end it.
type center struct {
	t      testing.TB
	v      *vcenter.Center
	admin  *govmomi.Client
	secret string
}

func newCenter(t testing.TB) *center {
	t.Helper()
	v, err := vcenter.New(t.Context(), vcenter.Config{})
	if err != nil {
		t.Fatal(err)
	}
	c := &center{t: t, v: v, admin: v.Admin, secret: filepath.Join(t.TempDir(), "password")}
	t.Cleanup(func() { c.must(v.Close()) })
	c.must(os.WriteFile(c.secret, []byte(vcenter.Password+"\n"), 0o600))
	return c
}

func (c *center) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *center) vm(name string) *object.VirtualMachine {
	c.t.Helper()
	vm, err := c.v.VM(c.t.Context(), name)
	c.must(err)
	return vm
}

func (c *center) read(vm *object.VirtualMachine) mo.VirtualMachine {
	c.t.Helper()
	got, err := c.v.Read(c.t.Context(), vm)
	c.must(err)
	return got
}

func (c *center) reconfigure(vm *object.VirtualMachine, spec types.VirtualMachineConfigSpec) {
	c.t.Helper()
	c.must(c.v.Reconfigure(c.t.Context(), vm, spec))
}

func (c *center) secure(vm *object.VirtualMachine) {
	c.t.Helper()
	c.must(c.v.Secure(c.t.Context(), vm))
}

// judgeConfig is the server's configuration, with more of it.
func (c *center) judgeConfig(more string) string {
	return fmt.Sprintf("vcenter_url = \"https://%s\"\nusername = %q\npassword_file = %q\nca_path = %q\n", c.v.URL.Host, vcenter.Username, c.secret, c.v.CA) + more
}

// inside is the configuration of an agent in a virtual machine that says it has the UUID.
func (c *center) inside(vm *object.VirtualMachine, uuid string) string {
	c.t.Helper()
	dmi, vmtoolsd, err := c.v.Inside(vm, uuid)
	c.must(err)
	return fmt.Sprintf("vmtoolsd_path = %q\ndmi_path = %q\n", vmtoolsd, dmi)
}

func (c *center) judge(more string) attestor.Judge {
	c.t.Helper()
	return attestortest.OpenJudge(c.t, server.Kind(), c.judgeConfig(more), attestor.Needs{})
}

func (c *center) evidence(inside string) ([]byte, attestor.Ask) {
	c.t.Helper()
	payload, answer, err := attestortest.OpenNode(c.t, node.Kind(), inside, attestor.Needs{}).Evidence(c.t.Context())
	c.must(err)
	return payload, answer
}

func TestSuite(t *testing.T) {
	c := newCenter(t)
	vm := c.vm("DC0_C0_RP0_VM0")
	c.secure(vm)
	fields, err := object.GetCustomFieldsManager(c.admin.Client)
	c.must(err)
	field, err := fields.Add(t.Context(), "owner", "VirtualMachine", nil, nil)
	c.must(err)
	c.must(fields.Set(t.Context(), vm.Reference(), field.Key, "shop"))
	restClient := rest.NewClient(c.admin.Client)
	c.must(restClient.Login(t.Context(), url.UserPassword(vcenter.Username, vcenter.Password)))
	manager := tags.NewManager(restClient)
	category, err := manager.CreateCategory(t.Context(), &tags.Category{Name: "zone", Cardinality: "SINGLE"})
	c.must(err)
	tag, err := manager.CreateTag(t.Context(), &tags.Tag{Name: "dmz", CategoryID: category})
	c.must(err)
	c.must(manager.AttachTag(t.Context(), tag, vm.Reference()))
	is := c.read(vm)
	id := c.admin.ServiceContent.About.InstanceUuid
	host := object.NewHostSystem(c.admin.Client, *is.Runtime.Host)
	hostName, err := host.ObjectName(t.Context())
	c.must(err)
	attestortest.Run(t, attestortest.Pair{
		Node: node.Kind(), Judge: server.Kind(),
		NodeConfig: c.inside(vm, is.Config.Uuid), JudgeConfig: c.judgeConfig("folders = [\"/DC0/vm\"]\nclusters = [\"DC0_C0\"]\nrequire_secure_rpc = true\ntags = true\n"),
		Path: "vsphere/" + id + "/" + is.Config.InstanceUuid,
		Selectors: slices.Sorted(slices.Values([]string{
			"vsphere:vcenter:" + id, "vsphere:datacenter:DC0", "vsphere:cluster:DC0_C0", "vsphere:host:" + hostName, "vsphere:folder:/DC0/vm",
			"vsphere:resource-pool:Resources", "vsphere:vm-name:DC0_C0_RP0_VM0", "vsphere:instance-uuid:" + is.Config.InstanceUuid,
			"vsphere:moid:" + vm.Reference().Value, "vsphere:guest-id:" + is.Config.GuestId, "vsphere:secure-rpc:true", "vsphere:vtpm:false",
			"vsphere:custom-attr:owner:shop", "vsphere:tag:zone:dmz",
		})),
		CanReattest: true,
		Foreign: map[string][]byte{
			"no machine": []byte(`{"bios_uuid":"00000000-0000-0000-0000-000000000000","nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`),
			"a pattern":  []byte(`{"bios_uuid":"*","nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`),
			"no nonce":   []byte(`{"bios_uuid":"` + is.Config.Uuid + `","nonce":""}`),
		},
		README: "README.md",
	})
	t.Run("no nonce is left behind", func(t *testing.T) {
		for _, option := range c.read(vm).Config.ExtraConfig {
			if o := option.GetOptionValue(); strings.HasPrefix(o.Key, "guestinfo.assay.") {
				t.Errorf("%s = %v", o.Key, o.Value)
			}
		}
	})
}

func TestForgeries(t *testing.T) {
	c := newCenter(t)
	vm, other := c.vm("DC0_H0_VM0"), c.vm("DC0_H0_VM1")
	uuid := c.read(vm).Config.Uuid
	payload, answer := c.evidence(c.inside(vm, uuid))
	all := c.judge(`folders = ["/"]`)
	refuse := func(t *testing.T, judge attestor.Judge, ask attestor.Ask, want string) {
		t.Helper()
		proof, err := judge.Judge(t.Context(), payload, ask)
		if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v; want %q", proof, err, want)
		}
	}
	t.Run("without the secure setting it is believed once", func(t *testing.T) {
		proof, err := all.Judge(t.Context(), payload, answer)
		if err != nil || proof.CanReattest || !slices.Contains(attestor.NewSet(proof.Selectors...).Strings(), "vsphere:secure-rpc:false") {
			t.Errorf("%+v, %v", proof, err)
		}
		refuse(t, c.judge("folders = [\"/\"]\nrequire_secure_rpc = true"), answer, "any user")
	})
	t.Run("another machine that says it is this one cannot read its nonce", func(t *testing.T) {
		_, byOther := c.evidence(c.inside(other, uuid))
		if proof, err := all.Judge(t.Context(), payload, byOther); err == nil {
			t.Errorf("believed: %+v", proof)
		}
	})
	t.Run("two machines that answer one nonce: the second is refused meanwhile", func(t *testing.T) {
		asked := false
		proof, err := all.Judge(t.Context(), payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
			asked = true
			refuse(t, all, answer, "being attested already")
			return answer(ctx, challenge)
		})
		if err != nil || !asked {
			t.Errorf("%+v, %v", proof, err)
		}
	})
	t.Run("an answer made for another trust domain's server is refused", func(t *testing.T) {
		var e vsphere.Evidence
		c.must(json.Unmarshal(payload, &e))
		refuse(t, all, func(_ context.Context, challenge []byte) ([]byte, error) {
			var q vsphere.Challenge
			c.must(json.Unmarshal(challenge, &q))
			nonce := make([]byte, vsphere.NonceSize)
			return json.Marshal(vsphere.Response{MAC: vsphere.MAC(nonce, e.Nonce, q.Key, "other.org", uuid, attestor.KeyHash{})})
		}, "not made with the nonce")
	})
	t.Run("somebody who reads the nonce in vCenter, and is not in the machine", func(t *testing.T) {
		// Whoever may look at a machine's configuration sees its guestinfo. They start an attestation of
		// their own, for a key of their own, and make the answer; but they cannot write it.
		mine := attestor.KeyHash{7}
		var e vsphere.Evidence
		c.must(json.Unmarshal(payload, &e))
		forge := func(_ context.Context, challenge []byte) ([]byte, error) {
			var q vsphere.Challenge
			c.must(json.Unmarshal(challenge, &q))
			for _, option := range c.read(vm).Config.ExtraConfig {
				if o := option.GetOptionValue(); o.Key == q.Key {
					nonce, err := base64.StdEncoding.DecodeString(o.Value.(string))
					c.must(err)
					return json.Marshal(vsphere.Response{MAC: vsphere.MAC(nonce, e.Nonce, q.Key, attestortest.TrustDomain.Name(), uuid, mine)})
				}
			}
			return nil, errors.New("there is no nonce")
		}
		proof, err := all.(attestor.KeyJudge).JudgeFor(t.Context(), payload, mine, forge)
		if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "has not written it") {
			t.Errorf("%+v, %v", proof, err)
		}
		t.Run("is believed where the guest need not write", func(t *testing.T) {
			if _, err := c.judge("folders = [\"/\"]\nguest_answers = false").(attestor.KeyJudge).JudgeFor(t.Context(), payload, mine, forge); err != nil {
				t.Errorf("the README says otherwise: %v", err)
			}
		})
	})
	t.Run("an answer for another key than is asked for", func(t *testing.T) {
		proof, err := all.(attestor.KeyJudge).JudgeFor(t.Context(), payload, attestor.KeyHash{7}, answer)
		if !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "for another key") {
			t.Errorf("%+v, %v", proof, err)
		}
	})
	t.Run("the machine writes another answer than is sent", func(t *testing.T) {
		refuse(t, all, func(ctx context.Context, challenge []byte) ([]byte, error) {
			said, err := answer(ctx, challenge)
			var q vsphere.Challenge
			c.must(json.Unmarshal(challenge, &q))
			c.reconfigure(vm, types.VirtualMachineConfigSpec{ExtraConfig: []types.BaseOptionValue{
				&types.OptionValue{Key: q.Answer, Value: base64.StdEncoding.EncodeToString(make([]byte, 32))},
			}})
			return said, err
		}, "has written another")
	})
	t.Run("reading alone is kept from its users, and writing is not", func(t *testing.T) {
		c.reconfigure(other, types.VirtualMachineConfigSpec{ExtraConfig: []types.BaseOptionValue{
			&types.OptionValue{Key: "guest_rpc.rpci.auth.cmd.info-get", Value: "TRUE"},
		}})
		payload, answer := c.evidence(c.inside(other, c.read(other).Config.Uuid))
		if proof, err := all.Judge(t.Context(), payload, answer); err != nil || proof.CanReattest {
			t.Errorf("%+v, %v", proof, err)
		}
		if proof, err := c.judge("folders = [\"/\"]\nguest_answers = false").Judge(t.Context(), payload, answer); err != nil || !proof.CanReattest {
			t.Errorf("%+v, %v", proof, err)
		}
	})
	t.Run("a guest that is too slow ends with the attestation, and leaves no nonce", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err := all.Judge(ctx, payload, func(ctx context.Context, _ []byte) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
		for _, option := range c.read(vm).Config.ExtraConfig {
			if o := option.GetOptionValue(); strings.HasPrefix(o.Key, "guestinfo.assay.") {
				t.Errorf("left behind: %s", o.Key)
			}
		}
	})
	t.Run("folders and clusters that are not accepted", func(t *testing.T) {
		refuse(t, c.judge(`folders = ["/DC0/vm/prod"]`), answer, "accepted folders")
		refuse(t, c.judge(`folders = ["/DC0/v"]`), answer, "accepted folders")
		refuse(t, c.judge("folders = [\"/\"]\nclusters = [\"DC0_C0\"]"), answer, "accepted clusters")
	})
	t.Run("a clone that is given the UUID while the nonce is out", func(t *testing.T) {
		before := c.read(other).Config.Uuid
		defer c.reconfigure(other, types.VirtualMachineConfigSpec{Uuid: before})
		refuse(t, all, func(ctx context.Context, challenge []byte) ([]byte, error) {
			c.reconfigure(other, types.VirtualMachineConfigSpec{Uuid: uuid})
			return answer(ctx, challenge)
		}, "2 virtual machines")
		refuse(t, all, answer, "2 virtual machines") // and ever after
	})
	t.Run("another machine that is given the UUID alone while the nonce is out", func(t *testing.T) {
		before := c.read(other).Config.Uuid
		defer func() {
			c.reconfigure(other, types.VirtualMachineConfigSpec{Uuid: before})
			c.reconfigure(vm, types.VirtualMachineConfigSpec{Uuid: uuid})
		}()
		refuse(t, all, func(ctx context.Context, challenge []byte) ([]byte, error) {
			said, err := answer(ctx, challenge)
			c.reconfigure(vm, types.VirtualMachineConfigSpec{Uuid: "421a9e3f-5c00-1122-3344-5566778899aa"})
			c.reconfigure(other, types.VirtualMachineConfigSpec{Uuid: uuid})
			return said, err
		}, "another virtual machine has the UUID by now")
	})
	t.Run("a session that vCenter has ended is begun anew", func(t *testing.T) {
		if _, err := all.Judge(t.Context(), payload, answer); err != nil {
			t.Fatal(err)
		}
		var sessions mo.SessionManager
		c.must(property.DefaultCollector(c.admin.Client).RetrieveOne(t.Context(), *c.admin.ServiceContent.SessionManager, []string{"sessionList", "currentSession"}, &sessions))
		for _, s := range sessions.SessionList {
			if s.Key != sessions.CurrentSession.Key {
				c.must(c.admin.SessionManager.TerminateSession(t.Context(), []string{s.Key}))
			}
		}
		if _, err := all.Judge(t.Context(), payload, answer); err != nil {
			t.Error(err)
		}
	})
	t.Run("a machine that is powered off", func(t *testing.T) {
		task, err := vm.PowerOff(t.Context())
		c.must(err)
		c.must(task.Wait(t.Context()))
		refuse(t, all, answer, "not powered on")
	})
	t.Run("a vCenter whose certificate is from nobody we know gets no password", func(t *testing.T) {
		body := strings.Replace(c.judgeConfig(`folders = ["/"]`), "ca_path", "#", 1)
		config, _ := attestortest.Decode(server.Kind().Config, body)
		judge, err := server.Kind().Open(config, attestor.Needs{TrustDomain: attestortest.TrustDomain})
		c.must(err)
		if _, err := judge.Judge(t.Context(), payload, answer); err == nil || errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("a vCenter that is away is nobody's fault", func(t *testing.T) {
		c.v.Stop()
		if _, err := all.Judge(t.Context(), payload, answer); err == nil || errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestNode(t *testing.T) {
	c := newCenter(t)
	vm := c.vm("DC0_H0_VM0")
	_, answer := c.evidence(c.inside(vm, c.read(vm).Config.Uuid))
	t.Run("it reads no other key than a nonce's", func(t *testing.T) {
		for _, key := range []string{"guestinfo.ovfEnv", "guestinfo.assay.nonce.", "guestinfo.assay.nonce.00000000000000000000000000000000 x", "$(reboot)"} {
			question, _ := json.Marshal(vsphere.Challenge{Key: key})
			if _, err := answer(t.Context(), question); err == nil || !strings.Contains(err.Error(), "key") {
				t.Errorf("%q: %v", key, err)
			}
		}
	})
	t.Run("it writes to no other key than the answer's", func(t *testing.T) {
		key := vsphere.KeyPrefix + strings.Repeat("0", 32)
		for _, to := range []string{"guestinfo.userdata", key, vsphere.AnswerPrefix, vsphere.AnswerPrefix + strings.Repeat("1", 32), vsphere.AnswerPrefix + strings.Repeat("0", 32) + " x"} {
			question, _ := json.Marshal(vsphere.Challenge{Key: key, Answer: to})
			if _, err := answer(t.Context(), question); err == nil || !strings.Contains(err.Error(), "no answer is written to") {
				t.Errorf("%q: %v", to, err)
			}
		}
	})
	t.Run("VMware's serial number tells the UUID", func(t *testing.T) {
		for serial, want := range map[string]string{
			"VMware-42 1a 9e 3f 5c 00 11 22-33 44 55 66 77 88 99 aa\n": "421a9e3f-5c00-1122-3344-5566778899aa",
			"VMware-42": "", "Dell-1": "", "": "",
		} {
			if got, ok := vsphere.UUIDOfSerial(serial); got != want && ok {
				t.Errorf("%q: %q", serial, got)
			}
		}
	})
	t.Run("a vmtoolsd that hangs, fails or floods is an error", func(t *testing.T) {
		for why, script := range map[string]string{"hangs": "sleep 60", "fails": "echo oops >&2; exit 3", "floods": "yes", "is silent": "true"} {
			dir := t.TempDir()
			c.must(os.WriteFile(filepath.Join(dir, "product_uuid"), []byte("421a9e3f-5c00-1122-3344-5566778899aa"), 0o400))
			c.must(os.WriteFile(filepath.Join(dir, "vmtoolsd"), []byte("#!/bin/sh\n"+script+"\n"), 0o700))
			_, answer := c.evidence(fmt.Sprintf("vmtoolsd_path = %q\ndmi_path = %q\n", filepath.Join(dir, "vmtoolsd"), dir))
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			question, _ := json.Marshal(vsphere.Challenge{Key: vsphere.KeyPrefix + strings.Repeat("0", 32)})
			if said, err := answer(ctx, question); err == nil {
				t.Errorf("%s: %q", why, said)
			}
			cancel()
		}
	})
}

// told collects what a judge tells of the one agent it has admitted.
type told struct {
	known string
	said  chan string
	set   atomic.Pointer[attestor.Set]
}

// has says which selectors the agent has.
func (n *told) has(set attestor.Set) { n.set.Store(&set) }

func (n *told) Each() iter.Seq2[string, attestor.Set] {
	return func(yield func(string, attestor.Set) bool) {
		if set := n.set.Load(); set != nil {
			yield(n.known, *set)
			return
		}
		yield(n.known, attestor.Set{})
	}
}

func (n *told) Update(_ context.Context, path string, s []attestor.Selector) error {
	n.said <- path + " " + strings.Join(attestor.NewSet(s...).Strings(), " ")
	return nil
}
func (n *told) Evict(_ context.Context, path string) error { n.said <- path + " gone"; return nil }

func TestTagsArePushed(t *testing.T) {
	c := newCenter(t)
	vm := c.vm("DC0_H0_VM0")
	path := "vsphere/" + c.admin.ServiceContent.About.InstanceUuid + "/" + c.read(vm).Config.InstanceUuid
	nodes := &told{known: path, said: make(chan string, 1024)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- c.judge("folders = [\"/\"]\ntags = true\ntags_interval = \"1s\"").(attestor.Follower).Follow(ctx, nodes)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	restClient := rest.NewClient(c.admin.Client)
	c.must(restClient.Login(t.Context(), url.UserPassword(vcenter.Username, vcenter.Password)))
	manager := tags.NewManager(restClient)
	category, err := manager.CreateCategory(t.Context(), &tags.Category{Name: "zone", Cardinality: "SINGLE"})
	c.must(err)
	tag, err := manager.CreateTag(t.Context(), &tags.Tag{Name: "dmz", CategoryID: category})
	c.must(err)
	await := func(what string, is func(said string) bool) {
		t.Helper()
		for {
			select {
			case said := <-nodes.said:
				if is(said) {
					return
				}
			case <-time.After(time.Minute):
				t.Fatalf("never told %s", what)
			}
		}
	}
	await("the machine", func(said string) bool { return strings.Contains(said, "vm-name:DC0_H0_VM0") })
	c.must(manager.AttachTag(t.Context(), tag, vm.Reference()))
	await("the tag", func(said string) bool {
		return strings.HasPrefix(said, path) && strings.Contains(said, "vsphere:tag:zone:dmz") && strings.Contains(said, "vm-name:DC0_H0_VM0")
	})
	nodes.has(attestor.NewSet(attestor.Selector{Type: "vsphere", Value: "tag:zone:dmz"}))
	c.must(manager.DetachTag(t.Context(), tag, vm.Reference()))
	await("that the tag is gone", func(said string) bool { return !strings.Contains(said, "vsphere:tag:") })
}

func TestSeveralVCenters(t *testing.T) {
	// The simulator gives machines of one name one UUID, as copies of an inventory have.
	east, west := newCenter(t), newCenter(t)
	block := func(name string, c *center) string {
		return fmt.Sprintf("vcenter %q {\n%s\n}\n", name, c.judgeConfig(`folders = ["/"]`))
	}
	openBoth := func(t *testing.T, body string) (attestor.Judge, error) {
		t.Helper()
		config, diags := attestortest.Decode(server.Kind().Config, body)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		return server.Kind().Open(config, attestor.Needs{TrustDomain: attestortest.TrustDomain})
	}
	judge, err := openBoth(t, block("east", east)+block("west", west))
	if err != nil {
		t.Fatal(err)
	}
	vm := west.vm("DC0_H0_VM0")
	uuid := west.read(vm).Config.Uuid
	want := "vsphere/" + west.admin.ServiceContent.About.InstanceUuid + "/" + west.read(vm).Config.InstanceUuid
	inside := west.inside(vm, uuid)
	payload, answer := west.evidence(inside)
	t.Run("two machines of one UUID are refused", func(t *testing.T) {
		if proof, err := judge.Judge(t.Context(), payload, answer); !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), "more than one vCenter") {
			t.Errorf("%+v, %v", proof, err)
		}
	})
	t.Run("unless the agent says in which vCenter it is", func(t *testing.T) {
		payload, answer := west.evidence(inside + "vcenter = \"west\"\n")
		if proof, err := judge.Judge(t.Context(), payload, answer); err != nil || proof.Path != want {
			t.Errorf("%+v, %v; want %s", proof, err, want)
		}
		payload, answer = west.evidence(inside + "vcenter = \"north\"\n")
		if proof, err := judge.Judge(t.Context(), payload, answer); !errors.Is(err, attestor.ErrEvidence) {
			t.Errorf("%+v, %v", proof, err)
		}
	})
	t.Run("one UUID that one of them has is found", func(t *testing.T) {
		twin := east.vm("DC0_H0_VM0")
		east.reconfigure(twin, types.VirtualMachineConfigSpec{Uuid: "11111111-2222-3333-4444-555555555555"})
		if proof, err := judge.Judge(t.Context(), payload, answer); err != nil || proof.Path != want {
			t.Errorf("%+v, %v; want %s", proof, err, want)
		}
	})
	t.Run("the configuration is one or the other", func(t *testing.T) {
		for body, says := range map[string]string{
			east.judgeConfig("folders = [\"/\"]\n") + block("west", west):  "into its vcenter block",
			block("east", east) + block("east", west):                      "name of its own",
			strings.Replace(block("east", east), `["/"]`, `["x"]`, 1):      `vcenter "east": folders`,
			east.judgeConfig("folders = [\"/\"]\ntags_interval = \"1ms\""): "tags_interval",
			"": "folders is empty",
		} {
			if _, err := openBoth(t, body); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v, want %q", body, err, says)
			}
		}
	})
}

func TestFollow(t *testing.T) {
	c := newCenter(t)
	vm := c.vm("DC0_C0_RP0_VM0")
	is := c.read(vm)
	path := "vsphere/" + c.admin.ServiceContent.About.InstanceUuid + "/" + is.Config.InstanceUuid
	nodes := &told{known: path, said: make(chan string, 1024)}
	follower, ok := c.judge(`folders = ["/"]`).(attestor.Follower)
	if !ok {
		t.Fatal("the judge does not follow")
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- follower.Follow(ctx, nodes) }()
	t.Cleanup(cancel) // before the server is closed, which waits for its callers
	await := func(want string) {
		t.Helper()
		for {
			select {
			case said := <-nodes.said:
				if !strings.HasPrefix(said, path+" ") {
					t.Errorf("told of another: %s", said)
				}
				if strings.Contains(said, want) {
					return
				}
			case err := <-ended:
				t.Fatalf("follow has ended: %v", err)
			case <-t.Context().Done():
				t.Fatalf("never told %s", want)
			}
		}
	}
	await("vsphere:vm-name:DC0_C0_RP0_VM0")
	name, err := c.v.Move(t.Context(), vm)
	c.must(err)
	await("vsphere:host:" + name)
	task, err := vm.Rename(t.Context(), "shop-1")
	c.must(err)
	c.must(task.Wait(t.Context()))
	await("vsphere:vm-name:shop-1")
	task, err = vm.PowerOff(t.Context())
	c.must(err)
	c.must(task.Wait(t.Context()))
	task, err = vm.Destroy(t.Context())
	c.must(err)
	c.must(task.Wait(t.Context()))
	await("gone")
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("follow: %v", err)
	}
}
