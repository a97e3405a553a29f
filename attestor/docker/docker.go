// Package docker is workload attestation by what a container engine with Docker's API (Docker,
// Podman) says of the container a process runs in: its labels, its environment and, above all, the
// identity of its image.
package docker

// Type is the attestor's name in configuration and its main selector type.
const Type = "docker"

// ImageType and ClaimType are the other selector types it answers: what the engine knows of the
// image by its content, and what somebody merely wrote into an image or a command line.
const (
	ImageType = "image"
	ClaimType = "claim"
)

// DefaultSocketPath is where Docker listens.
const DefaultSocketPath = "unix:///var/run/docker.sock"

// Config is the agent's configuration block.
type Config struct {
	// SocketPath is the engine's Unix socket, as a path or a unix:// URL; DefaultSocketPath if
	// neither this nor Host is set. Podman: /run/podman/podman.sock; rootless:
	// /run/user/UID/docker.sock or /run/user/UID/podman/podman.sock.
	SocketPath string `hcl:"docker_socket_path,optional"`
	// Host is the engine's address as a URL, unix:// or tcp:// on the loopback interface.
	Host string `hcl:"docker_host,optional"`
	// Version fixes the API version, for example "1.41"; empty means to negotiate.
	Version string `hcl:"docker_version,optional"`
	// CgroupMatchers replace the built-in layouts: cgroup paths in which one part is <id> and * is
	// any one part.
	CgroupMatchers []string `hcl:"container_id_cgroup_matchers,optional"`
	// KubernetesPods also attests containers of Kubernetes pods, which otherwise are left to the
	// Kubernetes attestor.
	KubernetesPods bool `hcl:"kubernetes_pods,optional"`
	// ClaimEnv are the names of environment variables that become claim:env selectors.
	ClaimEnv []string `hcl:"claim_env,optional"`
	// DisableEnv turns docker:env selectors off: variables often hold secrets.
	DisableEnv bool `hcl:"disable_env_selectors,optional"`
	// Timeout is how long one answer of the engine may take, for example "2s", which is the default.
	Timeout string `hcl:"engine_timeout,optional"`
}
