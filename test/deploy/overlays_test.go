package deploy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
)

// operators are the Secrets that operators make themselves, as the overlays say.
var operators = []string{"assay-trust", "assay-upstream"}

// foreign are the kinds that neither Kubernetes nor deploy/k8s/crds defines.
var foreign = []string{"SecurityContextConstraints"}

func TestOverlays(t *testing.T) {
	dirs, err := filepath.Glob(overlays + "/*/kustomization.yaml")
	if err != nil || len(dirs) < 6 {
		t.Fatalf("overlays are %q (%v)", dirs, err)
	}
	dirs = append(dirs, base+"/kustomization.yaml", "../../deploy/k8s/quickstart/kustomization.yaml")
	for _, dir := range dirs {
		dir = filepath.Dir(dir)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			all := kustomize(t, dir)
			for _, o := range all {
				decode(t, o)
			}
			if n := validate(t, all); n != 2 {
				t.Errorf("%d configurations were validated, not the server's and the agent's", n)
			}
			for _, of := range []string{"server", "agent"} {
				if missing := lost(t, all, of); len(missing) > 0 {
					t.Errorf("%s.hcl has no %q, which the base has by now", of, missing)
				}
			}
			references(t, all)
			agreements(t, all)
		})
	}
}

func TestAgentsThatStandByAreWhatTheFirstAre(t *testing.T) {
	all := kustomize(t, "../labk8s/overlay-standby")
	for _, o := range all {
		decode(t, o)
	}
	standsBy(t, all)
	references(t, all)
	for _, o := range all {
		if o.GetKind() == "NetworkPolicy" && o.GetName() == "assay-agent-standby" {
			return
		}
	}
	t.Error("no NetworkPolicy is about them")
}

// decode holds an object to the API's own types. Those of CRDs are checked by a real API server in test/lab.
func decode(t *testing.T, o *unstructured.Unstructured) {
	t.Helper()
	gvk := o.GroupVersionKind()
	typed, err := scheme.Scheme.New(gvk)
	if err != nil {
		if gvk.Group != "spire.spiffe.io" && gvk.Kind != "CustomResourceDefinition" && !slices.Contains(foreign, gvk.Kind) {
			t.Errorf("%s: %v", key(o), err)
		}
		return
	}
	convert(t, o, typed)
}

// lost returns what the base's configuration says something of and this one does not.
func lost(t *testing.T, all []*unstructured.Unstructured, of string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(base, of+".hcl"))
	if err != nil {
		t.Fatal(err)
	}
	has := keys(t, configuration(t, all, of))
	return slices.DeleteFunc(keys(t, string(text)), func(k string) bool { return slices.Contains(has, k) })
}

func configuration(t *testing.T, all []*unstructured.Unstructured, of string) string {
	t.Helper()
	for _, o := range all {
		if o.GetKind() == "ConfigMap" {
			if text, ok, _ := unstructured.NestedString(o.Object, "data", of+".hcl"); ok {
				return text
			}
		}
	}
	t.Fatalf("there is no %s.hcl", of)
	return ""
}

// keys returns the attributes and blocks of HCL as paths.
func keys(t *testing.T, text string) []string {
	t.Helper()
	file, wrong := hclsyntax.ParseConfig([]byte(text), "x.hcl", hcl.InitialPos)
	if wrong.HasErrors() {
		t.Fatal(wrong)
	}
	var all []string
	var walk func(b *hclsyntax.Body, under string)
	walk = func(b *hclsyntax.Body, under string) {
		for name := range b.Attributes {
			all = append(all, under+name)
		}
		for _, c := range b.Blocks {
			path := under + strings.Join(append([]string{c.Type}, c.Labels...), " ") + " > "
			all = append(all, path)
			walk(c.Body, path)
		}
	}
	walk(file.Body.(*hclsyntax.Body), "")
	slices.Sort(all)
	return all
}

// value returns the text of an attribute of HCL by its path as keys has it.
func value(t *testing.T, text string, path ...string) string {
	t.Helper()
	file, wrong := hclsyntax.ParseConfig([]byte(text), "x.hcl", hcl.InitialPos)
	if wrong.HasErrors() {
		t.Fatal(wrong)
	}
	body := file.Body.(*hclsyntax.Body)
	for i, name := range path {
		if i == len(path)-1 {
			if a := body.Attributes[name]; a != nil {
				return string(a.Expr.Range().SliceBytes([]byte(text)))
			}
			break
		}
		at := slices.IndexFunc(body.Blocks, func(b *hclsyntax.Block) bool { return b.Type == name })
		if at < 0 {
			break
		}
		body = body.Blocks[at].Body
	}
	t.Errorf("there is no %s", strings.Join(path, " > "))
	return ""
}

