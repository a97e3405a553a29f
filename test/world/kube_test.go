package world

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/assay-id/assay/server/kube"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/wire/evidencev1"
	"github.com/assay-id/assay/workloadapi/identity"
)

const bySA = "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}"

func TestPodsOfACluster(t *testing.T) {
	c := newCluster(t)
	c.rule("shop", map[string]any{
		"spiffeIDTemplate": bySA, "ttl": "10m", "dnsNameTemplates": []any{"{{ .PodMeta.Name }}.{{ .ClusterDomain }}"},
		"podSelector":               map[string]any{"matchLabels": map[string]any{"app": "shop"}},
		"namespaceSelector":         map[string]any{"matchLabels": map[string]any{"team": "shop"}},
		"workloadSelectorTemplates": []any{"k8s:container-name:main"}, "scanPolicy": "prod", "trustPolicy": "ci",
	})
	const line = "/ns/shop/sa/web k8s:container-name:main k8s:pod-uid:uid-shop-a prov:policy:ci scan:policy:prod"
	p := pod("shop", "a", map[string]string{"app": "shop"})
	c.create(p)
	c.create(pod("shop", "other", nil))
	c.create(pod("kube-system", "a", map[string]string{"app": "shop"}))
	t.Run("a pod that a rule selects has an entry", func(t *testing.T) {
		c.has(line)
		resp, err := entryv1.NewEntryClient(c.w.Local).ListEntries(c.w.Context(), &entryv1.ListEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		e := resp.GetEntries()[0]
		if e.GetParentId().GetPath() != "/spire/agent/k8s_psat/c1/node-uid-1" || e.GetX509SvidTtl() != 600 || !slices.Equal(e.GetDnsNames(), []string{"a.cluster.local"}) {
			t.Errorf("entry %v", e)
		}
	})
	t.Run("the resource says what came of it", func(t *testing.T) {
		c.condition("clusterspiffeids", "shop", "EntriesSet")
		eventually(t, "one entry is set", func() (bool, string) {
			s := c.stats("shop")
			return s["entriesToSet"] == int64(1) && s["podsSelected"] == int64(1) && s["namespacesSelected"] == int64(1), fmt.Sprint(s)
		})
	})
	t.Run("it goes with the label that the selector needs, and comes back with it", func(t *testing.T) {
		without := p.DeepCopy()
		without.Labels = nil
		c.updatePod(without)
		c.has()
		c.updatePod(p)
		c.has(line)
	})
	t.Run("an entry that somebody deletes by hand is made again when all is compared", func(t *testing.T) {
		c.stop()
		c.w.Delete(c.ids()...)
		c.start()
		c.has(line)
	})
	t.Run("it goes when nothing of the pod runs any more", func(t *testing.T) {
		ended := p.DeepCopy()
		ended.Status.Phase = corev1.PodSucceeded
		c.updatePod(ended)
		c.has()
		c.updatePod(p)
		c.has(line)
	})
	t.Run("a pod of the same name is another pod", func(t *testing.T) {
		c.deletePod(p)
		next := pod("shop", "a", map[string]string{"app": "shop"})
		next.UID = "second"
		c.create(next)
		c.has(strings.Replace(line, "uid-shop-a", "second", 1))
		c.deletePod(next)
		c.has()
	})
	t.Run("what went while no registrar ran goes when one starts", func(t *testing.T) {
		c.create(p)
		c.has(line)
		c.stop()
		c.deletePod(p)
		c.start()
		c.has()
	})
	t.Run("all entries of a rule go with it", func(t *testing.T) {
		c.create(p)
		c.has(line)
		c.drop("clusterspiffeids", "shop")
		c.has()
	})
}

func (c *cluster) ids() []string {
	c.t.Helper()
	resp, err := entryv1.NewEntryClient(c.w.Local).ListEntries(c.w.Context(), &entryv1.ListEntriesRequest{OutputMask: &types.EntryMask{}})
	if err != nil {
		c.t.Fatal(err)
	}
	var ids []string
	for _, e := range resp.GetEntries() {
		ids = append(ids, e.GetId())
	}
	return ids
}

func TestRulesOfACluster(t *testing.T) {
	t.Run("of two rules with the same entry the older has it", func(t *testing.T) {
		c := newCluster(t)
		c.rule("first", map[string]any{"spiffeIDTemplate": bySA, "hint": "first"})
		c.rule("second", map[string]any{"spiffeIDTemplate": bySA, "hint": "second"})
		c.create(pod("shop", "a", nil))
		c.has("/ns/shop/sa/web k8s:pod-uid:uid-shop-a")
		eventually(t, "the younger is masked", func() (bool, string) {
			s := c.stats("second")
			return s["entriesMasked"] == int64(1), fmt.Sprint(s)
		})
		c.drop("clusterspiffeids", "first")
		eventually(t, "the younger takes its place", func() (bool, string) {
			resp, err := entryv1.NewEntryClient(c.w.Local).ListEntries(c.w.Context(), &entryv1.ListEntriesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			return len(resp.GetEntries()) == 1 && resp.GetEntries()[0].GetHint() == "second", fmt.Sprint(resp.GetEntries())
		})
	})
	t.Run("of two rules for one pod each gives its identity, and takes no more than that back", func(t *testing.T) {
		c := newCluster(t)
		c.rule("first", map[string]any{"spiffeIDTemplate": bySA})
		c.rule("second", map[string]any{"spiffeIDTemplate": "spiffe://example.org/second/{{ .PodMeta.Name }}"})
		c.create(pod("shop", "a", nil))
		c.has("/ns/shop/sa/web k8s:pod-uid:uid-shop-a", "/second/a k8s:pod-uid:uid-shop-a")
		c.drop("clusterspiffeids", "first")
		c.has("/second/a k8s:pod-uid:uid-shop-a")
	})
	t.Run("a fallback is for pods that no other rule is for", func(t *testing.T) {
		c := newCluster(t)
		c.rule("rest", map[string]any{"spiffeIDTemplate": "spiffe://example.org/rest/{{ .PodMeta.Name }}", "fallback": true})
		c.rule("shop", map[string]any{"spiffeIDTemplate": bySA, "podSelector": map[string]any{"matchLabels": map[string]any{"app": "shop"}}})
		c.create(pod("shop", "a", map[string]string{"app": "shop"}))
		c.create(pod("shop", "b", nil))
		c.has("/ns/shop/sa/web k8s:pod-uid:uid-shop-a", "/rest/b k8s:pod-uid:uid-shop-b")
	})
	t.Run("a similar entry that somebody else made stays, and the resource says so", func(t *testing.T) {
		c := newCluster(t)
		c.w.Entry("/spire/agent/k8s_psat/c1/node-uid-1", "/ns/shop/sa/web", &types.Selector{Type: "k8s", Value: "pod-uid:uid-shop-a"})
		before := c.ids()
		c.rule("shop", map[string]any{"spiffeIDTemplate": bySA})
		c.create(pod("shop", "a", nil))
		eventually(t, "the entry is masked", func() (bool, string) {
			s := c.stats("shop")
			return s["entriesMasked"] == int64(1) && s["entriesToSet"] == int64(0), fmt.Sprint(s)
		})
		if after := c.ids(); !slices.Equal(before, after) {
			t.Errorf("entries were %v and are %v", before, after)
		}
	})
	t.Run("rules of another class are another registrar's", func(t *testing.T) {
		c := newCluster(t)
		c.rule("theirs", map[string]any{"spiffeIDTemplate": bySA, "className": "theirs"})
		c.rule("ours", map[string]any{"spiffeIDTemplate": "spiffe://example.org/ours"})
		c.create(pod("shop", "a", nil))
		c.has("/ours k8s:pod-uid:uid-shop-a")
	})
	t.Run("services give DNS names, and take them away", func(t *testing.T) {
		c := newCluster(t)
		c.rule("shop", map[string]any{"spiffeIDTemplate": bySA, "autoPopulateDNSNames": true})
		p := pod("shop", "a", nil)
		c.create(p)
		names := func(want ...string) {
			eventually(t, fmt.Sprintf("the DNS names are %q", want), func() (bool, string) {
				resp, err := entryv1.NewEntryClient(c.w.Local).ListEntries(c.w.Context(), &entryv1.ListEntriesRequest{})
				if err != nil {
					t.Fatal(err)
				}
				e := resp.GetEntries()
				return len(e) == 1 && slices.Equal(e[0].GetDnsNames(), want), fmt.Sprint(e)
			})
		}
		names()
		c.create(&discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "front-x", Labels: map[string]string{discoveryv1.LabelServiceName: "front"}},
			Endpoints:  []discoveryv1.Endpoint{{TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "a", UID: p.UID}}},
		})
		front := []string{"front", "front.shop", "front.shop.svc", "front.shop.svc.cluster.local"}
		names(front...)
		// A pod that is made anew under its name, as a StatefulSet does: the service hears of it after us.
		c.deletePod(p)
		p = pod("shop", "a", nil)
		p.UID = "second"
		c.create(p)
		names()
		if _, err := c.core.DiscoveryV1().EndpointSlices("shop").Update(t.Context(), &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "front-x", Labels: map[string]string{discoveryv1.LabelServiceName: "front"}},
			Endpoints:  []discoveryv1.Endpoint{{TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "a", UID: p.UID}}},
		}, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		names(front...)
		if err := c.core.DiscoveryV1().EndpointSlices("shop").Delete(t.Context(), "front-x", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		names()
	})
}

