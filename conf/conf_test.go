package conf

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
)

// proofConfig is the configuration of a made-up attestor.
type proofConfig struct {
	Path string `hcl:"path,optional"`
	Size int    `hcl:"size,optional"`
}

func newProofConfig() any { return &proofConfig{Size: 7} }

var (
	judges    = []attestor.JudgeKind{{Type: "join_token", Config: newProofConfig}, {Type: "x509pop", Config: newProofConfig}}
	nodes     = []attestor.NodeKind{{Type: "join_token", Config: newProofConfig}, {Type: "x509pop", Config: newProofConfig}}
	workloads = []attestor.WorkloadKind{{Type: "unix", Config: newProofConfig}, {Type: "docker", Config: newProofConfig}}
)

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// clustersConfig is the configuration of another, with blocks in it.
type clustersConfig struct {
	Clusters []struct {
		Name string   `hcl:"name,label"`
		Keys hcl.Body `hcl:",remain"`
	} `hcl:"cluster,block"`
}

func TestServerSample(t *testing.T) {
	judges := append(slices.Clone(judges), attestor.JudgeKind{Type: "k8s_psat", Config: func() any { return &clustersConfig{} }})
	s, err := LoadServer("server.hcl", judges, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s.TrustDomain.Name() != "example.org" || s.BindPort != 8081 || s.CATTL != 24*time.Hour || s.KeyManager != "disk" ||
		s.SocketPath != DefaultServerSocket || len(s.Judges) != 1 || s.Health.Address != "" || s.Metrics != "" {
		t.Errorf("the sample loads as %+v", s)
	}
	t.Run("its commented keys load as well", func(t *testing.T) {
		all := uncommented(t, "server.hcl", "ca_bundle_path", "ca_bundle_paths", "key_file", "ca_file", "registry_credentials_path", "token") // a token is in its file
		// The tests of the commands hold the other attestors.
		all = regexp.MustCompile(`(?ms)^node_attestor "[^"]*" \{.*?^\}`).ReplaceAllStringFunc(all, func(block string) string {
			label := strings.Split(block, `"`)[1]
			if slices.ContainsFunc(judges, func(k attestor.JudgeKind) bool { return k.Type == label }) {
				return block
			}
			return ""
		})
		// An endpoint's certificate is from files or from ACME.
		all = regexp.MustCompile(`serving_cert_file \{[^}]*\}`).ReplaceAllString(all, "")
		// So is the one of OIDC discovery, or a proxy's.
		all = regexp.MustCompile(`\n\s*(behind_proxy|listen_socket_path) .*`).ReplaceAllString(all, "")
		// One authority is above, and keys live in one place; each alternative has its turn.
		blocks := regexp.MustCompile(`(?ms)^(upstream_authority|key_manager) "[^"]*" \{.*?^\}`)
		ways := regexp.MustCompile(`(?ms)^  (approle_auth|cert_auth|k8s_auth) \{.*?\}`)
		for _, one := range append(blocks.FindAllString(all, -1), "") {
			if _, err := LoadServer(write(t, "one.hcl", blocks.ReplaceAllString(all, "")+ways.ReplaceAllString(one, "")), judges, Options{}); err != nil {
				t.Errorf("with %s: %v", one, err)
			}
		}
		s, err := LoadServer(write(t, "all.hcl", blocks.ReplaceAllString(all, "")), judges, Options{})
		if err != nil {
			t.Fatal(err)
		}
		want := Limits{MaxConnections: 50000, MaxPerSource: 10000, AttestPerSecond: 1, SignPerSecond: 500}
		if diff := cmp.Diff(want, s.Limits); diff != "" {
			t.Error(diff)
		}
		if s.Health.Address != "127.0.0.1:8080" || s.Metrics != "127.0.0.1:9988" || len(s.Judges) != 3 || s.CASubject.Country[0] != "US" {
			t.Errorf("the sample loads as %+v", s)
		}
	})
	t.Run("every key is in it, and nothing else", func(t *testing.T) {
		if diff := cmp.Diff(keysOf(reflect.TypeFor[serverFile]()), keysIn(t, "server.hcl", "key_manager", "upstream_authority")); diff != "" {
			t.Errorf("keys of the struct (-) and of the sample (+):\n%s", diff)
		}
	})
}

func TestAgentSample(t *testing.T) {
	bundle := write(t, "bundle.pem", "x")
	options := Options{Set: []Setting{{Key: "agent.trust_bundle_path", Value: bundle, Flag: "-trustBundle"}}}
	a, err := LoadAgent("agent.hcl", nodes, workloads, options)
	if err != nil {
		t.Fatal(err)
	}
	if a.TrustBundlePath != bundle || a.WorkloadHold != 3*time.Second || a.Node.Kind.Type != "join_token" || len(a.Workloads) != 1 ||
		a.AdminSocketPath != DefaultAdminSocket || a.SDS != (SDS{DefaultSVIDName: "default", DefaultBundleName: "ROOTCA", DefaultAllBundlesName: "ALL", CRL: "auto"}) {
		t.Errorf("the sample loads as %+v", a)
	}
	t.Run("every key is in it, and nothing else", func(t *testing.T) {
		if diff := cmp.Diff(keysOf(reflect.TypeFor[agentFile]()), keysIn(t, "agent.hcl", "key_manager")); diff != "" {
			t.Errorf("keys of the struct (-) and of the sample (+):\n%s", diff)
		}
	})
}

func TestEntriesSample(t *testing.T) {
	e, err := LoadEntries("entries.hcl", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if e.Owner != "shop-team" || len(e.Entries) != 2 || e.Entries[0].ParentID != ServerIDPath || len(e.Entries[1].Selectors) != 2 {
		t.Errorf("the sample loads as %+v", e)
	}
	t.Run("its commented keys load as well", func(t *testing.T) {
		e, err := LoadEntries(write(t, "all.hcl", uncommented(t, "entries.hcl")), Options{})
		if err != nil {
			t.Fatal(err)
		}
		if e.Entries[1].X509SVIDTTL != time.Hour || e.Entries[1].Hint != "internal" {
			t.Errorf("the sample loads as %+v", e)
		}
	})
	t.Run("every key is in it, and nothing else", func(t *testing.T) {
		if diff := cmp.Diff(keysOf(reflect.TypeFor[entriesFile]()), keysIn(t, "entries.hcl")); diff != "" {
			t.Errorf("keys of the struct (-) and of the sample (+):\n%s", diff)
		}
	})
}

var settingComment = regexp.MustCompile(`(?m)^(\s*)#([a-z}])`)

// uncommented returns a sample with the keys that are commented out put into force, but for those
// with the given names. A comment for people has a space after its sign; such a key has none.
func uncommented(t *testing.T, sample string, without ...string) string {
	t.Helper()
	text, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(settingComment.ReplaceAllString(string(text), "$1$2")) {
		key, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !slices.Contains(without, key) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// keysIn returns the paths of all keys in a sample, commented out or not, without those in blocks
// whose meaning their label chooses, among them those of the roles: the tests of the commands hold those.
func keysIn(t *testing.T, sample string, roles ...string) []string {
	t.Helper()
	file, diags := hclsyntax.ParseConfig([]byte(uncommented(t, sample)), sample, hcl.InitialPos)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	found := map[string]bool{}
	var walk func(prefix string, body *hclsyntax.Body)
	walk = func(prefix string, body *hclsyntax.Body) {
		for name := range body.Attributes {
			found[prefix+name] = true
		}
		for _, b := range body.Blocks {
			switch {
			case b.Type == "files": // its label is a name, and its keys are another test's
				found[prefix+b.Type] = true
			case slices.Contains(append(roles, "node_attestor", "workload_attestor", "scan_policy", "trust_policy", "evidence_source", "kubernetes", "role"), b.Type):
				found[prefix+b.Type] = true
			default:
				switch b.Type {
				case "webhook", "profile", "federates_with", "bundle_endpoint_profile", "jwt_profile", "entry", "allow":
					found[prefix+b.Type+".name"] = true // its label
				}
				walk(prefix+b.Type+".", b.Body)
			}
		}
	}
	walk("", file.Body.(*hclsyntax.Body))
	return slices.Sorted(maps.Keys(found))
}

// keysOf returns the paths of all keys that a struct takes.
func keysOf(t reflect.Type) []string {
	var keys []string
	var walk func(prefix string, t reflect.Type)
	walk = func(prefix string, t reflect.Type) {
		for t.Kind() != reflect.Struct {
			t = t.Elem()
		}
		for field := range t.Fields() {
			name, kind, _ := strings.Cut(field.Tag.Get("hcl"), ",")
			switch {
			case field.Type == reflect.TypeFor[[]typeBlock](), field.Type == reflect.TypeFor[[]filesBlock]():
				keys = append(keys, name)
			case kind == "block":
				walk(prefix+name+".", field.Type)
			case name == "": // where the block is
			default:
				keys = append(keys, prefix+name)
			}
		}
	}
	walk("", t)
	slices.Sort(keys)
	return keys
}

const goodServer = `server {
  trust_domain = "example.org"
  data_dir     = "/nowhere/assay"
}
node_attestor "join_token" {}
`

func TestServerMistakes(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"an unknown key", replace(goodServer, "}\nnode", "  bnd_port = 1\n}\nnode"),
			`F:4,3-11: Unsupported argument; An argument named "bnd_port" is not expected here. Did you mean "bind_port"?`},
		{"an unknown key in an attestor's block", goodServer + `node_attestor "x509pop" { pth = "/x" }`,
			`F:6,27-30: Unsupported argument; An argument named "pth" is not expected here. Did you mean "path"?`},
		{"a wrong type", replace(goodServer, "}\nnode", "  bind_port = \"many\"\n}\nnode"),
			`F:4,16-20: Unsuitable value type; a number is required`},
		{"a wrong type in an attestor's block", goodServer + `node_attestor "x509pop" { size = [] }`,
			`F:6,34-35: Unsuitable value type; number required, but have tuple`},
		{"an unknown attestor", goodServer + `node_attestor "x509poop" {}`,
			`F:6,1-25: Unknown node attestor; This program has no node attestor "x509poop"; there are "join_token" and "x509pop".`},
		{"the same attestor twice", goodServer + `node_attestor "join_token" {}`,
			`F:6,1-27: Duplicate node attestor; The node attestor "join_token" is configured twice; keep one of the blocks.`},
		{"no attestor", replace(goodServer, `node_attestor "join_token" {}`, ""),
			`F: Missing node_attestor block; Without one no agent can be admitted; add node_attestor "join_token" {} for a start.`},
		{"a bad port", replace(goodServer, "}\nnode", "  bind_port = 65536\n}\nnode"),
			`F:4,15-20: Invalid port; 65536 is no TCP port: it must be from 0 to 65535.`},
		{"a bad address", replace(goodServer, "}\nnode", "  bind_address = \"everywhere\"\n}\nnode"),
			`F:4,18-30: Invalid address; "everywhere" is no IP address to listen on, as "0.0.0.0", "::" and "127.0.0.1" are.`},
		{"a negative TTL", replace(goodServer, "}\nnode", "  agent_ttl = \"-1h\"\n}\nnode"),
			`F:4,15-20: Invalid duration; "-1h" is negative.`},
		{"a TTL without unit", replace(goodServer, "}\nnode", "  ca_ttl = \"24\"\n}\nnode"),
			`F:4,12-16: Invalid duration; "24" is no duration: write a number and a unit, as in "90s", "5m" or "1h30m".`},
		{"a TTL of nothing", replace(goodServer, "}\nnode", "  default_x509_svid_ttl = \"0s\"\n}\nnode"),
			`F:4,27-31: Invalid duration; "0s" is too short: it must be at least 1s.`},
		{"an SVID that outlives its authority", replace(goodServer, "}\nnode", "  default_x509_svid_ttl = \"48h\"\n}\nnode"),
			`F:4,27-32: Invalid duration; "48h" is longer than the authority's ca_ttl of 24h0m0s, which would cut it short; lengthen ca_ttl to at least 288h0m0s.`},
		{"an upper-case trust domain", replace(goodServer, `"example.org"`, `"Example.org"`),
			`F:2,18-31: Invalid trust domain; "Example.org": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores; write "example.org".`},
		{"no trust domain", replace(goodServer, `trust_domain = "example.org"`, ``),
			`F:1,1-7: Missing required argument; The argument "trust_domain" is required: it names the trust domain, for example "example.org".`},
		{"no data directory", replace(goodServer, `data_dir     = "/nowhere/assay"`, ``),
			`F:1,1-7: Missing required argument; The argument "data_dir" is required: it names the directory for the server's store and keys.`},
		{"a data directory that is a file", replace(goodServer, `/nowhere/assay`, `/dev/null`),
			`F:3,18-29: Not a directory; "/dev/null" is a file; name a directory, which is made if it does not exist.`},
		{"an unknown key type", replace(goodServer, "}\nnode", "  ca_key_type = \"ed25519\"\n}\nnode"),
			`F:4,17-26: Invalid value; "ed25519" is unknown; there are "ec-p256", "ec-p384", "rsa-2048" and "rsa-4096".`},
		{"an unknown log level", replace(goodServer, "}\nnode", "  log_level = \"loud\"\n}\nnode"),
			`F:4,15-21: Invalid log level; "loud" is unknown; there are "debug", "info", "warn" and "error".`},
		{"an unknown log format", replace(goodServer, "}\nnode", "  log_format = \"xml\"\n}\nnode"),
			`F:4,16-21: Invalid value; "xml" is unknown; there are "text" and "json".`},
		{"an admin that is a trust domain", replace(goodServer, "}\nnode", "  admin_ids = [\"spiffe://example.org\"]\n}\nnode"),
			`F:4,15-39: Invalid SPIFFE ID; "spiffe://example.org" is a trust domain; the ID of a workload has a path.`},
		{"an admin that is no SPIFFE ID", replace(goodServer, "}\nnode", "  admin_ids = [\"root\"]\n}\nnode"),
			`F:4,15-23: Invalid SPIFFE ID; "root": scheme is missing or invalid; write it as in "spiffe://example.org/admin".`},
		{"a socket path that no socket can have", replace(goodServer, "}\nnode", "  socket_path = \"/"+strings.Repeat("x", 107)+"\"\n}\nnode"),
			`F:4,17-127: Invalid socket path; "/` + strings.Repeat("x", 107) + `" is 108 bytes long, the system's limit is 107: choose a shorter directory.`},
		{"an unknown key manager", goodServer + `key_manager "tape" {}`,
			`F:6,1-19: Unknown key manager; This program has no key manager "tape"; there are "aws_kms", "disk", "external", "hashicorp_vault", "memory" and "pkcs11".`},
		{"half an upstream authority", goodServer + "upstream_authority \"disk\" {\n  cert_file_path = \"/c\"\n}",
			`F:6,1-26: Missing required argument; The argument "key_file_path" is required: it names the PEM file with that certificate's private key.`},
		{"an upstream port that is none", goodServer + "upstream_authority \"spire\" {\n  server_address = \"a\"\n  server_port = 0\n  workload_api_socket = \"/s\"\n}",
			`F:8,17-18: Invalid port; 0 is no TCP port: it must be from 1 to 65535.`},
		{"a mistyped key of an upstream authority", goodServer + "upstream_authority \"spire\" {\n  server_adr = \"a\"\n  server_address = \"a\"\n  workload_api_socket = \"/s\"\n}",
			`F:7,3-13: Unsupported argument; An argument named "server_adr" is not expected here.`},
		{"two ways to log in to Vault", goodServer + "key_manager \"hashicorp_vault\" {\n  vault_addr = \"https://v\"\n  token_auth { token = \"t\" }\n  k8s_auth { k8s_auth_role_name = \"r\" }\n}",
			`F:7,16-27: Unclear login; There must be exactly one of the blocks token_auth, approle_auth, cert_auth and k8s_auth; there are 2.`},
		{"half a credential of AWS", goodServer + "key_manager \"aws_kms\" {\n  region = \"r\"\n  access_key_id = \"a\"\n}",
			`F:8,19-22: Half a credential; Give both access_key_id and secret_access_key, or neither and let the environment say.`},
		{"a tag that is AWS's own", goodServer + "key_manager \"aws_kms\" {\n  region = \"x\"\n  key_tags = { \"aws:x\" = \"y\" }\n}",
			`F:8,14-31: Invalid tag; The tag "aws:x" is refused by AWS: tags that begin with "aws:" are its own.`},
		{"a PKCS #11 token without its PIN", goodServer + "key_manager \"pkcs11\" {\n  module_path = \"/m\"\n  token_label = \"t\"\n}",
			`F:6,1-21: Missing required argument; The argument "pin_path" is required: it names the file with the PIN of the token's user.`},
		{"two key managers", goodServer + "key_manager \"disk\" {}\nkey_manager \"memory\" {}",
			`F:7,1-21: Duplicate key manager; There can be only one key_manager block: keys live in one place.`},
		{"a key for a key manager that has none", goodServer + `key_manager "memory" { keys_path = "x" }`,
			`F:6,24-33: Unsupported argument; An argument named "keys_path" is not expected here.`},
		{"probes under one path", goodServer + `health_checks { ready_path = "/live" }`,
			`F:6,30-37: Invalid path; live_path and ready_path are both "/live"; they answer different questions and need different paths.`},
		{"a limit of nothing", replace(goodServer, "}\nnode", "  limits { max_connections = 0 }\n}\nnode"),
			`F:4,30-31: Invalid number; 0 is out of range: it must be from 1 to 16777216.`},
		{"two server blocks", goodServer + "server {}", `F:6,1-7: Duplicate server block; Only one server block is allowed. Another was defined at F:1,1-7.`},
		{"a mistyped block", replace(goodServer, "server {", "sever {"),
			`F:1,1-6: Unsupported block type; Blocks of type "sever" are not expected here. Did you mean "server"?`},
		{"nothing", "", "F: Missing server block; The file needs server { trust_domain = …, data_dir = … }.\n" +
			`F: Missing node_attestor block; Without one no agent can be admitted; add node_attestor "join_token" {} for a start.`},
		{"a syntax error", "server {\n  trust_domain = \n}\n",
			`F:2,18-3,1: Invalid expression; Expected the start of an expression, but found an invalid expression token.`},
		{"SPIRE's plugin blocks", goodServer + "plugins {\n  DataStore \"sql\" {}\n}",
			`F:6,1-8: Unsupported block type; Blocks of type "plugins" are not expected here. Each attestor has a block of its own at the top level: node_attestor "join_token" { … }, workload_attestor "unix" { … }, key_manager "disk" { … }. The command "migrate" makes such a file of one of SPIRE's.`},
		{"an expression", replace(goodServer, `"example.org"`, `"${TD}"`),
			`F:2,21-23: Variables not allowed; Variables may not be used here. With -expandEnv, $NAME and ${NAME} are replaced by environment variables.`},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := write(t, "server.hcl", c.text)
			_, err := LoadServer(path, judges, Options{})
			if err == nil {
				t.Fatal("it was accepted")
			}
			if diff := cmp.Diff(c.want, strings.ReplaceAll(err.Error(), path, "F")); diff != "" {
				t.Errorf("want (-), got (+):\n%s", diff)
			}
		})
	}
}

