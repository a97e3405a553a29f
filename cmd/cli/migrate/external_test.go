package migrate

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	hclv1 "github.com/hashicorp/hcl"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/conf"
)

// externalKind is a node attestor that is a plugin, as the server's configuration knows it.
var externalKind = attestor.JudgeKind{Type: external.Type, Config: func() any { return new(external.Config) }}

// migrated writes a configuration of SPIRE's server to path and migrates it.
func migrated(t *testing.T, path, text string) *Result {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	result, err := Server(path, Shape{File: conf.ServerShape(), Plugins: map[string]map[string]func() any{
		"key_manager": conf.KeyManagerKinds(), "node_attestor": {external.Type: externalKind.Config},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// asLoaded is what the server reads of a configuration, which it writes into dir.
func asLoaded(t *testing.T, dir, config string) *conf.Server {
	t.Helper()
	path := filepath.Join(dir, "made.hcl")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	loaded, err := conf.LoadServer(path, []attestor.JudgeKind{externalKind}, conf.Options{})
	if err != nil {
		t.Fatalf("%v\n%s", err, config)
	}
	return loaded
}

// TestObjectsOfJSON holds that an object of JSON in which there are but objects stays one: the old parser takes it apart.
func TestObjectsOfJSON(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "spire.json")
	program := filepath.Join(dir, "plugin")
	if err := os.WriteFile(program, []byte("\x7fELF and more"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := `{"server": {"trust_domain": "example.org", "data_dir": "` + dir + `", "federation": {
  "bundle_endpoint": {"port": 8443, "profile": {"https_spiffe": {}}},
  "federates_with": {"a.test": {"bundle_endpoint_url": "https://a.test", "bundle_endpoint_profile": {"https_web": {}}},
                     "b.test": {"bundle_endpoint_url": "https://b.test", "bundle_endpoint_profile": {"https_web": {}}}}}},
 "plugins": {"KeyManager": {"memory": {"plugin_data": {}}},
             "NodeAttestor": {"ours": {"plugin_cmd": "` + program + `", "plugin_data": {"a": {"x": 1}, "b": {"y": [2, {"z": 3}]}}}}}}`
	result := migrated(t, path, file)
	loaded := asLoaded(t, dir, string(result.Config))
	if f := loaded.Federation; f.Endpoint == nil || len(f.With) != 2 {
		t.Errorf("the federation is %+v", f)
	}
	var data map[string]any
	if err := hclv1.Decode(&data, loaded.Judges[0].Config.(*external.Config).Data); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"a": []map[string]any{{"x": 1}}, "b": []map[string]any{{"y": []any{2, map[string]any{"z": 3}}}}}
	if diff := cmp.Diff(want, data); diff != "" {
		t.Errorf("the plugin's configuration (-want +got):\n%s", diff)
	}
}

// TestExternal migrates a plugin, and reads its configuration as SPIRE's plugins do: before and after.
func TestExternal(t *testing.T) {
	const data = `
  text = "with \"quotes\", a \\ and ${not_a_variable} %{neither}"
  list = ["a", "b ${c}"]
  mixed = [1, "two", { b = "c ${d}", a = [true, { x = 1.5 }], e {} }, []]
  number = 4711
  yes = true
  block "labelled" { inner = "x" }
  block "other" { inner = <<EOT
several
lines
EOT
  }
`
	dir := t.TempDir()
	program := filepath.Join(dir, "plugin")
	if err := os.WriteFile(program, []byte("\x7fELF and more"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "spire.conf")
	file := `server { trust_domain = "example.org" data_dir = "` + dir + `" }
plugins {
  NodeAttestor "ours" {
    plugin_cmd = "` + program + `"
    plugin_args = ["-v", "1"]
    plugin_checksum = ""
    plugin_data {` + data + `}
  }
  KeyManager "scripted" { plugin_cmd = "/bin/none" plugin_data {} }
}`
	result := migrated(t, path, file)
	remarks := ""
	for _, r := range result.Remarks {
		remarks += r.line(path) + "\n"
	}
	for _, want := range []string{"plugins.NodeAttestor.ours.plugin_checksum; It is required here, so it is the SHA-256 that ", "plugins.KeyManager.scripted.plugin_checksum; It is required here, and cannot be told", "no variable that plugin_env does not name"} {
		if !strings.Contains(remarks, want) {
			t.Errorf("%q is not said:\n%s", want, remarks)
		}
	}
	config := strings.ReplaceAll(string(result.Config), "key_manager \"external\" {", "key_manager \"external\" {\nplugin_checksum = \""+strings.Repeat("00", 32)+"\"")
	loaded := asLoaded(t, dir, config)
	got, ok := loaded.Judges[0].Config.(*external.Config)
	if !ok || got.Name != "ours" || got.Cmd != program || len(got.Args) != 2 || len(got.Checksum) != 64 {
		t.Fatalf("got %+v", loaded.Judges[0].Config)
	}
	var before, after map[string]any
	if err := hclv1.Decode(&before, data); err != nil {
		t.Fatal(err)
	}
	if err := hclv1.Decode(&after, got.Data); err != nil {
		t.Fatalf("%v\n%s", err, got.Data)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the plugin's configuration before (-) and after (+):\n%s", diff)
	}
}
