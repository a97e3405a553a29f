package conf

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// loadOIDC loads a server's file with an issuer and further blocks.
func loadOIDC(t *testing.T, issuer, blocks string) (*Server, error) {
	t.Helper()
	return LoadServer(write(t, "server.hcl", `server {
  trust_domain = "example.org"
  data_dir     = "/nowhere"
  jwt_issuer   = "`+issuer+`"
}
node_attestor "join_token" {}
`+blocks), judges, Options{})
}

func TestOIDCDiscovery(t *testing.T) {
	const issuer = "https://oidc.example.org"
	s, err := loadOIDC(t, issuer, `oidc_discovery {
  domains            = ["oidc.example.org."]
  behind_proxy       = true
  listen_socket_path = "/run/x.sock"
  server_path_prefix = "/tenant/"
}`)
	if err != nil {
		t.Fatal(err)
	}
	want := &OIDCDiscovery{Domains: []string{"oidc.example.org"}, Address: "0.0.0.0", SocketPath: "/run/x.sock", Issuer: issuer, Prefix: "/tenant"}
	if diff := cmp.Diff(want, s.OIDC); diff != "" {
		t.Error(diff)
	}
	block := func(lines ...string) string {
		return "oidc_discovery {\n  domains = [\"oidc.example.org\"]\n  " + strings.Join(lines, "\n  ") + "\n}"
	}
	const port, proxy = "bind_port = 443", "behind_proxy = true"
	for _, c := range []struct{ issuer, blocks, want string }{
		{"", block(port, proxy), "set it to https://oidc.example.org"},
		{issuer, "oidc_discovery {\n bind_port = 1\n behind_proxy = true\n}", `"domains" is required`},
		{issuer, "oidc_discovery {\n domains = [\"https://x\"]\n bind_port = 1\n behind_proxy = true\n}", "no name of a host"},
		{"oidc.example.org", block(port, proxy), "is no https URL"},
		{"http://oidc.example.org", block(port, proxy), "is no https URL"},
		{issuer, block(port), "exactly one of acme"},
		{issuer, block(port, proxy, "acme {\n domain_name = \"oidc.example.org\"\n tos_accepted = true\n}"), "exactly one of acme"},
		{issuer, block(port, "acme {\n domain_name = \"other.example.org\"\n tos_accepted = true\n}"), "which is none of the domains"},
		{issuer, block(port, "acme {\n domain_name = \"oidc.example.org\"\n}"), "set tos_accepted = true"},
		{issuer, block(port, "serving_cert_file {\n cert_file_path = \"/nowhere/a\"\n key_file_path = \"/nowhere/b\"\n}"), "/nowhere/a: no such file"},
		{issuer, block(proxy), `"bind_port" is required`},
		{issuer, block(port, proxy, `listen_socket_path = "/x"`), "one of listen_socket_path and bind_address"},
		{issuer, block(port, proxy, `jwt_issuer = "https://other.example.org"`), "the tokens \"https://oidc.example.org\""},
		{issuer, block(port, proxy, `jwks_uri = "http://oidc.example.org/keys"`), "no https URL"},
		{issuer, block(port, proxy, `server_path_prefix = "tenant"`), "no URL path"},
		{issuer, block(port, proxy, `set_key_uses = true`), "Unsupported argument"},
	} {
		t.Run(c.want, func(t *testing.T) {
			if _, err := loadOIDC(t, c.issuer, c.blocks); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want a mistake with %q, have %v", c.want, err)
			}
		})
	}
}

func TestJWTProfiles(t *testing.T) {
	s, err := loadOIDC(t, "", `jwt_profile "login" {
  audiences  = ["https://login.example.org"]
  spiffe_ids = ["spiffe://example.org/shop", "spiffe://example.org/batch/*", "spiffe://example.org/*"]
  issuer     = "subject"
  jti        = true
}
jwt_profile "cloud" {
  audiences = ["sts"]
  issuer    = "https://cloud.example.org"
}`)
	if err != nil {
		t.Fatal(err)
	}
	want := []JWTProfile{
		{Name: "login", Audiences: []string{"https://login.example.org"}, IDs: []string{"spiffe://example.org/shop", "spiffe://example.org/batch/*", "spiffe://example.org/*"}, SubjectIssues: true, JTI: true},
		{Name: "cloud", Audiences: []string{"sts"}, Issuer: "https://cloud.example.org"},
	}
	if diff := cmp.Diff(want, s.JWTProfiles); diff != "" {
		t.Error(diff)
	}
	for _, c := range []struct{ blocks, want string }{
		{"jwt_profile \"a\" {\n jti = true\n}", "is for certain audiences"},
		{"jwt_profile \"a\" {\n audiences = [\"\"]\n jti = true\n}", "is for certain audiences"},
		{"jwt_profile \"a\" {\n audiences = [\"x\"]\n}", "It changes nothing"},
		{"jwt_profile \"a\" {\n audiences = [\"x\"]\n jti = true\n spiffe_ids = [\"shop\"]\n}", "no SPIFFE ID with a path"},
		{"jwt_profile \"a\" {\n audiences = [\"x\"]\n jti = true\n spiffe_ids = [\"spiffe://other.org/a\"]\n}", "of another trust domain"},
		{"jwt_profile \"a\" {\n audiences = [\"x\"]\n jti = true\n}\njwt_profile \"a\" {\n audiences = [\"x\"]\n jti = true\n}", "two blocks of this name"},
	} {
		t.Run(c.want, func(t *testing.T) {
			if _, err := loadOIDC(t, "", c.blocks); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want a mistake with %q, have %v", c.want, err)
			}
		})
	}
}