func replace(text, old, with string) string {
	if !strings.Contains(text, old) {
		panic("nothing to replace: " + old)
	}
	return strings.Replace(text, old, with, 1)
}

func TestAllMistakesAtOnce(t *testing.T) {
	path := write(t, "server.hcl", `server {
  trust_domain = "UPPER"
  bind_port    = -1
  bnd_address  = "x"
  ca_ttl       = "-1h"
}
node_attestor "nosuch" {}
node_attestor "x509pop" {
  size = "big"
  extra = 1
}
health_checks {
  bind_port = 70000
}
`)
	_, err := LoadServer(path, judges, Options{Set: []Setting{{Key: "server.log_level", Value: "loud", Flag: "-logLevel"}}})
	wrong, ok := err.(Mistakes) //nolint:errorlint // the test is of the value itself
	if !ok {
		t.Fatalf("got %v", err)
	}
	var places []string
	for _, m := range wrong {
		places = append(places, strings.TrimPrefix(m.Where, path+":"))
	}
	want := []string{"1,1-7", "-logLevel", "2,18-25", "3,18-20", "4,3-14", "5,18-23", "7,1-23", "9,11-14", "10,3-8", "13,15-20"}
	slices.Sort(want)
	slices.Sort(places)
	if diff := cmp.Diff(want, places); diff != "" {
		t.Errorf("%s\n%v", diff, err)
	}
}

