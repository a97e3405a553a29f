package lab_test

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/moby/moby/client"

	"github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/registry"
)

const cve = "CVE-2099-0001"

// pushed is an image for two platforms as a registry has it.
type pushed struct {
	repository string
	index      string
	manifests  map[string]string // by architecture
	configs    map[string]string
	images     map[string]v1.Image
}

// name is how the image is called by a digest.
func (p *pushed) name(digest string) string { return p.repository + "@" + digest }

// platforms pushes an image with the program for amd64 and another content for arm64. The mark makes it
// one of its own.
func (n *node) platforms(host, path, mark string) *pushed {
	n.t.Helper()
	p := &pushed{repository: host + "/" + path, manifests: map[string]string{}, configs: map[string]string{}, images: map[string]v1.Image{}}
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	program, err := os.ReadFile(n.program)
	n.must(err)
	for arch, content := range map[string][]byte{"amd64": program, "arm64": []byte("for another machine")} {
		var layer bytes.Buffer
		w := tar.NewWriter(&layer)
		n.must(w.WriteHeader(&tar.Header{Name: "app", Mode: 0o755, Size: int64(len(content))}))
		_, err := w.Write(content)
		n.must(err)
		n.must(w.Close())
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil },
			tarball.WithMediaType(types.OCILayer))
		n.must(err)
		img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		img, err = mutate.AppendLayers(img, l)
		n.must(err)
		file, err := img.ConfigFile()
		n.must(err)
		file = file.DeepCopy()
		file.OS, file.Architecture = "linux", arch
		file.Config.Entrypoint, file.Config.Labels = []string{"/app"}, map[string]string{"mark": mark}
		img, err = mutate.ConfigFile(img, file)
		n.must(err)
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		digest, err := img.Digest()
		n.must(err)
		config, err := img.ConfigName()
		n.must(err)
		p.manifests[arch], p.configs[arch], p.images[arch] = digest.String(), config.String(), img
	}
	ref, err := name.NewTag(p.repository+":latest", name.Insecure)
	n.must(err)
	n.must(remote.WriteIndex(ref, idx))
	digest, err := idx.Digest()
	n.must(err)
	p.index = digest.String()
	return p
}

// pull makes the engine pull an image by a digest.
func (n *node) pull(name string) {
	n.t.Helper()
	pulling, err := n.engine.Client().ImagePull(n.ctx, name, client.ImagePullOptions{})
	n.must(err)
	n.must(pulling.Wait(n.ctx))
}

// evidence is the block for a registry.
func evidence(host string, private bool) string {
	return fmt.Sprintf("evidence {\n  registries = [%q]\n  plain_registries = [%q]\n  allow_private_registries = %t\n}\n", host, host, private)
}

const prod = `
scan_policy "prod" {
  sources           = ["local"]
  allow_empty       = true # the images are FROM scratch
  allow_index_match = true
  fail {
    severity = "critical"
  }
}
`

