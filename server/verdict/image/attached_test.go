package image

import (
	"errors"
	"io"
	"log" //nolint:depguard // what the registry of these tests writes to
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const bundleType = "application/vnd.dev.sigstore.bundle.v0.3+json"

// attach pushes an artifact with the documents that refers to the image.
func attach(t *testing.T, repository string, subject v1.Image, documents map[string]string) {
	t.Helper()
	artifact := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	// What cosign writes on some registries: the list says nothing of what it is.
	artifact = mutate.ConfigMediaType(artifact, "application/vnd.oci.empty.v1+json")
	for text, mediaType := range documents {
		var err error
		if artifact, err = mutate.AppendLayers(artifact, static.NewLayer([]byte(text), types.MediaType(mediaType))); err != nil {
			t.Fatal(err)
		}
	}
	desc, err := partialDescriptor(subject)
	if err != nil {
		t.Fatal(err)
	}
	artifact = mutate.Subject(artifact, desc).(v1.Image)
	digest, err := artifact.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewDigest(repository+"@"+digest.String(), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, artifact); err != nil {
		t.Fatal(err)
	}
}

func partialDescriptor(img v1.Image) (v1.Descriptor, error) {
	digest, err := img.Digest()
	if err != nil {
		return v1.Descriptor{}, err
	}
	size, err := img.Size()
	if err != nil {
		return v1.Descriptor{}, err
	}
	mediaType, err := img.MediaType()
	return v1.Descriptor{MediaType: mediaType, Digest: digest, Size: size}, err
}

func TestAttached(t *testing.T) {
	for how, options := range map[string][]registry.Option{
		"by referrers":             {registry.WithReferrersSupport(true)},
		"by the tag for referrers": nil,
	} {
		t.Run("bundles are found "+how, func(t *testing.T) {
			server := httptest.NewServer(registry.New(append(options, registry.Logger(log.New(io.Discard, "", 0)))...))
			t.Cleanup(server.Close)
			host := strings.TrimPrefix(server.URL, "http://")
			repository := host + "/team/shop"
			img, err := random.Image(64, 1)
			if err != nil {
				t.Fatal(err)
			}
			ref, err := name.NewTag(repository+":latest", name.Insecure)
			if err != nil {
				t.Fatal(err)
			}
			if err := remote.Write(ref, img); err != nil {
				t.Fatal(err)
			}
			attach(t, repository, img, map[string]string{`{"bundle":1}`: bundleType, "an SBOM": "text/spdx+json"})
			attach(t, repository, img, map[string]string{`{"bundle":2}`: bundleType})
			digest, err := img.Digest()
			if err != nil {
				t.Fatal(err)
			}
			f, err := NewFetcher(Config{Registries: []string{host}, Plain: []string{host}, AllowPrivate: true, Dir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			found, err := f.Attached(t.Context(), repository, digest.String(), SigstoreBundle)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]bool{}
			for _, a := range found {
				got[string(a.Content)] = sumOf(a.Content) == a.Digest && a.MediaType == bundleType
			}
			if diff := cmp.Diff(map[string]bool{`{"bundle":1}`: true, `{"bundle":2}`: true}, got); diff != "" {
				t.Error(diff)
			}
			t.Run("what cosign before version 3 left under its tag is found beside", func(t *testing.T) {
				old, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1),
					static.NewLayer([]byte(`{"payload":""}`), "application/vnd.dsse.envelope.v1+json"), static.NewLayer([]byte("an SBOM"), "text/spdx+json"))
				if err != nil {
					t.Fatal(err)
				}
				tag, err := name.NewTag(repository+":"+strings.Replace(digest.String(), ":", "-", 1)+".att", name.Insecure)
				if err != nil {
					t.Fatal(err)
				}
				if err := remote.Write(tag, old); err != nil {
					t.Fatal(err)
				}
				found, err := f.Attached(t.Context(), repository, digest.String(), Signed)
				if err != nil || len(found) != 3 || string(found[2].Content) != `{"payload":""}` {
					t.Errorf("found %v, %v", found, err)
				}
			})
			t.Run("an image without any has none", func(t *testing.T) {
				other, err := random.Image(64, 1)
				if err != nil {
					t.Fatal(err)
				}
				if err := remote.Write(ref, other); err != nil {
					t.Fatal(err)
				}
				digest, err := other.Digest()
				if err != nil {
					t.Fatal(err)
				}
				if found, err := f.Attached(t.Context(), repository, digest.String(), SigstoreBundle); err != nil || len(found) != 0 {
					t.Errorf("found %v, %v", found, err)
				}
			})
		})
	}
	t.Run("a registry that is not on the list is not asked", func(t *testing.T) {
		server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Errorf("asked for %s", r.URL) }))
		defer server.Close()
		f, err := NewFetcher(Config{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Attached(t.Context(), strings.TrimPrefix(server.URL, "http://")+"/x", digestOf("x"), SigstoreBundle); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
}