const goodAgent = `agent {
  trust_domain       = "example.org"
  server_address     = "localhost"
  data_dir           = "/nowhere/assay"
  insecure_bootstrap = true
}
node_attestor "join_token" {}
workload_attestor "unix" {}
`

func TestRebootstrap(t *testing.T) {
	for _, c := range []struct {
		name, lines string
		want        time.Duration
	}{
		{"a source that somebody keeps is believed again after a while", "insecure_bootstrap = true", 10 * time.Minute},
		{"a ConfigMap is at once", `trust_bundle_config_map = "assay-bundle"`, time.Nanosecond},
		{"unless the operator has another delay", "trust_bundle_config_map = \"assay-bundle\"\n  rebootstrap_delay = \"1h\"", time.Hour},
		{"or says never", "trust_bundle_config_map = \"assay-bundle\"\n  rebootstrap_mode = \"never\"", -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := LoadAgent(write(t, "agent.hcl", strings.Replace(goodAgent, "insecure_bootstrap = true", c.lines, 1)), nodes, workloads, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if a.Rebootstrap != c.want {
				t.Errorf("got %s", a.Rebootstrap)
			}
		})
	}
}

func TestAgentMistakes(t *testing.T) {
	empty := write(t, "empty", " \n")
	for _, c := range []struct{ name, text, want string }{
		{"two ways to trust", replace(goodAgent, "}\nnode", "  trust_bundle_url = \"https://x.example\"\n}\nnode"),
			`F:5,24-28: Conflicting bootstrap trust; Only one of trust_bundle_path, trust_bundle_url, trust_bundle_config_map and insecure_bootstrap can be set; there are "trust_bundle_url" and "insecure_bootstrap".`},
		{"no way to trust", replace(goodAgent, "insecure_bootstrap = true", ""),
			`F:1,1-6: Missing bootstrap trust; One of trust_bundle_path, trust_bundle_url, trust_bundle_config_map and insecure_bootstrap is required: it is how the agent knows the server at first.`},
		{"a bundle that is not there", replace(goodAgent, "insecure_bootstrap = true", `trust_bundle_path = "/nowhere/bundle.pem"`),
			`F:5,23-44: Unreadable file; /nowhere/bundle.pem: no such file or directory; "assay-server bundle show" prints what belongs into it.`},
		{"a bundle that is a directory", replace(goodAgent, "insecure_bootstrap = true", `trust_bundle_path = "/proc"`),
			`F:5,23-30: Unreadable file; /proc: it is a directory; "assay-server bundle show" prints what belongs into it.`},
		{"a delegate that is nobody", replace(goodAgent, "}\nnode", "  authorized_delegates = [\"proxy\"]\n}\nnode"),
			`F:6,26-35: Invalid SPIFFE ID; "proxy" is no SPIFFE ID: scheme is missing or invalid.`},
		{"delegates without their socket", replace(goodAgent, "}\nnode", "  admin_socket_path = \"\"\n  authorized_delegates = [\"spiffe://example.org/proxy\"]\n}\nnode"),
			`F:7,26-56: Missing admin socket; Delegates are served at admin_socket_path, which is off.`},
		{"lists that are given sometimes", replace(goodAgent, "}\nnode", "  sds {\n    crl = \"sometimes\"\n  }\n}\nnode"),
			`F:7,11-22: Invalid value; "sometimes" is unknown; there are "auto", "always" and "never".`},
		{"one name for two secrets", replace(goodAgent, "}\nnode", "  sds {\n    default_all_bundles_name = \"ROOTCA\"\n  }\n}\nnode"),
			`F:7,32-40: Conflicting names; "ROOTCA" is what default_bundle_name is asked for by; choose another name for one of them.`},
		{"a bundle by http", replace(goodAgent, "insecure_bootstrap = true", `trust_bundle_url = "http://x.example"`),
			`F:5,22-40: Invalid URL; "http://x.example" is no https URL; without https anybody on the way could take the server's place.`},
		{"a ConfigMap that cannot be", replace(goodAgent, "insecure_bootstrap = true", `trust_bundle_config_map = "assay/Bundle"`),
			`F:5,29-43: Invalid name; "assay/Bundle" is no name of a ConfigMap; write NAME, for one in the agent's own namespace, or NAMESPACE/NAME.`},
		{"a ConfigMap and another way to trust", replace(goodAgent, "}\nnode", "  trust_bundle_config_map = \"assay-bundle\"\n}\nnode"),
			`F:5,24-28: Conflicting bootstrap trust; Only one of trust_bundle_path, trust_bundle_url, trust_bundle_config_map and insecure_bootstrap can be set; there are "trust_bundle_config_map" and "insecure_bootstrap".`},
		{"a token file that is not there", replace(goodAgent, "}\nnode", "  join_token_file = \"/nowhere/t\"\n}\nnode"),
			`F:6,21-33: Unreadable file; /nowhere/t: no such file or directory; "assay-server token generate" prints what belongs into it.`},
		{"an empty token file", replace(goodAgent, "}\nnode", "  join_token_file = \""+empty+"\"\n}\nnode"),
			fmt.Sprintf(`F:6,21-%d: Invalid join token; %s is empty; "assay-server token generate" prints what belongs into it.`, 23+len(empty), empty)},
		{"two tokens", replace(goodAgent, "}\nnode", "  join_token = \"a\"\n  join_token_file = \"b\"\n}\nnode"),
			`F:7,21-24: Conflicting join tokens; Only one of join_token and join_token_file can be set.`},
		{"an address with a port", replace(goodAgent, `"localhost"`, `"localhost:8081"`),
			`F:3,24-40: Invalid address; "localhost:8081" has a port in it; write the port as server_port.`},
		{"an address with a scheme", replace(goodAgent, `"localhost"`, `"https://localhost"`),
			`F:3,24-43: Invalid address; "https://localhost" is no host name or IP address; write only that, without scheme or path.`},
		{"port nought", replace(goodAgent, "}\nnode", "  server_port = 0\n}\nnode"),
			`F:6,17-18: Invalid port; 0 is no TCP port: it must be from 1 to 65535.`},
		{"an admin socket that workloads see", replace(goodAgent, "}\nnode", "  admin_socket_path = \"/run/assay/agent/public/x/admin.sock\"\n}\nnode"),
			`F:6,23-61: Invalid socket path; "/run/assay/agent/public/x/admin.sock" is in the directory of the Workload API's socket or below it, which is handed to workloads; choose another directory, or "" for no admin socket.`},
		{"registers that bind nothing", goodAgent + "key_manager \"tpm\" {\n  pcrs = [7, 16, 24]\n}",
			"F:10,10-21: Invalid register; Any program can set register 16 back; seal to others, as 0, 2, 4 and 7.\nF:10,10-21: Invalid register; 24 is no register of a TPM, which are 0 to 23."},
		{"an identity for a plugin of an agent", goodAgent + "key_manager \"external\" {\n  name = \"hsm\"\n  plugin_cmd = \"/p\"\n  plugin_checksum = \"" + strings.Repeat("00", 32) + "\"\n  plugin_identity = true\n}",
			`F:13,21-25: No identity to give; Agents have no identity to give to plugins; the key is for plugins of the server.`},
		{"a TPM at no path", goodAgent + "key_manager \"tpm\" {\n  tpm_path = \"tpm0\"\n}",
			`F:10,14-20: Invalid path; "tpm0" is no absolute path of a device.`},
		{"two node attestors", goodAgent + `node_attestor "x509pop" {}`,
			`F:9,1-24: Duplicate node attestor; There can be only one node_attestor block: an agent proves its node in one way.`},
		{"no workload attestor", replace(goodAgent, `workload_attestor "unix" {}`, ""),
			`F: Missing workload_attestor block; Without one no workload can prove anything; add workload_attestor "unix" {} for a start.`},
		{"an empty cache", replace(goodAgent, "}\nnode", "  x509_svid_cache_max_size = 0\n}\nnode"),
			`F:6,30-31: Invalid number; 0 is out of range: it must be from 1 to 16777216.`},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := write(t, "agent.hcl", c.text)
			_, err := LoadAgent(path, nodes, workloads, Options{})
			if err == nil {
				t.Fatal("it was accepted")
			}
			if diff := cmp.Diff(c.want, strings.ReplaceAll(err.Error(), path, "F")); diff != "" {
				t.Errorf("want (-), got (+):\n%s", diff)
			}
		})
	}
}

