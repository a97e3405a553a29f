// Package server is the server's side of k8s_psat: it has the cluster's API server review the token, and
// reads the pod and the node that the token is bound to.
//
// Why it is so: a token says which pod it was made for, but pods move and names are given again, so the pod
// that bears the name now must have the UID of the token's, run under the token's service account, and be on
// the node that the token names, where the API server tells that. What is believed of the node is read from
// the API server, never from the evidence.
package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	kerrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authclient "k8s.io/client-go/kubernetes/typed/authentication/v1"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/k8spsat"
)

// Keys of what the API server says of a token beside its user.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	extraNodeUID  = "authentication.kubernetes.io/node-uid"
)

// answerWithin is how long one answer of an API server may take, and calls how many a second it is asked
// at most, with as many in a burst: anybody may send evidence.
const (
	answerWithin = 10 * time.Second
	calls        = 100
)

// Kind returns the server's side of k8s_psat.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{
		Type:   k8spsat.Type,
		Config: func() any { return new(k8spsat.ServerConfig) },
		Open:   open,
	}
}

type judge struct {
	log      logrus.FieldLogger
	clusters map[string]*cluster
}

// cluster is a cluster that nodes may come from.
type cluster struct {
	k8spsat.Cluster
	log   logrus.FieldLogger
	auth  authclient.TokenReviewInterface
	core  coreclient.CoreV1Interface
	fresh chan struct{} // gets a value when a node was just proved
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*k8spsat.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("k8s_psat configuration is a %T", config)
	}
	needs = needs.Filled()
	log := needs.Log
	if len(c.Clusters) == 0 {
		return nil, errors.New(`no cluster: add a block cluster "name" { service_account_allow_list = ["namespace:account"] }`)
	}
	j := &judge{log: log, clusters: map[string]*cluster{}}
	for _, one := range c.Clusters {
		if j.clusters[one.Name] != nil {
			return nil, fmt.Errorf("cluster %q is configured twice", one.Name)
		}
		opened, err := openCluster(one, log.WithField("cluster", one.Name), needs.Trial)
		if err != nil {
			return nil, fmt.Errorf("cluster %q: %w", one.Name, err)
		}
		j.clusters[one.Name] = opened
	}
	return j, nil
}

// openCluster does not connect: a cluster may be away when the server starts. On trial the cluster that the server
// runs in need not be there either: who judges a configuration seldom sits in the pod that it is for.
func openCluster(c k8spsat.Cluster, log logrus.FieldLogger, trial bool) (*cluster, error) {
	if err := spiffeid.ValidatePathSegment(c.Name); err != nil {
		return nil, fmt.Errorf("its name is part of agents' IDs: %w", err)
	}
	if len(c.ServiceAccounts) == 0 {
		return nil, errors.New("service_account_allow_list is empty, so no agent could attest")
	}
	for _, account := range c.ServiceAccounts {
		namespace, name, ok := strings.Cut(account, ":")
		if !ok || namespace == "" || name == "" || strings.Contains(name, ":") {
			return nil, fmt.Errorf(`service_account_allow_list: %q is no "namespace:name"`, account)
		}
	}
	if c.Audience == nil {
		c.Audience = []string{k8spsat.DefaultAudience}
	}
	var cfg *rest.Config
	var err error
	if c.KubeConfig == "" {
		if cfg, err = rest.InClusterConfig(); trial && errors.Is(err, rest.ErrNotInCluster) {
			cfg = &rest.Config{}
		} else if err != nil {
			return nil, fmt.Errorf("find the cluster that the server runs in: %w (outside of one, set kube_config_file)", err)
		}
	} else if cfg, err = clientcmd.BuildConfigFromFlags("", c.KubeConfig); err != nil {
		return nil, fmt.Errorf("read kube_config_file: %w", err)
	}
	cfg.ContentType = "application/json"
	cfg.UserAgent, cfg.QPS, cfg.Burst = "assay-server", calls, calls
	auth, err := authclient.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("make API client: %w", err)
	}
	core, err := coreclient.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("make API client: %w", err)
	}
	return &cluster{Cluster: c, log: log, auth: auth.TokenReviews(), core: core, fresh: make(chan struct{}, 1)}, nil
}

// Judge has the token reviewed and describes the node that its pod runs on.
func (j *judge) Judge(ctx context.Context, payload []byte, _ attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	evidence, err := k8spsat.Parse(payload)
	if err != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	}
	c := j.clusters[evidence.Cluster]
	if c == nil {
		return attestor.Proof{}, attestor.Refusef("cluster is not one that this server knows: %.100q", evidence.Cluster)
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	b, err := c.review(ctx, evidence.Token)
	if err != nil {
		return attestor.Proof{}, c.named(err, b)
	}
	pod, node, err := c.look(ctx, b)
	if err != nil {
		return attestor.Proof{}, c.named(err, b)
	}
	uid := string(node.UID)
	if c.UsePodUID {
		uid = "pod/" + string(pod.UID)
	}
	select {
	case c.fresh <- struct{}{}: // its labels may change before it is admitted
	default:
	}
	return attestor.Proof{
		Path:        k8spsat.Type + "/" + c.Name + "/" + uid,
		Selectors:   c.selectors(pod, node),
		CanReattest: true,
	}, nil
}

// named adds to a refusal whom it is about, for the audit line. It is nothing that the evidence does not say itself.
func (c *cluster) named(err error, b bound) error {
	if !errors.Is(err, attestor.ErrEvidence) {
		return err
	}
	whom := fmt.Sprintf("cluster %q", c.Name)
	if b.account != "" {
		whom += fmt.Sprintf(", service account %.300q", b.namespace+":"+b.account)
	}
	if b.podName != "" {
		whom += fmt.Sprintf(", pod %.300q", b.podName)
	}
	return attestor.Refusef("%w (%s)", err, whom)
}

