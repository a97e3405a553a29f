package workload_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/k8s"
	"github.com/assay-id/assay/attestor/k8s/workload"
	"github.com/assay-id/assay/test/fake/kube"
)

// patience is how long anything may take on a busy machine before it counts as not happening.
const patience = 60 * time.Second

const (
	uidA   = "79261129-6b60-11e9-9054-0800277ac80f"
	uidB   = "0d8e1c52-8d5a-4a2f-9f64-2a1b3c4d5e6f"
	imageA = "1111111111111111111111111111111111111111111111111111111111111111"
	imageB = "2222222222222222222222222222222222222222222222222222222222222222"
	digest = "registry.example/team/app@sha256:3333333333333333333333333333333333333333333333333333333333333333"
)

func podA() kube.Pod {
	return kube.Pod{
		Namespace: "shop", Name: "cart-1", UID: uidA, ServiceAccount: "cart",
		Labels:     map[string]string{"app": "cart"},
		Owners:     []map[string]string{{"kind": "ReplicaSet", "name": "cart", "uid": uidB}},
		Containers: []kube.Container{{Name: "main", Image: "team/app:1", ImageID: imageA, Digests: []string{digest}, Labels: map[string]string{"built-by": "ci"}}},
		Init:       []kube.Container{{Name: "setup", Image: "busybox", ImageID: imageB}},
		Ephemeral:  []kube.Container{{Name: "debugger", Image: "busybox", ImageID: imageB}},
	}
}

// config is what an agent on the node has.
func config(c *kube.Cluster) k8s.Config {
	return k8s.Config{
		RuntimeSocket: c.Runtime.Socket(), RuntimeTimeout: "5s", NodeName: kube.Node,
		APIServer: c.APIServer(), APIServerCAPath: filepath.Join(c.Dir, "ca.crt"),
		KubeletAddress: "127.0.0.1", KubeletSecurePort: c.KubeletPort(), KubeletCAPath: filepath.Join(c.Dir, "ca.crt"),
		TokenPath: filepath.Join(c.Dir, "token"),
	}
}

func open(t testing.TB, c k8s.Config) (attestor.Workload, *test.Hook) {
	t.Helper()
	log, hook := test.NewNullLogger()
	log.SetLevel(logrus.DebugLevel)
	w, err := workload.Kind().Open(&c, attestor.Needs{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return w, hook
}

func try(t *testing.T, w attestor.Workload, c *kube.Cluster, pid int) (attestor.Set, error) {
	t.Helper()
	found, err := w.Attest(t.Context(), attestor.Process{PID: pid, Proc: c.Proc()})
	return attestor.NewSet(found...), err
}

func attest(t *testing.T, w attestor.Workload, c *kube.Cluster, pid int) attestor.Set {
	t.Helper()
	set, err := try(t, w, c, pid)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func has(t *testing.T, set attestor.Set, want ...string) {
	t.Helper()
	for _, text := range want {
		if !slices.Contains(set.Strings(), text) {
			t.Errorf("no %s in\n%s", text, strings.Join(set.Strings(), "\n"))
		}
	}
}

func hasNone(t *testing.T, set attestor.Set, parts ...string) {
	t.Helper()
	for _, s := range set.Strings() {
		for _, part := range parts {
			if strings.Contains(s, part) {
				t.Errorf("there is a %s", s)
			}
		}
	}
}

// logged waits for a line that holds all parts.
func logged(t *testing.T, hook *test.Hook, parts ...string) {
	t.Helper()
	eventually(t, "a line with "+strings.Join(parts, ", "), func() bool {
		for _, e := range hook.AllEntries() {
			line, _ := e.String()
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
				return true
			}
		}
		return false
	})
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	late := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("never: %s", what)
		}
	}
}

// wakes collects what a watcher says.
type wakes struct {
	mu   sync.Mutex
	pids map[int]int
	all  int
}

func (h *wakes) changed(pids ...int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(pids) == 0 {
		h.all++
	}
	for _, pid := range pids {
		h.pids[pid]++
	}
}