// many are texts with a number in each.
func many(format string, n int) []any {
	var all []any
	for i := range n {
		all = append(all, fmt.Sprintf(format, i))
	}
	return all
}

func TestBadRulesOfACluster(t *testing.T) {
	fence, err := kube.ParseTemplate("fence", "/ns/{{ .PodMeta.Namespace }}/")
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t, func(cfg *kube.Config) { cfg.Fence = fence })
	c.create(pod("shop", "a", map[string]string{"app": "shop", "team": "bank", "climbs": ".."}))
	c.rule("good", map[string]any{"spiffeIDTemplate": bySA})
	c.has("/ns/shop/sa/web k8s:pod-uid:uid-shop-a")
	for i, bad := range []struct {
		flaw    string
		spec    map[string]any
		reason  string
		message string
	}{
		{"no template", map[string]any{}, "InvalidSpec", "spec.spiffeIDTemplate is empty"},
		{"a template that is none", map[string]any{"spiffeIDTemplate": "spiffe://example.org/{{"}, "InvalidSpec", "spec.spiffeIDTemplate"},
		{"a field that is not there", map[string]any{"spiffeIDTemplate": "spiffe://example.org/{{ .PodMeta.Nme }}"}, "RenderFailures", "pod shop/a"},
		{"a label that is not there", map[string]any{"spiffeIDTemplate": "spiffe://example.org/ns/shop/{{ .PodMeta.Labels.none }}"}, "RenderFailures", "none"},
		{"no SPIFFE ID", map[string]any{"spiffeIDTemplate": "{{ .PodMeta.Name }}"}, "RenderFailures", "no SPIFFE ID"},
		{"another trust domain", map[string]any{"spiffeIDTemplate": "spiffe://other.org/ns/shop/a"}, "RenderFailures", "not in the trust domain"},
		{"a path outside of the fence", map[string]any{"spiffeIDTemplate": "spiffe://example.org/ns/shop-admin/a"}, "RenderFailures", "fenced"},
		{"a name from a label, of a pod that lies in its labels", map[string]any{"spiffeIDTemplate": "spiffe://example.org/ns/{{ .PodMeta.Labels.team }}/sa/admin"}, "RenderFailures", "fenced"},
		{"a name from a label that would climb out", map[string]any{"spiffeIDTemplate": "spiffe://example.org/ns/shop/{{ .PodMeta.Labels.climbs }}"}, "RenderFailures", "no SPIFFE ID"},
		{"a path that leaves the fence", map[string]any{"spiffeIDTemplate": "spiffe://example.org/ns/shop/../bank"}, "RenderFailures", "no SPIFFE ID"},
		{"an endless name", map[string]any{"spiffeIDTemplate": "spiffe://example.org/ns/shop/{{ printf \"%09000d\" 1 }}"}, "RenderFailures", "it writes more than"},
		{"a selector that is none", map[string]any{"spiffeIDTemplate": bySA, "workloadSelectorTemplates": []any{"nothing"}}, "RenderFailures", "no selector"},
		{"a DNS name that is none", map[string]any{"spiffeIDTemplate": bySA + "/x", "dnsNameTemplates": []any{"-a-"}}, "EntryFailures", "DNS name"},
		{"a DNS name beyond limits", map[string]any{"spiffeIDTemplate": bySA + "/x", "dnsNameTemplates": []any{"{{ printf \"a%0300d\" 1 }}"}}, "EntryFailures", "DNS name"},
		{"more DNS names than an entry may have", map[string]any{"spiffeIDTemplate": bySA + "/x", "dnsNameTemplates": many("{{ .PodMeta.Name }}-%d.example.org", identity.MaxDNSNames+1)}, "EntryFailures", "DNS names"},
		{"a hint beyond limits", map[string]any{"spiffeIDTemplate": bySA + "/x", "hint": strings.Repeat("x", identity.MaxHint+1)}, "EntryFailures", "hint"},
		{"a reserved path", map[string]any{"spiffeIDTemplate": "spiffe://example.org/spire/agent/x"}, "RenderFailures", "fenced"},
		{"a lifetime that is none", map[string]any{"spiffeIDTemplate": bySA, "jwtTtl": "1 hour"}, "InvalidSpec", `spec.jwtTtl: "1 hour" is no length of time`},
		{"a negative lifetime", map[string]any{"spiffeIDTemplate": bySA, "ttl": "-1s"}, "InvalidSpec", "negative"},
		{"a field of the wrong kind", map[string]any{"spiffeIDTemplate": bySA, "admin": "yes"}, "InvalidSpec", "spec"},
		{"a policy with no name", map[string]any{"spiffeIDTemplate": bySA, "scanPolicy": "a:b"}, "InvalidSpec", "spec.scanPolicy"},
		{"a trust domain that is none", map[string]any{"spiffeIDTemplate": bySA, "federatesWith": []any{"UPPER"}}, "InvalidSpec", "spec.federatesWith"},
	} {
		t.Run("a rule with "+bad.flaw+" gives no entry, says why, and harms no other", func(t *testing.T) {
			name := fmt.Sprintf("bad-%d", i)
			c.rule(name, bad.spec)
			message := c.condition("clusterspiffeids", name, bad.reason)
			if !strings.Contains(message, bad.message) {
				t.Errorf("the message is %q, want something about %q", message, bad.message)
			}
			c.has("/ns/shop/sa/web k8s:pod-uid:uid-shop-a")
			c.drop("clusterspiffeids", name)
		})
	}
}

