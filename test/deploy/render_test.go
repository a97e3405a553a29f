package deploy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

const (
	overlays = "../../deploy/k8s/overlays"
	chart    = "../../deploy/k8s/chart"
	// tools are built into the same folder as those of the Makefile, and are there already after the first time.
	tools = "../../bin/tools"
)

// renderers builds helm and kustomize as tools/deploy pins them, unless they are there and up to date.
var renderers = sync.OnceValue(func() error {
	out, err := filepath.Abs(tools)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out+"/",
		"helm.sh/helm/v4/cmd/helm", "sigs.k8s.io/kustomize/kustomize/v5")
	cmd.Dir = "../../tools/deploy"
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build helm and kustomize: %w\n%s", err, text)
	}
	return nil
})

// binaries builds the server and the agent, once, and returns the folder that they are in.
var binaries = sync.OnceValues(func() (string, error) {
	out, err := filepath.Abs("../../bin/deploy")
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(context.Background(), "go", "build", "-trimpath", "-buildvcs=false", "-tags", "grpcnotrace", "-o", out+"/",
		"../../cmd/assay-server", "../../cmd/assay-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build server and agent: %w\n%s", err, text)
	}
	return out, nil
})

// tool runs helm or kustomize and returns what it prints, and what it complains of.
func tool(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	if err := renderers(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(tools, name), args...)
	home := t.TempDir() // helm must see nothing of the user's
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_CACHE_HOME="+home, "XDG_DATA_HOME="+home)
	var out, wrong bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &wrong
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, wrong.String())
	}
	return out.String(), nil
}

// kustomize returns the objects that a folder's kustomization makes.
func kustomize(t *testing.T, dir string) []*unstructured.Unstructured {
	t.Helper()
	text, err := tool(t, "kustomize", "build", dir)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, text)
}

// helm returns the objects that the chart makes of these values, each NAME=VALUE as --set-json takes it.
func helm(t *testing.T, set ...string) []*unstructured.Unstructured {
	t.Helper()
	text, err := tool(t, "helm", template(set...)...)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, text)
}

func template(set ...string) []string {
	args := []string{"template", "assay", chart, "--namespace", "assay", "--include-crds"}
	for _, s := range set {
		args = append(args, "--set-json", s)
	}
	return args
}

func newReader(text string) *bufio.Reader { return bufio.NewReader(strings.NewReader(text)) }

func parse(t *testing.T, text string) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	for r := utilyaml.NewYAMLReader(newReader(text)); ; {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		var o map[string]any
		if err := yaml.UnmarshalStrict(doc, &o); err != nil {
			t.Fatalf("%v in:\n%s", err, doc)
		}
		if len(o) > 0 {
			all = append(all, &unstructured.Unstructured{Object: o})
		}
	}
}

func key(o *unstructured.Unstructured) string {
	return o.GetKind() + " " + strings.TrimPrefix(o.GetNamespace()+"/"+o.GetName(), "/")
}

// hashed is the name of a generated ConfigMap, with the hash of its contents that makes pods roll.
var hashed = regexp.MustCompile(`\b(assay-(?:server|agent))-[bcdfghkmt2456789]{10}\b`)

// plain returns what objects say apart from labels and from how a change of configuration makes pods roll,
// by kind and name.
func plain(t *testing.T, all []*unstructured.Unstructured) map[string]any {
	t.Helper()
	by := map[string]any{}
	for _, o := range all {
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			t.Fatal(err)
		}
		var p unstructured.Unstructured
		if err := yaml.Unmarshal(hashed.ReplaceAll(text, []byte("$1")), &p.Object); err != nil {
			t.Fatal(err)
		}
		unstructured.RemoveNestedField(p.Object, "metadata", "labels")
		template := []string{"spec", "template", "metadata"}
		if labels, ok, _ := unstructured.NestedMap(p.Object, append(template, "labels")...); ok {
			delete(labels, "app.kubernetes.io/part-of")
			if err := unstructured.SetNestedMap(p.Object, labels, append(template, "labels")...); err != nil {
				t.Fatal(err)
			}
		}
		if notes, ok, _ := unstructured.NestedMap(p.Object, append(template, "annotations")...); ok {
			if delete(notes, "checksum/config"); len(notes) == 0 {
				unstructured.RemoveNestedField(p.Object, append(template, "annotations")...)
			}
		}
		if files, ok, _ := unstructured.NestedMap(p.Object, "data"); ok {
			for name, text := range files {
				if strings.HasSuffix(name, ".hcl") {
					files[name] = tokens(t, name, text.(string))
				}
			}
			if err := unstructured.SetNestedMap(p.Object, files, "data"); err != nil {
				t.Fatal(err)
			}
		}
		if by[key(&p)] != nil {
			t.Errorf("%s is there twice", key(&p))
		}
		by[key(&p)] = p.Object
	}
	return by
}

// tokens is HCL without comments and layout, a token a line.
func tokens(t *testing.T, name, text string) string {
	t.Helper()
	all, wrong := hclsyntax.LexConfig([]byte(text), name, hcl.InitialPos)
	if wrong.HasErrors() {
		t.Errorf("%s: %v", name, wrong)
	}
	var words strings.Builder
	for _, token := range all {
		if token.Type != hclsyntax.TokenComment && token.Type != hclsyntax.TokenNewline {
			words.Write(token.Bytes)
			words.WriteByte('\n')
		}
	}
	return words.String()
}