// of returns how often a process was named, or everybody was.
func (h *wakes) of(pid int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pids[pid] + h.all
}

// watch runs the watcher until the test ends.
func watch(t *testing.T, w attestor.Workload) *wakes {
	t.Helper()
	heard := &wakes{pids: map[int]int{}}
	watcher, ok := w.(attestor.Watcher)
	if !ok {
		t.Fatal("it does not watch")
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- watcher.Watch(ctx, heard.changed) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("watch: %v", err)
			}
		case <-time.After(patience):
			t.Error("watch does not end")
		}
	})
	return heard
}

func TestSuite(t *testing.T) {
	c := kube.Start(t)
	p := podA()
	c.Put(p)
	_, mainPID := c.Run(t, p, "main")
	_, initPID := c.Run(t, p, "setup")
	_, debugPID := c.Run(t, p, "debugger")
	static := kube.Pod{
		Namespace: "kube-system", Name: "etcd-node", UID: "00112233445566778899aabbccddeeff",
		Containers: []kube.Container{{Name: "etcd", Image: "etcd:3", ImageID: imageB}},
	}
	c.PutStatic(static)
	_, staticPID := c.Run(t, static, "etcd")
	c.WriteProcess(t, 7, "0::/system.slice/sshd.service\n", "")
	c.WriteProcess(t, 8, "0::/\n", "1 2 0:1 /lib/kubelet/pods/"+uidA+"/containers/main/1a2b3c4d /dev/termination-log rw - ext4 /dev/x rw\n")
	pod := []string{
		"k8s:ns:shop", "k8s:sa:cart", "k8s:node-name:" + kube.Node, "k8s:pod-uid:" + uidA, "k8s:pod-name:cart-1",
		"k8s:pod-label:app:cart", "k8s:pod-owner:ReplicaSet:cart", "k8s:pod-owner-uid:ReplicaSet:" + uidB,
		"k8s:pod-image:team/app:1", "k8s:pod-image:docker.io/team/app:1", "k8s:pod-image-count:1",
		"k8s:pod-init-image:busybox", "k8s:pod-init-image:docker.io/library/busybox:latest", "k8s:pod-init-image-count:1",
	}
	busybox := []string{
		"k8s:container-image:busybox", "k8s:container-image:docker.io/library/busybox:latest", "k8s:container-image:sha256:" + imageB,
		"image:id:sha256:" + imageB, "image:platform:linux/amd64",
	}
	attestortest.RunWorkload(t, attestortest.Workload{
		Kind: workload.Kind(),
		Config: fmt.Sprintf(`runtime_socket_path = %q
			runtime_timeout = "20s"
			node_name = %q
			api_server = %q
			api_server_ca_path = %q
			kubelet_address = "127.0.0.1"
			kubelet_secure_port = %d
			kubelet_ca_path = %[4]q
			token_path = %[6]q`, c.Runtime.Socket(), kube.Node, c.APIServer(), filepath.Join(c.Dir, "ca.crt"), c.KubeletPort(), filepath.Join(c.Dir, "token")),
		Types: []string{"k8s", "image", "claim"},
		Cases: map[string]attestortest.Case{
			"a container": {Process: attestor.Process{PID: mainPID, Proc: c.Proc()}, Want: slices.Concat(pod, []string{
				"k8s:container-name:main", "k8s:container-image:team/app:1", "k8s:container-image:docker.io/team/app:1",
				"k8s:container-image:" + digest, "k8s:container-image:sha256:" + imageA,
				"image:id:sha256:" + imageA, "image:platform:linux/amd64", "claim:image:built-by:ci",
			})},
			"an init container":      {Process: attestor.Process{PID: initPID, Proc: c.Proc()}, Want: slices.Concat(pod, busybox, []string{"k8s:container-name:setup"})},
			"an ephemeral container": {Process: attestor.Process{PID: debugPID, Proc: c.Proc()}, Want: slices.Concat(pod, busybox, []string{"k8s:container-name:debugger"})},
			"a process in no pod":    {Process: attestor.Process{PID: 7, Proc: c.Proc()}, Want: nil},
			"a static pod's container": {Process: attestor.Process{PID: staticPID, Proc: c.Proc()}, Want: []string{
				"k8s:ns:kube-system", "k8s:node-name:" + kube.Node, "k8s:pod-uid:00112233445566778899aabbccddeeff", "k8s:pod-name:etcd-node",
				"k8s:pod-image:etcd:3", "k8s:pod-image:docker.io/library/etcd:3", "k8s:pod-image-count:1", "k8s:pod-init-image-count:0",
				"k8s:container-name:etcd", "k8s:container-image:etcd:3", "k8s:container-image:docker.io/library/etcd:3", "k8s:container-image:sha256:" + imageB,
				"image:id:sha256:" + imageB, "image:platform:linux/amd64",
			}},
		},
		Gone:   attestor.Process{PID: 4711, Proc: c.Proc()},
		README: "../README.md",
	})
	t.Run("where only the mounts tell, the container is found by them", func(t *testing.T) {
		w, _ := open(t, config(c))
		// Its cgroup is not the one of the container's first process, so it is refused, by name.
		if _, err := try(t, w, c, 8); err == nil || !strings.Contains(err.Error(), "not in that container's cgroup") {
			t.Errorf("error is %v", err)
		}
	})
}

