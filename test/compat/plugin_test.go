package compat

import (
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/agent/keep/external"
	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/external/workload"
)

// TestPlugin runs a plugin that was built as its makers build it, with the oldest go-plugin that the SDK takes.
func TestPlugin(t *testing.T) {
	path, err := filepath.Abs(filepath.Join(bin, "peers", "plugin"))
	if err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, ".")
	build.Dir = filepath.Join("peers", "plugin")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, text)
	}
	sum, err := block.Checksum(path)
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(t.Output())
	measured := make(chan attestor.Measurement, 1)
	needs := attestor.Needs{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Log: log,
		Measure: func(m attestor.Measurement) error { measured <- m; return nil },
	}
	opened, err := workload.Kind().Open(&block.Config{
		Name: "executable", Cmd: path, Checksum: fmt.Sprintf("%x", sum), Data: `selector = "ours:yes"`,
	}, needs)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if closer, ok := opened.(interface{ Close() error }); ok {
			_ = closer.Close()
		}
	}()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	got, err := opened.Attest(t.Context(), attestor.Process{PID: os.Getpid(), Proc: "/proc"})
	want := attestor.NewSet(attestor.Selector{Type: "executable", Value: "ours:yes"}, attestor.Selector{Type: "executable", Value: "exe:" + self})
	if err != nil || !attestor.NewSet(got...).Equal(want) {
		t.Fatalf("got %v, %v, want %v", got, err, want)
	}
	if m := <-measured; m.Source != "executable" || m.Key[0] != "attested" || m.Kind != attestor.Counter || m.Value != 1 {
		t.Errorf("measured %+v", m)
	}
	t.Run("the agent's own key is in one", func(t *testing.T) {
		keys, err := external.Open(&block.Config{Name: "memory_of_others", Cmd: path, Args: []string{"keys"}, Checksum: fmt.Sprintf("%x", sum)}, needs)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = keys.Close() }()
		key, err := keys.Generate(t.Context(), "agent-svid-A")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
			t.Error(err)
		}
		if err := keys.Has(t.Context(), "agent-svid-A", key.Public()); err != nil {
			t.Error(err)
		}
		if err := keys.Has(t.Context(), "agent-svid-B", key.Public()); !errors.Is(err, keep.ErrKeyGone) {
			t.Errorf("a key that was never made: %v", err)
		}
	})
}
