package broker

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
)

// subject is what a broker refers to, followed for as long as a call goes on.
type subject interface {
	// Facts are what is proved at the moment, Replaced is closed when that is not so any more, and Renew takes what is
	// proved now.
	Facts() attestor.Set
	Replaced() <-chan struct{}
	Renew() error
	// Again fires when Renew is due though nobody has told of a change; stop ends that.
	Again() (due <-chan time.Time, stop func())
	// Exited is closed when it has come to its end, Alive reports whether it has not, Gone says so.
	Exited() <-chan struct{}
	Alive() bool
	Gone() error
	// Told says that something new was said of it.
	Told()
}

// process is a process.
type process struct{ *workloadapi.Followed }

func (process) Again() (<-chan time.Time, func()) { return nil, func() {} }
func (process) Gone() error                       { return errExited }

// pod is a pod of this node.
type pod struct {
	ctx     context.Context //nolint:containedctx // of the one call that it is for
	pods    attestor.Pods
	of      attestor.PodReference
	facts   attestor.Set
	changed <-chan struct{}
}

// podAgain is how often a pod is asked about of which nobody has told a change: the API server may be away, and a
// kubelet tells nothing by itself.
const podAgain = 30 * time.Second

func (p *pod) Facts() attestor.Set       { return p.facts }
func (p *pod) Replaced() <-chan struct{} { return p.changed }
func (p *pod) Exited() <-chan struct{}   { return nil }
func (p *pod) Gone() error               { return errNoPod }
func (p *pod) Told()                     {}

func (p *pod) Again() (<-chan time.Time, func()) {
	timer := time.NewTimer(podAgain)
	return timer.C, func() { timer.Stop() }
}

// Alive looks again if there was a change.
func (p *pod) Alive() bool {
	select {
	case <-p.changed:
		return p.Renew() == nil
	default:
		return true
	}
}

func (p *pod) Renew() error {
	selectors, changed, err := p.pods.Pod(p.ctx, p.of)
	switch {
	case p.ctx.Err() != nil:
		return p.ctx.Err()
	case errors.Is(err, attestor.ErrNoPod):
		return status.Error(codes.NotFound, clip(err.Error()))
	case err != nil:
		return &nobodyKnows{fmt.Errorf("find pod: %w", err)}
	}
	p.facts, p.changed = attestor.NewSet(selectors...), changed
	return nil
}

var errNoPod = status.Error(codes.NotFound, "pod is not on this node")

// nobodyKnows is why nobody can be asked: for the audit line, and not for the broker.
type nobodyKnows struct{ error }

// GRPCStatus is what the broker is told.
func (*nobodyKnows) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, "nobody can be asked about pods at the moment")
}

// What Kubernetes lets an object be called, and how it writes a UID: in an audit line nothing else has a place.
var (
	objectName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
	objectUID  = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$|^[0-9a-f]{32}$`) // static pods have a hash
)

// parseObject reads a reference, and says what is wrong with it in SPIRE's words.
func parseObject(raw []byte) (of attestor.PodReference, kind string, err error) {
	wrong := func(text string) (attestor.PodReference, string, error) {
		return attestor.PodReference{}, "", status.Error(codes.InvalidArgument, text)
	}
	var ref brokerapi.KubernetesObjectReference
	if err := proto.Unmarshal(raw, &ref); err != nil {
		return of, "", errMalformed
	}
	of = attestor.PodReference{Namespace: ref.GetKey().GetNamespace(), Name: ref.GetKey().GetName(), UID: ref.GetUid()}
	plural, group := ref.GetType().GetPlural(), ref.GetType().GetGroup()
	switch {
	case ref.GetType() == nil:
		return wrong("object reference is missing type")
	case plural == "":
		return wrong("object reference type is missing plural")
	case group == "":
		return wrong("object reference type is missing group")
	case ref.GetKey() == nil && of.UID == "":
		return wrong("object reference is missing key and UID")
	case ref.GetKey() != nil && of.Name == "":
		return wrong("object reference key is missing name")
	case plural != "pods" || group != "core":
		return wrong("objects of type " + clip(plural+"."+group) + " are not known to this agent, which knows pods.core of its own node")
	case of.Name != "" && of.Namespace == "":
		return wrong("namespace is required when name is set for a namespaced resource")
	case of.Name != "" && (!objectName.MatchString(of.Name) || !objectName.MatchString(of.Namespace)):
		return wrong("object reference key is no name that Kubernetes gives")
	case of.UID != "" && !objectUID.MatchString(of.UID):
		return wrong("object reference UID is no UUID")
	}
	kind = "pods.core"
	if of.Name != "" {
		kind += " " + of.Namespace + "/" + of.Name
	}
	if of.UID != "" {
		kind += " " + of.UID
	}
	return of, kind, nil
}

// pod finds the pod that is meant.
func (e *errand) pod(ctx context.Context, raw []byte, run func(*errand) error) error {
	of, object, err := parseObject(raw)
	if err != nil {
		return err
	}
	e.object = object
	p := &pod{ctx: ctx, pods: e.cfg.Pods, of: of}
	if err := p.Renew(); err != nil {
		return err
	}
	e.of = p
	return run(e)
}
