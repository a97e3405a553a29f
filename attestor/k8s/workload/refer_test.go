package workload_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8s"
	"github.com/assay-id/assay/test/fake/kube"
)

// refer asks for a pod until it is told of it, or of why it is not.
func refer(t *testing.T, w attestor.Workload, of attestor.PodReference) (attestor.Set, <-chan struct{}, error) {
	t.Helper()
	pods, ok := w.(attestor.Pods)
	if !ok {
		t.Fatal("it knows no pods")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	found, changed, err := pods.Pod(ctx, of)
	return attestor.NewSet(found...), changed, err
}

func TestPodsByReference(t *testing.T) {
	for name, change := range map[string]func(*k8s.Config){
		"as the API server tells":                      func(*k8s.Config) {},
		"as the API server tells, without the kubelet": func(c *k8s.Config) { c.DisableKubelet = true },
		"as the kubelet tells":                         func(c *k8s.Config) { c.APIServer, c.EnableNamespaceLabels = k8s.None, false },
	} {
		t.Run(name, func(t *testing.T) {
			c := kube.Start(t)
			p := podA()
			c.Put(p)
			c.PutNamespace("shop", map[string]string{"team": "red"})
			cfg := config(c)
			cfg.EnableNamespaceLabels = true
			change(&cfg)
			w, _ := open(t, cfg)
			watch(t, w)
			var set attestor.Set
			var changed <-chan struct{}
			eventually(t, "the pod is known", func() bool {
				var err error
				set, changed, err = refer(t, w, attestor.PodReference{Namespace: "shop", Name: "cart-1"})
				return err == nil
			})
			has(t, set, "k8s:ns:shop", "k8s:sa:cart", "k8s:pod-name:cart-1", "k8s:pod-uid:"+uidA, "k8s:pod-label:app:cart", "k8s:pod-owner:ReplicaSet:cart")
			hasNone(t, set, "container-", "image:id:", "claim:")
			if cfg.EnableNamespaceLabels {
				has(t, set, "k8s:ns-label:team:red")
			}
			for name, of := range map[string]attestor.PodReference{
				"by UID": {UID: uidA}, "by both": {Namespace: "shop", Name: "cart-1", UID: uidA},
			} {
				if same, _, err := refer(t, w, of); err != nil || !same.Equal(set) {
					t.Errorf("%s: %v, %v", name, same, err)
				}
			}
			for name, of := range map[string]attestor.PodReference{
				"another UID": {Namespace: "shop", Name: "cart-1", UID: uidB}, "another namespace": {Namespace: "other", Name: "cart-1"},
				"a name of nobody": {Namespace: "shop", Name: "cart-2"}, "a UID of nobody": {UID: uidB}, "nothing": {},
			} {
				if _, _, err := refer(t, w, of); !errors.Is(err, attestor.ErrNoPod) {
					t.Errorf("%s: %v", name, err)
				}
			}
			p.Labels = map[string]string{"app": "other"}
			c.Put(p)
			if cfg.APIServer != k8s.None {
				<-changed
			}
			eventually(t, "the label changes", func() bool {
				set, _, err := refer(t, w, attestor.PodReference{UID: uidA})
				return err == nil && strings.Contains(set.Key(), "pod-label:app:other")
			})
			if cfg.EnableNamespaceLabels {
				_, changed, err := refer(t, w, attestor.PodReference{UID: uidA})
				if err != nil {
					t.Fatal(err)
				}
				c.PutNamespace("shop", map[string]string{"team": "blue"})
				<-changed
				eventually(t, "the namespace's label changes", func() bool {
					set, _, err := refer(t, w, attestor.PodReference{UID: uidA})
					return err == nil && strings.Contains(set.Key(), "ns-label:team:blue")
				})
			}
			c.Delete(uidA)
			eventually(t, "the pod is gone", func() bool {
				_, _, err := refer(t, w, attestor.PodReference{UID: uidA})
				return errors.Is(err, attestor.ErrNoPod)
			})
		})
	}
	t.Run("that nobody can be asked is not that there is none", func(t *testing.T) {
		c := kube.Start(t)
		c.Answer(500, 500)
		w, _ := open(t, config(c))
		watch(t, w)
		if _, _, err := refer(t, w, attestor.PodReference{UID: uidA}); err == nil || errors.Is(err, attestor.ErrNoPod) {
			t.Errorf("got %v", err)
		}
	})
}
