package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/assay-id/assay/attestor/cgroup"
	"github.com/assay-id/assay/attestor/k8s"
)

const (
	// maxReply is the largest reply of the runtime in bytes: one container or one image each.
	maxReply = 8 << 20
	// maxCalls is how many calls may be under way at once: when a full node starts, the runtime is busy
	// enough.
	maxCalls = 16
	// sayAgain is how long a warning is not repeated for a part that comes and goes.
	sayAgain = time.Minute
	// avoidFor is how long a runtime that did not answer is not asked again.
	avoidFor = time.Second
	// starting is how often a container is looked at whose first process is not known yet.
	starting = 5 * time.Millisecond
)

// Labels that the kubelet gives to what it has the runtime make.
const (
	labelPodName   = "io.kubernetes.pod.name"
	labelNamespace = "io.kubernetes.pod.namespace"
	labelPodUID    = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
)

var (
	// errNotKnown says that the runtime has no such container.
	errNotKnown = errors.New("runtime does not know it")
	// errAway says that the runtime did not answer a moment ago.
	errAway = errors.New("container runtime does not answer")
)

// runtime is the container runtime as the attestor asks it, over CRI.
type runtime struct {
	path    string
	timeout time.Duration
	log     logrus.FieldLogger
	now     func() time.Time

	conn   *grpc.ClientConn
	crs    cri.RuntimeServiceClient
	images cri.ImageServiceClient
	calls  chan struct{} // a place for each call under way
	health health
}

// health knows whether a part that is asked is there, and says so once when that changes.
type health struct {
	log  logrus.FieldLogger
	now  func() time.Time
	name string // what is asked
	loss string // what is lost without it
	// back gets a value when what was away answers again.
	back chan struct{}

	mu     sync.Mutex // guards all below
	away   bool
	since  time.Time // of the last failure
	said   bool
	warned time.Time
}

// observe learns from the end of a call. A caller who hung up says nothing.
func (h *health) observe(err error) {
	if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		if !h.away {
			return
		}
		h.away = false
		if h.said {
			h.said = false
			h.log.Info(h.name + " answers again")
		}
		select {
		case h.back <- struct{}{}:
		default:
		}
		return
	}
	h.away, h.since = true, h.now()
	if !h.said && (h.warned.IsZero() || h.now().Sub(h.warned) >= sayAgain) {
		h.said, h.warned = true, h.now()
		h.log.WithError(err).Warn(h.name + " does not answer as it should: " + h.loss)
	}
}

// isAway reports whether the last call failed.
func (h *health) isAway() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.away
}

// avoid reports whether it failed so lately that it is not worth asking again.
func (h *health) avoid() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.away && h.now().Sub(h.since) < avoidFor
}

// openRuntime returns nil if the runtime is not to be asked. It need not be there yet, unless it has to be
// found.
func openRuntime(c *k8s.Config, log logrus.FieldLogger, now func() time.Time) (*runtime, error) {
	path := strings.TrimPrefix(c.RuntimeSocket, "unix://")
	switch {
	case path == k8s.None:
		return nil, nil
	case path == "":
		path = k8s.RuntimeSockets[0]
		for _, candidate := range k8s.RuntimeSockets {
			if stat, err := os.Stat(candidate); err == nil && stat.Mode()&os.ModeSocket != 0 {
				path = candidate
				break
			}
		}
	case !filepath.IsAbs(path):
		return nil, fmt.Errorf("runtime_socket_path: %q is no absolute path of a Unix socket, nor %q", c.RuntimeSocket, k8s.None)
	}
	timeout := 2 * time.Second
	if c.RuntimeTimeout != "" {
		var err error
		if timeout, err = time.ParseDuration(c.RuntimeTimeout); err != nil || timeout <= 0 {
			return nil, fmt.Errorf("runtime_timeout: %q is no duration above zero", c.RuntimeTimeout)
		}
	}
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), // a socket that only root opens
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)), grpc.WithAuthority("localhost"),
		grpc.WithIdleTimeout(0), grpc.WithDisableServiceConfig())
	if err != nil {
		return nil, fmt.Errorf("open runtime socket %s: %w", path, err)
	}
	log = log.WithField("runtime", path)
	return &runtime{
		path: path, timeout: timeout, log: log, now: now, conn: conn,
		crs: cri.NewRuntimeServiceClient(conn), images: cri.NewImageServiceClient(conn),
		calls: make(chan struct{}, maxCalls),
		health: health{
			log: log, now: now, name: "container runtime", back: make(chan struct{}, 1),
			loss: "containers that it was not asked about before are attested by what the kubelet tells of them, without image selectors",
		},
	}, nil
}

