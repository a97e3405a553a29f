package lab_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/kube"
	"github.com/assay-id/assay/test/lab/site"
)

// registrar is a built server that keeps the entries of a cluster, before a real API server, with the CRDs
// and the roles of deploy/k8s and no right beside them.
type registrar struct {
	t    *testing.T
	kube *kube.Cluster
	dyn  dynamic.Interface
	site *site.Site
}

// TestRegistrar shows that what is shipped for Kubernetes is what the server needs there.
func TestRegistrar(t *testing.T) {
	bin, err := filepath.Abs("../../bin/k8s")
	if err != nil {
		t.Fatal(err)
	}
	if err := kube.Available(bin, false); err != nil {
		lab.Missing(t, "Kubernetes' API server", err)
	}
	r := &registrar{t: t}
	if r.kube, err = kube.Start(t.Context(), bin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.kube.Close(); err != nil {
			t.Errorf("close cluster: %v", err)
		}
	})
	if r.dyn, err = dynamic.NewForConfig(r.kube.Config); err != nil {
		t.Fatal(err)
	}
	r.apply("../../deploy/k8s/base/namespace.yaml", "")
	r.apply("../../deploy/k8s/base/server-access.yaml", "assay")
	for _, crd := range []string{"clusterspiffeids", "clusterstaticentries", "clusterfederatedtrustdomains"} {
		r.apply("../../deploy/k8s/crds/"+crd+".yaml", "")
	}
	r.start()
	core := r.kube.Client.CoreV1()
	node, err := core.Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := core.Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	r.apply("../../deploy/k8s/quickstart/identities.yaml", "")
	r.makeAccount("shop")
	pod := r.pod("shop", "web")

	t.Run("a pod has the entry that the quickstart promises, below its node", func(t *testing.T) {
		r.has("/spire/agent/k8s_psat/lab/" + string(node.UID) + " /ns/shop/sa/default k8s:pod-uid:" + string(pod.UID))
	})
	t.Run("the resource says that it is ready", func(t *testing.T) { r.ready("service-accounts", "True") })
	t.Run("the bundle is in the server's namespace", func(t *testing.T) {
		r.eventually("the ConfigMap has it", func() error {
			m, err := core.ConfigMaps("assay").Get(t.Context(), "assay-bundle", metav1.GetOptions{})
			if err == nil && !strings.HasPrefix(m.Data["bundle.pem"], "-----BEGIN CERTIFICATE-----") {
				err = fmt.Errorf("it has %q", m.Data)
			}
			return err
		})
	})
	t.Run("a resource that the schema does not allow is refused by the API server", func(t *testing.T) {
		_, err := r.dyn.Resource(spiffeIDs).Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "spire.spiffe.io/v1alpha1", "kind": "ClusterSPIFFEID", "metadata": map[string]any{"name": "bad"},
			"spec": map[string]any{"spiffeIDTemplate": "x", "scanPolicy": "not a name"},
		}}, metav1.CreateOptions{})
		if err == nil || !strings.Contains(err.Error(), "scanPolicy") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("policies and lifetimes come through the schema, and a broken template is told", func(t *testing.T) {
		patch := []byte(`{"spec":{"scanPolicy":"prod","ttl":"10m","podSelector":{"matchLabels":{"app":"web"}}}}`)
		if _, err := r.dyn.Resource(spiffeIDs).Patch(t.Context(), "service-accounts", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		r.has("/spire/agent/k8s_psat/lab/" + string(node.UID) + " /ns/shop/sa/default k8s:pod-uid:" + string(pod.UID) + " scan:policy:prod")
		r.ready("service-accounts", "False") // this server has no such policy
		r.patch("service-accounts", `{"spec":{"spiffeIDTemplate":"spiffe://example.org/{{"}}`)
		r.ready("service-accounts", "False")
		r.has()
		r.patch("service-accounts", `{"spec":{"spiffeIDTemplate":"spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}","scanPolicy":null}}`)
		r.has("/spire/agent/k8s_psat/lab/" + string(node.UID) + " /ns/shop/sa/default k8s:pod-uid:" + string(pod.UID))
	})
	if log, err := os.ReadFile(r.site.ServerLog()); err != nil || strings.Contains(string(log), "may not watch") || strings.Contains(string(log), "forbidden") {
		t.Errorf("the shipped role is not enough (%v):\n%s", err, site.Tail(r.site.ServerLog(), 20))
	}
	t.Run("CRDs of a newer version are no hindrance as long as they serve this one", r.newerCRDs)
	t.Run("an API server that is away takes no entry, and what happened meanwhile is caught up with", func(t *testing.T) {
		r.kube.Kill("kube-apiserver")
		r.has("/spire/agent/k8s_psat/lab/" + string(node.UID) + " /ns/shop/sa/default k8s:pod-uid:" + string(pod.UID))
		if err := r.kube.StartAPIServer(t.Context()); err != nil {
			t.Fatal(err)
		}
		second := r.pod("shop", "second")
		r.has("/spire/agent/k8s_psat/lab/"+string(node.UID)+" /ns/shop/sa/default k8s:pod-uid:"+string(pod.UID),
			"/spire/agent/k8s_psat/lab/"+string(node.UID)+" /ns/shop/sa/default k8s:pod-uid:"+string(second.UID))
	})
	t.Run("entries go with the pods", func(t *testing.T) {
		now := int64(0)
		for _, name := range []string{"web", "second"} {
			if err := core.Pods("shop").Delete(t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
				t.Fatal(err)
			}
		}
		r.has()
	})
	t.Run("it takes all that the kustomizations and the chart make", r.manifests)
	t.Run("all pods are found by a server that knows of none, and then only what changes is looked at", r.reconcile)
}

