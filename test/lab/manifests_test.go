package lab_test

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/yaml"
)

// manifests asks a real API server what it thinks of everything that is shipped for Kubernetes: strict about
// fields, with all its validation and admission, without storing it. The pods of workloads are asked about by
// themselves, for Pod Security judges pods alone.
func (r *registrar) manifests(t *testing.T) {
	groups, err := restmapper.GetAPIGroupResources(r.kube.Client.Discovery())
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDiscoveryRESTMapper(groups)
	sets := map[string][]string{
		"chart": {"helm", "template", "assay", "../../deploy/k8s/chart", "-n", "assay", "--include-crds"},
		"chart with all": {"helm", "template", "assay", "../../deploy/k8s/chart", "-n", "assay", "--set",
			"csi.enabled=true,defaultIdentity.enabled=true,registrar.clusterTrustBundle=assay,server.priorityClassName=system-cluster-critical,server.files[0].name=x,server.files[0].secret=y,server.storage.size=1"},
	}
	dirs, err := filepath.Glob("../../deploy/k8s/overlays/*/kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range append(dirs, "../../deploy/k8s/quickstart/kustomization.yaml", "../../deploy/k8s/csi/kustomization.yaml") {
		dir = filepath.Dir(dir)
		sets[filepath.Base(dir)] = []string{"kustomize", "build", dir}
	}
	tools, err := filepath.Abs("../../bin/tools")
	if err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", tools+"/", "helm.sh/helm/v4/cmd/helm", "sigs.k8s.io/kustomize/kustomize/v5")
	build.Dir = "../../tools/deploy"
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build helm and kustomize: %v\n%s", err, text)
	}
	for name, command := range sets {
		t.Run(name, func(t *testing.T) {
			text, err := exec.CommandContext(t.Context(), filepath.Join(tools, command[0]), command[1:]...).Output()
			if err != nil {
				t.Fatal(err)
			}
			// As "kubectl label" does where no manifest makes the namespace.
			free := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Namespace"}}
			free.SetName("assay")
			free.SetLabels(map[string]string{"pod-security.kubernetes.io/enforce": "privileged"})
			r.namespace(t, free)
			restricted := 0
			for docs := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(string(text)))); ; {
				doc, err := docs.Read()
				if errors.Is(err, io.EOF) {
					break
				}
				var u unstructured.Unstructured
				if err == nil {
					err = yaml.Unmarshal(doc, &u.Object)
				}
				if err != nil {
					t.Fatal(err)
				}
				if len(u.Object) == 0 || u.GroupVersionKind().Group == "security.openshift.io" { // OpenShift's, which is not here
					continue
				}
				if u.GetKind() == "Namespace" {
					r.namespace(t, &u)
				}
				r.dry(t, mapper.RESTMapping, &u)
				restricted += r.podOf(t, &u)
			}
			if name == "high-security" && restricted == 0 {
				t.Error("no pod is in a namespace of the restricted profile")
			}
		})
	}
}

// namespace makes a namespace for real: what is in it can be asked about only then.
func (r *registrar) namespace(t *testing.T, u *unstructured.Unstructured) {
	t.Helper()
	of := r.dyn.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"})
	if _, err := of.Create(t.Context(), u.DeepCopy(), metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	labels, err := yaml.Marshal(map[string]any{"metadata": map[string]any{"labels": u.GetLabels()}})
	if err != nil {
		t.Fatal(err)
	}
	if labels, err = yaml.YAMLToJSON(labels); err != nil {
		t.Fatal(err)
	}
	if _, err := of.Patch(t.Context(), u.GetName(), types.MergePatchType, labels, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// dry has the API server judge an object as kubectl apply --server-side --dry-run=server would.
func (r *registrar) dry(t *testing.T, mapping func(schema.GroupKind, ...string) (*meta.RESTMapping, error), u *unstructured.Unstructured) {
	t.Helper()
	m, err := mapping(u.GroupVersionKind().GroupKind(), u.GroupVersionKind().Version)
	if err != nil {
		t.Errorf("%s %s: %v", u.GetKind(), u.GetName(), err)
		return
	}
	to := r.dyn.Resource(m.Resource).Namespace("")
	if m.Scope.Name() == "namespace" {
		to = r.dyn.Resource(m.Resource).Namespace(u.GetNamespace())
	}
	body, err := u.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	force := true
	if _, err := to.Patch(t.Context(), u.GetName(), types.ApplyPatchType, body, metav1.PatchOptions{
		FieldManager: "lab", Force: &force, FieldValidation: "Strict", DryRun: []string{metav1.DryRunAll},
	}); err != nil {
		t.Errorf("%s %s: %v", u.GetKind(), u.GetName(), err)
	}
}

// podOf has Pod Security judge the pod of a workload, and returns 1 if it did so by the restricted profile.
func (r *registrar) podOf(t *testing.T, u *unstructured.Unstructured) int {
	t.Helper()
	template, ok, err := unstructured.NestedMap(u.Object, "spec", "template")
	if err != nil || !ok {
		return 0
	}
	pod := &unstructured.Unstructured{Object: template}
	pod.SetAPIVersion("v1")
	pod.SetKind("Pod")
	pod.SetName(u.GetName())
	pods := r.dyn.Resource(schema.GroupVersionResource{Version: "v1", Resource: "pods"})
	// The account is not there, for nothing was stored.
	unstructured.RemoveNestedField(pod.Object, "spec", "serviceAccountName")
	unstructured.RemoveNestedField(pod.Object, "spec", "priorityClassName")
	// A StatefulSet gives each pod its claim as a volume of this name.
	if volumes, _, _ := unstructured.NestedSlice(pod.Object, "spec", "volumes"); u.GetKind() == "StatefulSet" {
		volumes = append(volumes, map[string]any{"name": "data", "persistentVolumeClaim": map[string]any{"claimName": "data"}})
		if err := unstructured.SetNestedSlice(pod.Object, volumes, "spec", "volumes"); err != nil {
			t.Fatal(err)
		}
	}
	if err := unstructured.SetNestedField(pod.Object, false, "spec", "automountServiceAccountToken"); err != nil {
		t.Fatal(err)
	}
	namespace, err := r.dyn.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}).Get(t.Context(), u.GetNamespace(), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.eventually("the namespace has an account", func() error {
		_, err := r.kube.Client.CoreV1().ServiceAccounts(u.GetNamespace()).Get(t.Context(), "default", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			r.makeAccount(u.GetNamespace())
		}
		return err
	})
	if _, err := pods.Namespace(u.GetNamespace()).Create(t.Context(), pod, metav1.CreateOptions{FieldValidation: "Strict", DryRun: []string{metav1.DryRunAll}}); err != nil {
		t.Errorf("the pod of %s %s: %v", u.GetKind(), u.GetName(), err)
	}
	if namespace.GetLabels()["pod-security.kubernetes.io/enforce"] == "restricted" {
		return 1
	}
	return 0
}
