package world

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	kubetypes "k8s.io/apimachinery/pkg/types"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	kubefake "k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/kube"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/policy"
)

// cluster is a Kubernetes API server in memory (client-go's own), and the registrar of it before a real
// server of ours. What is claimed of real clusters is shown in test/lab/k8s.
type cluster struct {
	t    *testing.T
	w    *World
	cfg  kube.Config
	core *kubefake.Clientset
	dyn  *dynamicfake.FakeDynamicClient
	r    *kube.Registrar
	stop func()
}

var (
	spireGroup = schema.GroupVersion{Group: "spire.spiffe.io", Version: "v1alpha1"}
	reports    = schema.GroupVersionResource{Group: "aquasecurity.github.io", Version: "v1alpha1", Resource: "vulnerabilityreports"}
	listKinds  = map[schema.GroupVersionResource]string{
		spireGroup.WithResource("clusterspiffeids"):             "ClusterSPIFFEIDList",
		spireGroup.WithResource("clusterstaticentries"):         "ClusterStaticEntryList",
		spireGroup.WithResource("clusterfederatedtrustdomains"): "ClusterFederatedTrustDomainList",
		reports: "VulnerabilityReportList",
	}
)

func newCluster(t *testing.T, change ...func(*kube.Config)) *cluster {
	t.Helper()
	scan, problems := policy.New(policy.Block{Name: "prod", Sources: []string{verdict.Local}, Fail: []policy.Fails{{Severity: "critical"}}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	w := New(t, func(c *server.Config) {
		c.Evidence = &server.Evidence{Rules: verdict.Rules{Policies: []*policy.ScanPolicy{scan}}}
	})
	c := &cluster{t: t, w: w, core: kubefake.NewClientset(), dyn: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), listKinds)}
	// The fake gives no names of its own, and takes no reactor safely once a registrar asks it.
	var events atomic.Int64
	c.core.PrependReactor("create", "events", func(a clienttesting.Action) (bool, runtime.Object, error) {
		a.(clienttesting.CreateAction).GetObject().(*corev1.Event).Name = fmt.Sprint("e", events.Add(1))
		return false, nil, nil
	})
	c.cfg = kube.Config{
		Name: "c1", TrustDomain: "example.org", ClusterDomain: "cluster.local", LeaseNamespace: "assay",
		IgnoreNamespaces: []*regexp.Regexp{regexp.MustCompile("^kube-.*$")}, Log: silent(), StatusEvery: 20 * time.Millisecond,
	}
	for _, f := range change {
		f(&c.cfg)
	}
	c.namespace("shop", map[string]string{"team": "shop"})
	c.namespace("kube-system", nil)
	c.create(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "node-uid-1"}})
	c.start()
	return c
}

// start begins a registrar, as a server that was started does.
func (c *cluster) start() {
	c.t.Helper()
	cfg := c.cfg
	cfg.Metrics = prometheus.NewRegistry()
	changed := func(ctx context.Context) error {
		select {
		case <-time.After(50 * time.Millisecond):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r, err := kube.New(kube.NewAPI(c.w.Local, changed), kube.Cluster{Core: c.core, Dynamic: c.dyn}, cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	c.r = r
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	c.stop = func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("the registrar ended with %v", err)
		}
		c.stop = func() {}
	}
	c.t.Cleanup(func() { c.stop() })
}

func (c *cluster) create(o any) {
	c.t.Helper()
	var err error
	switch o := o.(type) {
	case *corev1.Node:
		_, err = c.core.CoreV1().Nodes().Create(c.t.Context(), o, metav1.CreateOptions{})
	case *corev1.Namespace:
		_, err = c.core.CoreV1().Namespaces().Create(c.t.Context(), o, metav1.CreateOptions{})
	case *corev1.Pod:
		_, err = c.core.CoreV1().Pods(o.Namespace).Create(c.t.Context(), o, metav1.CreateOptions{})
	case *discoveryv1.EndpointSlice:
		_, err = c.core.DiscoveryV1().EndpointSlices(o.Namespace).Create(c.t.Context(), o, metav1.CreateOptions{})
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) namespace(name string, labels map[string]string) {
	c.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: kubetypes.UID("uid-" + name), Labels: labels}})
}

