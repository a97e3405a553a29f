// Package systemd is workload attestation by the systemd unit a process runs in: found in its cgroup
// path, confirmed by the system's own manager over D-Bus. The selectors id and fragment_path are
// SPIRE's byte for byte.
package systemd

// Type is the attestor's name in configuration and in selectors.
const Type = "systemd"

// Config is the agent's configuration block.
type Config struct {
	// Slices are those whose units are attested, with the slices below them.
	Slices []string `hcl:"slices,optional"`
	// BusAddress is where the system's D-Bus listens; empty is the usual place, or what
	// DBUS_SYSTEM_BUS_ADDRESS says.
	BusAddress string `hcl:"bus_address,optional"`
}

// Defaults is a configuration with nothing set: units of the system's services.
func Defaults() *Config { return &Config{Slices: []string{"system.slice"}} }
