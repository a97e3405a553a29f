package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/assay-id/assay/workloadapi/identity"
)

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	ociConfig   = "application/vnd.oci.image.config.v1+json"
)

func digestOf(name string) string { return sumOf([]byte(name)) }

func manifest(config string) []byte {
	return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":1},"layers":[]}`, ociManifest, ociConfig, config)
}

// index names manifests, each with a platform "os/architecture[/variant]".
func index(children ...[2]string) []byte {
	var list []any
	for _, c := range children {
		parts := append(strings.Split(c[1], "/"), "", "")
		list = append(list, map[string]any{
			"mediaType": ociManifest, "digest": c[0],
			"platform": map[string]string{"os": parts[0], "architecture": parts[1], "variant": parts[2]},
		})
	}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ociIndex, "manifests": list})
	if err != nil {
		panic(err)
	}
	return raw
}

func TestProve(t *testing.T) {
	good := manifest(digestOf("config"))
	both := strings.Replace(string(good), `"layers":[]`, `"layers":[],"manifests":[]`, 1)
	for _, c := range []struct {
		name    string
		content string
		want    error
	}{
		{"a manifest", string(good), nil},
		{"an index", string(index([2]string{digestOf("m"), "linux/amd64"})), nil},
		{"no JSON", "hello", ErrNoImage},
		{"nothing", "", ErrNoImage},
		{"null", "null", ErrNoImage},
		{"a manifest that is an index too", both, ErrNoImage},
		{"a manifest that says it is an index", strings.Replace(string(good), ociManifest, ociIndex, 1), ErrNoImage},
		{"another kind of artifact", strings.Replace(string(good), ociConfig, "application/vnd.cncf.helm.config.v1+json", 1), ErrNoImage},
		{"a config digest that is none", strings.Replace(string(good), digestOf("config"), "sha256:1", 1), ErrNoImage},
		{"an old schema", `{"schemaVersion":1,"fsLayers":[]}`, ErrNoImage},
		{"an index without end", string(index(make([][2]string, maxManifests+1)...)), ErrNoImage},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Prove(sumOf([]byte(c.content)), []byte(c.content))
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("bytes of another digest prove nothing", func(t *testing.T) {
		for _, digest := range []string{digestOf("other"), "sha256:1", "", "md5:" + digestOf("")[7:]} {
			if _, err := Prove(digest, good); !errors.Is(err, ErrDigest) {
				t.Errorf("%q: %v", digest, err)
			}
		}
	})
	t.Run("attestations are no images", func(t *testing.T) {
		content := fmt.Sprintf(`{"schemaVersion":2,"manifests":[
			{"mediaType":%[1]q,"digest":%[2]q,"platform":{"os":"linux","architecture":"amd64"}},
			{"mediaType":%[1]q,"digest":%[3]q,"platform":{"os":"unknown","architecture":"unknown"},"annotations":{"vnd.docker.reference.type":"attestation-manifest"}}
		]}`, ociManifest, digestOf("image"), digestOf("attestation"))
		p, err := Prove(sumOf([]byte(content)), []byte(content))
		if err != nil {
			t.Fatal(err)
		}
		want := []Manifest{{Digest: digestOf("image"), Platform: "linux/amd64"}}
		if diff := cmp.Diff(want, p.Manifests); diff != "" {
			t.Error(diff)
		}
	})
}

// FuzzProve checks that no bytes make the parser panic, and that what it accepts leads somewhere.
func FuzzProve(f *testing.F) {
	f.Add(manifest(digestOf("config")))
	f.Add(index([2]string{digestOf("m"), "linux/arm/v7"}))
	f.Add([]byte(`{"schemaVersion":2,"manifests":null}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		p, err := Prove(sumOf(content), content)
		if err != nil {
			return
		}
		digests := []string{p.Config}
		if p.Config == "" {
			digests = nil
		} else if len(p.Manifests) > 0 {
			t.Errorf("a manifest that is an index: %+v", p)
		}
		for _, m := range p.Manifests {
			digests = append(digests, m.Digest)
		}
		for _, digest := range digests {
			if !identity.ValidDigest(digest) {
				t.Errorf("it leads to %q", digest)
			}
		}
	})
}
