package kube

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Runtime is a container runtime's socket.
type Runtime struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer

	path string

	mu         sync.Mutex // guards all below
	server     *grpc.Server
	containers map[string]*running
	images     map[string]Container // by configuration digest
	calls      int
	hang       chan struct{} // not nil: calls wait for its end
	listeners  map[chan *cri.ContainerEventResponse]struct{}
	crio       bool
}

type running struct {
	pod       Pod
	container Container
	starting  bool
}

func startRuntime(t testing.TB, path string) *Runtime {
	t.Helper()
	r := &Runtime{
		path: path, containers: map[string]*running{}, images: map[string]Container{},
		listeners: map[chan *cri.ContainerEventResponse]struct{}{},
	}
	r.Up(t)
	t.Cleanup(func() { r.Hang(false); r.Down() })
	return r
}

// Socket is the path of its socket.
func (r *Runtime) Socket() string { return r.path }

// Up starts it.
func (r *Runtime) Up(t testing.TB) {
	t.Helper()
	_ = os.Remove(r.path) // of the time before
	listener, err := new(net.ListenConfig).Listen(context.Background(), "unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(server, r)
	cri.RegisterImageServiceServer(server, r)
	r.mu.Lock()
	r.server = server
	r.mu.Unlock()
	go func() { _ = server.Serve(listener) }() // until Down
}

// Down ends it; its containers run on.
func (r *Runtime) Down() {
	r.mu.Lock()
	server := r.server
	r.mu.Unlock()
	server.Stop()
}

// Hang makes calls wait without an end.
func (r *Runtime) Hang(hang bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hang != nil {
		close(r.hang)
		r.hang = nil
	}
	if hang {
		r.hang = make(chan struct{})
	}
}

// Calls returns how many calls there were.
func (r *Runtime) Calls() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls
}

// Starting says whether a container's first process is not written down yet.
func (r *Runtime) Starting(id string, starting bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.containers[id].starting = starting
}

// Stop ends a container and tells of it.
func (r *Runtime) Stop(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.containers, id)
	for l := range r.listeners {
		select {
		case l <- &cri.ContainerEventResponse{ContainerId: id, ContainerEventType: cri.ContainerEventType_CONTAINER_STOPPED_EVENT}:
		default:
		}
	}
}

func (r *Runtime) add(p Pod, c Container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.containers[c.ID] = &running{pod: p, container: c}
	r.images[c.ImageID] = c
}

// called counts a call and lets it hang.
func (r *Runtime) called(ctx context.Context) error {
	r.mu.Lock()
	r.calls++
	hang := r.hang
	r.mu.Unlock()
	if hang == nil {
		return nil
	}
	select {
	case <-hang:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// CRIO has the runtime answer as CRI-O v1.34.0 does with its own settings, where that differs from containerd: IDs of
// images have no algorithm before them, and one that has is taken for a short name; a container's reference is that of
// the repository; there are no events, and their stream ends at once.
func (r *Runtime) CRIO() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.crio = true
}

// Version answers.
func (r *Runtime) Version(ctx context.Context, _ *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: "containerd"}, r.called(ctx)
}

func (r *running) labels() map[string]string {
	return map[string]string{
		"io.kubernetes.pod.name": r.pod.Name, "io.kubernetes.pod.namespace": r.pod.Namespace,
		"io.kubernetes.pod.uid": r.pod.UID, "io.kubernetes.container.name": r.container.Name,
	}
}

// ListContainers finds by ID, also by its beginning, and by labels.
func (r *Runtime) ListContainers(ctx context.Context, q *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	if err := r.called(ctx); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	reply := &cri.ListContainersResponse{}
next:
	for id, one := range r.containers {
		if !strings.HasPrefix(id, q.GetFilter().GetId()) {
			continue
		}
		for key, value := range q.GetFilter().GetLabelSelector() {
			if one.labels()[key] != value {
				continue next
			}
		}
		if r.crio {
			reply.Containers = append(reply.Containers, &cri.Container{
				Id: id, PodSandboxId: "sandbox", Labels: one.labels(), State: cri.ContainerState_CONTAINER_RUNNING,
				ImageId: one.container.ImageID, ImageRef: one.container.Digests[0], Image: &cri.ImageSpec{Image: one.container.Image},
			})
			continue
		}
		reply.Containers = append(reply.Containers, &cri.Container{
			Id: id, PodSandboxId: "sandbox", Labels: one.labels(), State: cri.ContainerState_CONTAINER_RUNNING,
			ImageRef: "sha256:" + one.container.ImageID, Image: &cri.ImageSpec{Image: "sha256:" + one.container.ImageID},
		})
	}
	return reply, nil
}

// ContainerStatus describes one container as containerd does.
func (r *Runtime) ContainerStatus(ctx context.Context, q *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	if err := r.called(ctx); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.containers[q.GetContainerId()]
	if one == nil {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	state, pid := cri.ContainerState_CONTAINER_RUNNING, one.container.PID
	if one.starting {
		state, pid = cri.ContainerState_CONTAINER_CREATED, 0
	}
	ref := "sha256:" + one.container.ImageID
	if len(one.container.Digests) > 0 {
		ref = one.container.Digests[0]
	}
	info, _ := json.Marshal(map[string]any{"sandboxID": "sandbox", "pid": pid}) // always JSON
	id := ""
	if r.crio {
		id = one.container.ImageID
	}
	return &cri.ContainerStatusResponse{
		Status: &cri.ContainerStatus{Id: q.GetContainerId(), State: state, Labels: one.labels(), ImageRef: ref, ImageId: id},
		Info:   map[string]string{"info": string(info)},
	}, nil
}

// ImageStatus describes an image by the digest of its configuration.
func (r *Runtime) ImageStatus(ctx context.Context, q *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	if err := r.called(ctx); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.crio && strings.HasPrefix(q.GetImage().GetImage(), "sha256:") {
		return nil, status.Errorf(codes.Unknown, "short-name %q did not resolve to an alias and no unqualified-search registries are defined", q.GetImage().GetImage())
	}
	img, ok := r.images[strings.TrimPrefix(q.GetImage().GetImage(), "sha256:")]
	if !ok {
		return &cri.ImageStatusResponse{}, nil
	}
	algorithm := "sha256:"
	if r.crio {
		algorithm = ""
	}
	info, _ := json.Marshal(map[string]any{"imageSpec": map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Labels": img.Labels},
	}}) // always JSON
	return &cri.ImageStatusResponse{
		Image: &cri.Image{Id: algorithm + img.ImageID, RepoTags: []string{"moved.example/other:tag"}, RepoDigests: img.Digests},
		Info:  map[string]string{"info": string(info)},
	}, nil
}

// GetContainerEvents tells of containers that end.
func (r *Runtime) GetContainerEvents(_ *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	events := make(chan *cri.ContainerEventResponse, 16)
	r.mu.Lock()
	if r.crio {
		r.mu.Unlock()
		return nil
	}
	r.listeners[events] = struct{}{}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.listeners, events)
	}()
	for {
		select {
		case e := <-events:
			if err := stream.Send(e); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}
