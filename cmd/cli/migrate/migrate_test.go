package migrate

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/assay-id/assay/conf"
)

// FuzzMigrate feeds foreign files: what comes out parses, or nothing does.
func FuzzMigrate(f *testing.F) {
	for _, text := range []string{
		"server { trust_domain = \"example.org\" bind_port = \"8081\" }\nplugins { KeyManager \"disk\" { plugin_data { keys_path = \"a\" } } }",
		`{"server": {"ca_subject": {"country": ["a"]}, "federation": {"federates_with": {"b": {"bundle_endpoint_profile": {"https_web": {}}}}}}}`,
		"server = [{}, {}]\nserver { x = [[[1]]] y = <<E\na ${b}\nE\n}",
		"server { \"a\" \"b\" \"c\" { d = -1.5e3 } }",
		"plugins \"NodeAttestor\" \"x\" plugin_data {}\nserver {}",
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
