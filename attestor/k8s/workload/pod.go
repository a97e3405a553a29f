package workload

import (
	"fmt"
	"slices"
	"strings"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/cgroup"
	"github.com/assay-id/assay/attestor/k8s"
)

// mirrorKey is the annotation of the object that stands in the API server for a static pod. Its value is
// the UID that the kubelet knows the pod by.
const mirrorKey = "kubernetes.io/config.mirror"

// wirePod is what is read of a pod; everything else is skipped.
type wirePod struct {
	Metadata struct {
		Name, Namespace, UID, ResourceVersion string
		Labels, Annotations                   map[string]string
		OwnerReferences                       []struct{ Kind, Name, UID string }
	}
	Spec struct {
		NodeName, ServiceAccountName                    string
		Containers, InitContainers, EphemeralContainers []struct{ Name, Image string }
	}
	Status struct {
		ContainerStatuses, InitContainerStatuses, EphemeralContainerStatuses []wireStatus
	}
}

type wireStatus struct{ Name, Image, ImageID, ContainerID string }

// pod is what is known of a pod.
type pod struct {
	uid, namespace, name string
	// mirror is the UID that the kubelet knows it by, if that is another.
	mirror string
	// selectors are the pod's own, sorted.
	selectors []attestor.Selector
	// images are those the pod asks for, by the container's name.
	images map[string]string
	// containers are those the kubelet has told of, by ID.
	containers map[string]wireStatus
}

// parsePod keeps of a pod what is asked about it.
func parsePod(w *wirePod) (*pod, error) {
	m := &w.Metadata
	if m.UID == "" || m.Name == "" || m.Namespace == "" {
		return nil, fmt.Errorf("pod %q without a name, a namespace or a UID", m.Namespace+"/"+m.Name)
	}
	p := &pod{
		uid: m.UID, namespace: m.Namespace, name: m.Name, mirror: m.Annotations[mirrorKey],
		images: map[string]string{}, containers: map[string]wireStatus{},
	}
	if hash := m.Annotations["kubernetes.io/config.hash"]; p.mirror == "" && hash != "" && hash != p.uid {
		p.mirror = hash // as the kubelet itself tells of a static pod
	}
	var list selectorList
	list.add(k8s.Type, "sa", w.Spec.ServiceAccountName)
	list.add(k8s.Type, "node-name", w.Spec.NodeName)
	list.identity(m.Namespace, m.Name, m.UID)
	list.add(k8s.Type, "pod-image-count", fmt.Sprint(len(w.Spec.Containers)))
	list.add(k8s.Type, "pod-init-image-count", fmt.Sprint(len(w.Spec.InitContainers)))
	for key, value := range m.Labels {
		list.add(k8s.Type, "pod-label", key, value)
	}
	for _, owner := range m.OwnerReferences {
		list.add(k8s.Type, "pod-owner", owner.Kind, owner.Name)
		list.add(k8s.Type, "pod-owner-uid", owner.Kind, owner.UID)
	}
	for _, c := range w.Spec.Containers {
		p.images[c.Name] = c.Image
		list.images("pod-image", c.Image)
	}
	for _, c := range w.Spec.InitContainers {
		p.images[c.Name] = c.Image
		list.images("pod-init-image", c.Image)
	}
	for _, c := range w.Spec.EphemeralContainers {
		p.images[c.Name] = c.Image
	}
	for _, s := range w.Status.ContainerStatuses {
		list.images("pod-image", s.Image, s.ImageID)
		p.add(s)
	}
	for _, s := range w.Status.InitContainerStatuses {
		list.images("pod-init-image", s.Image, s.ImageID)
		p.add(s)
	}
	for _, s := range w.Status.EphemeralContainerStatuses {
		p.add(s)
	}
	p.selectors = attestor.NewSet(list...).All()
	return p, nil
}

// add notes a container by its ID, which the kubelet writes as runtime://<id>.
func (p *pod) add(s wireStatus) {
	if _, id, ok := strings.Cut(s.ContainerID, "://"); ok && cgroup.IsID(id) {
		p.containers[id] = s
	}
}

// sameAs reports whether the same is said of containers of both pods.
func (p *pod) sameAs(o *pod) bool {
	return p.namespace == o.namespace && p.name == o.name && p.mirror == o.mirror && slices.Equal(p.selectors, o.selectors)
}

type selectorList []attestor.Selector

// add joins the parts of a value. What cannot be a selector, as an empty value, is left out; that no entry
// can name it is the same as that it is not there.
func (l *selectorList) add(kind string, parts ...string) {
	if len(parts) == 2 && parts[1] == "" {
		return
	}
	if s := (attestor.Selector{Type: kind, Value: strings.Join(parts, ":")}); s.Check() == nil {
		*l = append(*l, s)
	}
}

func (l *selectorList) identity(namespace, name, uid string) {
	l.add(k8s.Type, "ns", namespace)
	l.add(k8s.Type, "pod-name", name)
	l.add(k8s.Type, "pod-uid", uid)
}

// images adds references to images as they were written, and in full.
func (l *selectorList) images(kind string, references ...string) {
	for _, ref := range references {
		l.add(k8s.Type, kind, ref)
		if full := fullReference(ref); full != ref {
			l.add(k8s.Type, kind, full)
		}
	}
}

// fullReference gives a reference the registry and the tag that every runtime takes for granted: "nginx" is
// docker.io/library/nginx:latest, which is how runtimes report it. Digests stay as they are.
func fullReference(ref string) string {
	if ref == "" || strings.HasPrefix(ref, "sha256:") || cgroup.IsID(ref) {
		return ref
	}
	name, digest, _ := strings.Cut(ref, "@")
	first, _, slash := strings.Cut(name, "/")
	switch {
	case !slash:
		name = "docker.io/library/" + name
	case !strings.ContainsAny(first, ".:") && first != "localhost":
		name = "docker.io/" + name
	}
	if digest != "" {
		return name + "@" + digest
	}
	if !strings.Contains(name[strings.LastIndexByte(name, '/')+1:], ":") {
		name += ":latest"
	}
	return name
}
