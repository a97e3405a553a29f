package compat

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
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
	sum, err := external.Checksum(path)
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(t.Output())
	opened, err := workload.Kind().Open(&external.Config{
		Name: "executable", Cmd: path, Checksum: fmt.Sprintf("%x", sum), Data: `selector = "ours:yes"`,
	}, attestor.Needs{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Log: log})
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
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}