func TestARuleThatNamesAPolicyWhichIsNotThereIsNotReady(t *testing.T) {
	var added atomic.Bool
	c := newCluster(t, func(cfg *kube.Config) {
		cfg.Policies = func() (scan, trust []string) {
			if added.Load() {
				scan = []string{"prod", "stage"}
			} else {
				scan = []string{"prod"}
			}
			return scan, []string{"ci"}
		}
	})
	c.create(pod("shop", "a", nil))
	spec := func(scan, trust string) map[string]any {
		return map[string]any{"spiffeIDTemplate": bySA, "scanPolicy": scan, "trustPolicy": trust, "podSelector": map[string]any{"matchLabels": map[string]any{"app": "none"}}}
	}
	c.rule("right", spec("prod", "ci"))
	c.rule("early", spec("stage", "ci"))
	c.rule("wrong", spec("prod", "c1"))
	c.condition("clusterspiffeids", "right", "EntriesSet")
	if got, want := c.condition("clusterspiffeids", "early", "UnknownPolicy"), `spec.scanPolicy: the server has no scan_policy "stage", so no pod gets this identity; it has prod`; got != want {
		t.Errorf("the message is %q, want %q", got, want)
	}
	if got, want := c.condition("clusterspiffeids", "wrong", "UnknownPolicy"), `spec.trustPolicy: the server has no trust_policy "c1", so no pod gets this identity; it has ci`; got != want {
		t.Errorf("the message is %q, want %q", got, want)
	}
	added.Store(true)
	c.r.PoliciesChanged()
	c.condition("clusterspiffeids", "early", "EntriesSet")
}

