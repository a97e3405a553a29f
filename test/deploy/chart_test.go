package deploy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// csiDriver is what makes the chart the same as base and csi.
var csiDriver = `csi.enabled=true`

func TestChart(t *testing.T) {
	t.Run("it is one that helm finds no fault with", func(t *testing.T) {
		if _, err := tool(t, "helm", "lint", "--strict", chart); err != nil {
			t.Error(err)
		}
	})
	same := func(t *testing.T, got, want []*unstructured.Unstructured) {
		t.Helper()
		w := plain(t, want)
		delete(w, "Namespace assay") // helm install --create-namespace makes it
		if d := cmp.Diff(w, plain(t, got)); d != "" {
			t.Errorf("deploy/k8s/chart does not make what the kustomization makes; bring both together (-kustomize +chart):\n%s", d)
		}
	}
	t.Run("with its own values it makes what the base makes", func(t *testing.T) {
		same(t, helm(t), kustomize(t, base))
	})
	t.Run("with the CSI driver and the default identity it makes what the quickstart makes", func(t *testing.T) {
		text, err := os.ReadFile("../../deploy/k8s/quickstart/identities.yaml")
		if err != nil {
			t.Fatal(err)
		}
		identities := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(text, &identities.Object); err != nil {
			t.Fatal(err)
		}
		same(t, helm(t, csiDriver, `defaultIdentity.enabled=true`), append(kustomize(t, "../../deploy/k8s/quickstart"), identities))
	})
	t.Run("with the CSI driver it makes what base and csi make", func(t *testing.T) {
		same(t, helm(t, csiDriver), append(kustomize(t, base), kustomize(t, "../../deploy/k8s/csi")...))
	})
	t.Run("its copies are those of the originals", func(t *testing.T) {
		for dir, pattern := range map[string]string{
			"crds": "../../deploy/k8s/crds/cluster*.yaml", "files": "../../deploy/monitoring/*.[yj][as]*",
		} {
			originals, err := filepath.Glob(pattern)
			if err != nil || len(originals) == 0 {
				t.Fatalf("there is no %s (%v)", pattern, err)
			}
			for _, original := range originals {
				want, err := os.ReadFile(original)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := os.ReadFile(filepath.Join(chart, dir, filepath.Base(original))); err != nil || string(got) != string(want) {
					t.Errorf("deploy/k8s/chart/%s has another %s: copy it there (%v)", dir, filepath.Base(original), err)
				}
			}
		}
	})
}

