package lab_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/attestor/awsiid"
	"github.com/assay-id/assay/test/fake/aws"
	"github.com/assay-id/assay/test/lab/site"
)

// TestEC2WithoutARole runs the built binaries as on an instance that has no role: its document is good once. When
// it was off for longer than its SVID lived, the key that it had brings it back, and nothing else does.
func TestEC2WithoutARole(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	cloud := aws.New()
	t.Cleanup(cloud.Close)
	text, err := os.ReadFile("../../attestor/awsiid/testdata/real.json")
	must(err)
	var document awsiid.Evidence
	must(json.Unmarshal(text, &document))
	for name, text := range map[string]string{"document": document.Document, "signature": "AAAA", "rsa2048": document.RSA2048} {
		cloud.Metadata["dynamic/instance-identity/"+name] = text
	}
	dir, err := os.MkdirTemp("", "lab") //nolint:usetesting // a socket's path may have 107 bytes
	must(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := site.New(dir, "../../bin")
	must(err)
	certificate, err := filepath.Abs("../../attestor/awsiid/testdata/us-east-1.pem")
	must(err)
	s.ServerExtra = `agent_ttl = "5s"`
	s.ServerBlocks = fmt.Sprintf("node_attestor \"aws_iid\" {\n  account_ids = [\"123456789012\"]\n  region_certificates = { \"us-east-1\" = %q }\n}", certificate)
	must(s.StartServer(ctx))
	t.Cleanup(func() { _ = s.Stop() })
	blocks := fmt.Sprintf("node_attestor \"aws_iid\" {\n  ec2_metadata_endpoint = %q\n}\nworkload_attestor \"unix\" {}", cloud.URL())
	agent, err := s.NewAgent(ctx, "agent", site.AgentOptions{Blocks: blocks})
	must(err)
	must(agent.Start(ctx))
	t.Cleanup(func() {
		if agent.Process != nil {
			_ = agent.Stop(15 * time.Second)
		}
	})
	audited := func(wants ...string) bool {
		text, err := os.ReadFile(filepath.Join(s.ServerData(), "audit.log"))
		must(err)
		for line := range strings.Lines(string(text)) {
			found := true
			for _, want := range wants {
				found = found && strings.Contains(line, want)
			}
			if found {
				return true
			}
		}
		return false
	}
	const attest, again = `"event":"agent.attest"`, "the key of the SVID it had before"
	if !audited(attest, `"outcome":"allow"`) || audited(attest, again) {
		t.Error("the audit log has not one plain attestation")
	}
	must(agent.Stop(15 * time.Second))
	agent.Process = nil
	select { // until its SVID has expired
	case <-time.After(6 * time.Second):
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
	t.Run("a thief with the document is refused", func(t *testing.T) {
		thief, err := s.NewAgent(ctx, "thief", site.AgentOptions{Blocks: blocks})
		must(err)
		must(thief.Launch())
		t.Cleanup(func() { _ = thief.Stop(15 * time.Second) })
		must(thief.WaitFor(ctx, "the refusal", func() error {
			if !audited(attest, `"outcome":"deny"`, "has attested before") {
				return fmt.Errorf("not in the audit log")
			}
			return nil
		}))
	})
	t.Run("the instance is let back in by the key it had", func(t *testing.T) {
		must(agent.Start(ctx))
		must(agent.WaitFor(ctx, "the attestation", func() error {
			if !audited(attest, `"outcome":"allow"`, again) {
				return fmt.Errorf("not in the audit log")
			}
			return nil
		}))
		if _, err := agent.CLI(ctx, "healthcheck", "-socketPath", agent.Socket); err != nil {
			t.Error(err)
		}
	})
}