func TestStaticEntriesOfACluster(t *testing.T) {
	c := newCluster(t)
	c.resource("ClusterStaticEntry", "clusterstaticentries", "legacy", map[string]any{
		"spiffeID": "spiffe://example.org/legacy", "parentID": "spiffe://example.org/node/one", "selectors": []any{"unix:uid:7", "unix:gid:7"}, "x509SVIDTTL": "1h",
	})
	c.has("/legacy unix:gid:7 unix:uid:7")
	c.condition("clusterstaticentries", "legacy", "EntrySet")
	c.resource("ClusterStaticEntry", "clusterstaticentries", "bad", map[string]any{"spiffeID": "x", "parentID": "spiffe://example.org/node/one"})
	if m := c.condition("clusterstaticentries", "bad", "InvalidSpec"); !strings.Contains(m, "spec.spiffeID") {
		t.Errorf("message %q", m)
	}
	c.resource("ClusterStaticEntry", "clusterstaticentries", "empty", map[string]any{
		"spiffeID": "spiffe://example.org/empty", "parentID": "spiffe://example.org/node/one", "selectors": []any{},
	})
	if m := c.condition("clusterstaticentries", "empty", "EntryFailure"); !strings.Contains(m, "selector") {
		t.Errorf("message %q", m)
	}
	c.stop()
	c.drop("clusterstaticentries", "legacy")
	c.start()
	c.has()
}

