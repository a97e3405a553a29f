package kube

import (
	"cmp"
	"errors"
	"fmt"
	"strings"
	"text/template"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// The resources, by the names that spire-controller-manager published them under.
var (
	group           = schema.GroupVersion{Group: "spire.spiffe.io", Version: "v1alpha1"}
	spiffeIDs       = group.WithResource("clusterspiffeids")
	staticEntries   = group.WithResource("clusterstaticentries")
	federations     = group.WithResource("clusterfederatedtrustdomains")
	vulnerabilities = schema.GroupVersionResource{Group: "aquasecurity.github.io", Version: "v1alpha1", Resource: "vulnerabilityreports"}
)

// spiffeIDSpec is spec of a ClusterSPIFFEID.
type spiffeIDSpec struct {
	SPIFFEIDTemplate          string                `json:"spiffeIDTemplate"`
	TTL                       metav1.Duration       `json:"ttl"`
	JWTTTL                    metav1.Duration       `json:"jwtTtl"`
	DNSNameTemplates          []string              `json:"dnsNameTemplates"`
	WorkloadSelectorTemplates []string              `json:"workloadSelectorTemplates"`
	FederatesWith             []string              `json:"federatesWith"`
	NamespaceSelector         *metav1.LabelSelector `json:"namespaceSelector"`
	PodSelector               *metav1.LabelSelector `json:"podSelector"`
	Admin                     bool                  `json:"admin"`
	Downstream                bool                  `json:"downstream"`
	AutoPopulateDNSNames      bool                  `json:"autoPopulateDNSNames"`
	ClassName                 string                `json:"className"`
	Fallback                  bool                  `json:"fallback"`
	Hint                      string                `json:"hint"`
	// ScanPolicy and TrustPolicy are ours: policies of the server that must let the image of the container
	// through, or the pod has no identity.
	ScanPolicy  string `json:"scanPolicy"`
	TrustPolicy string `json:"trustPolicy"`
}

// rule is a ClusterSPIFFEID that was read.
type rule struct {
	name       string
	uid        string
	generation int64
	created    time.Time
	// broken says why the rule applies to nothing; nil if it does.
	broken error

	id         *template.Template
	dnsNames   []*template.Template
	selectors  []*template.Template
	fixed      []string // selectors that are no templates: the policies'
	namespaces labels.Selector
	pods       labels.Selector
	federates  []string
	spec       spiffeIDSpec
}

// readRule reads a ClusterSPIFFEID. A rule that cannot be is returned too, with broken set.
func readRule(u *unstructured.Unstructured) *rule {
	r := &rule{
		name: u.GetName(), uid: string(u.GetUID()), generation: u.GetGeneration(), created: u.GetCreationTimestamp().Time,
	}
	r.broken = r.read(u)
	return r
}

func (r *rule) read(u *unstructured.Unstructured) error {
	if err := readSpec(u, &r.spec); err != nil {
		return err
	}
	if r.spec.SPIFFEIDTemplate == "" {
		return errors.New("spec.spiffeIDTemplate is empty")
	}
	var wrong []error
	parse := func(field, text string) *template.Template {
		t, err := ParseTemplate(field, text)
		if err != nil {
			wrong = append(wrong, fmt.Errorf("spec.%s: %w", field, err))
		}
		return t
	}
	r.id = parse("spiffeIDTemplate", r.spec.SPIFFEIDTemplate)
	for i, text := range r.spec.DNSNameTemplates {
		r.dnsNames = append(r.dnsNames, parse(fmt.Sprintf("dnsNameTemplates[%d]", i), text))
	}
	for i, text := range r.spec.WorkloadSelectorTemplates {
		r.selectors = append(r.selectors, parse(fmt.Sprintf("workloadSelectorTemplates[%d]", i), text))
	}
	var err error
	if r.namespaces, err = selector(r.spec.NamespaceSelector); err != nil {
		wrong = append(wrong, fmt.Errorf("spec.namespaceSelector: %w", err))
	}
	if r.pods, err = selector(r.spec.PodSelector); err != nil {
		wrong = append(wrong, fmt.Errorf("spec.podSelector: %w", err))
	}
	if r.federates, err = trustDomains(r.spec.FederatesWith); err != nil {
		wrong = append(wrong, fmt.Errorf("spec.federatesWith: %w", err))
	}
	for _, ttl := range []struct {
		field string
		value time.Duration
	}{{"ttl", r.spec.TTL.Duration}, {"jwtTtl", r.spec.JWTTTL.Duration}} {
		if ttl.value < 0 {
			wrong = append(wrong, fmt.Errorf("spec.%s: %s is negative", ttl.field, ttl.value))
		}
	}
	for _, p := range []struct{ field, name, selector string }{
		{"scanPolicy", r.spec.ScanPolicy, "scan:policy:"}, {"trustPolicy", r.spec.TrustPolicy, "prov:policy:"},
	} {
		switch {
		case p.name == "":
		case !clusterName.MatchString(p.name):
			wrong = append(wrong, fmt.Errorf("spec.%s: %q is no name of a policy", p.field, p.name))
		default:
			r.fixed = append(r.fixed, p.selector+p.name)
		}
	}
	return errors.Join(wrong...)
}

// readSpec reads the spec of a resource into its struct.
func readSpec(u *unstructured.Unstructured, to any) error {
	spec, _, err := unstructured.NestedMap(u.Object, "spec")
	for _, field := range []string{"ttl", "jwtTtl", "x509SVIDTTL", "jwtSVIDTTL"} { // what reads them does not say which it is
		if text, is := spec[field].(string); is {
			if _, wrong := time.ParseDuration(text); wrong != nil {
				return fmt.Errorf("spec.%s: %q is no length of time, such as \"30m\" or \"1h30m\"", field, text)
			}
		}
	}
	if err == nil {
		err = runtime.DefaultUnstructuredConverter.FromUnstructured(spec, to)
	}
	if err != nil {
		return fmt.Errorf("spec: %w", err)
	}
	return nil
}

func trustDomains(names []string) ([]string, error) {
	var all []string
	for _, name := range names {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", name, err)
		}
		all = append(all, td.Name())
	}
	return all, nil
}

