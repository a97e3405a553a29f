package kube

import (
	"fmt"
	"os"
	"regexp"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Block is kubernetes "cluster" { … } of the server's file; the label is the cluster's name.
type Block struct {
	Kubeconfig       string               `hcl:"kubeconfig,optional"`
	ClusterDomain    *string              `hcl:"cluster_domain,optional"`
	ClassName        string               `hcl:"class_name,optional"`
	WatchClassless   bool                 `hcl:"watch_classless,optional"`
	IgnoreNamespaces *[]string            `hcl:"ignore_namespaces,optional"`
	ParentID         string               `hcl:"parent_id_template,optional"`
	Fence            string               `hcl:"path_fence,optional"`
	Resync           string               `hcl:"resync_interval,optional"`
	ReportSource     string               `hcl:"vulnerability_reports,optional"`
	LeaderElection   *leaseBlock          `hcl:"leader_election,block"`
	ConfigMaps       []configMapBlock     `hcl:"bundle_config_map,block"`
	TrustBundles     []clusterBundleBlock `hcl:"cluster_trust_bundle,block"`
}

type leaseBlock struct {
	Namespace string `hcl:"namespace,optional"`
	Name      string `hcl:"name,optional"`
	Disabled  bool   `hcl:"disabled,optional"`
}

type configMapBlock struct {
	Name      string            `hcl:"name,label"`
	Key       string            `hcl:"key,optional"`
	Format    string            `hcl:"format,optional"`
	Namespace map[string]string `hcl:"namespace_labels,optional"`
}

type clusterBundleBlock struct {
	Name   string `hcl:"name,label"`
	Signer string `hcl:"signer_name,optional"`
}

// Problem is something that is wrong with one key of a block.
type Problem struct{ Field, Text string }

// defaultIgnored are the namespaces of the cluster's own machinery, as spire-controller-manager has them.
var defaultIgnored = []string{"kube-system", "kube-public", "spire-system"}

// NewConfig checks a block. What it does not say is filled in with defaults; TrustDomain, Log and Metrics
// are the caller's to set.
func NewConfig(name string, b Block) (*Config, []Problem) {
	c := &Config{
		Name: name, Kubeconfig: b.Kubeconfig, ClusterDomain: "cluster.local", ClassName: b.ClassName,
		WatchClassless: b.WatchClassless, ReportSource: b.ReportSource,
	}
	var wrong []Problem
	say := func(field, format string, args ...any) {
		wrong = append(wrong, Problem{field, fmt.Sprintf(format, args...)})
	}
	if !clusterName.MatchString(name) {
		say("", "the label is the cluster's name, up to 63 letters, digits, '-' and '_'.")
	}
	if b.ClusterDomain != nil {
		c.ClusterDomain = *b.ClusterDomain
	}
	if b.Kubeconfig != "" {
		if _, err := os.Stat(b.Kubeconfig); err != nil {
			say("kubeconfig", "%s; it says where the cluster's API server is. Leave it out for the service account of the server's own pod.", err)
		}
	}
	if b.WatchClassless && b.ClassName == "" {
		say("watch_classless", "without class_name only resources without a class are looked at anyway; set class_name too.")
	}
	ignored := defaultIgnored
	if b.IgnoreNamespaces != nil {
		ignored = *b.IgnoreNamespaces
	}
	for _, text := range ignored {
		re, err := WholeName(text)
		if err != nil {
			say("ignore_namespaces", "%q is no regular expression: %s.", text, err)
			continue
		}
		c.IgnoreNamespaces = append(c.IgnoreNamespaces, re)
	}
	var err error
	if b.ParentID != "" {
		if c.ParentID, err = ParseTemplate("parent_id_template", b.ParentID); err != nil {
			say("parent_id_template", "%s.", err)
		}
	}
	if b.Fence != "" {
		if c.Fence, err = ParseTemplate("path_fence", b.Fence); err != nil {
			say("path_fence", "%s.", err)
		}
	}
	if b.Resync != "" {
		if c.Resync, err = time.ParseDuration(b.Resync); err != nil || c.Resync < 10*time.Second {
			say("resync_interval", "%q is no length of time of 10s or more, such as \"10m\".", b.Resync)
		}
	}
	if b.ReportSource != "" && !clusterName.MatchString(b.ReportSource) {
		say("vulnerability_reports", "%q is no name of a source: up to 63 letters, digits, '-' and '_'.", b.ReportSource)
	}
	if l := b.LeaderElection; l != nil {
		c.LeaseNamespace, c.LeaseName, c.NoLease = l.Namespace, l.Name, l.Disabled
	}
	wrong = append(wrong, c.targets(b)...)
	return c, wrong
}

// WholeName reads a regular expression that is of all of a name: of "dev|dev-.*" the second is tried too where the
// first matches the beginning.
func WholeName(text string) (*regexp.Regexp, error) {
	if _, err := regexp.Compile(text); err != nil { // as it was written, and not with what is put around it
		return nil, err
	}
	return regexp.Compile(`^(?:` + text + `)$`)
}

func (c *Config) targets(b Block) []Problem {
	var wrong []Problem
	seen := map[string]bool{}
	for _, m := range b.ConfigMaps {
		t := Target{ConfigMap: m.Name, Key: m.Key, Format: m.Format}
		if m.Format != "" && m.Format != "pem" && m.Format != "spiffe" {
			wrong = append(wrong, Problem{"bundle_config_map.format", fmt.Sprintf("%q is unknown; there are \"pem\" and \"spiffe\".", m.Format)})
		}
		if seen[m.Name] {
			wrong = append(wrong, Problem{"bundle_config_map", fmt.Sprintf("%q is there twice; keep one of the blocks.", m.Name)})
		}
		seen[m.Name] = true
		if len(m.Namespace) > 0 {
			s, err := metav1.LabelSelectorAsSelector(&metav1.LabelSelector{MatchLabels: m.Namespace})
			if err != nil {
				wrong = append(wrong, Problem{"bundle_config_map.namespace_labels", err.Error() + "."})
			}
			t.Namespaces = s
		} else {
			t.Namespaces = labels.Everything()
		}
		c.Publish = append(c.Publish, t)
	}
	for _, m := range b.TrustBundles {
		c.Publish = append(c.Publish, Target{ClusterTrustBundle: m.Name, Signer: m.Signer})
	}
	return wrong
}
