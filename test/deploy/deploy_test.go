// Package deploy holds the manifests in deploy/k8s to what they are about: the API's own types, each other,
// and the ports and paths of the configuration that they carry.
package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

const base = "../../deploy/k8s/base"

// kustomization is the part of one that is looked at.
type kustomization struct {
	Resources          []string `json:"resources"`
	ConfigMapGenerator []struct {
		Name  string   `json:"name"`
		Files []string `json:"files"`
	} `json:"configMapGenerator"`
}

// objects returns what a file holds, decoded strictly: a field that the API does not have is an error.
func objects(t *testing.T, path string) []runtime.Object {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	var all []runtime.Object
	for r := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text))); ; {
		doc := make([]byte, 1<<20)
		n, err := r.Read(doc)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		o, _, err := strict.Decode(doc[:n], nil, nil)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		all = append(all, o)
	}
}

func manifests(t *testing.T) []runtime.Object {
	t.Helper()
	var k kustomization
	text, err := os.ReadFile(filepath.Join(base, "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &k); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(base, "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var all []runtime.Object
	for _, f := range files {
		name := filepath.Base(f)
		if name == "kustomization.yaml" {
			continue
		}
		if !slices.Contains(k.Resources, name) {
			t.Errorf("%s is not in the kustomization", name)
		}
		all = append(all, objects(t, f)...)
	}
	for _, g := range k.ConfigMapGenerator {
		for _, f := range g.Files {
			if _, err := os.Stat(filepath.Join(base, f)); err != nil {
				t.Error(err)
			}
		}
	}
	return all
}

func TestManifests(t *testing.T) {
	all := manifests(t)
	t.Run("the server's pod has no privilege at all", func(t *testing.T) {
		for _, o := range all {
			s, ok := o.(*appsv1.StatefulSet)
			if !ok {
				continue
			}
			p := s.Spec.Template.Spec
			c := p.Containers[0].SecurityContext
			if p.HostPID || p.HostNetwork || !*p.SecurityContext.RunAsNonRoot || *c.AllowPrivilegeEscalation || !*c.ReadOnlyRootFilesystem || len(c.Capabilities.Add) > 0 {
				t.Errorf("security contexts %+v and %+v", p.SecurityContext, c)
			}
		}
	})
	t.Run("the agent's pod is not privileged and has the one capability that it needs", func(t *testing.T) {
		for _, o := range all {
			d, ok := o.(*appsv1.DaemonSet)
			if !ok || d.Name != "assay-agent" {
				continue
			}
			c := d.Spec.Template.Spec.Containers[0].SecurityContext
			if c.Privileged != nil || *c.AllowPrivilegeEscalation || !*c.ReadOnlyRootFilesystem || !slices.Equal(c.Capabilities.Add, []corev1.Capability{"SYS_PTRACE"}) {
				t.Errorf("security context %+v", c)
			}
		}
	})
	t.Run("the CSI driver's pod, which must be privileged, has no token, no network of the node and nothing to write to", func(t *testing.T) {
		for _, o := range all {
			d, ok := o.(*appsv1.DaemonSet)
			if !ok || d.Name != "assay-csi" {
				continue
			}
			p := d.Spec.Template.Spec
			c := p.Containers[0].SecurityContext
			if p.HostPID || p.HostNetwork || p.AutomountServiceAccountToken == nil || *p.AutomountServiceAccountToken || !*c.Privileged || !*c.ReadOnlyRootFilesystem {
				t.Errorf("pod %+v, security context %+v", p, c)
			}
		}
	})
	t.Run("the next agent starts before the last one ends", func(t *testing.T) {
		for _, o := range all {
			if d, ok := o.(*appsv1.DaemonSet); ok && d.Name == "assay-agent" {
				u := d.Spec.UpdateStrategy.RollingUpdate
				if u.MaxSurge.IntValue() != 1 || u.MaxUnavailable.IntValue() != 0 {
					t.Errorf("update strategy %v", u)
				}
			}
		}
		configs, err := filepath.Glob("../../deploy/k8s/overlays/*/agent.hcl")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range append(configs, filepath.Join(base, "agent.hcl")) {
			if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), "standby           = true") {
				t.Errorf("%s does not say standby, and the next agent would not wait: %v", path, err)
			}
		}
	})
	t.Run("no role may do everything, and none reads secrets", func(t *testing.T) {
		n := 0
		check := func(name string, rules []rbacv1.PolicyRule) {
			n++
			for _, r := range rules {
				for _, list := range [][]string{r.Verbs, r.Resources, r.APIGroups} {
					if slices.Contains(list, "*") {
						t.Errorf("%s has a wildcard in %v", name, r)
					}
				}
				if slices.Contains(r.Resources, "secrets") {
					t.Errorf("%s reads secrets", name)
				}
			}
		}
		for _, o := range all {
			switch r := o.(type) {
			case *rbacv1.ClusterRole:
				check(r.Name, r.Rules)
			case *rbacv1.Role:
				check(r.Name, r.Rules)
			}
		}
		if n != 4 {
			t.Errorf("%d roles", n)
		}
	})
	t.Run("the agent's role has nodes/pods, which the kubelet asks for first", func(t *testing.T) {
		for _, o := range all {
			if r, ok := o.(*rbacv1.ClusterRole); ok && r.Name == "assay-agent" {
				if !slices.ContainsFunc(r.Rules, func(p rbacv1.PolicyRule) bool { return slices.Contains(p.Resources, "nodes/pods") }) {
					t.Errorf("rules %v", r.Rules)
				}
			}
		}
	})
	t.Run("ports and paths are those of the configuration files", func(t *testing.T) {
		for name, texts := range containerTexts(all) {
			config, err := os.ReadFile(filepath.Join(base, name+".hcl"))
			if err != nil {
				t.Fatal(err)
			}
			for _, text := range texts {
				if !strings.Contains(string(config), text) && text != "8081" {
					t.Errorf("%s.hcl says nothing of %s", name, text)
				}
			}
		}
	})
}

// containerTexts returns, for the server and the agent, the ports of its container and the folders of its
// data and sockets.
func containerTexts(all []runtime.Object) map[string][]string {
	texts := map[string][]string{}
	add := func(name string, c corev1.Container) {
		for _, p := range c.Ports {
			texts[name] = append(texts[name], fmt.Sprint(p.ContainerPort))
		}
		for _, m := range c.VolumeMounts {
			if m.Name == "data" || m.Name == "sockets" || m.Name == "bundle" || m.Name == "run" {
				texts[name] = append(texts[name], m.MountPath)
			}
		}
	}
	for _, o := range all {
		switch o := o.(type) {
		case *appsv1.StatefulSet:
			add("server", o.Spec.Template.Spec.Containers[0])
		case *appsv1.DaemonSet:
			if o.Name == "assay-agent" {
				add("agent", o.Spec.Template.Spec.Containers[0])
			}
		}
	}
	return texts
}
