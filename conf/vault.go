package conf

import "strings"

// Vault is where Vault or OpenBao is and how to log in; SPIRE's names. Exactly one of the blocks is there.
type Vault struct {
	Address   string
	Namespace string
	CAPath    string

	Token   *VaultToken
	AppRole *VaultAppRole
	Cert    *VaultCert
	K8s     *VaultK8s
}

// VaultToken is token_auth.
type VaultToken struct {
	Token string `hcl:"token,optional"`
	Path  string `hcl:"token_path,optional"`
}

// VaultAppRole is approle_auth.
type VaultAppRole struct {
	Mount      string `hcl:"approle_auth_mount_point,optional"`
	ID         string `hcl:"approle_id,optional"`
	Secret     string `hcl:"approle_secret_id,optional"`
	SecretPath string `hcl:"approle_secret_id_path,optional"`
}

// VaultCert is cert_auth.
type VaultCert struct {
	Mount    string `hcl:"cert_auth_mount_point,optional"`
	Role     string `hcl:"cert_auth_role_name,optional"`
	CertPath string `hcl:"client_cert_path,optional"`
	KeyPath  string `hcl:"client_key_path,optional"`
}

// VaultK8s is k8s_auth.
type VaultK8s struct {
	Mount     string `hcl:"k8s_auth_mount_point,optional"`
	Role      string `hcl:"k8s_auth_role_name,optional"`
	TokenPath string `hcl:"token_path,optional"`
}

// vault checks what two blocks have in common. key makes the path of one of their keys.
func (l *loader) vault(key func(string) string, v *Vault) {
	l.required(key("vault_addr"), v.Address, "it is the https URL of Vault or OpenBao")
	if v.Address != "" && !strings.HasPrefix(v.Address, "https://") && !strings.HasPrefix(v.Address, "http://") {
		l.say(key("vault_addr"), "Invalid URL", "%q is no URL: write https://vault.example.org:8200.", v.Address)
	}
	v.CAPath = absolute(v.CAPath)
	ways := 0
	if a := v.Token; a != nil {
		ways++
		if (a.Token == "") == (a.Path == "") {
			l.say(key("token_auth"), "Unclear token", "Give either token or token_path.")
		}
		a.Path = absolute(a.Path)
	}
	if a := v.AppRole; a != nil {
		ways++
		l.required(key("approle_auth.approle_id"), a.ID, "it is the ID of the AppRole")
		if (a.Secret == "") == (a.SecretPath == "") {
			l.say(key("approle_auth"), "Unclear secret", "Give either approle_secret_id or approle_secret_id_path.")
		}
		a.SecretPath = absolute(a.SecretPath)
	}
	if a := v.Cert; a != nil {
		ways++
		l.required(key("cert_auth.client_cert_path"), a.CertPath, "it names the PEM file with the certificate to log in with")
		l.required(key("cert_auth.client_key_path"), a.KeyPath, "it names the PEM file with that certificate's private key")
		a.CertPath, a.KeyPath = absolute(a.CertPath), absolute(a.KeyPath)
	}
	if a := v.K8s; a != nil {
		ways++
		l.required(key("k8s_auth.k8s_auth_role_name"), a.Role, "it is the role of the service account in Vault")
		a.TokenPath = absolute(a.TokenPath)
	}
	if ways != 1 {
		l.say(key("vault_addr"), "Unclear login", "There must be exactly one of the blocks token_auth, approle_auth, cert_auth and k8s_auth; there are %d.", ways)
	}
}