// TestImageOfTwoPlatforms pulls an index of two platforms from a real registry into a real engine, and
// shows that what is known of the one platform never decides about the other.
func TestImageOfTwoPlatforms(t *testing.T) {
	needDocker(t)
	if err := registry.Available(); err != nil {
		lab.Missing(t, "docker-registry", err)
	}
	reg, err := registry.Start(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Down)
	n := newNode(t, prod+evidence(reg.Host, true))
	shop := n.platforms(reg.Host, "team/shop", "shop")
	n.entry("/shop", "scan:policy:prod")
	n.entry("/nothing", "scan:status:prod:missing")
	n.pull(shop.name(shop.index))
	running := n.run(shop.name(shop.index))
	amd, arm := shop.configs["amd64"], shop.configs["arm64"]
	n.until(running, "/nothing")

	// In the order in which each says less of the image.
	ways := []struct {
		name string
		to   func(arch string) (string, scan)
	}{
		{"by config digest", func(arch string) (string, scan) {
			return shop.name(shop.configs[arch]), scan{config: shop.configs[arch], digests: []string{shop.index}}
		}},
		{"by manifest", func(arch string) (string, scan) {
			return shop.name(shop.manifests[arch]), scan{digests: []string{shop.manifests[arch]}}
		}},
		{"by index and platform", func(arch string) (string, scan) {
			return shop.name(shop.index), scan{digests: []string{shop.index}, platform: "linux/" + arch}
		}},
		{"by index and platform, with the other's config digest beside", func(arch string) (string, scan) {
			return shop.name(shop.index), scan{config: shop.configs[arch], digests: []string{shop.index}, platform: "linux/amd64"}
		}},
		{"by index without a platform", func(string) (string, scan) {
			return shop.name(shop.index), scan{digests: []string{shop.index}}
		}},
	}
	t.Run("a clean report on arm64 gives the amd64 container nothing", func(t *testing.T) {
		for _, way := range ways {
			n.push(way.to("arm64"))
			n.want(t, amd, "missing")
			if t.Failed() {
				t.Fatal(way.name)
			}
		}
		n.want(t, arm, "pass")
	})
	t.Run("a report that names the manifest alone is joined by what the registry proves", func(t *testing.T) {
		out := n.push(shop.name(shop.manifests["amd64"]), scan{digests: []string{shop.manifests["amd64"]}})
		if !strings.Contains(out, amd) {
			t.Errorf("it does not say which image it is about:\n%s", out)
		}
		n.want(t, amd, "pass")
		n.until(running, "/shop")
	})
	t.Run("a condemned arm64 takes nothing from the amd64 container", func(t *testing.T) {
		for _, way := range ways {
			image, s := way.to("arm64")
			s.critical = cve
			n.push(image, s)
			n.want(t, amd, "pass")
			if t.Failed() {
				t.Fatal(way.name)
			}
		}
		n.want(t, arm, "fail")
		n.until(running, "/shop")
	})
	t.Run("a condemned amd64 does", func(t *testing.T) {
		n.push(shop.name(shop.index), scan{digests: []string{shop.index}, platform: "linux/amd64", critical: cve})
		n.want(t, amd, "fail")
		n.until(running, "")
	})
	t.Run("a registry that is down takes away nothing that was proved", func(t *testing.T) {
		reg.Down()
		n.must(n.Stop())
		n.must(n.StartServer(n.ctx))
		n.want(t, amd, "fail")
		n.push(shop.name(shop.index), scan{digests: []string{shop.index}, platform: "linux/amd64"})
		n.until(running, "/shop")
		n.must(reg.Up(n.ctx))
	})
	t.Run("what is attached to an image is found by the tag for referrers", func(t *testing.T) {
		const kind = "application/vnd.dev.sigstore.bundle.v0.3+json"
		attach(n, shop, "amd64", `{"bundle":1}`, kind)
		f, err := image.NewFetcher(image.Config{Registries: []string{reg.Host}, Plain: []string{reg.Host}, AllowPrivate: true})
		n.must(err)
		found, err := f.Attached(t.Context(), shop.repository, shop.manifests["amd64"], image.SigstoreBundle)
		if err != nil || len(found) != 1 || string(found[0].Content) != `{"bundle":1}` {
			t.Errorf("found %v, %v", found, err)
		}
		if other, err := f.Attached(t.Context(), shop.repository, shop.manifests["arm64"], image.SigstoreBundle); err != nil || len(other) != 0 {
			t.Errorf("the other platform has %v, %v", other, err)
		}
	})
	t.Run("what CI has signed and attached is fetched, and opens what it vouches for", func(t *testing.T) {
		key, pem := newKey(n)
		n.restart(prod + evidence(reg.Host, true) + fmt.Sprintf("trust_policy \"ci\" {\n  predicate_types = [\"provenance\"]\n  key {\n    pem = <<EOT\n%sEOT\n  }\n}\n", pem))
		n.entry("/signed", "scan:policy:prod", "prov:policy:ci", "prov:commit:"+commit)
		attach(n, shop, "amd64", signed(n, key, shop.manifests["amd64"]), "application/vnd.dsse.envelope.v1+json")
		attach(n, shop, "arm64", signed(n, key, shop.manifests["arm64"]), "application/vnd.dsse.envelope.v1+json")
		out, err := n.ServerCLI(n.ctx, "evidence", "push", "-image", shop.name(shop.manifests["amd64"]), "-attached")
		n.must(err)
		if !strings.Contains(out, "taken (slsa-v1 provenance) from ci") || !strings.Contains(out, amd) || strings.Contains(out, arm) {
			t.Errorf("it says:\n%s", out)
		}
		n.must(n.agent.WaitFor(n.ctx, "the container to have what the signature opens", func() error {
			out, err := n.agent.CLI(n.ctx, "explain", "-container", running.ID, "-socketPath", n.agent.Admin, "-output", "json")
			if err != nil {
				return err
			}
			var told struct {
				Matches []struct {
					ID string `json:"spiffe_id"`
				}
			}
			n.must(json.Unmarshal([]byte(out), &told))
			for _, m := range told.Matches {
				if strings.HasSuffix(m.ID, "/signed") {
					return nil
				}
			}
			return fmt.Errorf("it says:\n%s", out)
		}))
	})
	t.Run("a registry on a private address is not asked unless that is allowed", func(t *testing.T) {
		n.restart(prod + evidence(reg.Host, false))
		fresh := n.platforms(reg.Host, "team/private", "private")
		out := n.push(fresh.name(fresh.manifests["amd64"]), scan{digests: []string{fresh.manifests["amd64"]}})
		if !strings.Contains(out, "is not public") {
			t.Errorf("it says:\n%s", out)
		}
		n.want(t, fresh.configs["amd64"], "")
	})
	t.Run("a registry that sends on to another host is not followed", func(t *testing.T) {
		front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v2/" {
				return
			}
			http.Redirect(w, r, "http://"+reg.Host+r.URL.Path, http.StatusTemporaryRedirect)
		}))
		defer front.Close()
		host := strings.TrimPrefix(front.URL, "http://")
		n.restart(prod + evidence(host, true))
		fresh := n.platforms(reg.Host, "team/elsewhere", "elsewhere")
		out := n.push(host+"/team/elsewhere@"+fresh.manifests["amd64"], scan{digests: []string{fresh.manifests["amd64"]}})
		if !strings.Contains(out, "registry is not allowed") {
			t.Errorf("it says:\n%s", out)
		}
		n.want(t, fresh.configs["amd64"], "")
	})
}

