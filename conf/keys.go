package conf

import (
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/assay-id/assay/attestor/external"
)

// KeysVault is key_manager "hashicorp_vault": the transit engine of Vault or OpenBao.
type KeysVault struct {
	Mount     string        `hcl:"transit_engine_path,optional"`
	Prefix    string        `hcl:"key_prefix,optional"`
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

// KeysAWS is key_manager "aws_kms".
type KeysAWS struct {
	Region      string `hcl:"region,optional"`
	Endpoint    string `hcl:"endpoint,optional"`
	AccessKeyID string `hcl:"access_key_id,optional"`
	SecretKey   string `hcl:"secret_access_key,optional"`
	Prefix      string `hcl:"key_prefix,optional"`
	PolicyPath  string `hcl:"key_policy_file,optional"`

	Tags map[string]string `hcl:"key_tags,optional"`
}

// KeysPKCS11 is key_manager "pkcs11".
type KeysPKCS11 struct {
	Helper  string `hcl:"helper_path,optional"`
	Module  string `hcl:"module_path,optional"`
	Token   string `hcl:"token_label,optional"`
	PINPath string `hcl:"pin_path,optional"`
	Prefix  string `hcl:"key_prefix,optional"`
}

// KeyManagerKinds are the key managers of the server, each with the maker of its configuration.
func KeyManagerKinds() map[string]func() any {
	return map[string]func() any{
		"disk":   func() any { return new(diskKeys) },
		"memory": func() any { return new(struct{}) },

		"hashicorp_vault": func() any { return new(KeysVault) },
		"aws_kms":         func() any { return new(KeysAWS) },
		"pkcs11":          func() any { return new(KeysPKCS11) },

		external.Type: func() any { return new(external.Config) },
	}
}

// keys reads the one key_manager block of the server, "disk" if there is none.
func (l *loader) keys(blocks []typeBlock) Chosen {
	c := l.keyManager(blocks, KeyManagerKinds())
	key := func(name string) string { return "key_manager." + c.Kind + "." + name }
	switch m := c.Config.(type) {
	case *KeysVault:
		m.Vault = Vault{m.Address, m.Namespace, m.CAPath, m.Token, m.AppRole, m.Cert, m.K8s}
		l.vault(key, &m.Vault)
	case *KeysAWS:
		l.required(key("region"), m.Region, "it is the AWS region of the keys")
		if (m.AccessKeyID == "") != (m.SecretKey == "") {
			l.say(key("access_key_id"), "Half a credential", "Give both access_key_id and secret_access_key, or neither and let the environment say.")
		}
		m.PolicyPath = absolute(m.PolicyPath)
		l.keyTags(key("key_tags"), m.Tags)
	case *KeysPKCS11:
		l.required(key("module_path"), m.Module, "it names the PKCS #11 library of the token")
		l.required(key("token_label"), m.Token, "it says which of the module's tokens holds the keys")
		l.required(key("pin_path"), m.PINPath, "it names the file with the PIN of the token's user")
		if m.Helper == "" {
			m.Helper = "/usr/libexec/assay/assay-pkcs11"
		}
		if l.options.Try { // the PIN may be where only the running server has it
			l.existing(key("helper_path"), m.Helper, `"make pkcs11" builds it`)
			l.existing(key("module_path"), m.Module, "it is the PKCS #11 library of the token")
		}
		m.Helper, m.Module, m.PINPath = absolute(m.Helper), absolute(m.Module), absolute(m.PINPath)
	}
	return c
}

// maxTags is how many AWS lets a key have.
const maxTags = 50

// keyTags checks what AWS would refuse only when a key is made, weeks from now.
func (l *loader) keyTags(key string, tags map[string]string) {
	if len(tags) > maxTags {
		l.say(key, "Too many tags", "There are %d tags; AWS takes %d.", len(tags), maxTags)
	}
	for _, name := range slices.Sorted(maps.Keys(tags)) {
		switch {
		case name == "" || utf8.RuneCountInString(name) > 128 || utf8.RuneCountInString(tags[name]) > 256:
			l.say(key, "Invalid tag", "The tag %q is refused by AWS: a key has 1 to 128 characters, a value 256 at most.", name)
		case strings.HasPrefix(strings.ToLower(name), "aws:"):
			l.say(key, "Invalid tag", "The tag %q is refused by AWS: tags that begin with \"aws:\" are its own.", name)
		}
	}
}