func TestValuesOfTheChart(t *testing.T) {
	pod := func(t *testing.T, all []*unstructured.Unstructured, kind, name string) map[string]any {
		t.Helper()
		for _, o := range all {
			if o.GetKind() == kind && o.GetName() == name {
				spec, _, err := unstructured.NestedMap(o.Object, "spec", "template", "spec")
				if err != nil {
					t.Fatal(err)
				}
				return spec
			}
		}
		t.Fatalf("there is no %s %s", kind, name)
		return nil
	}
	container := func(t *testing.T, spec map[string]any) map[string]any {
		t.Helper()
		return spec["containers"].([]any)[0].(map[string]any)
	}
	config := func(t *testing.T, all []*unstructured.Unstructured, of string) string {
		t.Helper()
		for _, o := range all {
			if o.GetKind() == "ConfigMap" && strings.HasSuffix(o.GetName(), "-"+of) {
				text, _, _ := unstructured.NestedString(o.Object, "data", of+".hcl")
				return text
			}
		}
		t.Fatalf("there is no ConfigMap of the %s", of)
		return ""
	}
	t.Run("a digest wins over the tag, behind the registry", func(t *testing.T) {
		digest := "sha256:" + strings.Repeat("0a", 32)
		all := helm(t, `images.registry="registry.example.org/assay/"`, `images.server.digest="`+digest+`"`, `images.agent.tag="v1"`, `images.pullSecrets=["one"]`)
		if got := container(t, pod(t, all, "StatefulSet", "assay-server"))["image"]; got != "registry.example.org/assay/assay-server@"+digest {
			t.Errorf("the server's image is %v", got)
		}
		agent := pod(t, all, "DaemonSet", "assay-agent")
		if got := container(t, agent)["image"]; got != "registry.example.org/assay/assay-agent:v1" {
			t.Errorf("the agent's image is %v", got)
		}
		if got := agent["imagePullSecrets"]; !cmp.Equal(got, []any{map[string]any{"name": "one"}}) {
			t.Errorf("the pull secrets are %v", got)
		}
	})
	t.Run("two in one cluster share no name of the cluster's and no folder of the nodes'", func(t *testing.T) {
		other := helm(t, csiDriver, `defaultIdentity.enabled=true`, `name="other"`, `csi.driverName="other.csi.spiffe.io"`, `agent.hostPaths={"sockets":"/run/other/agent","data":"/var/lib/other"}`)
		ours := plain(t, helm(t, csiDriver, `defaultIdentity.enabled=true`))
		for name := range plain(t, other) {
			if ours[name] != nil && !strings.HasPrefix(name, "CustomResourceDefinition ") {
				t.Errorf("%s is made by both", name)
			}
		}
		for _, kind := range []string{"other-agent", "other-csi"} {
			for _, v := range pod(t, other, "DaemonSet", kind)["volumes"].([]any) {
				path, _, _ := unstructured.NestedString(v.(map[string]any), "hostPath", "path")
				if strings.Contains(path, "assay") {
					t.Errorf("%s has the node's %s", kind, path)
				}
			}
		}
		if got := container(t, pod(t, other, "DaemonSet", "other-csi"))["args"]; !cmp.Equal(got, []any{"run", "-driverName", "other.csi.spiffe.io"}) {
			t.Errorf("the driver runs with %v", got)
		}
	})
	t.Run("agents that stand by are what the first are, and policies and scrapers know them", func(t *testing.T) {
		all := helm(t, `agent.hotStandby=true`, `monitoring.podMonitor.enabled=true`)
		standsBy(t, all)
		for _, o := range all {
			if (o.GetKind() == "NetworkPolicy" || o.GetKind() == "PodMonitor") && o.GetName() == "assay-agent" && !strings.Contains(text(t, o), "assay-agent-standby") {
				t.Errorf("%s of the agents is not about those that stand by", o.GetKind())
			}
		}
	})
	t.Run("who scrapes may be somebody else, or nobody", func(t *testing.T) {
		for set, want := range map[string]string{
			`networkPolicies.metricsFrom=[{"podSelector":{"matchLabels":{"app":"prometheus"}}}]`: "prometheus",
			`networkPolicies.metricsFrom=[]`: "",
		} {
			for _, o := range helm(t, set) {
				if o.GetKind() != "NetworkPolicy" {
					continue
				}
				convert(t, o, &networkingv1.NetworkPolicy{})
				if got := text(t, o); strings.Contains(got, "monitoring") || !strings.Contains(got, want) || strings.Contains(got, "metrics") != (want != "") {
					t.Errorf("with %s it is %s", set, got)
				}
			}
		}
	})
	t.Run("what is in the values is in the configuration, and cannot break out of it", func(t *testing.T) {
		all := helm(t, `trustDomain="prod.example.org"`, `clusterName="west"`, `clusterDomain="west.local"`,
			`registrar={"className":"a\"b${c}","watchClassless":true,"ignoreNamespaces":["kube-.*"],"vulnerabilityReports":"trivy","clusterTrustBundle":"assay"}`,
			`server.extraServerConfig="ca_ttl = \"48h\""`, `server.extraConfig="evidence {}"`, `agent.runtime={"dir":"/run/crio","socket":"crio.sock"}`)
		server, agent := config(t, all, "server"), config(t, all, "agent")
		for _, want := range []string{
			`trust_domain = "prod.example.org"`, `cluster "west"`, `kubernetes "west"`, `cluster_domain = "west.local"`, `class_name = "a\"b$${c}"`,
			`watch_classless = true`, `ignore_namespaces = ["kube-.*"]`, `vulnerability_reports = "trivy"`, `cluster_trust_bundle "assay"`, `ca_ttl = "48h"`, `evidence {}`,
		} {
			if !strings.Contains(server, want) {
				t.Errorf("server.hcl says nothing of %s:\n%s", want, server)
			}
		}
		for _, want := range []string{`trust_domain      = "prod.example.org"`, `cluster = "west"`, `runtime_socket_path = "/run/crio/crio.sock"`} {
			if !strings.Contains(agent, want) {
				t.Errorf("agent.hcl says nothing of %s:\n%s", want, agent)
			}
		}
		mounts := container(t, pod(t, all, "DaemonSet", "assay-agent"))["volumeMounts"].([]any)
		if !slices.ContainsFunc(mounts, func(m any) bool { return m.(map[string]any)["mountPath"] == "/run/crio" }) {
			t.Errorf("the runtime's folder is not among %v", mounts)
		}
		if validate(t, all) == 0 {
			t.Error("no configuration was validated")
		}
	})
	t.Run("rules and dashboard are those of deploy/monitoring", func(t *testing.T) {
		all := helm(t, `monitoring={"podMonitor":{"enabled":true},"rules":{"enabled":true,"labels":{"release":"x"}},"dashboard":{"enabled":true}}`)
		kinds := map[string]int{}
		for _, o := range all {
			kinds[o.GetKind()]++
			switch {
			case o.GetKind() == "PrometheusRule":
				groups, _, _ := unstructured.NestedSlice(o.Object, "spec", "groups")
				text, err := os.ReadFile(rulesFile)
				if err != nil {
					t.Fatal(err)
				}
				if want := parse(t, string(text))[0].Object["groups"]; !cmp.Equal(any(groups), want) || o.GetLabels()["release"] != "x" {
					t.Errorf("the rules are not those of %s: %s", rulesFile, cmp.Diff(any(groups), want))
				}
			case strings.HasSuffix(o.GetName(), "-dashboard"):
				got, _, _ := unstructured.NestedString(o.Object, "data", "assay.json")
				if want, err := os.ReadFile(dashboardFile); err != nil || got != string(want) || o.GetLabels()["grafana_dashboard"] != "1" {
					t.Errorf("the dashboard is not that of %s (%v)", dashboardFile, err)
				}
			}
		}
		if kinds["PodMonitor"] != 2 || kinds["PrometheusRule"] != 1 {
			t.Errorf("there are %v", kinds)
		}
	})
	t.Run("a change of the configuration rolls the pods", func(t *testing.T) {
		sum := func(set ...string) string {
			for _, o := range helm(t, set...) {
				if o.GetKind() == "StatefulSet" {
					text, _, _ := unstructured.NestedString(o.Object, "spec", "template", "metadata", "annotations", "checksum/config")
					return text
				}
			}
			return ""
		}
		if one, two := sum(), sum(`server.logLevel="debug"`); one == "" || one == two {
			t.Errorf("checksums %q and %q", one, two)
		}
	})
	for _, bad := range []struct{ set, words string }{
		{`trustDomain="spiffe://example.org"`, "at '/trustDomain'"},
		{`trustDomain=""`, "at '/trustDomain'"},
		{`clusterName="a b"`, "at '/clusterName'"},
		{`server.replicas=3`, "additional properties 'replicas' not allowed"},
		{`images.server.digest="sha256:abc"`, "at '/images/server/digest'"},
		{`images.registry="registry.example.org"`, "at '/images/registry'"},
		{`server.service.port=0`, "at '/server/service/port'"},
		{`server.files=[{"name":"x"}]`, "missing property 'secret'"},
		{`registrar.pathFence="ns/"`, "at '/registrar/pathFence'"},
		{`agent.runtime.dir="run"`, "at '/agent/runtime/dir'"},
		{`agent.hostPaths.data="/a b"`, "at '/agent/hostPaths/data'"},
		{`agent.hostPaths.sockets="/run/assay/../x"`, "at '/agent/hostPaths/sockets'"},
		{`networkPolicies.metricsFrom=[{"namespace":"x"}]`, "additional properties 'namespace' not allowed"},
		{`agent.maxSurge=0`, "at '/agent/maxSurge'"},
		{`csi.enabled="yes"`, "got string, want boolean"},
		{`nonsense=1`, "additional properties 'nonsense' not allowed"},
	} {
		t.Run("refuses "+bad.set, func(t *testing.T) {
			if _, err := tool(t, "helm", template(bad.set)...); err == nil || !strings.Contains(err.Error(), bad.words) {
				t.Errorf("want %q, have %v", bad.words, err)
			}
		})
	}
}

