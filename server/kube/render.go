package kube

import (
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ParseTemplate reads a template of a rule or of the configuration; name is the field it is in.
func ParseTemplate(name, text string) (*template.Template, error) {
	// A label that is not there is an error, and not a SPIFFE ID with "<no value>" in it.
	return template.New(name).Option("missingkey=error").Parse(text)
}

var defaultParentID = template.Must(ParseTemplate("parent ID",
	"spiffe://{{ .TrustDomain }}/spire/agent/k8s_psat/{{ .ClusterName }}/{{ .NodeMeta.UID }}"))

// facts is what a template sees, by the names that spire-controller-manager gave them.
type facts struct {
	TrustDomain   string
	ClusterName   string
	ClusterDomain string
	PodMeta       *metav1.ObjectMeta
	PodSpec       *corev1.PodSpec
	NodeMeta      *metav1.ObjectMeta
	NodeSpec      *corev1.NodeSpec
}

// maxRendered is what a template may write: more than any SPIFFE ID or selector may have.
const maxRendered = 8 << 10

var errTooLong = fmt.Errorf("it writes more than %d bytes", maxRendered)

// limited keeps a template from filling the memory.
type limited struct{ strings.Builder }

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxRendered {
		return 0, errTooLong
	}
	return l.Builder.Write(p)
}

func render(t *template.Template, f *facts) (string, error) {
	var out limited
	if err := t.Execute(&out, f); err != nil {
		return "", err
	}
	return out.String(), nil
}

// factsOf returns what the templates see of a pod. The structs are copies: a template may call methods,
// and must not change what the informer holds.
func (c *Config) factsOf(pod *corev1.Pod, node *corev1.Node) *facts {
	podMeta, podSpec, nodeMeta, nodeSpec := pod.ObjectMeta, pod.Spec, node.ObjectMeta, node.Spec
	return &facts{
		TrustDomain: c.TrustDomain, ClusterName: c.Name, ClusterDomain: c.ClusterDomain,
		PodMeta: &podMeta, PodSpec: &podSpec, NodeMeta: &nodeMeta, NodeSpec: &nodeSpec,
	}
}

// entryFor returns the entry that a rule gives a pod on a node; services are those that name the pod.
func (c *Config) entryFor(r *rule, pod *corev1.Pod, node *corev1.Node, services []string) (*types.Entry, error) {
	f := c.factsOf(pod, node)
	parent, err := c.spiffeID(c.ParentID, f)
	if err != nil {
		return nil, fmt.Errorf("parent ID: %w", err)
	}
	id, err := c.spiffeID(r.id, f)
	if err != nil {
		return nil, fmt.Errorf("spec.spiffeIDTemplate: %w", err)
	}
	if err := c.fenced(id, f); err != nil {
		return nil, err
	}
	if !podUID(string(pod.UID)) {
		return nil, fmt.Errorf("the pod's UID %q cannot be part of an entry's ID", pod.UID)
	}
	e := &types.Entry{
		Id: c.podEntryID(r.name, string(pod.UID)), SpiffeId: wireID(id), ParentId: wireID(parent),
		Selectors:   []*types.Selector{{Type: "k8s", Value: "pod-uid:" + string(pod.UID)}},
		X509SvidTtl: seconds(r.spec.TTL.Duration), JwtSvidTtl: seconds(r.spec.JWTTTL.Duration),
		FederatesWith: r.federates, Admin: r.spec.Admin, Downstream: r.spec.Downstream, Hint: r.spec.Hint,
	}
	for i, t := range r.dnsNames {
		name, err := render(t, f)
		if err != nil {
			return nil, fmt.Errorf("spec.dnsNameTemplates[%d]: %w", i, err)
		}
		e.DnsNames = appendNew(e.DnsNames, name)
	}
	if r.spec.AutoPopulateDNSNames {
		e.DnsNames = appendNew(e.DnsNames, c.serviceNames(pod.Namespace, services)...)
	}
	for i, t := range r.selectors {
		text, err := render(t, f)
		if err == nil {
			err = addSelector(e, text)
		}
		if err != nil {
			return nil, fmt.Errorf("spec.workloadSelectorTemplates[%d]: %w", i, err)
		}
	}
	for _, text := range r.fixed {
		if err := addSelector(e, text); err != nil {
			return nil, err
		}
	}
	sortSelectors(e)
	return e, nil
}

func (c *Config) spiffeID(t *template.Template, f *facts) (spiffeid.ID, error) {
	text, err := render(t, f)
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := spiffeid.FromString(text)
	switch {
	case err != nil:
		return spiffeid.ID{}, fmt.Errorf("%q is no SPIFFE ID: %w", text, err)
	case id.TrustDomain().Name() != c.TrustDomain:
		return spiffeid.ID{}, fmt.Errorf("%q is not in the trust domain %q", text, c.TrustDomain)
	}
	return id, nil
}

