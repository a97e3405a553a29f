// Package kube makes entries of what a Kubernetes cluster says: the pods that a ClusterSPIFFEID selects
// have their entries before their containers start, and lose them with the pod.
//
// The resources are those of spire-controller-manager (group spire.spiffe.io, version v1alpha1):
// ClusterSPIFFEID, ClusterStaticEntry and ClusterFederatedTrustDomain, with the same fields and templates,
// so that manifests written for it work here unchanged. What is ours beside them: scanPolicy and
// trustPolicy, which make a pod's identity depend on what is known of its images, a fence that keeps the
// identities of a namespace below a path of its own, and conditions that say in words what is wrong.
//
// # How a change travels
//
//	informer ──> queue of pods ──> what each should have ──> difference ──> entry.v1, in batches
//	                  ^
//	rule, node, namespace or service changed: the pods it concerns
//
// A pod is looked at again when it, its node, its namespace, a service that names it or a rule changes;
// what it should have is compared with what it has, and only the difference is written. Nothing is listed
// but at the start and, in case somebody deleted an entry by hand, every Config.Resync.
//
// # Why it is so
//
// The registrar is a client of the server's public API and holds no way around it: the same rules, the
// same audit lines, the same limits as for everybody. An entry's ID is made of the cluster, the rule and
// the pod, so what belongs to whom is in the entry itself, survives a restart, and needs no list of its
// own. Entries that others made are never touched: where one of them is similar, it wins, and the
// resource's status says so.
//
// Only the holder of the cluster's lease writes (client-go's leader election), so several servers over one
// store may all be configured the same.
package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"sync"
	"text/template"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"github.com/assay-id/assay/server/wire/evidencev1"
)

// Config is what an operator says of one cluster.
type Config struct {
	// Name is the cluster's, as its agents name it to k8s_psat. Letters, digits, '-' and '_'.
	Name string
	// TrustDomain is the server's, a name without a scheme.
	TrustDomain string
	// Kubeconfig is a file; empty: the service account of the pod that the server runs in.
	Kubeconfig string
	// ClusterDomain ends the DNS names of services. Empty: such names are left out.
	ClusterDomain string
	// ClassName limits the resources to those of a class; empty: those without one. WatchClassless takes
	// those without one too.
	ClassName      string
	WatchClassless bool
	// IgnoreNamespaces are those whose pods get no entries, as regular expressions of WholeName.
	IgnoreNamespaces []*regexp.Regexp
	// ParentID is the template of the parent's SPIFFE ID; nil: that of a k8s_psat agent on the pod's node.
	ParentID *template.Template
	// Fence is the template of a path that the SPIFFE IDs of a pod must be below; nil: none. It sees what
	// the other templates see.
	Fence *template.Template
	// Resync is how often what is stored is compared whole; 0: 10 minutes.
	Resync time.Duration
	// StatusEvery is how long news are gathered before statuses are written: they are for people. 0: 1 s.
	StatusEvery time.Duration
	// LeaseNamespace and LeaseName are the lease that one registrar holds at a time; empty: assay-registrar
	// in the server's own namespace. NoLease runs without one.
	LeaseNamespace, LeaseName string
	NoLease                   bool
	// Publish says where the bundle goes in the cluster.
	Publish []Target
	// ReportSource is the evidence source that reports of Trivy Operator are taken in for; empty: they are
	// not looked at.
	ReportSource string
	// Policies returns the names of the scan_policy and trust_policy blocks in force, which rules may name. Nil: nobody
	// knows them.
	Policies func() (scan, trust []string)

	Log     logrus.FieldLogger
	Metrics prometheus.Registerer
}

// API is the server as the registrar sees it.
type API struct {
	Entries      entryv1.EntryClient
	TrustDomains trustdomainv1.TrustDomainClient
	Bundles      bundlev1.BundleClient
	Evidence     evidencev1.EvidenceClient
	// Changed returns after something was committed to the server's records since it was called last.
	Changed func(ctx context.Context) error
}

// NewAPI returns the API behind a connection.
func NewAPI(conn grpc.ClientConnInterface, changed func(context.Context) error) API {
	return API{
		Entries: entryv1.NewEntryClient(conn), TrustDomains: trustdomainv1.NewTrustDomainClient(conn),
		Bundles: bundlev1.NewBundleClient(conn), Evidence: evidencev1.NewEvidenceClient(conn), Changed: changed,
	}
}

// Cluster is a Kubernetes API server.
type Cluster struct {
	Core    kubernetes.Interface
	Dynamic dynamic.Interface
}

// Connect reads the configuration of a cluster's clients. It does not yet connect.
func Connect(cfg Config) (Cluster, error) {
	var rc *rest.Config
	var err error
	if cfg.Kubeconfig == "" {
		rc, err = rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			err = errors.New("the server does not run in a pod: name a kubeconfig")
		}
	} else {
		rc, err = clientcmd.BuildConfigFromFlags("", cfg.Kubeconfig)
	}
	if err != nil {
		return Cluster{}, fmt.Errorf("connect to cluster %q: %w", cfg.Name, err)
	}
	// Deltas are few, but a rule that matches ten thousand pods writes as many statuses as there are rules.
	rc.QPS, rc.Burst, rc.UserAgent = 50, 100, "assay-server"
	core, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return Cluster{}, fmt.Errorf("connect to cluster %q: %w", cfg.Name, err)
	}
	dyn, err := dynamic.NewForConfig(rc)
	if err != nil {
		return Cluster{}, fmt.Errorf("connect to cluster %q: %w", cfg.Name, err)
	}
	return Cluster{Core: core, Dynamic: dyn}, nil
}

