package kube

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Turn is a verdict on an image that is another than before.
type Turn struct {
	// Allowed says that identities which demand the policy are given again; otherwise they were withdrawn.
	Allowed bool
	Policy  string
	// Digests are those that the image is known by.
	Digests []string
	Reason  string
}

// maxTurns is how many turns may wait to be told. They are news for people: what is too much is dropped.
const maxTurns = 256

// Tell has events made at the pods that run an image whose verdict turned. It does not wait.
func (r *Registrar) Tell(t Turn) {
	select {
	case r.turns <- t:
	default:
		r.log.WithField("policy", t.Policy).Warn("too many verdicts turn at once: no events are made for some")
	}
}

// makeEvents tells of turns until ctx ends.
func (d *desk) makeEvents(ctx context.Context) {
	for {
		select {
		case t := <-d.turns:
			d.makeEventsOf(ctx, t)
		case <-ctx.Done():
			return
		}
	}
}

func (d *desk) makeEventsOf(ctx context.Context, t Turn) {
	for _, o := range d.sees.pods.GetStore().List() {
		pod := o.(*corev1.Pod)
		for _, c := range containers(pod) {
			if !named(c.ImageID, t.Digests) || !d.demands(pod, t.Policy) {
				continue
			}
			if err := d.makeEvent(ctx, pod, c, t); err != nil && ctx.Err() == nil {
				d.log.WithFields(logrus.Fields{"pod": pod.Namespace + "/" + pod.Name, "err": err}).Warn("no event could be made at a pod")
			}
		}
	}
}

// container is one of a pod's, of whatever kind.
type container struct {
	Name, ImageID string
	field         string // where the pod's specification has it
}

func containers(pod *corev1.Pod) []container {
	var all []container
	for _, of := range []struct {
		field    string
		statuses []corev1.ContainerStatus
	}{
		{"containers", pod.Status.ContainerStatuses}, {"initContainers", pod.Status.InitContainerStatuses},
		{"ephemeralContainers", pod.Status.EphemeralContainerStatuses},
	} {
		for _, s := range of.statuses {
			all = append(all, container{s.Name, s.ImageID, fmt.Sprintf("spec.%s{%s}", of.field, s.Name)})
		}
	}
	return all
}

// named reports whether a container's imageID, whose form is the runtime's choice, ends in one of the
// digests.
func named(imageID string, digests []string) bool {
	for _, digest := range digests {
		if strings.HasSuffix(imageID, digest) {
			return true
		}
	}
	return false
}

// demands reports whether an entry of the pod asks for the policy.
func (d *desk) demands(pod *corev1.Pod, policy string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := d.holders[podKey(pod)]
	if h == nil {
		return false
	}
	for id := range h.ids {
		for _, s := range d.have[id].GetSelectors() {
			if s.GetType() == "scan" && s.GetValue() == "policy:"+policy {
				return true
			}
		}
	}
	return false
}

func (d *desk) makeEvent(ctx context.Context, pod *corev1.Pod, c container, t Turn) error {
	now := metav1.NewTime(time.Now())
	e := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{GenerateName: pod.Name + ".", Namespace: pod.Namespace},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID,
			FieldPath: c.field,
		},
		Type: corev1.EventTypeWarning, Reason: "IdentityWithdrawn",
		Message: fmt.Sprintf("scan policy %q no longer allows the image of container %s: %s (assay-server evidence explain -image %s)", t.Policy, c.Name, t.Reason, t.Digests[0]),
		Source:  corev1.EventSource{Component: fieldManager}, ReportingController: "assay.id/server", ReportingInstance: d.cfg.Name,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
	if t.Allowed {
		e.Type, e.Reason = corev1.EventTypeNormal, "IdentityRestored"
		e.Message = fmt.Sprintf("scan policy %q allows the image of container %s again", t.Policy, c.Name)
	}
	_, err := d.cluster.Core.CoreV1().Events(pod.Namespace).Create(ctx, e, metav1.CreateOptions{FieldManager: fieldManager})
	return err
}
