package lab_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/registry"
	"github.com/assay-id/assay/test/lab/site"
)

// TestRegistryWithCredentials lets the built server look for what is attached to an image at a real registry that
// demands a password.
func TestRegistryWithCredentials(t *testing.T) {
	if err := registry.Available(); err != nil {
		lab.Missing(t, "a private registry", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	r, err := registry.Start(ctx, t.TempDir())
	must(err)
	r.Down()
	r.User, r.Password = "assay", "open:sesame"
	must(r.Up(ctx))
	defer r.Down()

	img, err := random.Image(64, 1)
	must(err)
	digest, err := img.Digest()
	must(err)
	ref, err := name.NewDigest(r.Host+"/private/shop@"+digest.String(), name.Insecure)
	must(err)
	if err := remote.Write(ref, img); err == nil {
		t.Fatal("the registry demands no password")
	}
	must(remote.Write(ref, img, remote.WithAuth(&authn.Basic{Username: r.User, Password: r.Password})))

	dir, err := os.MkdirTemp("", "assay-lab-") //nolint:usetesting // t.TempDir is too long for a socket
	must(err)
	defer func() { _ = os.RemoveAll(dir) }()
	s, err := site.New(dir, "../../bin")
	must(err)
	defer func() { _ = s.Stop() }()
	config := filepath.Join(dir, "registries.json")
	write := func(password string) {
		t.Helper()
		text, err := json.Marshal(map[string]any{"auths": map[string]any{
			r.Host: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(r.User + ":" + password))},
		}})
		must(err)
		must(os.WriteFile(config, text, 0o600))
	}
	write("open barley")
	s.ServerBlocks = `node_attestor "join_token" {}` + fmt.Sprintf(prod+"evidence {\n  registries = [%q]\n  plain_registries = [%q]\n  allow_private_registries = true\n  registry_credentials_path = %q\n}\n", r.Host, r.Host, config)
	must(s.StartServer(ctx))
	push := func() string {
		t.Helper()
		out, err := s.ServerCLI(ctx, "evidence", "push", "-image", ref.Name(), "-attached")
		if err == nil {
			t.Fatalf("something was attached:\n%s", out)
		}
		return out + err.Error()
	}
	if said := push(); !strings.Contains(said, "401") && !strings.Contains(strings.ToLower(said), "unauthorized") {
		t.Errorf("with a wrong password: %s", said)
	}
	write(r.Password)
	if said := push(); !strings.Contains(said, "nothing signed is attached") {
		t.Errorf("with the password: %s", said)
	}
	must(os.Chmod(config, 0o644))
	if said := push(); strings.Contains(said, "nothing signed is attached") {
		t.Errorf("with a file that everybody may read: %s", said)
	}
	for _, log := range []string{s.ServerLog(), filepath.Join(s.ServerData(), "audit.log")} {
		text, err := os.ReadFile(log)
		must(err)
		if strings.Contains(string(text), r.Password) || strings.Contains(string(text), base64.StdEncoding.EncodeToString([]byte(r.User+":"+r.Password))) {
			t.Errorf("%s tells the password", log)
		}
	}
}
