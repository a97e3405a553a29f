// Package docker is a small container engine in memory: the part of Docker's API that the docker
// attestor uses, on a real Unix socket, with a procfs of fixtures for the processes of its containers.
// It passes the attestor's suite as the real engine does, and can be slow, broken or away at will.
package docker

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Layout says in which cgroup a container's processes are; see Run.
type Layout func(id string) string

// Layouts of Docker with the cgroupfs driver (cgroup v1) and the systemd driver (cgroup v2).
var (
	Cgroupfs Layout = func(id string) string {
		return "12:pids:/docker/" + id + "\n3:cpuset:/docker/" + id + "\n1:name=systemd:/docker/" + id + "\n0::/docker/" + id + "\n"
	}
	Systemd Layout = func(id string) string { return "0::/system.slice/docker-" + id + ".scope\n" }
)

// Engine is the fake. Make it with New and start it with Start.
type Engine struct {
	// APIVersion is the newest version it speaks; requests for a newer one are refused, as Docker
	// does. New sets 1.41, which is Docker 20.10.
	APIVersion string
	// Podman leaves the algorithm out of image IDs.
	Podman bool
	// ContainerdStore describes images by manifest, as Docker 29 does.
	ContainerdStore bool

	dir string

	mu         sync.Mutex // guards all below
	server     *http.Server
	stop       context.CancelFunc
	containers map[string]*container
	images     map[string]*image
	tags       map[string]string // name to image ID
	nextPID    int
	calls      map[string]int
	fail       func(path string) int
	hang       chan struct{} // nil unless requests hang
	log        []event
	more       chan struct{} // closed when log grows
}

type image struct {
	id     string
	labels map[string]string
	env    []string
}

type container struct {
	id, name, ref, image string
	labels               map[string]string
	env                  []string
	pid                  int
	layout               Layout
	pids                 []int
}

type event struct {
	Type, Action string
	Actor        actor
	Time         int64 `json:"time"`
	TimeNano     int64 `json:"timeNano"`
}

type actor struct {
	ID         string
	Attributes map[string]string
}

// New returns an engine that keeps its socket and its procfs in dir.
func New(dir string) *Engine {
	return &Engine{
		APIVersion: "1.41", dir: dir,
		containers: make(map[string]*container), images: make(map[string]*image), tags: make(map[string]string),
		calls: make(map[string]int), nextPID: 1000, more: make(chan struct{}),
	}
}

// Socket is the path of the engine's Unix socket.
func (e *Engine) Socket() string { return filepath.Join(e.dir, "docker.sock") }

// Proc is the procfs of the containers' processes.
func (e *Engine) Proc() string { return filepath.Join(e.dir, "proc") }

// Start listens on the socket.
func (e *Engine) Start() error {
	if err := os.MkdirAll(e.Proc(), 0o755); err != nil {
		return err
	}
	if err := os.Remove(e.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", e.Socket())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	server := &http.Server{
		Handler: http.HandlerFunc(e.serve), ReadHeaderTimeout: time.Minute,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	e.mu.Lock()
	e.server, e.stop = server, cancel
	e.mu.Unlock()
	go func() { _ = server.Serve(listener) }()
	return nil
}

// Stop closes the socket and every connection at once. Containers keep running, and are known again
// after Start; past events are forgotten, as Docker forgets them.
func (e *Engine) Stop() {
	e.mu.Lock()
	server, stop := e.server, e.stop
	e.server, e.log = nil, nil
	e.mu.Unlock()
	if server == nil {
		return
	}
	stop()
	_ = server.Close()
}

// Hang makes every request wait until it is called again with false.
func (e *Engine) Hang(on bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case on && e.hang == nil:
		e.hang = make(chan struct{})
	case !on && e.hang != nil:
		close(e.hang)
		e.hang = nil
	}
}

// Fail makes requests fail with the HTTP status that f returns for their path; 0 lets them pass. A nil
// f ends it.
func (e *Engine) Fail(f func(path string) int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fail = f
}

// Calls returns how many requests of a kind ("containers", "images", "events", "_ping") came.
func (e *Engine) Calls(kind string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.calls[kind]
}

// Build makes an image and returns its ID.
func (e *Engine) Build(labels map[string]string, env ...string) string {
	seed := make([]byte, 32)
	_, _ = rand.Read(seed)
	sum := sha256.Sum256(seed)
	img := &image{id: "sha256:" + hex.EncodeToString(sum[:]), labels: maps.Clone(labels), env: env}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.images[img.id] = img
	return img.id
}

