// Package kube is a Kubernetes node in memory, as an agent on it sees it: the container runtime's socket, the
// API server with its lists and watches, and the kubelet. Pods and containers are put there by the test; each
// of the three can be away, hang, or refuse.
package kube

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
)

// Node is the node's name, and Token what the agent must show.
const (
	Node  = "example.com" // as the certificates of httptest name it
	Token = "good-token"
)

// Pod is a pod's object, as the API server has it. Its parts are JSON.
type Pod struct {
	Namespace, Name, UID, ServiceAccount string
	Labels, Annotations                  map[string]string
	Owners                               []map[string]string
	Containers, Init, Ephemeral          []Container
}

// Container is one of a pod's.
type Container struct {
	Name, Image string
	// ImageID is the digest of the image's configuration, without the algorithm.
	ImageID string
	// Digests are the references by which its content is known.
	Digests []string
	// Labels are the image's.
	Labels map[string]string
	// ID and PID are set by Start.
	ID  string
	PID int
	// Told says that the kubelet and the API server tell of the running container.
	Told bool
}

// Cluster is the node and what is around it.
type Cluster struct {
	Dir     string
	Runtime *Runtime
	api     *httptest.Server
	kubelet *httptest.Server

	mu       sync.Mutex // guards all below
	version  int
	pods     map[string]*Pod // by UID
	static   map[string]bool // UIDs that only the kubelet knows
	spaces   map[string]map[string]string
	log      []change
	woken    chan struct{}
	lists    map[string]int // by what was listed
	compact  int
	apiCode  int // answered to everything, if not 0
	codeOfKl int
	pid      int
}

type change struct {
	version int
	kind    string
	path    string
	object  any
}

// Start brings up a cluster for one test.
func Start(t testing.TB) *Cluster {
	t.Helper()
	c := &Cluster{
		Dir: t.TempDir(), version: 10, pods: map[string]*Pod{}, static: map[string]bool{}, spaces: map[string]map[string]string{},
		woken: make(chan struct{}), lists: map[string]int{}, pid: 1000,
	}
	c.api = httptest.NewUnstartedServer(http.HandlerFunc(c.serveAPI))
	c.api.EnableHTTP2 = true
	c.api.StartTLS()
	c.kubelet = httptest.NewTLSServer(http.HandlerFunc(c.serveKubelet))
	c.Runtime = startRuntime(t, filepath.Join(c.Dir, "cri.sock"))
	for name, text := range map[string][]byte{
		"token": []byte(Token + "\n"), "ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.api.Certificate().Raw}),
	} {
		if err := os.WriteFile(filepath.Join(c.Dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		c.api.CloseClientConnections()
		c.api.Close()
		c.kubelet.CloseClientConnections()
		c.kubelet.Close()
	})
	return c
}

// Proc is where the node's processes are.
func (c *Cluster) Proc() string { return filepath.Join(c.Dir, "proc") }

// APIServer is its URL, and KubeletPort the kubelet's port on 127.0.0.1.
func (c *Cluster) APIServer() string { return c.api.URL }

// KubeletPort is the kubelet's port on 127.0.0.1.
func (c *Cluster) KubeletPort() int {
	port, _ := strconv.Atoi(c.kubelet.URL[len("https://127.0.0.1:"):]) // httptest's own
	return port
}

// Answer makes the API server and the kubelet answer with a status; 0: as they should.
func (c *Cluster) Answer(api, kubelet int) {
	c.mu.Lock()
	c.apiCode, c.codeOfKl = api, kubelet
	c.mu.Unlock()
	if api != 0 {
		c.api.CloseClientConnections()
	}
}

// Compact forgets the versions so far: who watches from one of them must list anew.
func (c *Cluster) Compact() {
	c.mu.Lock()
	c.compact = c.version
	c.log = nil
	c.mu.Unlock()
	c.api.CloseClientConnections()
}

// Lists returns how often something was listed: "kubelet", "pods" or "namespaces".
func (c *Cluster) Lists(what string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lists[what]
}

// Put makes or changes a pod.
func (c *Cluster) Put(p Pod) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kind := "MODIFIED"
	if c.pods[p.UID] == nil {
		kind = "ADDED"
	}
	c.pods[p.UID] = &p
	c.happened(kind, "/api/v1/pods", p.object)
}

// PutStatic makes a pod that only the kubelet knows.
func (c *Cluster) PutStatic(p Pod) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods[p.UID] = &p
	c.static[p.UID] = true
}

// Delete deletes a pod.
func (c *Cluster) Delete(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.pods[uid]; p != nil {
		delete(c.pods, uid)
		c.happened("DELETED", "/api/v1/pods", p.object)
	}
}

// PutNamespace makes or changes a namespace.
func (c *Cluster) PutNamespace(name string, labels map[string]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kind := "MODIFIED"
	if c.spaces[name] == nil {
		kind = "ADDED"
	}
	c.spaces[name] = labels
	c.happened(kind, "/api/v1/namespaces", func(version int) any { return spaceObject(name, labels, version) })
}

// happened writes a change down and wakes the watches. The caller holds mu.
func (c *Cluster) happened(kind, path string, object func(version int) any) {
	c.version++
	c.log = append(c.log, change{c.version, kind, path, object(c.version)})
	close(c.woken)
	c.woken = make(chan struct{})
}