// before orders rules: those that are no fallback first, then the older, so that a younger rule takes
// nothing from an older one.
func before(a, b *rule) int {
	if a.spec.Fallback != b.spec.Fallback {
		if a.spec.Fallback {
			return 1
		}
		return -1
	}
	return cmp.Or(a.created.Compare(b.created), strings.Compare(a.uid, b.uid))
}

// staticSpec is spec of a ClusterStaticEntry.
type staticSpec struct {
	SPIFFEID      string          `json:"spiffeID"`
	ParentID      string          `json:"parentID"`
	Selectors     []string        `json:"selectors"`
	FederatesWith []string        `json:"federatesWith"`
	X509SVIDTTL   metav1.Duration `json:"x509SVIDTTL"`
	JWTSVIDTTL    metav1.Duration `json:"jwtSVIDTTL"`
	DNSNames      []string        `json:"dnsNames"`
	Hint          string          `json:"hint"`
	Admin         bool            `json:"admin"`
	Downstream    bool            `json:"downstream"`
	StoreSVID     bool            `json:"storeSVID"`
	ClassName     string          `json:"className"`
}

// federationSpec is spec of a ClusterFederatedTrustDomain.
type federationSpec struct {
	TrustDomain           string `json:"trustDomain"`
	BundleEndpointURL     string `json:"bundleEndpointURL"`
	BundleEndpointProfile struct {
		Type             string `json:"type"`
		EndpointSPIFFEID string `json:"endpointSPIFFEID"`
	} `json:"bundleEndpointProfile"`
	TrustDomainBundle string `json:"trustDomainBundle"`
	ClassName         string `json:"className"`
}
