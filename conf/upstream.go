package conf

import "fmt"

// Chosen is the one block of a role that may be there once: its label, and one of the structures below.
type Chosen struct {
	Kind   string // empty: there is no block
	Config any
}

// UpstreamDisk is upstream_authority "disk".
type UpstreamDisk struct {
	CertPath   string `hcl:"cert_file_path,optional"`
	KeyPath    string `hcl:"key_file_path,optional"`
	BundlePath string `hcl:"bundle_file_path,optional"`
}

// UpstreamSPIRE is upstream_authority "spire": a server of the same trust domain, ours or SPIRE's.
type UpstreamSPIRE struct {
	Address string `hcl:"server_address,optional"`
	PortKey *int   `hcl:"server_port,optional"`
	Socket  string `hcl:"workload_api_socket,optional"`

	Port int
}

// UpstreamKinds are the upstream authorities there are, each with the maker of its configuration.
func UpstreamKinds() map[string]func() any {
	return map[string]func() any{
		"disk":  func() any { return new(UpstreamDisk) },
		"spire": func() any { return new(UpstreamSPIRE) },
	}
}

// upstream reads the one upstream_authority block, if there is one.
func (l *loader) upstream(blocks []typeBlock) Chosen {
	l.one(blocks, "upstream authority", "one authority signs those of this server")
	k := kinds{role: "upstream authority"}
	for t, config := range UpstreamKinds() {
		k.add(t, config)
	}
	var c Chosen
	l.decodeTypes(blocks, k, func(t string, config any) { c = Chosen{t, config} })
	key := func(name string) string { return fmt.Sprintf("upstream_authority.%s.%s", c.Kind, name) }
	switch u := c.Config.(type) {
	case *UpstreamDisk:
		l.required(key("cert_file_path"), u.CertPath, "it names the PEM file with the certificate that signs this server's authorities, and what leads to its root")
		l.required(key("key_file_path"), u.KeyPath, "it names the PEM file with that certificate's private key")
		u.CertPath, u.KeyPath, u.BundlePath = absolute(u.CertPath), absolute(u.KeyPath), absolute(u.BundlePath)
	case *UpstreamSPIRE:
		l.required(key("server_address"), u.Address, "it is the name or IP address of the server above")
		l.required(key("workload_api_socket"), u.Socket, "it is the socket of an agent of the server above, from which this server has its SVID")
		u.Port = l.port(key("server_port"), u.PortKey, 8081, 1)
		u.Socket = l.socket(key("workload_api_socket"), u.Socket, "")
	}
	return c
}
