package workload

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8s"
	"github.com/assay-id/assay/test/fake/kube"
)

func TestWarm(t *testing.T) {
	c := kube.Start(t)
	p := kube.Pod{
		Namespace: "shop", Name: "cart-1", UID: "79261129-6b60-11e9-9054-0800277ac80f", ServiceAccount: "cart",
		Containers: []kube.Container{
			{Name: "main", Image: "team/app:1", ImageID: "1111111111111111111111111111111111111111111111111111111111111111"},
			{Name: "lost", Image: "team/app:1", ImageID: "1111111111111111111111111111111111111111111111111111111111111111"},
		},
	}
	c.Put(p)
	id, pid := c.Run(t, p, "main")
	lost, lostPID := c.Run(t, p, "lost")
	c.WriteProcess(t, lostPID, "0::/system.slice/sshd.service\n", "") // the container's number is another process's by now
	made, err := open(&k8s.Config{
		RuntimeSocket: c.Runtime.Socket(), RuntimeTimeout: "5s", NodeName: kube.Node,
		APIServer: c.APIServer(), APIServerCAPath: filepath.Join(c.Dir, "ca.crt"), TokenPath: filepath.Join(c.Dir, "token"), DisableKubelet: true,
	}, attestor.Needs{})
	if err != nil {
		t.Fatal(err)
	}
	w := made.(*workload)
	w.proc = c.Proc()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w.warm(ctx)
	t.Run("a container that runs is known before anybody asks, and costs no call then", func(t *testing.T) {
		if w.known[id] == nil {
			t.Fatal("it is not known")
		}
		calls := c.Runtime.Calls()
		found, err := w.Attest(ctx, attestor.Process{PID: pid, Proc: c.Proc()})
		if err != nil || !attestor.NewSet(found...).Has(attestor.Selector{Type: k8s.Type, Value: "container-name:main"}) {
			t.Fatalf("selectors %v, %v", found, err)
		}
		if now := c.Runtime.Calls(); now != calls {
			t.Errorf("the runtime was asked %d times", now-calls)
		}
	})
	t.Run("one whose first process is not where it should be is left to who asks", func(t *testing.T) {
		if w.known[lost] != nil {
			t.Error("it is known")
		}
	})
	t.Run("a runtime that is away is none of its business", func(t *testing.T) {
		c.Runtime.Down()
		w.warm(ctx)
	})
}