// Tag gives an image a name, taking it from the image that had it.
func (e *Engine) Tag(id, name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tags[name] = id
	e.emit("image", "tag", id, map[string]string{"name": name})
}

// Untag takes a name away.
func (e *Engine) Untag(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := e.tags[name]
	delete(e.tags, name)
	e.emit("image", "untag", id, map[string]string{"name": name})
}

// Forget drops an image although containers run it, as Podman can.
func (e *Engine) Forget(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.images, id)
	e.emit("image", "delete", id, nil)
}

// Run starts a container of the image called ref, with labels and variables over the image's, and
// returns its ID and the PID of its first process.
func (e *Engine) Run(ref string, labels map[string]string, env []string, layout Layout) (id string, pid int, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	img := e.find(ref)
	if img == nil {
		return "", 0, fmt.Errorf("no such image: %s", ref)
	}
	seed := make([]byte, 32)
	_, _ = rand.Read(seed)
	c := &container{id: hex.EncodeToString(seed), ref: ref, image: img.id, labels: maps.Clone(img.labels), layout: layout}
	c.name = "c" + c.id[:8]
	c.env = append(slices.Clone(img.env), env...)
	if c.labels == nil {
		c.labels = make(map[string]string)
	}
	maps.Copy(c.labels, labels)
	e.containers[c.id] = c
	if c.pid, err = e.process(c); err != nil {
		return "", 0, err
	}
	e.emit("container", "start", c.id, c.labels)
	return c.id, c.pid, nil
}

// Exec starts a further process in a container and returns its PID.
func (e *Engine) Exec(id string) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.containers[id]
	if c == nil {
		return 0, errors.New("no such container")
	}
	return e.process(c)
}

// process makes the fixture of a process. The caller holds mu.
func (e *Engine) process(c *container) (int, error) {
	e.nextPID++
	pid := e.nextPID
	c.pids = append(c.pids, pid)
	return pid, WriteProcess(e.Proc(), pid, c.layout(c.id), "")
}

// WriteProcess makes the fixture of a process with these cgroups and mounts.
func WriteProcess(proc string, pid int, cgroup, mountinfo string) error {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "mountinfo"), []byte(mountinfo), 0o600)
}

// End stops a container: its processes end.
func (e *Engine) End(id string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.containers[id]
	if c == nil {
		return errors.New("no such container")
	}
	for _, pid := range c.pids {
		if err := os.RemoveAll(filepath.Join(e.Proc(), strconv.Itoa(pid))); err != nil {
			return err
		}
	}
	c.pid, c.pids = 0, nil
	e.emit("container", "die", id, c.labels)
	return nil
}

// Restart stops a container and starts it again, and returns the PID of its new first process.
func (e *Engine) Restart(id string) (int, error) {
	if err := e.End(id); err != nil {
		return 0, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.containers[id]
	pid, err := e.process(c)
	c.pid = pid
	e.emit("container", "start", id, c.labels)
	return pid, err
}

// Rename gives a container another name.
func (e *Engine) Rename(id, name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c := e.containers[id]; c != nil {
		c.name = name
	}
	e.emit("container", "rename", id, map[string]string{"name": name})
}

// emit adds an event to the log. The caller holds mu.
func (e *Engine) emit(kind, action, id string, attributes map[string]string) {
	now := time.Now()
	e.log = append(e.log, event{kind, action, actor{e.format(id, kind), attributes}, now.Unix(), now.UnixNano()})
	close(e.more)
	e.more = make(chan struct{})
}

// find looks an image up by ID or name. The caller holds mu.
func (e *Engine) find(ref string) *image {
	if img := e.images[ref]; img != nil {
		return img
	}
	if img := e.images["sha256:"+ref]; img != nil {
		return img
	}
	return e.images[e.tags[ref]]
}

func (e *Engine) format(id, kind string) string {
	if e.Podman && kind == "image" {
		return strings.TrimPrefix(id, "sha256:")
	}
	return id
}

func (e *Engine) serve(w http.ResponseWriter, r *http.Request) {
	path, version := r.URL.Path, ""
	if rest, ok := strings.CutPrefix(path, "/v"); ok {
		version, path, _ = strings.Cut(rest, "/")
		path = "/" + path
	}
	kind, rest, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	e.mu.Lock()
	e.calls[kind]++
	hang, fail := e.hang, e.fail
	e.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-r.Context().Done():
			return
		}
	}
	if fail != nil {
		if status := fail(path); status != 0 {
			refuse(w, status, "made to fail")
			return
		}
	}
	w.Header().Set("Api-Version", e.APIVersion)
	w.Header().Set("Ostype", "linux")
	if version != "" && newer(version, e.APIVersion) {
		refuse(w, http.StatusBadRequest, "client version "+version+" is too new. Maximum supported API version is "+e.APIVersion)
		return
	}
	switch id, ok := strings.CutSuffix(rest, "/json"); {
	case kind == "_ping":
		_, _ = w.Write([]byte("OK"))
	case kind == "events":
		e.serveEvents(w, r)
	case kind == "containers" && ok:
		e.serveContainer(w, id)
	case kind == "images" && ok:
		e.serveImage(w, id)
	default:
		refuse(w, http.StatusNotFound, "page not found")
	}
}