// Run starts a pod's container and one process in it, and returns both.
func (c *Cluster) Run(t testing.TB, p Pod, name string) (id string, pid int) {
	t.Helper()
	raw := make([]byte, 32)
	_, _ = rand.Read(raw) // never fails
	id = hex.EncodeToString(raw)
	c.mu.Lock()
	c.pid++
	pid = c.pid
	c.mu.Unlock()
	c.WriteProcess(t, pid, "0::/kubepods/besteffort/pod"+p.UID+"/"+id+"\n", "")
	for _, list := range [][]Container{p.Containers, p.Init, p.Ephemeral} {
		for _, one := range list {
			if one.Name == name {
				one.ID, one.PID = id, pid
				c.Runtime.add(p, one)
				return id, pid
			}
		}
	}
	t.Fatalf("pod has no container %q", name)
	return "", 0
}

// WriteProcess makes the fixture of a process.
func (c *Cluster) WriteProcess(t testing.TB, pid int, cgroup, mounts string) {
	t.Helper()
	dir := filepath.Join(c.Proc(), strconv.Itoa(pid))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"cgroup": cgroup, "mountinfo": mounts} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// object is the pod as JSON has it.
func (p *Pod) object(version int) any {
	specs := func(list []Container) []any {
		all := []any{}
		for _, c := range list {
			all = append(all, map[string]any{"name": c.Name, "image": c.Image, "env": []any{map[string]string{"name": "SKIPPED", "value": "x"}}})
		}
		return all
	}
	statuses := func(list []Container) []any {
		all := []any{}
		for _, c := range list {
			s := map[string]any{"name": c.Name, "image": c.Image, "imageID": "", "state": map[string]any{"waiting": map[string]any{}}}
			if c.Told {
				s["containerID"], s["imageID"] = "containerd://"+c.ID, "sha256:"+c.ImageID
				if len(c.Digests) > 0 {
					s["imageID"] = c.Digests[0]
				}
			}
			all = append(all, s)
		}
		return all
	}
	return map[string]any{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{
			"name": p.Name, "namespace": p.Namespace, "uid": p.UID, "resourceVersion": strconv.Itoa(version),
			"labels": p.Labels, "annotations": p.Annotations, "ownerReferences": p.Owners,
		},
		"spec": map[string]any{
			"nodeName": Node, "serviceAccountName": p.ServiceAccount,
			"containers": specs(p.Containers), "initContainers": specs(p.Init), "ephemeralContainers": specs(p.Ephemeral),
		},
		"status": map[string]any{
			"phase": "Pending", "containerStatuses": statuses(p.Containers),
			"initContainerStatuses": statuses(p.Init), "ephemeralContainerStatuses": statuses(p.Ephemeral),
		},
	}
}

func spaceObject(name string, labels map[string]string, version int) any {
	return map[string]any{"metadata": map[string]any{"name": name, "labels": labels, "resourceVersion": strconv.Itoa(version)}}
}

func (c *Cluster) refused(w http.ResponseWriter, r *http.Request, code int) bool {
	if code == 0 && r.Header.Get("Authorization") != "Bearer "+Token {
		code = http.StatusUnauthorized
	}
	if code == 0 {
		return false
	}
	http.Error(w, `{"kind":"Status","message":"refused"}`, code)
	return true
}

func (c *Cluster) serveKubelet(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lists["kubelet"]++
	if c.refused(w, r, c.codeOfKl) {
		return
	}
	if r.URL.Path != "/pods" {
		http.NotFound(w, r)
		return
	}
	items := []any{}
	for _, p := range c.pods {
		items = append(items, p.object(c.version))
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "PodList", "apiVersion": "v1", "metadata": map[string]any{}, "items": items}) // a caller who left
}

func (c *Cluster) serveAPI(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	code := c.apiCode
	c.mu.Unlock()
	if c.refused(w, r, code) {
		return
	}
	q := r.URL.Query()
	switch {
	case r.URL.Path == "/api/v1/pods" && q.Get("fieldSelector") != "spec.nodeName="+Node:
		http.Error(w, "the agent may list the pods of its own node", http.StatusForbidden)
	case r.URL.Path != "/api/v1/pods" && r.URL.Path != "/api/v1/namespaces":
		http.NotFound(w, r)
	case q.Get("watch") == "true":
		c.watch(w, r, q.Get("resourceVersion"))
	default:
		c.list(w, r.URL.Path)
	}
}

func (c *Cluster) list(w http.ResponseWriter, path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	items := []any{}
	if path == "/api/v1/pods" {
		c.lists["pods"]++
		for uid, p := range c.pods {
			if !c.static[uid] {
				items = append(items, p.object(c.version))
			}
		}
	} else {
		c.lists["namespaces"]++
		for name, labels := range c.spaces {
			items = append(items, spaceObject(name, labels, c.version))
		}
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"kind": "List", "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": strconv.Itoa(c.version)}, "items": items,
	}) // a caller who left
}

func (c *Cluster) watch(w http.ResponseWriter, r *http.Request, from string) {
	after, err := strconv.Atoi(from)
	if err != nil {
		http.Error(w, "no version", http.StatusBadRequest)
		return
	}
	flush := func() { _ = http.NewResponseController(w).Flush() }
	out := json.NewEncoder(w)
	w.WriteHeader(http.StatusOK)
	flush()
	for {
		c.mu.Lock()
		if after < c.compact {
			c.mu.Unlock()
			_ = out.Encode(map[string]any{"type": "ERROR", "object": map[string]any{"kind": "Status", "code": 410, "message": "too old"}})
			return
		}
		var due []change
		for _, one := range c.log {
			if one.version > after && one.path == r.URL.Path {
				due = append(due, one)
			}
		}
		after = c.version
		woken := c.woken
		c.mu.Unlock()
		for _, one := range due {
			if out.Encode(map[string]any{"type": one.kind, "object": one.object}) != nil {
				return
			}
		}
		if _, err := fmt.Fprintf(w, `{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d"}}}`+"\n", after); err != nil {
			return
		}
		flush()
		select {
		case <-woken:
		case <-r.Context().Done():
			return
		}
	}
}
