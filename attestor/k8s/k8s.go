// Package k8s is workload attestation by the Kubernetes pod and the container that a process runs in: what
// the container runtime of the node says of the container and its image, and what the API server or the
// kubelet say of the pod.
package k8s

// Type is the attestor's name in configuration and its main selector type.
const Type = "k8s"

// ImageType and ClaimType are the other selector types it answers: what the runtime knows of the image by
// its content, and what somebody merely wrote into an image.
const (
	ImageType = "image"
	ClaimType = "claim"
)

// Where a pod finds what Kubernetes gives it.
const (
	ServiceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"
	DefaultTokenPath  = ServiceAccountDir + "/token"
	DefaultCAPath     = ServiceAccountDir + "/ca.crt"
)

// None in place of a socket or an address turns it off.
const None = "none"

// RuntimeSockets are where container runtimes listen, in the order in which they are looked for.
var RuntimeSockets = []string{
	"/run/containerd/containerd.sock",
	"/run/crio/crio.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/k0s/containerd.sock",
	"/run/cri-dockerd.sock",
}

// DefaultSecurePort is the kubelet's.
const DefaultSecurePort = 10250

// DefaultNodeNameEnv is the variable that names the node, as SPIRE has it.
const DefaultNodeNameEnv = "MY_NODE_NAME"

// Config is the agent's configuration block.
type Config struct {
	// RuntimeSocket is the container runtime's CRI socket; empty means the first of RuntimeSockets that is
	// there, None that the runtime is not asked.
	RuntimeSocket string `hcl:"runtime_socket_path,optional"`
	// RuntimeTimeout is how long one answer of the runtime may take, for example "2s", which is the default.
	RuntimeTimeout string `hcl:"runtime_timeout,optional"`

	// NodeName is the node's name in Kubernetes; empty means what the variable NodeNameEnv holds.
	NodeName    string `hcl:"node_name,optional"`
	NodeNameEnv string `hcl:"node_name_env,optional"`

	// APIServer is the URL of the API server, which is asked for the node's pods and tells of every change;
	// empty means the one that Kubernetes names in a pod's environment, None that it is not asked.
	APIServer string `hcl:"api_server,optional"`
	// APIServerCAPath verifies it; DefaultCAPath if empty.
	APIServerCAPath string `hcl:"api_server_ca_path,optional"`
	// EnableNamespaceLabels asks the API server for the labels of namespaces.
	EnableNamespaceLabels bool `hcl:"enable_namespace_labels,optional"`

	// KubeletAddress is the host name or address of the kubelet; empty means the node's name, and without
	// one 127.0.0.1.
	KubeletAddress string `hcl:"kubelet_address,optional"`
	// KubeletSecurePort is its port; DefaultSecurePort if neither this nor KubeletReadOnlyPort is set.
	KubeletSecurePort   int `hcl:"kubelet_secure_port,optional"`
	KubeletReadOnlyPort int `hcl:"kubelet_read_only_port,optional"`
	// KubeletCAPath verifies it; DefaultCAPath if empty.
	KubeletCAPath           string `hcl:"kubelet_ca_path,optional"`
	SkipKubeletVerification bool   `hcl:"skip_kubelet_verification,optional"`
	// DisableKubelet turns the kubelet off.
	DisableKubelet bool `hcl:"disable_kubelet_client,optional"`

	// TokenPath is the token for the API server and the kubelet; DefaultTokenPath if empty. A client
	// certificate may take its place.
	TokenPath                  string `hcl:"token_path,optional"`
	CertificatePath            string `hcl:"certificate_path,optional"`
	PrivateKeyPath             string `hcl:"private_key_path,optional"`
	UseAnonymousAuthentication bool   `hcl:"use_anonymous_authentication,optional"`

	// DisableContainerSelectors leaves out what is of the container and not of its pod.
	DisableContainerSelectors bool `hcl:"disable_container_selectors,optional"`
}