func TestFlags(t *testing.T) {
	path := write(t, "server.hcl", goodServer)
	t.Run("a flag takes the place of a key", func(t *testing.T) {
		s, err := LoadServer(path, judges, Options{Set: []Setting{
			{Key: "server.bind_port", Value: "99", Flag: "-serverPort"},
			{Key: "server.trust_domain", Value: "other.example", Flag: "-trustDomain"},
			{Key: "server.log_level", Value: "debug", Flag: "-logLevel"},
			{Key: "telemetry.prometheus.port", Value: "1", Flag: "-x"},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if s.BindPort != 99 || s.TrustDomain.Name() != "other.example" || s.Log.Level != logrus.DebugLevel || s.Metrics != "127.0.0.1:1" {
			t.Errorf("got %+v", s)
		}
	})
	t.Run("a bad flag is named as it was typed", func(t *testing.T) {
		_, err := LoadServer(path, judges, Options{Set: []Setting{{Key: "server.bind_port", Value: "66000", Flag: "-serverPort"}}})
		if err == nil || err.Error() != "-serverPort: Invalid port; 66000 is no TCP port: it must be from 0 to 65535." {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a flag for trust replaces the file's source of it", func(t *testing.T) {
		bundle := write(t, "b.pem", "x")
		a, err := LoadAgent(write(t, "agent.hcl", goodAgent), nodes, workloads, Options{Set: []Setting{{Key: "agent.trust_bundle_path", Value: bundle, Flag: "-trustBundle"}}})
		if err != nil {
			t.Fatal(err)
		}
		if a.InsecureBootstrap || a.TrustBundlePath != bundle {
			t.Errorf("got %+v", a)
		}
	})
}

func TestExpandEnv(t *testing.T) {
	env := map[string]string{"TD": "example.org", "DIR": "/x\" \n}\nserver {", "PORT": "77"}
	lookup := func(name string) (string, bool) { v, ok := env[name]; return v, ok }
	text := "server {\n  # not $ME\n  trust_domain = \"$TD\"\n  data_dir = \"${DIR}\"\n  bind_port = $PORT\n}\nnode_attestor \"join_token\" {}\n"
	t.Run("variables become their values and nothing but values", func(t *testing.T) {
		s, err := LoadServer(write(t, "server.hcl", text), judges, Options{ExpandEnv: true, Getenv: lookup})
		if err != nil {
			t.Fatal(err)
		}
		if s.TrustDomain.Name() != "example.org" || s.DataDir != env["DIR"] || s.BindPort != 77 {
			t.Errorf("got %+v", s)
		}
	})
	t.Run("a variable that is not set is a mistake", func(t *testing.T) {
		delete(env, "TD")
		path := write(t, "server.hcl", text)
		_, err := LoadServer(path, judges, Options{ExpandEnv: true, Getenv: lookup})
		want := path + ":3,19-22: Unset environment variable; The file uses $TD, which is not in the environment; set it or run without -expandEnv."
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v", err)
		}
	})
}

func FuzzServer(f *testing.F) {
	sample, err := os.ReadFile("server.hcl")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(sample), true)
	f.Add(goodServer, false)
	f.Add("server { ${ }", true)
	path := filepath.Join(f.TempDir(), "server.hcl")
	f.Fuzz(func(t *testing.T, text string, expand bool) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := LoadServer(path, judges, Options{ExpandEnv: expand})
		if (s == nil) == (err == nil) {
			t.Errorf("got both or none of %v and %v", s, err)
		}
		if err != nil && err.Error() == "" {
			t.Error("an error that says nothing")
		}
	})
}

func TestTry(t *testing.T) {
	opened := ""
	refuse := func(config any, needs attestor.Needs) error {
		opened += config.(*proofConfig).Path + " " + needs.TrustDomain.Name() + " " + needs.JoinToken + ";"
		return fmt.Errorf("open %s: no such\nfile", config.(*proofConfig).Path)
	}
	nodes := []attestor.NodeKind{{Type: "x509pop", Config: newProofConfig, Open: func(c any, n attestor.Needs) (attestor.Node, error) { return nil, refuse(c, n) }}}
	workloads := []attestor.WorkloadKind{{Type: "unix", Config: newProofConfig, Open: func(c any, n attestor.Needs) (attestor.Workload, error) { return nil, refuse(c, n) }}}
	path := write(t, "agent.hcl", `agent {
  trust_domain      = "example.org"
  server_address    = "localhost"
  data_dir          = "data"
  join_token        = "token"
  trust_bundle_path = "/dev/null"
}
node_attestor "x509pop" {
  path = "a"
}
workload_attestor "unix" {
  path = "b"
  size = "large"
}
`)
	bundle := func(td spiffeid.TrustDomain, path, format string) error {
		return fmt.Errorf("%s %s of %s is empty", format, path, td.Name())
	}
	t.Run("what cannot be opened is a mistake at its place, and what was not decoded is not opened", func(t *testing.T) {
		_, err := LoadAgent(path, nodes, workloads, Options{Try: true, TryBundle: bundle})
		want := []string{
			`agent.hcl:6,23-34: Unusable trust bundle; pem /dev/null of example.org is empty; "assay-server bundle show" prints what belongs into it.`,
			`agent.hcl:8,1-24: Unusable node attestor; open a: no such file.`,
			`agent.hcl:13,11-16: Unsuitable value type; a number is required`,
		}
		if got := strings.ReplaceAll(fmt.Sprint(err), filepath.Dir(path)+"/", ""); got != strings.Join(want, "\n") {
			t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
		}
		if opened != "a example.org token;" {
			t.Errorf("opened %q", opened)
		}
	})
	t.Run("without it nothing is opened", func(t *testing.T) {
		opened = ""
		_, err := LoadAgent(path, nodes, workloads, Options{TryBundle: bundle})
		if err == nil || opened != "" || strings.Contains(err.Error(), "Unusable") {
			t.Errorf("opened %q, got %v", opened, err)
		}
	})
}