const commit = "0123456789abcdef0123456789abcdef01234567"

// newKey makes a key for signing and returns it with its public half as PEM.
func newKey(n *node) (*ecdsa.PrivateKey, []byte) {
	n.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	n.must(err)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	n.must(err)
	return key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// signed is a DSSE envelope with provenance of an image, as "cosign attest --key" makes it.
func signed(n *node, key *ecdsa.PrivateKey, digest string) string {
	n.t.Helper()
	payload, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://slsa.dev/provenance/v1",
		"subject": []any{map[string]any{"name": "shop", "digest": map[string]any{"sha256": strings.TrimPrefix(digest, "sha256:")}}},
		"predicate": map[string]any{
			"buildDefinition": map[string]any{
				"buildType": "https://example.org/build", "externalParameters": map[string]any{},
				"resolvedDependencies": []any{map[string]any{"uri": "git+https://example.org/shop", "digest": map[string]any{"gitCommit": commit}}},
			},
			"runDetails": map[string]any{"builder": map[string]any{"id": "https://example.org/builder"}},
		},
	})
	n.must(err)
	const kind = "application/vnd.in-toto+json"
	sum := sha256.Sum256(fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(payload), payload))
	signature, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	n.must(err)
	text, err := json.Marshal(map[string]any{"payload": payload, "payloadType": kind, "signatures": []any{map[string]any{"sig": signature}}})
	n.must(err)
	return string(text)
}

// restart starts the server anew with other blocks.
func (n *node) restart(blocks string) {
	n.t.Helper()
	n.must(n.Stop())
	n.ServerBlocks = "node_attestor \"join_token\" {}\n" + blocks
	n.must(n.StartServer(n.ctx))
}

// attach pushes a document that refers to the image of one platform.
func attach(n *node, p *pushed, arch, text string, mediaType types.MediaType) {
	n.t.Helper()
	img := p.images[arch]
	size, err := img.Size()
	n.must(err)
	digest, err := img.Digest()
	n.must(err)
	artifact := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), "application/vnd.oci.empty.v1+json")
	artifact, err = mutate.AppendLayers(artifact, static.NewLayer([]byte(text), mediaType))
	n.must(err)
	artifact = mutate.Subject(artifact, v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: digest, Size: size}).(v1.Image)
	own, err := artifact.Digest()
	n.must(err)
	ref, err := name.NewDigest(p.name(own.String()), name.Insecure)
	n.must(err)
	n.must(remote.Write(ref, artifact))
}