// How a lease is held: a registrar that dies is followed within a quarter of a minute.
const (
	leaseDuration = 15 * time.Second
	leaseRenew    = 10 * time.Second
	leaseRetry    = 2 * time.Second
)

// Registrar keeps the entries of one cluster.
type Registrar struct {
	cfg     Config
	api     API
	cluster Cluster
	log     logrus.FieldLogger
	m       *metrics
	turns   chan Turn // what Tell was told
	// ruled holds a token when Policies may return others than before.
	ruled chan struct{}
	// term is held while this registrar leads: the next term waits for the end of the last.
	term sync.Mutex
}

// New returns a registrar of a cluster. It does nothing until Run.
func New(api API, cluster Cluster, cfg Config) (*Registrar, error) {
	if !clusterName.MatchString(cfg.Name) {
		return nil, fmt.Errorf("cluster name %q: it may have up to 63 letters, digits, '-' and '_'", cfg.Name)
	}
	cfg.Resync = cmp.Or(cfg.Resync, 10*time.Minute)
	cfg.StatusEvery = cmp.Or(cfg.StatusEvery, time.Second)
	klogOnce.Do(func() { klog.SetLogger(logr.New(klogSink{cfg.Log})) })
	if cfg.ParentID == nil {
		cfg.ParentID = defaultParentID
	}
	if cfg.LeaseName == "" {
		cfg.LeaseName = "assay-registrar"
	}
	if cfg.LeaseNamespace == "" {
		cfg.LeaseNamespace = ownNamespace()
	}
	m, err := newMetrics(cfg.Metrics, cfg.Name)
	if err != nil {
		return nil, err
	}
	return &Registrar{cfg: cfg, api: api, cluster: cluster, log: cfg.Log.WithField("cluster", cfg.Name), m: m, turns: make(chan Turn, maxTurns), ruled: make(chan struct{}, 1)}, nil
}

// PoliciesChanged has the rules that name policies looked at again. It waits for nobody.
func (r *Registrar) PoliciesChanged() {
	select {
	case r.ruled <- struct{}{}:
	default:
	}
}

// clusterName is part of entries' IDs and agents' SPIFFE IDs.
var clusterName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,63}$`)

// ownNamespace is that of the pod that this process runs in.
func ownNamespace() string {
	name, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
	if err != nil || len(name) == 0 || len(name) > 63 {
		return metav1.NamespaceDefault
	}
	return string(name)
}

// Run keeps the entries until ctx ends. A cluster that is away is waited for: what is stored stays.
func (r *Registrar) Run(ctx context.Context) error {
	if r.cfg.NoLease {
		r.lead(ctx)
		return nil
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("name this registrar: %w", err)
	}
	lock := &toldLease{log: r.log, now: time.Now, Interface: &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: r.cfg.LeaseNamespace, Name: r.cfg.LeaseName},
		Client:     r.cluster.Core.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: fmt.Sprintf("%s-%d", host, os.Getpid())},
	}}
	for ctx.Err() == nil {
		// Elections end when the lease is lost; then the next begins.
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: lock, LeaseDuration: leaseDuration, RenewDeadline: leaseRenew, RetryPeriod: leaseRetry,
			ReleaseOnCancel: true, Name: r.cfg.Name,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: r.lead,
				OnStoppedLeading: func() { r.log.Info("the lease of the registrar is held no more") },
			},
		})
		if err != nil {
			return fmt.Errorf("elect a registrar: %w", err)
		}
		elector.Run(ctx)
	}
	// The elector does not wait for who led.
	r.term.Lock()
	defer r.term.Unlock()
	return nil
}

// lead does the work of the one registrar that holds the lease, until ctx ends.
func (r *Registrar) lead(ctx context.Context) {
	r.term.Lock()
	defer r.term.Unlock()
	if ctx.Err() != nil {
		return
	}
	r.log.WithFields(logrus.Fields{"lease": r.cfg.LeaseNamespace + "/" + r.cfg.LeaseName}).Info("registrar starts")
	newDesk(r).run(ctx)
}

// classed reports whether a resource of a class is for this registrar.
func (c *Config) classed(class string) bool {
	return class == c.ClassName || class == "" && c.WatchClassless
}

// ignored reports whether the pods of a namespace get no entries.
func (c *Config) ignored(namespace string) bool {
	for _, re := range c.IgnoreNamespaces {
		if re.MatchString(namespace) {
			return true
		}
	}
	return false
}

// selector reads a label selector; nil selects everything.
func selector(s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	return metav1.LabelSelectorAsSelector(s)
}