func TestFederationsOfACluster(t *testing.T) {
	c := newCluster(t)
	domains := trustdomainv1.NewTrustDomainClient(c.w.Local)
	if _, err := domains.BatchCreateFederationRelationship(c.w.Context(), &trustdomainv1.BatchCreateFederationRelationshipRequest{
		FederationRelationships: []*types.FederationRelationship{{
			TrustDomain: "hand.org", BundleEndpointUrl: "https://hand.org/", BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}},
		}},
	}); err != nil {
		t.Fatal(err)
	}
	has := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("federations are %q", want), func() (bool, string) {
			resp, err := domains.ListFederationRelationships(c.w.Context(), &trustdomainv1.ListFederationRelationshipsRequest{})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range resp.GetFederationRelationships() {
				got = append(got, f.GetTrustDomain()+" "+f.GetBundleEndpointUrl())
			}
			slices.Sort(got)
			return slices.Equal(got, want), fmt.Sprintf("%q", got)
		})
	}
	spec := func(td string) map[string]any {
		return map[string]any{
			"trustDomain": td, "bundleEndpointURL": "https://bundles.invalid/" + td,
			"bundleEndpointProfile": map[string]any{"type": "https_web"},
		}
	}
	c.resource("ClusterFederatedTrustDomain", "clusterfederatedtrustdomains", "bank", spec("bank.org"))
	c.resource("ClusterFederatedTrustDomain", "clusterfederatedtrustdomains", "hand", spec("hand.org"))
	has("bank.org https://bundles.invalid/bank.org", "hand.org https://hand.org/")
	if m := c.condition("clusterfederatedtrustdomains", "bank", "RelationshipSet"); !strings.Contains(m, "bundle list -id spiffe://bank.org") {
		t.Errorf("message %q", m) // and not that the bundle was fetched, which it was not
	}
	if m := c.condition("clusterfederatedtrustdomains", "hand", "NotSet"); !strings.Contains(m, "somebody else") {
		t.Errorf("message %q", m)
	}
	c.resource("ClusterFederatedTrustDomain", "clusterfederatedtrustdomains", "bad", map[string]any{"trustDomain": "b.org", "bundleEndpointURL": "https://b.org", "bundleEndpointProfile": map[string]any{"type": "ftp"}})
	c.condition("clusterfederatedtrustdomains", "bad", "NotSet")
	c.stop()
	c.drop("clusterfederatedtrustdomains", "bank")
	c.drop("clusterfederatedtrustdomains", "hand")
	c.start()
	has("hand.org https://hand.org/") // what was made by hand is nobody's to take away
}