// newer compares versions of the form 1.x.
func newer(a, b string) bool {
	minor := func(v string) int {
		_, text, _ := strings.Cut(v, ".")
		n, _ := strconv.Atoi(text)
		return n
	}
	return minor(a) > minor(b)
}

func refuse(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": message})
}

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}

func (e *Engine) serveContainer(w http.ResponseWriter, ref string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.containers[ref]
	for _, other := range e.containers { // by name, and by the beginning of the ID, as engines do
		if c == nil && (other.name == ref || len(ref) >= 12 && strings.HasPrefix(other.id, ref)) {
			c = other
		}
	}
	if c == nil {
		refuse(w, http.StatusNotFound, "No such container: "+ref)
		return
	}
	described := map[string]any{
		"Id": c.id, "Name": "/" + c.name, "Image": e.format(c.image, "image"), "Driver": "overlay2",
		"State":  map[string]any{"Status": "running", "Running": c.pid != 0, "Pid": c.pid},
		"Config": map[string]any{"Image": c.ref, "Labels": c.labels, "Env": c.env},
	}
	if e.ContainerdStore {
		described["Driver"] = "overlayfs"
		described["ImageManifestDescriptor"] = map[string]any{
			"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
			"digest": manifestOf(c.image), "platform": map[string]string{"os": "linux", "architecture": "arm64", "variant": "v8"},
		}
	}
	answer(w, described)
}

// manifestOf is the manifest digest that a containerd store gives for an image.
func manifestOf(id string) string {
	sum := sha256.Sum256([]byte(id))
	return "sha256:" + hex.EncodeToString(sum[:])
}

func (e *Engine) serveImage(w http.ResponseWriter, ref string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	img := e.find(ref)
	if img == nil {
		refuse(w, http.StatusNotFound, "No such image: "+ref)
		return
	}
	described := map[string]any{
		"Id": e.format(img.id, "image"), "Os": "linux", "Architecture": "amd64", "RepoTags": []string{}, "RepoDigests": []string{},
		"Config": map[string]any{"Labels": img.labels, "Env": img.env},
	}
	if e.ContainerdStore {
		described["Descriptor"] = map[string]any{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": img.id, "size": 1}
	}
	answer(w, described)
}

// serveEvents streams what matches the filters, from the asked moment on.
func (e *Engine) serveEvents(w http.ResponseWriter, r *http.Request) {
	var filters map[string]map[string]bool
	if text := r.URL.Query().Get("filters"); text != "" {
		if err := json.Unmarshal([]byte(text), &filters); err != nil {
			refuse(w, http.StatusBadRequest, "invalid filter")
			return
		}
	}
	e.mu.Lock()
	next := len(e.log)
	if since := r.URL.Query().Get("since"); since != "" {
		seconds, nanos, _ := strings.Cut(since, ".")
		s, _ := strconv.ParseInt(seconds, 10, 64)
		n, _ := strconv.ParseInt(nanos, 10, 64)
		from := s*int64(time.Second) + n
		next = slices.IndexFunc(e.log, func(ev event) bool { return ev.TimeNano >= from })
		if next < 0 {
			next = len(e.log)
		}
	}
	e.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w)
	_ = flush.Flush()
	lines := json.NewEncoder(w)
	for {
		e.mu.Lock()
		news, more := slices.Clone(e.log[min(next, len(e.log)):]), e.more
		next = len(e.log)
		e.mu.Unlock()
		for _, ev := range news {
			if !passes(filters["type"], ev.Type) || !passes(filters["event"], ev.Action) {
				continue
			}
			if lines.Encode(ev) != nil {
				return
			}
		}
		_ = flush.Flush()
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}

func passes(allowed map[string]bool, value string) bool { return len(allowed) == 0 || allowed[value] }
