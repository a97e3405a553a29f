package workload

import (
	"context"
	"fmt"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8s"
)

var _ attestor.Pods = (*workload)(nil)

// Pod implements attestor.Pods: what the API server or the kubelet say of a pod of this node.
func (w *workload) Pod(ctx context.Context, of attestor.PodReference) ([]attestor.Selector, <-chan struct{}, error) {
	pod, changed, err := w.pods.refer(ctx, of)
	if err != nil {
		return nil, nil, err
	}
	list := selectorList(pod.selectors)
	if w.spaces != nil {
		// A pod's namespace is there before it, so this waits for nothing but the API server's word of it.
		sp, err := w.spaces.find(ctx, pod.namespace)
		if err != nil {
			return nil, nil, fmt.Errorf("find labels of namespace %s: %w", pod.namespace, err)
		}
		list = append(selectorList(nil), list...)
		for key, value := range sp.labels {
			list.add(k8s.Type, "ns-label", key, value)
		}
	}
	return attestor.NewSet(list...).All(), changed, nil
}

// refer returns the pod that a reference means, and a channel that is closed at the next change of any. Where the API
// server does not tell of changes, the kubelet is asked what there is now.
func (s *pods) refer(ctx context.Context, of attestor.PodReference) (*pod, <-chan struct{}, error) {
	for asked := false; ; asked = true {
		s.mu.Lock()
		p, live, moved := s.meant(of), s.live, s.moved
		s.mu.Unlock()
		switch {
		case p != nil && (live || asked):
			if of.UID != "" && of.UID != p.uid && of.UID != p.mirror {
				return nil, nil, fmt.Errorf("%w: pod %s/%s has UID %s, not %s", attestor.ErrNoPod, p.namespace, p.name, p.uid, of.UID)
			}
			return p, moved, nil
		case asked || live && s.kubelet == nil:
			return nil, nil, fmt.Errorf("%w: neither the API server nor the kubelet tell of it", attestor.ErrNoPod)
		case s.kubelet == nil:
			return nil, nil, errNobody
		}
		if err := s.ask(ctx); err != nil && !live {
			return nil, nil, fmt.Errorf("%w: %w", errNobody, err)
		}
	}
}

// meant returns the pod that has the name, or without one the UID. The caller holds mu.
func (s *pods) meant(of attestor.PodReference) *pod {
	if of.Name == "" {
		return s.lookup(of.UID)
	}
	for _, p := range s.byUID {
		if p.namespace == of.Namespace && p.name == of.Name {
			return p
		}
	}
	return nil
}

// stir wakes who follows a pod: what is proved about it may have changed, though not the pod.
func (s *pods) stir() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.moved)
	s.moved = make(chan struct{})
}
