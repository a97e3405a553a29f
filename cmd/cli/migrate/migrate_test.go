package migrate

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/conf"
)

// TestOlderACME holds that a bundle endpoint keeps its certificate of the web when SPIRE's file says acme where it was
// before there were profiles.
func TestOlderACME(t *testing.T) {
	dir := t.TempDir()
	path, made := filepath.Join(dir, "spire.conf"), filepath.Join(dir, "made.hcl")
	file := `server {
  trust_domain = "example.org"
  data_dir = "` + dir + `"
  federation { bundle_endpoint {
    port = 8443
    acme { domain_name = "bundle.example.org" email = "a@example.org" tos_accepted = true }
  } }
}
plugins { KeyManager "memory" { plugin_data {} } }`
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	result, err := Server(path, Shape{File: conf.ServerShape(), Plugins: map[string]map[string]func() any{"key_manager": conf.KeyManagerKinds()}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range result.Remarks {
		if r.Dropped {
			t.Errorf("left out: %s", r.line(path))
		}
	}
	config := append(result.Config, "node_attestor \"x\" {}\n"...)
	if err := os.WriteFile(made, config, 0o600); err != nil {
		t.Fatal(err)
	}
	kind := attestor.JudgeKind{Type: "x", Config: func() any { return new(struct{}) }}
	loaded, err := conf.LoadServer(made, []attestor.JudgeKind{kind}, conf.Options{})
	if err != nil {
		t.Fatalf("%v\n%s", err, config)
	}
	want := conf.ACME{Domain: "bundle.example.org", Email: "a@example.org"}
	if e := loaded.Federation.Endpoint; e == nil || e.ACME == nil || *e.ACME != want {
		t.Errorf("the endpoint is %+v\n%s", e, config)
	}
}

// FuzzMigrate feeds foreign files: what comes out parses, or nothing does.
func FuzzMigrate(f *testing.F) {
	for _, text := range []string{
		"server { trust_domain = \"example.org\" bind_port = \"8081\" }\nplugins { KeyManager \"disk\" { plugin_data { keys_path = \"a\" } } }",
		`{"server": {"ca_subject": {"country": ["a"]}, "federation": {"federates_with": {"b": {"bundle_endpoint_profile": {"https_web": {}}}}}}}`,
		"server = [{}, {}]\nserver { x = [[[1]]] y = <<E\na ${b}\nE\n}",
		"server { \"a\" \"b\" \"c\" { d = -1.5e3 } }",
		"plugins \"NodeAttestor\" \"x\" plugin_data {}\nserver {}",
		"plugins { NodeAttestor \"x\" { plugin_cmd = \"y\" plugin_data { a = [1, { \"b \\\" c\" = {} }] } } }\nserver { log_level = [1, { a = 2 }] trust_domain = [[{}]] }",
	} {
		f.Add([]byte(text))
	}
	external := reflect.TypeFor[struct {
		Name string   `hcl:"name,optional"`
		Cmd  string   `hcl:"plugin_cmd,optional"`
		Args []string `hcl:"plugin_args,optional"`
	}]()
	shape := Shape{File: conf.ServerShape(), Plugins: map[string]map[string]func() any{
		"key_manager": conf.KeyManagerKinds(), "node_attestor": {"external": func() any { return reflect.New(external).Interface() }},
	}}
	path := filepath.Join(f.TempDir(), "spire.conf")
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		result, err := Server(path, shape)
		if err != nil {
			return
		}
		if _, diags := hclsyntax.ParseConfig(result.Config, "made.hcl", hcl.InitialPos); diags.HasErrors() {
			t.Fatalf("%s\n%s", diags, result.Config)
		}
	})
}