// fenced refuses a SPIFFE ID that is not below the path that the pod is kept to.
func (c *Config) fenced(id spiffeid.ID, f *facts) error {
	if c.Fence == nil {
		return nil
	}
	fence, err := render(c.Fence, f)
	if err != nil {
		return fmt.Errorf("fence: %w", err)
	}
	if fence = strings.TrimSuffix(fence, "/"); fence == "" {
		return errors.New("fence: it is empty for this pod")
	}
	if id.Path() != fence && !strings.HasPrefix(id.Path(), fence+"/") {
		return fmt.Errorf("%q is outside of %q, which pods of namespace %q are fenced to", id, fence, f.PodMeta.Namespace)
	}
	return nil
}

// serviceNames are the DNS names of services, sorted so that the same services give the same entry.
func (c *Config) serviceNames(namespace string, services []string) []string {
	var names []string
	for _, s := range services {
		names = append(names, s, s+"."+namespace, s+"."+namespace+".svc")
		if c.ClusterDomain != "" {
			names = append(names, s+"."+namespace+".svc."+c.ClusterDomain)
		}
	}
	slices.Sort(names)
	return names
}

func appendNew(to []string, names ...string) []string {
	for _, n := range names {
		if !slices.Contains(to, n) {
			to = append(to, n)
		}
	}
	return to
}

func addSelector(e *types.Entry, text string) error {
	kind, value, ok := strings.Cut(text, ":")
	if !ok || kind == "" || value == "" {
		return fmt.Errorf("%q is no selector: write TYPE:VALUE", text)
	}
	e.Selectors = append(e.Selectors, &types.Selector{Type: kind, Value: value})
	return nil
}

// sortSelectors brings selectors into the order in which the server returns them, each once.
func sortSelectors(e *types.Entry) {
	slices.SortFunc(e.Selectors, compareSelectors)
	e.Selectors = slices.CompactFunc(e.Selectors, func(a, b *types.Selector) bool { return compareSelectors(a, b) == 0 })
}

func compareSelectors(a, b *types.Selector) int {
	if c := strings.Compare(a.GetType(), b.GetType()); c != 0 {
		return c
	}
	return strings.Compare(a.GetValue(), b.GetValue())
}

func wireID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// seconds rounds up: less than a second is not "the default", which 0 means.
func seconds(d time.Duration) int32 {
	return int32(min((d+time.Second-1)/time.Second, 1<<31-1)) //nolint:gosec // within the range
}

// staticEntry returns the entry of a ClusterStaticEntry.
func (c *Config) staticEntry(name string, s *staticSpec) (*types.Entry, error) {
	id, err := spiffeid.FromString(s.SPIFFEID)
	if err != nil {
		return nil, fmt.Errorf("spec.spiffeID: %q: %w", s.SPIFFEID, err)
	}
	parent, err := spiffeid.FromString(s.ParentID)
	if err != nil {
		return nil, fmt.Errorf("spec.parentID: %q: %w", s.ParentID, err)
	}
	e := &types.Entry{
		Id: c.staticEntryID(name), SpiffeId: wireID(id), ParentId: wireID(parent),
		X509SvidTtl: seconds(s.X509SVIDTTL.Duration), JwtSvidTtl: seconds(s.JWTSVIDTTL.Duration),
		DnsNames: s.DNSNames, Hint: s.Hint, Admin: s.Admin, Downstream: s.Downstream, StoreSvid: s.StoreSVID,
	}
	if s.X509SVIDTTL.Duration < 0 || s.JWTSVIDTTL.Duration < 0 {
		return nil, errors.New("spec.x509SVIDTTL and spec.jwtSVIDTTL must not be negative")
	}
	if e.FederatesWith, err = trustDomains(s.FederatesWith); err != nil {
		return nil, fmt.Errorf("spec.federatesWith: %w", err)
	}
	for i, text := range s.Selectors {
		if err := addSelector(e, text); err != nil {
			return nil, fmt.Errorf("spec.selectors[%d]: %w", i, err)
		}
	}
	sortSelectors(e)
	return e, nil
}

// Entries' IDs say whose they are: kube.CLUSTER.RULE.POD and kube.CLUSTER.static.NAME, with hashes of
// names, which may be longer than an entry's ID.
func (c *Config) prefix() string { return "kube." + c.Name + "." }

func (c *Config) podEntryID(rule, uid string) string {
	return c.prefix() + hashed("ClusterSPIFFEID/"+rule) + "." + uid
}

func (c *Config) staticEntryID(name string) string {
	return c.prefix() + "static." + hashed("ClusterStaticEntry/"+name)
}

func hashed(name string) string {
	sum := sha256.Sum256([]byte(name))
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:15]))
}

// podUID reports whether a UID can be part of an entry's ID. They are UUIDs, or hashes for static pods.
func podUID(uid string) bool {
	return uid != "" && len(uid) <= 128 && !strings.ContainsFunc(uid, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
	})
}
