package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/cmd/cli/samplestest"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/kube"
)

func TestClusterSample(t *testing.T) {
	samplestest.Run(t, "../../conf/server.hcl", clusterBlock, map[string]func() any{"production": func() any { return new(kube.Block) }})
}

func TestClusterMistakes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.hcl")
	if err := os.WriteFile(path, []byte(`server {
  trust_domain = "example.org"
  data_dir     = "/nowhere"
}
node_attestor "join_token" {}
kubernetes "a b" {
  kubeconfig        = "/nowhere/kubeconfig"
  watch_classless   = true
  ignore_namespaces = ["("]
  path_fence        = "/ns/{{"
  resync_interval   = "1s"
  bundle_config_map "x" {
    format = "der"
  }
}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := conf.LoadServer(path, judges(), conf.Options{Named: []conf.NamedKind{clusterKind()}})
	if err == nil {
		t.Fatal("it loaded")
	}
	for _, want := range []string{
		"server.hcl:6,", "the label is the cluster's name", "server.hcl:7,", "/nowhere/kubeconfig", "server.hcl:8,", "class_name",
		"server.hcl:9,", "regular expression", "server.hcl:10,", "server.hcl:11,", "length of time", "server.hcl:13,", `"pem" and "spiffe"`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %q in\n%v", want, err)
		}
	}
}
