package kube

import (
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// The API server drops what a CRD does not name, so a field that is in the code alone would never arrive.
func TestCRDsHaveEveryField(t *testing.T) {
	for _, c := range []struct {
		file         string
		spec, status reflect.Type
	}{
		{"clusterspiffeids", reflect.TypeFor[spiffeIDSpec](), reflect.TypeFor[ruleStatus]()},
		{"clusterstaticentries", reflect.TypeFor[staticSpec](), reflect.TypeFor[staticStatus]()},
		{"clusterfederatedtrustdomains", reflect.TypeFor[federationSpec](), reflect.TypeFor[federationStatus]()},
	} {
		t.Run(c.file, func(t *testing.T) {
			text, err := os.ReadFile("../../deploy/k8s/crds/" + c.file + ".yaml")
			if err != nil {
				t.Fatal(err)
			}
			var crd map[string]any
			if err := yaml.UnmarshalStrict(text, &crd); err != nil {
				t.Fatal(err)
			}
			u := unstructured.Unstructured{Object: crd}
			if u.GetName() != c.file+"."+group.Group {
				t.Errorf("its name is %q", u.GetName())
			}
			versions, _, _ := unstructured.NestedSlice(crd, "spec", "versions")
			version := versions[0].(map[string]any)
			if version["name"] != group.Version {
				t.Errorf("its version is %v", version["name"])
			}
			for part, of := range map[string]reflect.Type{"spec": c.spec, "status": c.status} {
				fields, _, err := unstructured.NestedMap(version, "schema", "openAPIV3Schema", "properties", part, "properties")
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(jsonNames(of), slices.Sorted(maps.Keys(fields))); diff != "" {
					t.Errorf("%s: fields of the struct (-) and of the CRD (+):\n%s", part, diff)
				}
			}
		})
	}
}

func jsonNames(t reflect.Type) []string {
	var names []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