func pod(namespace, name string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: kubetypes.UID("uid-" + namespace + "-" + name), Labels: labels},
		Spec:       corev1.PodSpec{NodeName: "n1", ServiceAccountName: "web"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
}

// updatePod writes a pod as a later version of it.
func (c *cluster) updatePod(p *corev1.Pod) {
	c.t.Helper()
	if _, err := c.core.CoreV1().Pods(p.Namespace).Update(c.t.Context(), p, metav1.UpdateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) deletePod(p *corev1.Pod) {
	c.t.Helper()
	if err := c.core.CoreV1().Pods(p.Namespace).Delete(c.t.Context(), p.Name, metav1.DeleteOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// age gives each resource a later time of creation than the one before.
var age = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (c *cluster) resource(kind, plural, name string, spec map[string]any) *unstructured.Unstructured {
	c.t.Helper()
	age = age.Add(time.Second)
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "spire.spiffe.io/v1alpha1", "kind": kind, "spec": spec,
		"metadata": map[string]any{"name": name, "uid": "uid-" + name, "generation": int64(1), "creationTimestamp": age.Format(time.RFC3339)},
	}}
	u, err := c.dyn.Resource(spireGroup.WithResource(plural)).Create(c.t.Context(), u, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return u
}

func (c *cluster) rule(name string, spec map[string]any) *unstructured.Unstructured {
	return c.resource("ClusterSPIFFEID", "clusterspiffeids", name, spec)
}

func (c *cluster) drop(plural, name string) {
	c.t.Helper()
	if err := c.dyn.Resource(spireGroup.WithResource(plural)).Delete(c.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// entries are those that the server has, one line each: SPIFFE ID, selectors.
func (c *cluster) entries() []string {
	c.t.Helper()
	resp, err := entryv1.NewEntryClient(c.w.Local).ListEntries(c.w.Context(), &entryv1.ListEntriesRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	var lines []string
	for _, e := range resp.GetEntries() {
		line := e.GetSpiffeId().GetPath()
		for _, s := range e.GetSelectors() {
			line += " " + s.GetType() + ":" + s.GetValue()
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return lines
}

// patience is far above what anything here takes.
const patience = time.Minute

func eventually(t *testing.T, what string, ok func() (bool, string)) {
	t.Helper()
	late, tick := time.After(patience), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for {
		done, now := ok()
		if done {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not in time: %s; it is %s", what, now)
		}
	}
}

// has waits until the server has these entries and no others.
func (c *cluster) has(want ...string) {
	c.t.Helper()
	slices.Sort(want)
	eventually(c.t, fmt.Sprintf("the entries are %q", want), func() (bool, string) {
		got := c.entries()
		return slices.Equal(got, want), fmt.Sprintf("%q", got)
	})
}

// condition waits until the resource's Ready condition has the reason, and returns its message.
func (c *cluster) condition(plural, name, reason string) (message string) {
	c.t.Helper()
	eventually(c.t, fmt.Sprintf("%s %s is %s", plural, name, reason), func() (bool, string) {
		u, err := c.dyn.Resource(spireGroup.WithResource(plural)).Get(c.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		all, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
		if len(all) != 1 {
			return false, fmt.Sprint(all)
		}
		message, _ = all[0].(map[string]any)["message"].(string)
		return all[0].(map[string]any)["reason"] == reason, fmt.Sprint(all)
	})
	return message
}

func (c *cluster) stats(name string) map[string]any {
	c.t.Helper()
	u, err := c.dyn.Resource(spireGroup.WithResource("clusterspiffeids")).Get(c.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	stats, _, _ := unstructured.NestedMap(u.Object, "status", "stats")
	return stats
}