// pods returns the pods that workloads make, by kind and name, with their namespace.
func pods(t *testing.T, all []*unstructured.Unstructured) map[string]*corev1.Pod {
	t.Helper()
	by := map[string]*corev1.Pod{}
	for _, o := range all {
		var template corev1.PodTemplateSpec
		switch o.GetKind() {
		case "StatefulSet":
			var s appsv1.StatefulSet
			convert(t, o, &s)
			template = s.Spec.Template
		case "DaemonSet":
			var d appsv1.DaemonSet
			convert(t, o, &d)
			template = d.Spec.Template
		default:
			continue
		}
		template.Namespace, template.Name = o.GetNamespace(), o.GetName()
		by[o.GetName()] = &corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}
	}
	return by
}

// references checks that what objects name is there, in the namespace where it is looked for.
func references(t *testing.T, all []*unstructured.Unstructured) {
	t.Helper()
	there := map[string]bool{}
	namespaces := map[string]bool{}
	for _, o := range all {
		there[key(o)] = true
		if o.GetKind() == "Namespace" {
			namespaces[o.GetName()] = true
		}
	}
	need := func(by, kind, namespace, name string) {
		if !there[kind+" "+strings.TrimPrefix(namespace+"/"+name, "/")] {
			t.Errorf("%s names %s %s/%s, which is not there", by, kind, namespace, name)
		}
	}
	for _, o := range all {
		if ns := o.GetNamespace(); ns != "" && !namespaces[ns] {
			t.Errorf("%s is in a namespace that nobody makes", key(o))
		}
		if o.GetKind() != "RoleBinding" && o.GetKind() != "ClusterRoleBinding" {
			continue
		}
		var b rbacv1.RoleBinding // the other has the same fields
		u := o.DeepCopy()
		u.SetGroupVersionKind(schema.GroupVersionKind{Group: rbacv1.GroupName, Version: "v1", Kind: "RoleBinding"})
		convert(t, u, &b)
		if !strings.HasPrefix(b.RoleRef.Name, "system:") {
			need(key(o), b.RoleRef.Kind, map[string]string{"Role": b.Namespace}[b.RoleRef.Kind], b.RoleRef.Name)
		}
		for _, s := range b.Subjects {
			need(key(o), s.Kind, s.Namespace, s.Name)
		}
	}
	for name, p := range pods(t, all) {
		need(name, "ServiceAccount", p.Namespace, p.Spec.ServiceAccountName)
		for _, v := range p.Spec.Volumes {
			switch {
			case v.ConfigMap != nil && !strings.HasSuffix(v.ConfigMap.Name, "-bundle"):
				need(name, "ConfigMap", p.Namespace, v.ConfigMap.Name)
			case v.Secret != nil && !slices.Contains(operators, v.Secret.SecretName):
				need(name, "Secret", p.Namespace, v.Secret.SecretName)
			}
		}
	}
}

// agreements checks what the configuration of one part says of another.
func agreements(t *testing.T, all []*unstructured.Unstructured) {
	t.Helper()
	server, agent := configuration(t, all, "server"), configuration(t, all, "agent")
	at := pods(t, all)["assay-agent"]
	if got, want := value(t, server, "node_attestor", "cluster", "service_account_allow_list"), `["`+at.Namespace+":"+at.Spec.ServiceAccountName+`"]`; got != want {
		t.Errorf("agents are let in as %s and are %s", got, want)
	}
	if got := value(t, server, "kubernetes", "bundle_config_map", "namespace_labels"); !strings.Contains(got, `= "`+at.Namespace+`"`) {
		t.Errorf("the bundle goes to %s, and the agents are in %s", got, at.Namespace)
	}
	if got, want := value(t, agent, "agent", "trust_domain"), value(t, server, "server", "trust_domain"); got != want {
		t.Errorf("the trust domain is %s and %s", got, want)
	}
	address := strings.Trim(value(t, agent, "agent", "server_address"), `"`)
	name, namespace, ok := strings.Cut(address, ".")
	if !ok {
		namespace = at.Namespace
	}
	if !slices.ContainsFunc(all, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "Service" && o.GetName() == name && o.GetNamespace() == namespace
	}) {
		t.Errorf("agents look for the server at %q, and there is no such service", address)
	}
	for name, p := range pods(t, all) {
		if o := restricts(p); name == "assay-server" && o != "" {
			t.Errorf("the server's pod %s", o)
		}
	}
}

// restricts says what the restricted profile of Pod Security forbids about a pod; a real API server judges it
// in test/lab.
func restricts(p *corev1.Pod) string {
	for _, v := range p.Spec.Volumes {
		if v.HostPath != nil {
			return "has a folder of the node"
		}
	}
	if p.Spec.HostPID || p.Spec.HostIPC || p.Spec.HostNetwork {
		return "is in a namespace of the node's"
	}
	return ""
}
