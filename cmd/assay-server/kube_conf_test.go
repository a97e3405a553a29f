package main

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/assay-id/assay/cmd/cli/samplestest"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/kube"
	"github.com/assay-id/assay/server/verdict/rules"
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
  vulnerability_reports = "a b"
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
		"server.hcl:9,", "regular expression", "server.hcl:10,", "server.hcl:11,", "length of time", "server.hcl:12,", "no name of a source", "server.hcl:14,", `"pem" and "spiffe"`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %q in\n%v", want, err)
		}
	}
}

func TestReportsOfAClusterAreASource(t *testing.T) {
	load := func(blocks string) error {
		path := filepath.Join(t.TempDir(), "server.hcl")
		text := "server {\n  trust_domain = \"example.org\"\n  data_dir = \"/nowhere\"\n}\nnode_attestor \"join_token\" {}\n" + blocks
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := conf.LoadServer(path, judges(), conf.Options{Named: append(rules.Kinds(), clusterKind()), CheckNamed: checkNamed})
		return err
	}
	policy := "scan_policy \"prod\" {\n  sources = [\"trivy\"]\n}\n"
	if err := load("kubernetes \"one\" {\n  vulnerability_reports = \"trivy\"\n}\n" + policy); err != nil {
		t.Errorf("a policy that names them: %v", err)
	}
	if err := load("kubernetes \"one\" {\n  vulnerability_reports = \"other\"\n}\n" + policy); err == nil || !strings.Contains(err.Error(), `"trivy" is no trust_policy and no evidence_source`) {
		t.Errorf("a policy that names what nobody brings: %v", err)
	}
	key, err := x509.MarshalPKIXPublicKey(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public())
	if err != nil {
		t.Fatal(err)
	}
	signed := fmt.Sprintf("trust_policy \"trivy\" {\n  predicate_types = [\"scan\"]\n  key {\n    pem = %q\n  }\n}\n", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: key}))
	if err := load("kubernetes \"one\" {\n  vulnerability_reports = \"trivy\"\n}\n" + policy + signed); err == nil || !strings.Contains(err.Error(), "these reports are not signed") {
		t.Errorf("the name of a trust policy: %v", err)
	}
}
