// Package unix is workload attestation by what the kernel knows of a process: its user, its groups
// and, if asked for, the file it runs. Every selector is SPIRE's byte for byte.
package unix

// Type is the attestor's name in configuration and in selectors.
const Type = "unix"

// Config is the agent's configuration block.
type Config struct {
	// DiscoverWorkloadPath turns on the selectors path and sha256. The agent must be root, or the
	// same user as the workload, to read them.
	DiscoverWorkloadPath bool `hcl:"discover_workload_path,optional"`
	// WorkloadSizeLimit is the largest executable, in bytes, that is hashed; 0 hashes all, a
	// negative number none.
	WorkloadSizeLimit int64 `hcl:"workload_size_limit,optional"`
}
