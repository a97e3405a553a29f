package conf

import (
	"fmt"

	"github.com/assay-id/assay/attestor/external"
)

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

// UpstreamVault is upstream_authority "vault": the PKI engine of Vault or OpenBao.
type UpstreamVault struct {
	Mount     string        `hcl:"pki_mount_point,optional"`
	Address   string        `hcl:"vault_addr,optional"`
	Namespace string        `hcl:"namespace,optional"`
	CAPath    string        `hcl:"ca_cert_path,optional"`
	Token     *VaultToken   `hcl:"token_auth,block"`
	AppRole   *VaultAppRole `hcl:"approle_auth,block"`
	Cert      *VaultCert    `hcl:"cert_auth,block"`
	K8s       *VaultK8s     `hcl:"k8s_auth,block"`

	// Vault is the above, checked.
	Vault Vault
}

// UpstreamPCA is upstream_authority "aws_pca".
type UpstreamPCA struct {
	Region       string `hcl:"region,optional"`
	Endpoint     string `hcl:"endpoint,optional"`
	ARN          string `hcl:"certificate_authority_arn,optional"`
	Algorithm    string `hcl:"signing_algorithm,optional"`
	Template     string `hcl:"ca_signing_template_arn,optional"`
	Role         string `hcl:"assume_role_arn,optional"`
	Supplemental string `hcl:"supplemental_bundle_path,optional"`
}

// UpstreamCertManager is upstream_authority "cert-manager".
type UpstreamCertManager struct {
	Namespace  string `hcl:"namespace,optional"`
	Name       string `hcl:"issuer_name,optional"`
	Kind       string `hcl:"issuer_kind,optional"`
	Group      string `hcl:"issuer_group,optional"`
	KubeConfig string `hcl:"kube_config_file,optional"`
}

// UpstreamKinds are the upstream authorities there are, each with the maker of its configuration.
func UpstreamKinds() map[string]func() any {
	return map[string]func() any{
		"disk":  func() any { return new(UpstreamDisk) },
		"spire": func() any { return new(UpstreamSPIRE) },

		"vault":        func() any { return new(UpstreamVault) },
		"aws_pca":      func() any { return new(UpstreamPCA) },
		"cert-manager": func() any { return new(UpstreamCertManager) },

		external.Type: func() any { return new(external.Config) },
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
	before := len(l.wrong)
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
	case *UpstreamVault:
		u.Vault = Vault{u.Address, u.Namespace, u.CAPath, u.Token, u.AppRole, u.Cert, u.K8s}
		l.vault(key, &u.Vault)
	case *UpstreamPCA:
		l.required(key("region"), u.Region, "it is the AWS region of the private CA")
		l.required(key("certificate_authority_arn"), u.ARN, "it names the private CA")
		u.Supplemental = absolute(u.Supplemental)
	case *UpstreamCertManager:
		l.required(key("namespace"), u.Namespace, "it is the Kubernetes namespace of the issuer")
		l.required(key("issuer_name"), u.Name, "it names the issuer")
		u.KubeConfig = absolute(u.KubeConfig)
	}
	if c.Kind != "" && l.options.Try && l.options.TryUpstream != nil && len(l.wrong) == before {
		if err := l.options.TryUpstream(c); err != nil {
			l.at(blocks[0].Where, "Unusable upstream authority", sentence(err))
		}
	}
	return c
}