// ask runs one call with the runtime's deadline, in its turn.
func ask[T any](ctx context.Context, r *runtime, f func(context.Context) (T, error)) (T, error) {
	var none T
	if r.health.avoid() {
		return none, errAway
	}
	within, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	select {
	case r.calls <- struct{}{}:
		defer func() { <-r.calls }()
	case <-within.Done():
		return none, within.Err()
	}
	value, err := f(within)
	switch code := status.Code(err); {
	case code == codes.NotFound:
		r.health.observe(nil)
		return none, errNotKnown
	case err != nil && ctx.Err() != nil:
		return none, ctx.Err() // the caller's end, not the runtime's
	default:
		r.health.observe(err)
	}
	return value, err
}

// probe asks whether the runtime is there.
func (r *runtime) probe(ctx context.Context) error {
	_, err := ask(ctx, r, func(ctx context.Context) (*cri.VersionResponse, error) {
		return r.crs.Version(ctx, &cri.VersionRequest{})
	})
	return err
}

// container is what the runtime says of a container.
type container struct {
	id, name                  string
	podUID, podName, podSpace string
	reference                 string   // the image as it was asked for
	digests                   []string // references by which the image's content is known
	imageID, platform         string
	imageLabels               map[string]string
	pid                       int
}

// byName returns the ID of a pod's running container.
func (r *runtime) byName(ctx context.Context, podUID, name string) (string, error) {
	reply, err := ask(ctx, r, func(ctx context.Context) (*cri.ListContainersResponse, error) {
		return r.crs.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
			LabelSelector: map[string]string{labelPodUID: podUID, labelContainer: name},
			State:         &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING},
		}})
	})
	if err != nil {
		return "", err
	}
	if len(reply.GetContainers()) != 1 {
		return "", errNotKnown
	}
	return reply.GetContainers()[0].GetId(), nil
}

// running lists the containers that run.
func (r *runtime) running(ctx context.Context) ([]*cri.Container, error) {
	reply, err := ask(ctx, r, func(ctx context.Context) (*cri.ListContainersResponse, error) {
		return r.crs.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
			State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING},
		}})
	})
	return reply.GetContainers(), err
}

// container describes a container by its full ID. It waits for one that is about to start.
func (r *runtime) container(ctx context.Context, id string) (*container, error) {
	reply, err := ask(ctx, r, func(ctx context.Context) (*cri.ListContainersResponse, error) {
		return r.crs.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{Id: id}})
	})
	if err != nil {
		return nil, err
	}
	// Runtimes also find a container by the beginning of its ID.
	i := slices.IndexFunc(reply.GetContainers(), func(c *cri.Container) bool { return c.GetId() == id })
	if i < 0 {
		return nil, errNotKnown
	}
	listed := reply.GetContainers()[i]
	labels := listed.GetLabels()
	c := &container{
		id: id, name: labels[labelContainer], podUID: labels[labelPodUID],
		podName: labels[labelPodName], podSpace: labels[labelNamespace],
	}
	if c.name == "" || c.podUID == "" || c.podName == "" || c.podSpace == "" {
		return nil, errNotKnown // not the kubelet's
	}
	st, pid, err := r.started(ctx, id)
	if err != nil {
		return nil, err
	}
	c.pid = pid
	c.reference = firstOf(st.GetImage().GetUserSpecifiedImage(), listed.GetImage().GetUserSpecifiedImage())
	image := "" // the ID in the runtime's own form: CRI-O takes one with the algorithm before it for a name
	for _, ref := range []string{listed.GetImageId(), st.GetImageId(), listed.GetImageRef(), st.GetImageRef()} {
		if c.imageID == "" && digestOf(ref) != "" {
			image, c.imageID = ref, digestOf(ref)
		}
		if strings.Contains(ref, "@sha256:") {
			c.digests = append(c.digests, ref)
		}
	}
	if err := r.describeImage(ctx, c, firstOf(image, st.GetImageRef())); err != nil {
		return nil, fmt.Errorf("ask for image of container: %w", err)
	}
	return c, nil
}