func TestBundleInACluster(t *testing.T) {
	team, err := labels.Parse("team=shop")
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t, func(cfg *kube.Config) {
		cfg.Publish = []kube.Target{{ConfigMap: "trust", Namespaces: team}, {ConfigMap: "spiffe", Key: "bundle.json", Format: "spiffe"}}
	})
	at := func(namespace, name, key string) string {
		m, err := c.core.CoreV1().ConfigMaps(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err.Error()
		}
		return m.Data[key]
	}
	eventually(t, "the bundle is in the namespace that is selected", func() (bool, string) {
		text := at("shop", "trust", "bundle.pem")
		return strings.HasPrefix(text, "-----BEGIN CERTIFICATE-----"), text
	})
	eventually(t, "the SPIFFE bundle is in all namespaces", func() (bool, string) {
		text := at("kube-system", "spiffe", "bundle.json")
		return strings.Contains(text, `"use":"x509-svid"`) && strings.Contains(text, `"use":"jwt-svid"`), text
	})
	if text := at("kube-system", "trust", "bundle.pem"); !strings.Contains(text, "not found") {
		t.Errorf("a namespace that is not selected has %q", text)
	}
	c.namespace("late", map[string]string{"team": "shop"})
	has := func() (bool, string) {
		text := at("late", "trust", "bundle.pem")
		return strings.HasPrefix(text, "-----BEGIN CERTIFICATE-----"), text
	}
	eventually(t, "a namespace that comes later has it too", has)
	// A real API server takes what is in a namespace with it.
	if err := c.core.CoreV1().Namespaces().Delete(t.Context(), "late", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.core.CoreV1().ConfigMaps("late").Delete(t.Context(), "trust", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "late", UID: "another", Labels: map[string]string{"team": "shop"}}})
	eventually(t, "a namespace that is made anew under its name has it too", has)
}

func TestEventsAtPods(t *testing.T) {
	const image, manifest = "sha256:1111", "sha256:2222"
	c := newCluster(t)
	c.rule("shop", map[string]any{"spiffeIDTemplate": bySA, "scanPolicy": "prod"})
	for name, imageID := range map[string]string{"by-config": image, "by-manifest": "docker.io/library/shop@" + manifest, "other": "sha256:3333"} {
		p := pod("shop", name, nil)
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "main", ImageID: imageID}}
		c.create(p)
	}
	ended := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}
	for name, change := range map[string]func(*corev1.PodStatus){
		"by-sidecar": func(s *corev1.PodStatus) {
			s.InitContainerStatuses = []corev1.ContainerStatus{{Name: "mesh", ImageID: image}}
		},
		"by-debugger": func(s *corev1.PodStatus) {
			s.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "debug", ImageID: image}}
		},
		"was-set-up": func(s *corev1.PodStatus) {
			s.InitContainerStatuses = []corev1.ContainerStatus{{Name: "setup", ImageID: image, State: ended}}
		},
		"was-debugged": func(s *corev1.PodStatus) {
			s.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "debug", ImageID: image, State: ended}}
		},
	} {
		p := pod("shop", name, nil)
		change(&p.Status)
		c.create(p)
	}
	eventually(t, "all pods have entries", func() (bool, string) { n := len(c.entries()); return n == 7, fmt.Sprint(n) })
	events := func() []string {
		all, err := c.core.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, e := range all.Items {
			lines = append(lines, e.InvolvedObject.Name+" "+e.Type+" "+e.Reason)
			if at := map[string]string{"by-sidecar": "spec.initContainers{mesh}", "by-debugger": "spec.ephemeralContainers{debug}"}[e.InvolvedObject.Name]; at != "" && e.InvolvedObject.FieldPath != at {
				t.Errorf("the event of %s is about %s", e.InvolvedObject.Name, e.InvolvedObject.FieldPath)
			}
			if e.Reason == "IdentityWithdrawn" && !strings.Contains(e.Message, "CVE-1") {
				t.Errorf("the message is %q", e.Message)
			}
		}
		slices.Sort(lines)
		return slices.Compact(lines)
	}
	// A turn is told again until it is seen: the registrar knows an entry a moment after the server does.
	untilEvents := func(turn kube.Turn, want ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("events are %q", want), func() (bool, string) {
			c.r.Tell(turn)
			got := events()
			return slices.Equal(got, want), fmt.Sprintf("%q", got)
		})
	}
	untilEvents(kube.Turn{Policy: "prod", Digests: []string{image, manifest}, Reason: "CVE-1 is critical"},
		"by-config Warning IdentityWithdrawn", "by-debugger Warning IdentityWithdrawn", "by-manifest Warning IdentityWithdrawn", "by-sidecar Warning IdentityWithdrawn")
	c.r.Tell(kube.Turn{Policy: "other", Digests: []string{manifest}, Allowed: true}) // nobody demands it
	untilEvents(kube.Turn{Policy: "prod", Digests: []string{image}, Allowed: true},
		"by-config Normal IdentityRestored", "by-config Warning IdentityWithdrawn",
		"by-debugger Normal IdentityRestored", "by-debugger Warning IdentityWithdrawn", "by-manifest Warning IdentityWithdrawn",
		"by-sidecar Normal IdentityRestored", "by-sidecar Warning IdentityWithdrawn")
}