func TestChanges(t *testing.T) {
	c := kube.Start(t)
	p := podA()
	c.Put(p)
	c.PutNamespace("shop", map[string]string{"team": "red"})
	_, pid := c.Run(t, p, "main")
	cfg := config(c)
	cfg.EnableNamespaceLabels = true
	w, _ := open(t, cfg)
	heard := watch(t, w)
	set := attest(t, w, c, pid)
	has(t, set, "k8s:pod-label:app:cart", "k8s:ns-label:team:red")

	step := func(why string, change func(), is func(attestor.Set, error) bool) {
		t.Run(why, func(t *testing.T) {
			before := heard.of(pid)
			change()
			eventually(t, "the process is named", func() bool { return heard.of(pid) > before })
			eventually(t, "its selectors change", func() bool { return is(try(t, w, c, pid)) })
		})
	}
	with := func(text string) func(attestor.Set, error) bool {
		return func(s attestor.Set, err error) bool { return err == nil && slices.Contains(s.Strings(), text) }
	}
	step("a label that is added", func() {
		p.Labels = map[string]string{"app": "cart", "tier": "gold", "empty": ""}
		c.Put(p)
	}, func(s attestor.Set, err error) bool {
		return with("k8s:pod-label:tier:gold")(s, err) && with("k8s:pod-label:empty:")(s, err)
	})
	step("a label that is taken away", func() {
		p.Labels = map[string]string{"tier": "gold"}
		c.Put(p)
	}, func(s attestor.Set, err error) bool { return err == nil && !strings.Contains(s.Key(), "pod-label:app") })
	step("a namespace's label", func() { c.PutNamespace("shop", map[string]string{"team": "blue"}) }, with("k8s:ns-label:team:blue"))
	step("a change that was missed, because versions were compacted", func() {
		c.Answer(500, 0)
		p.Labels = map[string]string{"tier": "lead"}
		c.Put(p)
		c.Compact()
		c.Answer(0, 0)
	}, with("k8s:pod-label:tier:lead"))
	step("an image given to the pod later is not the running container's", func() {
		p.Containers = slices.Clone(p.Containers)
		p.Containers[0].Image = "team/app:2"
		c.Put(p)
	}, func(s attestor.Set, err error) bool {
		return with("k8s:pod-image:team/app:2")(s, err) && with("k8s:container-image:team/app:1")(s, err) && !with("k8s:container-image:team/app:2")(s, err)
	})
	step("a pod that is deleted", func() { c.Delete(uidA) }, func(_ attestor.Set, err error) bool { return err != nil })
}