// started waits until the container's first process is known: it may ask for its identity before the
// runtime has written down that it runs.
func (r *runtime) started(ctx context.Context, id string) (*cri.ContainerStatus, int, error) {
	tick := time.NewTicker(starting)
	defer tick.Stop()
	for {
		reply, err := ask(ctx, r, func(ctx context.Context) (*cri.ContainerStatusResponse, error) {
			return r.crs.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
		})
		if err != nil {
			return nil, 0, err
		}
		st := reply.GetStatus()
		if st.GetState() == cri.ContainerState_CONTAINER_EXITED {
			return nil, 0, errors.New("container has ended")
		}
		var verbose struct{ PID int }
		if text := reply.GetInfo()["info"]; text != "" {
			if err := json.Unmarshal([]byte(text), &verbose); err != nil {
				return nil, 0, errors.New("runtime describes a container in a form that is not JSON")
			}
		}
		if verbose.PID > 0 || st.GetState() == cri.ContainerState_CONTAINER_RUNNING {
			return st, verbose.PID, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, 0, fmt.Errorf("wait for container to start: %w", ctx.Err())
		}
	}
}

// describeImage asks for an image by what the runtime itself identifies it with, never by a name that can
// be moved. An image that is gone while its container runs leaves its ID alone.
func (r *runtime) describeImage(ctx context.Context, c *container, ref string) error {
	if ref == "" {
		return nil
	}
	reply, err := ask(ctx, r, func(ctx context.Context) (*cri.ImageStatusResponse, error) {
		return r.images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}, Verbose: true})
	})
	if errors.Is(err, errNotKnown) || err == nil && reply.GetImage() == nil {
		return nil
	}
	if err != nil {
		return err
	}
	if c.imageID == "" {
		c.imageID = digestOf(reply.GetImage().GetId())
	}
	for _, digest := range reply.GetImage().GetRepoDigests() {
		if !slices.Contains(c.digests, digest) {
			c.digests = append(c.digests, digest)
		}
	}
	var verbose struct {
		ImageSpec struct {
			OS, Architecture, Variant string
			Config                    struct{ Labels map[string]string }
		}
	}
	if text := reply.GetInfo()["info"]; text != "" && json.Unmarshal([]byte(text), &verbose) == nil {
		spec := &verbose.ImageSpec
		if spec.OS != "" && spec.Architecture != "" {
			c.platform = spec.OS + "/" + spec.Architecture
			if spec.Variant != "" {
				c.platform += "/" + spec.Variant
			}
		}
		c.imageLabels = spec.Config.Labels
	}
	return nil
}

// digestOf returns the digest that an image ID is, in full form: CRI-O leaves the algorithm out. It is
// empty for a reference that is a name.
func digestOf(id string) string {
	hex := strings.TrimPrefix(id, "sha256:")
	if !cgroup.IsID(hex) { // the same 64 digits as a container's
		return ""
	}
	return "sha256:" + hex
}

func firstOf(texts ...string) string {
	for _, text := range texts {
		if text != "" {
			return text
		}
	}
	return ""
}

// follow names containers that something happens to, until the stream ends. A runtime that knows no
// events answers Unimplemented.
func (r *runtime) follow(ctx context.Context, happened func(id string, kind cri.ContainerEventType)) error {
	stream, err := r.crs.GetContainerEvents(ctx, &cri.GetEventsRequest{})
	if err != nil {
		return err
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			return err
		}
		happened(event.GetContainerId(), event.GetContainerEventType())
	}
}
