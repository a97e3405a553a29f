package site

import (
	"fmt"
	"path/filepath"
)

// SPIRE are the programs of a real SPIRE that take the place of Assay's in a site. Either may be empty:
// Assay's is run then. Options whose keys SPIRE does not have are for the caller to leave out.
type SPIRE struct {
	Server, Agent string // paths
	// ServerPlugins are put among the server's plugins.
	ServerPlugins string
}

// serverProgram is the program that the site's server is, and that talks to it.
func (s *Site) serverProgram() string {
	if s.SPIRE.Server != "" {
		return s.SPIRE.Server
	}
	return filepath.Join(s.Bin, "assay-server")
}

// agentProgram is the program that the site's agents are.
func (s *Site) agentProgram() string {
	if s.SPIRE.Agent != "" {
		return s.SPIRE.Agent
	}
	return filepath.Join(s.Bin, "assay-agent")
}

// spireServerConfig is the configuration of a spire-server as the site's server.
func (s *Site) spireServerConfig() string {
	return fmt.Sprintf(`server {
  trust_domain = %q
  bind_address = "127.0.0.1"
  bind_port    = %d
  socket_path  = %q
  data_dir     = %q
  log_level    = %q
  %s
}
plugins {
  DataStore "sql" {
    plugin_data {
      database_type     = "sqlite3"
      connection_string = %q
    }
  }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "disk" { plugin_data { keys_path = %q } }
  %s
}
`, s.trustDomain(), s.Port, s.ServerSocket(), s.ServerData(), s.logLevel(), s.ServerExtra,
		filepath.Join(s.ServerData(), "datastore.sqlite3"), filepath.Join(s.ServerData(), "keys.json"), s.SPIRE.ServerPlugins)
}

// spireAgentConfig is the configuration of a spire-agent as an agent of the site. It joins with a token.
func (s *Site) spireAgentConfig(a *Agent, o AgentOptions) string {
	node := `NodeAttestor "join_token" { plugin_data {} }`
	if o.SPIRENode != "" {
		node = o.SPIRENode
	}
	attestors := `WorkloadAttestor "unix" { plugin_data {} }`
	if o.Docker != "" {
		attestors = fmt.Sprintf(`WorkloadAttestor "docker" { plugin_data { docker_socket_path = %q } }`, "unix://"+o.Docker)
	}
	return fmt.Sprintf(`agent {
  trust_domain   = %q
  server_address = "127.0.0.1"
  server_port    = %d
  socket_path    = %q
  data_dir       = %q
  log_level      = %q
  %s
  %s
}
plugins {
  %s
  KeyManager "disk" { plugin_data { directory = %q } }
  %s
}
`, s.trustDomain(), s.Port, a.Socket, a.Data(), s.logLevel(), o.Trust, o.Extra, node, a.Data(), attestors)
}
