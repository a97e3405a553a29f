package conf

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"golang.org/x/sys/unix"
)

// keysUnder returns the keys of the first block of a kind in a sample, commented out or not.
func keysUnder(t *testing.T, sample, block string) []string {
	t.Helper()
	file, diags := hclsyntax.ParseConfig([]byte(uncommented(t, sample)), sample, hcl.InitialPos)
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	var keys []string
	for _, b := range file.Body.(*hclsyntax.Body).Blocks {
		if b.Type == block {
			for name := range b.Body.Attributes {
				keys = append(keys, name)
			}
		}
	}
	slices.Sort(keys)
	return keys
}

func TestFilesSamples(t *testing.T) {
	t.Run("every key of a files block is in the agent's sample, and nothing else", func(t *testing.T) {
		if diff := cmp.Diff(keysOf(reflect.TypeFor[filesKeys]()), keysUnder(t, "agent.hcl", "files")); diff != "" {
			t.Errorf("keys of the struct (-) and of the sample (+):\n%s", diff)
		}
	})
	t.Run("every key of the client's file is in its sample, and nothing else", func(t *testing.T) {
		want := append(keysOf(reflect.TypeFor[filesClientFile]()), keysOf(reflect.TypeFor[filesKeys]())...)
		slices.Sort(want)
		if diff := cmp.Diff(want, keysIn(t, "files.hcl")); diff != "" {
			t.Errorf("keys of the structs (-) and of the sample (+):\n%s", diff)
		}
	})
	t.Run("the client's sample loads", func(t *testing.T) {
		f, err := LoadFiles("files.hcl", Options{})
		if err != nil {
			t.Fatal(err)
		}
		if f.Socket != DefaultAgentSocket || !f.Daemon || f.Cert != "svid.pem" || f.Signal != unix.SIGHUP || f.CertMode != 0o644 ||
			f.KeyMode != 0o600 || f.Withdrawn != "replace" || f.Owner != nil || f.Health.Address != "" {
			t.Errorf("the sample loads as %+v", f)
		}
	})
	t.Run("with all its keys in force it loads as well", func(t *testing.T) {
		f, err := LoadFiles(write(t, "all.hcl", uncommented(t, "files.hcl")), Options{})
		if err != nil {
			t.Fatal(err)
		}
		if f.Health.Address != "127.0.0.1:8081" || len(f.JWTs) != 1 || *f.Owner != 0 || len(f.Process) != 3 || f.CommandTimeout != 30*time.Second {
			t.Errorf("the sample loads as %+v", f)
		}
	})
}

func TestFilesOfTheHelper(t *testing.T) {
	f, err := LoadFiles(write(t, "helper.conf", `
agent_address = "unix:///tmp/agent.sock"
cmd = "sh"
cmd_args = "-c \"echo \"\"hello\"\" world\" last"
cert_dir = "certs"
renew_signal = "SIGUSR1"
svid_file_name = "svid.pem"
svid_key_file_name = "svid_key.pem"
svid_bundle_file_name = "svid_bundle.pem"
jwt_svids = [{jwt_audience="your-audience", jwt_extra_audiences=["one", "two"], jwt_svid_file_name="jwt_svid.token"}]
jwt_bundle_file_name = "bundle.json"
cert_file_mode = 0444
key_file_mode = 0444
jwt_bundle_file_mode = 0444
add_intermediates_to_bundle = true
`), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if f.Socket != "/tmp/agent.sock" || f.Signal != unix.SIGUSR1 || f.CertMode != 0o444 || f.KeyMode != 0o444 || !f.IntermediatesInBundle {
		t.Errorf("it loads as %+v", f)
	}
	if diff := cmp.Diff([]string{"sh", "-c", `echo "hello" world`, "last"}, f.Process); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]FilesJWT{{Audience: []string{"your-audience", "one", "two"}, File: "jwt_svid.token"}}, f.JWTs); diff != "" {
		t.Error(diff)
	}
}

func TestMistakesInFiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good := "cert_dir = \"" + dir + "\"\nsvid_file_name = \"a\"\nsvid_key_file_name = \"b\"\n"
	for _, c := range []struct{ text, want string }{
		{"svid_file_name = \"a\"\nsvid_key_file_name = \"b\"", `"cert_dir" is required`},
		{"cert_dir = \"" + file + "\"\nsvid_bundle_file_name = \"a\"", "is a file; name a directory"},
		{"cert_dir = \"" + dir + "\"", "No file is asked for"},
		{"cert_dir = \"" + dir + "\"\nsvid_file_name = \"a\"", "of no use without its key"},
		{good + `svid_bundle_file_name = "a"`, `Two files have the name "a"`},
		{good + `crl_file_name = "../x"`, "no name of a file in cert_dir"},
		{good + `crl_file_name = ".x"`, "no name of a file in cert_dir"},
		{good + `cert_file_mode = 0648`, "no mode of a file"},
		{good + `cert_file_mode = "rw"`, "no mode of a file"},
		{good + `key_file_mode = 0755`, "would be a program"},
		{good + `key_file_mode = "0040"`, "not even the owner"},
		{good + `cert_file_mode = true`, "no mode of a file"},
		{good + `file_owner = "nobody-has-this-name"`, "no user"},
		{good + `file_group = "nobody-has-this-name"`, "no group"},
		{good + `file_owner = "-4"`, "is no user"},
		{good + `renew_signal = "SIGNONE"`, "is no signal"},
		{good + `renew_signal = "KILL"`, "reloads nothing"},
		{good + `on_withdrawal = "hide"`, `"hide" is unknown`},
		{good + `spiffe_id = "example.org/web"`, "is no SPIFFE ID"},
		{good + `renew_command = [""]`, "is the program to run"},
		{good + `renew_command_timeout = "soon"`, "no duration"},
		{good + `cmd_args = "x"`, "arguments of cmd"},
		{good + "cmd = \"a\"\ncmd_args = \"\\\"x\"", "opening quote"},
		{good + "cmd = \"a\"\ncmd_args = [1]", "list of texts"},
		{good + `jwt_svids = "a"`, "It is no list"},
		{good + `jwt_svids = ["a"]`, "An element is no object"},
		{good + `jwt_svids = [{jwt_svid_file_name = "t"}]`, "needs jwt_audience"},
		{good + `jwt_svids = [{jwt_audience = "x"}]`, "needs jwt_svid_file_name"},
		{good + `jwt_svids = [{jwt_audience = "x", jwt_svid_file_name = "a"}]`, `Two files have the name "a"`},
		{good + `jwt_svids = [{jwt_audience = "x", jwt_svid_file_name = "t", more = 1}]`, `has no "more"`},
		{good + `cert_dri = "x"`, "Unsupported argument"},
	} {
		t.Run(c.want, func(t *testing.T) {
			_, err := LoadFiles(write(t, "files.hcl", c.text), Options{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want a mistake with %q, have %v", c.want, err)
			}
		})
	}
}

func TestFilesBlocksOfTheAgent(t *testing.T) {
	load := func(t *testing.T, blocks string) (*Agent, error) {
		t.Helper()
		bundle := write(t, "bundle.pem", "x")
		return LoadAgent(write(t, "agent.hcl", `agent {
  trust_domain      = "example.org"
  server_address    = "localhost"
  data_dir          = "/nowhere"
  trust_bundle_path = "`+bundle+`"
}
node_attestor "join_token" {}
workload_attestor "unix" {}
`+blocks), nodes, workloads, Options{})
	}
	t.Run("a block stands for its selector", func(t *testing.T) {
		a, err := load(t, `files "nginx" {
  cert_dir           = "/etc/nginx/svid"
  svid_file_name     = "svid.pem"
  svid_key_file_name = "key.pem"
}`)
		if err != nil {
			t.Fatal(err)
		}
		if len(a.Files) != 1 || a.Files[0].Name != "nginx" || !slices.Equal(a.Files[0].Selectors.Strings(), []string{"files:name:nginx"}) {
			t.Errorf("it loads as %+v", a.Files)
		}
	})
	for _, c := range []struct{ blocks, want string }{
		{`files "a b" { cert_dir = "/x" }`, "does not do as a name"},
		{`files "" { cert_dir = "/x" }`, "does not do as a name"},
		{"files \"a\" {\n  cert_dir = \"/x\"\n  jwks_file_name = \"k\"\n}\nfiles \"a\" {\n  cert_dir = \"/y\"\n  jwks_file_name = \"k\"\n}", "There are two blocks"},
		{"files \"a\" {\n  cert_dir = \"/x\"\n  jwks_file_name = \"k\"\n}\nfiles \"b\" {\n  cert_dir = \"/x\"\n  crl_file_name = \"k\"\n}", `is written by the block files "a" too`},
		{"files \"a\" {\n  cert_dir = \"/x\"\n  cmd = \"k\"\n}", "Unsupported argument"},
	} {
		t.Run(c.want, func(t *testing.T) {
			_, err := load(t, c.blocks)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want a mistake with %q, have %v", c.want, err)
			}
		})
	}
}