func TestUnreadableCgroups(t *testing.T) {
	c := kube.Start(t)
	p := podA()
	c.Put(p)
	id, pid := c.Run(t, p, "main")
	w, _ := open(t, config(c))
	good := "0::/kubepods/besteffort/pod" + uidA + "/" + id + "\n"
	has(t, attest(t, w, c, pid), "k8s:ns:shop")
	file := filepath.Join(c.Proc(), strconv.Itoa(pid), "cgroup")
	for why, text := range map[string]string{
		"binary":                  "\x00\xff\xfe\x00" + id,
		"lines of another form":   "kubepods " + id + "\n",
		"nothing":                 "",
		"a name that is cut off":  good[:len(good)-8],
		"two containers":          good + "1:cpu:/kubepods/besteffort/pod" + uidB + "/" + strings.Repeat("a", 64) + "\n",
		"larger than any":         strings.Repeat("2:cpu:/x\n", 10_000) + good,
		"an ID in capital digits": strings.ReplaceAll(good, id, strings.ToUpper(id)+"A"),
	} {
		t.Run(why, func(t *testing.T) {
			c.WriteProcess(t, pid, text, "")
			if set, _ := try(t, w, c, pid); set.Len() != 0 {
				t.Errorf("selectors are %v", set.Strings())
			}
		})
	}
	t.Run("a file that cannot be read is an error, not a process in no container", func(t *testing.T) {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(file, 0o755); err != nil {
			t.Fatal(err)
		}
		if set, err := try(t, w, c, pid); err == nil || set.Len() != 0 {
			t.Errorf("selectors are %v, error %v", set.Strings(), err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if set, err := try(t, w, c, pid); err == nil || set.Len() != 0 {
			t.Errorf("without it selectors are %v, error %v", set.Strings(), err)
		}
	})
	t.Run("and it is attested again when it can be", func(t *testing.T) {
		c.WriteProcess(t, pid, good, "")
		has(t, attest(t, w, c, pid), "k8s:ns:shop")
	})
}

func TestKnownContainersCostNoCall(t *testing.T) {
	c := kube.Start(t)
	p := podA()
	c.Put(p)
	_, pid := c.Run(t, p, "main")
	w, _ := open(t, config(c))
	watch(t, w)
	first := attest(t, w, c, pid)
	eventually(t, "the pods are listed", func() bool { return c.Lists("pods") > 0 })
	calls, lists := c.Runtime.Calls(), c.Lists("kubelet")
	for range 50 {
		if again := attest(t, w, c, pid); !again.Equal(first) {
			t.Fatalf("selectors are\n%v, were\n%v", again.Strings(), first.Strings())
		}
	}
	if c.Runtime.Calls() != calls || c.Lists("kubelet") != lists {
		t.Errorf("%d calls of the runtime, %d lists of the kubelet", c.Runtime.Calls()-calls, c.Lists("kubelet")-lists)
	}
	t.Run("and are served when nobody is there", func(t *testing.T) {
		c.Answer(503, 503)
		c.Runtime.Down()
		if again := attest(t, w, c, pid); !again.Equal(first) {
			t.Errorf("selectors are\n%v", again.Strings())
		}
	})
}

func TestOneListForAll(t *testing.T) {
	c := kube.Start(t)
	cfg := config(c)
	cfg.APIServer = k8s.None
	w, _ := open(t, cfg)
	p := podA()
	c.Put(p)
	var pids []int
	for range 40 {
		_, pid := c.Run(t, p, "main")
		pids = append(pids, pid)
	}
	var all sync.WaitGroup
	for _, pid := range pids {
		all.Go(func() {
			if set, err := try(t, w, c, pid); err != nil || set.Len() == 0 {
				t.Errorf("%d selectors, error %v", set.Len(), err)
			}
		})
	}
	all.Wait()
	if n := c.Lists("kubelet"); n > 3 {
		t.Errorf("the kubelet was asked %d times", n)
	}
}

func TestStartingContainer(t *testing.T) {
	c := kube.Start(t)
	p := podA()
	c.Put(p)
	id, pid := c.Run(t, p, "main")
	c.Runtime.Starting(id, true)
	w, _ := open(t, config(c))
	done := make(chan error, 1)
	go func() {
		_, err := try(t, w, c, pid)
		done <- err
	}()
	eventually(t, "the runtime is asked again", func() bool { return c.Runtime.Calls() > 5 })
	c.Runtime.Starting(id, false)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestContainerThatEnds(t *testing.T) {
	c := kube.Start(t)
	p := podA()
	c.Put(p)
	id, pid := c.Run(t, p, "main")
	w, _ := open(t, config(c))
	heard := watch(t, w)
	attest(t, w, c, pid)
	before := heard.of(pid)
	eventually(t, "its end is heard of", func() bool { c.Runtime.Stop(id); return heard.of(pid) > before })
	set, err := try(t, w, c, pid)
	if err != nil && !errors.Is(err, os.ErrNotExist) || set.Len() > 0 {
		t.Errorf("selectors %v, error %v", set.Strings(), err)
	}
}

func TestOpen(t *testing.T) {
	c := kube.Start(t)
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for why, spoil := range map[string]func(*k8s.Config){
		"a relative socket":            func(c *k8s.Config) { c.RuntimeSocket = "run/x.sock" },
		"no duration":                  func(c *k8s.Config) { c.RuntimeTimeout = "soon" },
		"a duration below zero":        func(c *k8s.Config) { c.RuntimeTimeout = "-1s" },
		"an API server without TLS":    func(c *k8s.Config) { c.APIServer = "http://127.0.0.1:8080" },
		"an API server that is no URL": func(c *k8s.Config) { c.APIServer = "127.0.0.1" },
		"an API server, no node name":  func(c *k8s.Config) { c.NodeName, c.NodeNameEnv = "", "NO_SUCH_VARIABLE" },
		"a port that is none":          func(c *k8s.Config) { c.KubeletSecurePort = 70000 },
		"two ports":                    func(c *k8s.Config) { c.KubeletReadOnlyPort = 10255 },
		"a key without a certificate":  func(c *k8s.Config) { c.PrivateKeyPath = "/x" },
		"a token and a certificate":    func(c *k8s.Config) { c.PrivateKeyPath, c.CertificatePath = "/x", "/y" },
		"anonymous with a token":       func(c *k8s.Config) { c.UseAnonymousAuthentication = true },
		"an address with a path":       func(c *k8s.Config) { c.KubeletAddress = "host/pods?x=" },
		"nobody to ask":                func(c *k8s.Config) { c.APIServer, c.DisableKubelet = k8s.None, true },
		"namespaces and no API server": func(c *k8s.Config) { c.APIServer, c.EnableNamespaceLabels = k8s.None, true },
	} {
		t.Run(why+" is refused", func(t *testing.T) {
			cfg := config(c)
			spoil(&cfg)
			if _, err := workload.Kind().Open(&cfg, attestor.Needs{}); err == nil {
				t.Error("accepted")
			}
		})
	}
	t.Run("in a pod everything is found", func(t *testing.T) {
		t.Setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
		t.Setenv("KUBERNETES_SERVICE_PORT", strconv.Itoa(443))
		t.Setenv("MY_NODE_NAME", "n")
		if _, err := workload.Kind().Open(&k8s.Config{}, attestor.Needs{}); err != nil {
			t.Error(err)
		}
	})
}

// otherCA writes the certificate of an authority that signed nothing here.
func otherCA(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "another"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// BenchmarkAttest attests processes of containers that are known, as eight callers at once do.
func BenchmarkAttest(b *testing.B) {
	c := kube.Start(b)
	p := podA()
	c.Put(p)
	_, pid := c.Run(b, p, "main")
	w, _ := open(b, config(c))
	b.SetParallelism(8)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := w.Attest(b.Context(), attestor.Process{PID: pid, Proc: c.Proc()}); err != nil {
				b.Error(err)
			}
		}
	})
}
