package compat

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab/site"
)

// ci lets workloads below /ci push reports about one repository, unsigned.
const ci = `
node_attestor "join_token" {}
scan_policy "prod" {
  sources = ["ci"]
  fail {
    severity = "critical"
  }
}
evidence_source "ci" {
  repositories   = ["registry.example.org/shop/**"]
  allow_unsigned = true
  svid {
    ids = ["spiffe://example.org/ci/*"]
  }
}
`

func TestEvidencePushWithAnSVID(t *testing.T) {
	s := newSite(t, func(s *site.Site) { s.ServerBlocks = ci })
	agent := newAgent(t, s, "agent")
	client := entries(t, s)
	image := "sha256:" + strings.Repeat("1a", 32)
	report := filepath.Join(s.Dir, "clean.json")
	text, err := json.Marshal(map[string]any{
		"SchemaVersion": 2, "CreatedAt": time.Now().Format(time.RFC3339Nano), "ArtifactName": "app", "ArtifactType": "container_image",
		"Metadata": map[string]any{"ImageID": image, "OS": map[string]any{"Family": "debian", "Name": "12.5"}},
		"Results":  []any{map[string]any{"Target": "app", "Class": "os-pkgs", "Type": "debian", "Packages": []any{map[string]any{"Name": "lib", "Version": "1"}}}},
	})
	if err == nil {
		err = os.WriteFile(report, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	// push is what a job runs: no token, no trust bundle, nothing but the Workload API.
	push := func(repository string) (string, error) {
		return site.Run(patiently(t), nil, filepath.Join(bin, "assay"), "evidence", "push", "-server", fmt.Sprintf("127.0.0.1:%d", s.Port),
			"-workloadAPI", "unix://"+agent.Socket, "-image", repository+"@"+image, "-scan", report)
	}
	refused := func(t *testing.T, repository, why string) {
		t.Helper()
		if out, err := push(repository); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("got %v\n%s", err, out)
		}
		if out, err := s.ServerCLI(patiently(t), "evidence", "list"); err != nil || !strings.Contains(out, "Found 0 images") {
			t.Errorf("the server knows something of it: %v\n%s", err, out)
		}
	}
	w := watch(t, agent.Socket)
	parent := onlyAgent(t, s)

	stranger := createEntry(t, client, newEntry(parent, "/dev/laptop"))
	w.until(t, "an SVID that may not push", hasID("/dev/laptop"))
	t.Run("one that no evidence_source names may not push", func(t *testing.T) {
		refused(t, "registry.example.org/shop/app", "may not push evidence")
	})
	createEntry(t, client, newEntry(parent, "/ci/build"))
	deleteEntry(t, client, stranger.GetId())
	w.until(t, "an SVID that may push", func(s sight) bool {
		return s.x509 != nil && len(s.x509.SVIDs) == 1 && s.x509.DefaultSVID().ID.Path() == "/ci/build"
	})
	t.Run("nor for a repository that it may not push for", func(t *testing.T) {
		refused(t, "registry.example.org/bank/app", "no evidence_source lets")
	})
	t.Run("one that may pushes with nothing else", func(t *testing.T) {
		out, err := push("registry.example.org/shop/app")
		if err != nil || !strings.Contains(out, "from ci") || !strings.Contains(out, "scan:policy:prod is open") {
			t.Fatalf("got %v\n%s", err, out)
		}
		if out, err = s.ServerCLI(patiently(t), "evidence", "show", "-image", image); err != nil || !strings.Contains(out, "from spiffe://example.org/ci/build") {
			t.Errorf("the server does not say who pushed: %v\n%s", err, out)
		}
		log, err := os.ReadFile(filepath.Join(s.ServerData(), "audit.log"))
		if err != nil || !strings.Contains(string(log), `"event":"evidence.push"`) {
			t.Errorf("the audit log does not tell of it: %v", err)
		}
	})
}
