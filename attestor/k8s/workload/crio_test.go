package workload_test

import (
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/test/fake/kube"
)

// What CRI-O answers otherwise than containerd was taken from a real CRI-O v1.34.0.
func TestCRIO(t *testing.T) {
	c := kube.Start(t)
	c.Runtime.CRIO()
	p := podA()
	p.Init, p.Ephemeral = nil, nil // the fake has digests of the first alone
	c.Put(p)
	_, pid := c.Run(t, p, "main")
	w, hook := open(t, config(c))
	heard := watch(t, w)
	t.Run("the true image is known, with its platform and what is said of it", func(t *testing.T) {
		set := attest(t, w, c, pid)
		has(t, set, "k8s:ns:shop", "k8s:sa:cart", "k8s:container-name:main", "k8s:container-image:"+digest,
			"image:id:sha256:"+imageA, "image:platform:linux/amd64", "claim:image:built-by:ci")
	})
	t.Run("that it tells of no events is no trouble: labels that change wake the process", func(t *testing.T) {
		before := heard.of(pid)
		p.Labels = map[string]string{"app": "till"}
		c.Put(p)
		eventually(t, "it is woken", func() bool { return heard.of(pid) > before })
		has(t, attest(t, w, c, pid), "k8s:pod-label:app:till")
		for _, e := range hook.AllEntries() {
			if e.Level <= logrus.WarnLevel {
				t.Errorf("a warning: %s", e.Message)
			}
		}
	})
}
