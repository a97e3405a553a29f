package workload_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8s"
	"github.com/assay-id/assay/test/fake/kube"
)

func TestAway(t *testing.T) {
	t.Run("a runtime that is away costs the image, until it is back", func(t *testing.T) {
		for why, away := range map[string]func(*kube.Cluster){
			"it is down": func(c *kube.Cluster) { c.Runtime.Down() },
			"it hangs":   func(c *kube.Cluster) { c.Runtime.Hang(true) },
		} {
			t.Run(why, func(t *testing.T) {
				c := kube.Start(t)
				p := podA()
				id, pid := c.Run(t, p, "main")
				c.Put(p)
				away(c)
				cfg := config(c)
				cfg.RuntimeTimeout = "100ms"
				w, hook := open(t, cfg)
				heard := watch(t, w)
				// The kubelet tells of the container a moment later.
				done := make(chan error, 1)
				var set attestor.Set
				go func() {
					var err error
					set, err = try(t, w, c, pid)
					done <- err
				}()
				eventually(t, "it is looked for", func() bool { return c.Lists("kubelet") > 0 })
				p.Containers[0].ID, p.Containers[0].Told = id, true
				c.Put(p)
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				has(t, set, "k8s:container-name:main", "k8s:sa:cart", "k8s:container-image:"+digest)
				hasNone(t, set, "image:id", "claim:")
				logged(t, hook, "container runtime does not answer", c.Runtime.Socket())
				before := heard.of(pid)
				c.Runtime.Hang(false)
				if why == "it is down" {
					c.Runtime.Up(t)
				}
				eventually(t, "everybody is woken", func() bool { return heard.of(pid) > before })
				eventually(t, "the image is known", func() bool {
					set, err := try(t, w, c, pid)
					return err == nil && slices.Contains(set.Strings(), "image:id:sha256:"+imageA)
				})
				logged(t, hook, "container runtime answers again")
			})
		}
	})
	t.Run("with nobody to ask about a pod the runtime's word stands, without labels", func(t *testing.T) {
		c := kube.Start(t)
		c.Answer(503, 503)
		p := podA()
		c.Put(p)
		_, pid := c.Run(t, p, "main")
		w, hook := open(t, config(c))
		heard := watch(t, w)
		set := attest(t, w, c, pid)
		has(t, set, "k8s:ns:shop", "k8s:pod-name:cart-1", "k8s:pod-uid:"+uidA, "k8s:container-name:main", "image:id:sha256:"+imageA)
		hasNone(t, set, "pod-label", "k8s:sa:", "pod-owner")
		logged(t, hook, "API server does not answer", "503")
		before := heard.of(pid)
		c.Answer(0, 0)
		eventually(t, "everybody is woken", func() bool { return heard.of(pid) > before })
		eventually(t, "all is known", func() bool {
			set, err := try(t, w, c, pid)
			return err == nil && slices.Contains(set.Strings(), "k8s:sa:cart")
		})
	})
	t.Run("without the API server the kubelet's pods count", func(t *testing.T) {
		c := kube.Start(t)
		c.Answer(403, 0)
		p := podA()
		c.Put(p)
		_, pid := c.Run(t, p, "main")
		w, hook := open(t, config(c))
		heard := watch(t, w)
		has(t, attest(t, w, c, pid), "k8s:sa:cart", "k8s:pod-label:app:cart")
		logged(t, hook, "API server", "403", "role lacks a permission")
		before := heard.of(pid)
		p.Labels = map[string]string{}
		c.Put(p)
		eventually(t, "the kubelet is asked again by itself", func() bool { return heard.of(pid) > before })
		eventually(t, "the label is gone", func() bool {
			set, err := try(t, w, c, pid)
			return err == nil && !strings.Contains(set.Key(), "pod-label")
		})
	})
	for why, c := range map[string]struct {
		spoil func(t *testing.T, c *kube.Cluster, cfg *k8s.Config)
		says  []string
	}{
		"a kubelet whose certificate is not from the CA": {func(t *testing.T, c *kube.Cluster, cfg *k8s.Config) {
			cfg.KubeletCAPath = otherCA(t)
		}, []string{"kubelet does not answer", "certificate signed by unknown authority"}},
		"a kubelet with another node's certificate": {func(_ *testing.T, _ *kube.Cluster, cfg *k8s.Config) {
			cfg.NodeName = "another.test"
		}, []string{"kubelet does not answer", "not another.test"}},
		"a token that has expired": {func(t *testing.T, c *kube.Cluster, _ *k8s.Config) {
			if err := os.WriteFile(filepath.Join(c.Dir, "token"), []byte("old-secret-token"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"kubelet does not answer", "401", "token has expired"}},
		"no token": {func(_ *testing.T, _ *kube.Cluster, cfg *k8s.Config) {
			cfg.TokenPath = "/nowhere/token"
		}, []string{"kubelet does not answer", "/nowhere/token"}},
	} {
		t.Run(why+" is said, and loses the pod's selectors only", func(t *testing.T) {
			cluster := kube.Start(t)
			p := podA()
			cluster.Put(p)
			_, pid := cluster.Run(t, p, "main")
			cfg := config(cluster)
			cfg.APIServer = k8s.None
			c.spoil(t, cluster, &cfg)
			w, hook := open(t, cfg)
			set := attest(t, w, cluster, pid)
			has(t, set, "k8s:ns:shop", "image:id:sha256:"+imageA)
			hasNone(t, set, "k8s:sa:", "pod-label")
			logged(t, hook, c.says...)
			for _, e := range hook.AllEntries() {
				if line, _ := e.String(); strings.Contains(line, "secret") {
					t.Errorf("the token is in the log: %s", line)
				}
			}
		})
	}
}

func TestNotBelieved(t *testing.T) {
	c := kube.Start(t)
	p := podA()
	c.Put(p)
	id, pid := c.Run(t, p, "main")
	w, _ := open(t, config(c))
	attest(t, w, c, pid)
	for why, cgroup := range map[string]string{
		"a cgroup of that name elsewhere":      "0::/kubepods/burstable/pod" + uidA + "/" + id,
		"a cgroup of that name in another pod": "0::/kubepods/besteffort/pod" + uidB + "/" + id,
		"beside the pod":                       "0::/../" + id,
	} {
		t.Run(why, func(t *testing.T) {
			c.WriteProcess(t, 5, cgroup+"\n", "")
			if set, err := try(t, w, c, 5); err == nil || set.Len() > 0 {
				t.Errorf("believed: %v", set.Strings())
			}
		})
	}
	t.Run("a user's own cgroup", func(t *testing.T) {
		c.WriteProcess(t, 5, "0::/user.slice/user-1000.slice/user@1000.service/kubepods/pod"+uidA+"/"+id+"\n", "")
		if set, err := try(t, w, c, 5); err != nil || set.Len() > 0 {
			t.Errorf("selectors %v, error %v", set.Strings(), err)
		}
	})
	t.Run("the beginning of an ID", func(t *testing.T) {
		c.WriteProcess(t, 5, "0::/kubepods/besteffort/pod"+uidA+"/"+id[:63]+"\n", "")
		if set, err := try(t, w, c, 5); err != nil || set.Len() > 0 {
			t.Errorf("selectors %v, error %v", set.Strings(), err)
		}
	})
	t.Run("a pod that says it mirrors another", func(t *testing.T) {
		liar := kube.Pod{
			Namespace: "evil", Name: "liar", UID: uidB, ServiceAccount: "admin",
			Annotations: map[string]string{"kubernetes.io/config.mirror": "00112233445566778899aabbccddeeff"},
		}
		c.Put(liar)
		static := kube.Pod{Namespace: "kube-system", Name: "etcd", UID: "00112233445566778899aabbccddeeff", Containers: []kube.Container{{Name: "etcd", Image: "e", ImageID: imageB}}}
		_, pid := c.Run(t, static, "etcd")
		set, err := try(t, w, c, pid)
		if err == nil {
			t.Errorf("believed: %v", set.Strings())
		}
	})
}