var spiffeIDs = schema.GroupVersionResource{Group: "spire.spiffe.io", Version: "v1alpha1", Resource: "clusterspiffeids"}

// start runs a built server with the token of the service account that deploy/k8s gives it.
func (r *registrar) start() {
	r.t.Helper()
	dir := r.t.TempDir()
	lifetime := int64(3600)
	token, err := r.kube.Client.CoreV1().ServiceAccounts("assay").CreateToken(r.t.Context(), "assay-server",
		&authv1.TokenRequest{Spec: authv1.TokenRequestSpec{ExpirationSeconds: &lifetime}}, metav1.CreateOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: r.kube.Config.Host, CertificateAuthority: r.kube.CA()}
	config.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: token.Status.Token}
	config.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "x"
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := clientcmd.WriteToFile(*config, kubeconfig); err != nil {
		r.t.Fatal(err)
	}
	short, err := os.MkdirTemp("", "reg")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = os.RemoveAll(short) })
	if r.site, err = site.New(short, "../../bin"); err != nil {
		r.t.Fatal(err)
	}
	r.site.ServerBlocks = fmt.Sprintf(`node_attestor "join_token" {}
kubernetes "lab" {
  kubeconfig = %q
  path_fence = "/ns/{{ .PodMeta.Namespace }}/"
  leader_election {
    namespace = "assay"
  }
  bundle_config_map "assay-bundle" {
    namespace_labels = { "kubernetes.io/metadata.name" = "assay" }
  }
}`, kubeconfig)
	if err := r.site.StartServer(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = r.site.Stop() })
}

// apply creates what a manifest holds.
func (r *registrar) apply(path, namespace string) {
	r.t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		var o map[string]any
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			r.t.Fatalf("%s: %v", path, err)
		}
		u := &unstructured.Unstructured{Object: o}
		of, namespaced := resourceOf(u.GetKind())
		gv, err := schema.ParseGroupVersion(u.GetAPIVersion())
		if err != nil {
			r.t.Fatal(err)
		}
		to := r.dyn.Resource(gv.WithResource(of)).Namespace("")
		if namespaced {
			to = r.dyn.Resource(gv.WithResource(of)).Namespace(namespace)
		}
		// The role bindings name their account without the namespace, which kustomize fills in.
		if subjects, ok := o["subjects"].([]any); ok {
			for _, s := range subjects {
				s.(map[string]any)["namespace"] = namespace
			}
		}
		r.eventually("the API server takes "+u.GetKind()+" "+u.GetName(), func() error {
			_, err := to.Create(r.t.Context(), u, metav1.CreateOptions{FieldValidation: "Strict"})
			return err
		})
	}
}

func resourceOf(kind string) (resource string, namespaced bool) {
	switch kind {
	case "Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition":
		return strings.ToLower(kind) + "s", false
	case "ClusterSPIFFEID":
		return spiffeIDs.Resource, false
	}
	return strings.ToLower(kind) + "s", true
}

// makeAccount makes the account that the controller manager would make: there is none.
func (r *registrar) makeAccount(namespace string) {
	r.t.Helper()
	_, err := r.kube.Client.CoreV1().ServiceAccounts(namespace).Create(r.t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *registrar) pod(namespace, name string) (made *corev1.Pod) {
	r.t.Helper()
	r.eventually("the API server takes the pod "+name, func() (err error) {
		made, err = r.kube.Client.CoreV1().Pods(namespace).Create(r.t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "web"}},
			Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "main", Image: "none.local/x:1"}}, Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}}},
		}, metav1.CreateOptions{})
		return err
	})
	return made
}

func (r *registrar) patch(name, patch string) {
	r.t.Helper()
	if _, err := r.dyn.Resource(spiffeIDs).Patch(r.t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

// has waits until the server has these entries and no others: parent, SPIFFE ID, selectors.
func (r *registrar) has(want ...string) {
	r.t.Helper()
	slices.Sort(want)
	r.eventually(fmt.Sprintf("the entries are %q", want), func() error {
		got, err := r.list()
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("they are %q", got)
		}
		return err
	})
}

// entries returns the server's entries as has compares them.
func (r *registrar) entries() []string {
	r.t.Helper()
	got, err := r.list()
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

func (r *registrar) list() ([]string, error) {
	out, err := r.site.ServerCLI(r.t.Context(), "entry", "show", "-output", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Entries []struct {
			Parent    struct{ Path string }          `json:"parent_id"`
			ID        struct{ Path string }          `json:"spiffe_id"`
			Selectors []struct{ Type, Value string } `json:"selectors"`
		} `json:"entries"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	var got []string
	for _, e := range list.Entries {
		line := e.Parent.Path + " " + e.ID.Path
		for _, s := range e.Selectors {
			line += " " + s.Type + ":" + s.Value
		}
		got = append(got, line)
	}
	slices.Sort(got)
	return got, nil
}

// ready waits until the resource's condition has the status.
func (r *registrar) ready(name, want string) {
	r.t.Helper()
	r.eventually(fmt.Sprintf("%s is ready: %s", name, want), func() error {
		u, err := r.dyn.Resource(spiffeIDs).Get(r.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		all, _, err := unstructured.NestedSlice(u.Object, "status", "conditions")
		if err == nil && (len(all) != 1 || all[0].(map[string]any)["status"] != want) {
			err = fmt.Errorf("conditions are %v", all)
		}
		return err
	})
}

// eventually tries again and again, far longer than anything here takes.
func (r *registrar) eventually(what string, ok func() error) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			r.t.Fatalf("not in time: %s: %v\n%s", what, err, site.Tail(r.site.ServerLog(), 30))
		}
	}
}