// text is an object as YAML.
func text(t *testing.T, o *unstructured.Unstructured) string {
	t.Helper()
	out, err := yaml.Marshal(o.Object)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// standsBy checks that there is a second DaemonSet of agents with all that the first has, and pods of its own.
func standsBy(t *testing.T, all []*unstructured.Unstructured) {
	t.Helper()
	specs := map[string]any{}
	for _, o := range all {
		if o.GetKind() != "DaemonSet" || !strings.HasPrefix(o.GetName(), "assay-agent") {
			continue
		}
		label, _, _ := unstructured.NestedString(o.Object, "spec", "selector", "matchLabels", "app.kubernetes.io/name")
		of, _, _ := unstructured.NestedString(o.Object, "spec", "template", "metadata", "labels", "app.kubernetes.io/name")
		if label != o.GetName() || of != label {
			t.Errorf("%s selects %q, and its pods are %q", o.GetName(), label, of)
		}
		specs[o.GetName()], _, _ = unstructured.NestedMap(o.Object, "spec", "template", "spec")
	}
	if len(specs) != 2 || specs["assay-agent-standby"] == nil {
		t.Fatalf("there are %d DaemonSets of agents", len(specs))
	}
	if d := cmp.Diff(specs["assay-agent"], specs["assay-agent-standby"]); d != "" {
		t.Errorf("the one that stands by is another (-first +standby):\n%s", d)
	}
}
