package attestor

import (
	"context"
	"errors"
)

// PodReference names a pod of Kubernetes: by namespace and name, by UID, or by both, which must agree.
type PodReference struct{ Namespace, Name, UID string }

// Pods is a Workload that knows the pods of this node, also without a process of them.
type Pods interface {
	// Pod returns what is proved about a pod, in any order, and a channel that is closed when that may have changed.
	// Nothing of it is about one of the pod's containers. The error wraps ErrNoPod if there is no such pod on
	// this node.
	Pod(ctx context.Context, of PodReference) (selectors []Selector, changed <-chan struct{}, err error)
}

// ErrNoPod says that a pod is not on this node, or not the one that was meant.
var ErrNoPod = errors.New("pod is not on this node")