// bound is what a token was made for.
type bound struct {
	namespace, account string
	podName, podUID    string
	nodeName, nodeUID  string // empty where the API server is too old to tell
}

// review asks the API server whether the token is good. Refusals do not say what else would have been. With one comes
// what is known of the token.
func (c *cluster) review(ctx context.Context, token string) (bound, error) {
	reply, err := c.auth.Create(ctx, &authv1.TokenReview{
		Spec: authv1.TokenReviewSpec{Token: token, Audiences: c.Audience},
	}, metav1.CreateOptions{})
	if err != nil {
		return bound{}, fmt.Errorf("have token reviewed by cluster %q: %w", c.Name, err)
	}
	status := &reply.Status
	switch {
	case !status.Authenticated:
		c.log.WithField("reason", status.Error).Debug("token is not good")
		return bound{}, attestor.Refusef("token is not good: expired, of another cluster, or not for this server")
	case len(c.Audience) > 0 && !slices.ContainsFunc(status.Audiences, func(a string) bool { return slices.Contains(c.Audience, a) }):
		// An API server that knows no audiences answers none, and has not looked at them.
		return bound{}, attestor.Refusef("token is not for this server")
	}
	var b bound
	account, ok := strings.CutPrefix(status.User.Username, "system:serviceaccount:")
	if ok {
		b.namespace, b.account, _ = strings.Cut(account, ":")
	}
	if !ok || !slices.Contains(c.ServiceAccounts, account) {
		return b, attestor.Refusef("token is not of a service account that agents may have")
	}
	for key, into := range map[string]*string{
		extraPodName: &b.podName, extraPodUID: &b.podUID, extraNodeName: &b.nodeName, extraNodeUID: &b.nodeUID,
	} {
		if values := status.User.Extra[key]; len(values) == 1 {
			*into = values[0]
		} else if len(values) > 1 {
			return b, attestor.Refusef("token is bound to several pods")
		}
	}
	if b.podName == "" || b.podUID == "" {
		return b, attestor.Refusef("token is not bound to a pod: it must be a projected one")
	}
	return b, nil
}

// look reads the pod and the node that the token is bound to, and checks that they are still those.
func (c *cluster) look(ctx context.Context, b bound) (*corev1.Pod, *corev1.Node, error) {
	pod, err := c.core.Pods(b.namespace).Get(ctx, b.podName, metav1.GetOptions{})
	switch {
	case kerrors.IsNotFound(err):
		return nil, nil, attestor.Refusef("pod of the token is gone")
	case err != nil:
		return nil, nil, fmt.Errorf("read pod from cluster %q: %w", c.Name, err)
	case string(pod.UID) != b.podUID:
		return nil, nil, attestor.Refusef("pod of the token is gone: another has its name")
	case pod.Spec.ServiceAccountName != b.account:
		return nil, nil, attestor.Refusef("pod of the token runs under another service account")
	case pod.Spec.NodeName == "" || b.nodeName != "" && b.nodeName != pod.Spec.NodeName:
		return nil, nil, attestor.Refusef("pod of the token is not on its node")
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return nil, nil, attestor.Refusef("pod of the token has ended")
	}
	node, err := c.core.Nodes().Get(ctx, pod.Spec.NodeName, metav1.GetOptions{})
	switch {
	case kerrors.IsNotFound(err):
		return nil, nil, attestor.Refusef("node of the token is gone")
	case err != nil:
		return nil, nil, fmt.Errorf("read node from cluster %q: %w", c.Name, err)
	case node.UID == "" || b.nodeUID != "" && b.nodeUID != string(node.UID):
		return nil, nil, attestor.Refusef("node of the token is gone: another has its name")
	}
	return pod, node, nil
}

// selectors describes the agent's pod and node, sorted. A label that cannot be a selector is left out.
func (c *cluster) selectors(pod *corev1.Pod, node *corev1.Node) []attestor.Selector {
	values := []string{
		"cluster:" + c.Name,
		"agent_ns:" + pod.Namespace,
		"agent_sa:" + pod.Spec.ServiceAccountName,
		"agent_pod_name:" + pod.Name,
		"agent_pod_uid:" + string(pod.UID),
		prefixNodeName + node.Name,
		prefixNodeUID + string(node.UID),
	}
	if pod.Status.HostIP != "" {
		values = append(values, "agent_node_ip:"+pod.Status.HostIP)
	}
	values = append(values, labelled(prefixNodeLabel, node.Labels, c.NodeLabels)...)
	values = append(values, labelled(prefixPodLabel, pod.Labels, c.PodLabels)...)
	return selectorsOf(values)
}

// Beginnings of selectors' values.
const (
	prefixCluster   = "cluster:"
	prefixPodUID    = "agent_pod_uid:"
	prefixNodeName  = "agent_node_name:"
	prefixNodeUID   = "agent_node_uid:"
	prefixNodeLabel = "agent_node_label:"
	prefixPodLabel  = "agent_pod_label:"
)

func labelled(prefix string, labels map[string]string, keys []string) []string {
	var values []string
	for _, key := range keys {
		if value, ok := labels[key]; ok {
			values = append(values, prefix+key+":"+value)
		}
	}
	return values
}

func selectorsOf(values []string) []attestor.Selector {
	var list []attestor.Selector
	for _, value := range values {
		if s := (attestor.Selector{Type: k8spsat.Type, Value: value}); s.Check() == nil {
			list = append(list, s)
		}
	}
	return attestor.NewSet(list...).All()
}
