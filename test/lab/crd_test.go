package lab_test

import (
	"errors"
	"maps"
	"os"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// newerCRDs gives the cluster a CRD as a later release may have it: with another version beside the one that
// this server knows, and in the end without that one.
func (r *registrar) newerCRDs(t *testing.T) {
	definitions := r.dyn.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	change := func(edit func(versions []any) []any) {
		t.Helper()
		r.eventually("the CRD is changed", func() error {
			crd, err := definitions.Get(t.Context(), "clusterspiffeids.spire.spiffe.io", metav1.GetOptions{})
			if err != nil {
				return err
			}
			versions, _, err := unstructured.NestedSlice(crd.Object, "spec", "versions")
			if err != nil {
				return err
			}
			if err := unstructured.SetNestedSlice(crd.Object, edit(versions), "spec", "versions"); err != nil {
				return err
			}
			_, err = definitions.Update(t.Context(), crd, metav1.UpdateOptions{})
			return err
		})
	}
	change(func(versions []any) []any {
		old := versions[0].(map[string]any)
		next := maps.Clone(old)
		next["storage"], next["name"] = false, "v2"
		next["schema"] = map[string]any{"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}
		return []any{old, next}
	})
	before := r.entries()
	newer := r.dyn.Resource(schema.GroupVersionResource{Group: spiffeIDs.Group, Version: "v2", Resource: spiffeIDs.Resource})
	r.eventually("the newer version is served", func() error {
		_, err := newer.Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "spire.spiffe.io/v2", "kind": "ClusterSPIFFEID", "metadata": map[string]any{"name": "newer"},
			"spec": map[string]any{"spiffeIDTemplate": "spiffe://example.org/ns/{{ .PodMeta.Namespace }}/newer", "fancy": []any{"field"}},
		}}, metav1.CreateOptions{})
		return err
	})
	r.eventually("a resource of the newer version gives entries", func() error {
		for _, e := range r.entries() {
			if strings.Contains(e, "/ns/shop/newer ") {
				return nil
			}
		}
		return errors.New("there is none")
	})
	if err := newer.Delete(t.Context(), "newer", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.has(before...)
	serve := func(is bool) {
		change(func(versions []any) []any {
			versions[0].(map[string]any)["served"] = is
			return versions
		})
	}
	serve(false)
	r.eventually("the server says that the resource is gone", func() error {
		log, err := os.ReadFile(r.site.ServerLog())
		if err == nil && !strings.Contains(string(log), "the cluster has no such resource") {
			err = errors.New("it does not")
		}
		return err
	})
	r.has(before...) // what it knows stays
	serve(true)
	pod := r.pod("shop", "served-again")
	r.eventually("pods are registered again", func() error {
		for _, e := range r.entries() {
			if strings.HasSuffix(e, "k8s:pod-uid:"+string(pod.UID)) {
				return nil
			}
		}
		return errors.New("there is no entry")
	})
	now := int64(0)
	if err := r.kube.Client.CoreV1().Pods("shop").Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	r.has(before...)
	change(func(versions []any) []any { return versions[:1] })
}