func TestReportsInACluster(t *testing.T) {
	c := newCluster(t, func(cfg *kube.Config) { cfg.ReportSource = verdict.Local })
	digest := Digest("b")
	// The image is known by its configuration's digest, from a report of another scanner.
	stream, err := evidencev1.NewEvidenceClient(c.w.Local).Push(c.w.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*evidencev1.PushRequest{
		{Step: &evidencev1.PushRequest_Header{Header: &evidencev1.PushHeader{Image: digest}}},
		{Step: &evidencev1.PushRequest_Chunk{Chunk: fmt.Appendf(nil, `{"SchemaVersion":2,"CreatedAt":%q,"ArtifactName":"shop","ArtifactType":"container_image",
"Metadata":{"ImageID":%q,"OS":{"Family":"debian","Name":"12.9"}},"Results":[{"Target":"shop","Class":"os-pkgs","Type":"debian","Packages":[{"Name":"lib"}]}]}`,
			time.Now().Add(-time.Minute).Format(time.RFC3339Nano), digest)}},
	} {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	report := func(name string, artifact map[string]any) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "aquasecurity.github.io/v1alpha1", "kind": "VulnerabilityReport",
			"metadata": map[string]any{"name": name, "namespace": "shop", "resourceVersion": "7"},
			"report": map[string]any{
				"artifact": artifact, "registry": map[string]any{"server": "registry.example.org"},
				"os": map[string]any{"family": "debian", "name": "12.9"}, "scanner": map[string]any{"name": "Trivy", "version": "0.60.0", "vendor": "Aqua"},
				"updateTimestamp": time.Now().UTC().Format(time.RFC3339), "summary": map[string]any{},
				"vulnerabilities": []any{map[string]any{
					"vulnerabilityID": "CVE-2099-1", "resource": "lib", "installedVersion": "1", "fixedVersion": "2", "severity": "CRITICAL", "packagePURL": "pkg:deb/debian/lib@1",
				}},
			},
		}}
	}
	for _, u := range []*unstructured.Unstructured{
		report("tagged", map[string]any{"repository": "shop", "tag": "latest"}), // names no digest
		report("good", map[string]any{"repository": "shop", "digest": digest}),
	} {
		if _, err := c.dyn.Resource(reports).Namespace("shop").Create(t.Context(), u, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the report is evidence about its image, and the one that names no digest is not", func() (bool, string) {
		resp, err := evidencev1.NewEvidenceClient(c.w.Local).Show(c.w.Context(), &evidencev1.ShowRequest{Image: digest})
		if err != nil {
			return false, err.Error()
		}
		return slices.ContainsFunc(resp.GetDocuments(), func(d *evidencev1.Document) bool {
			return d.GetSource() == verdict.Local && d.GetRepository() == "registry.example.org/shop" && d.GetFindings() == 1
		}), fmt.Sprint(resp)
	})
}
