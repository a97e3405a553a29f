package workload

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/cgroup"
	"github.com/assay-id/assay/attestor/docker"
)

// maxSelectors is how many selectors a container may have. Labels and variables are its starter's
// to choose, and every one of them is compared with every entry's.
const maxSelectors = 2048

// imageID returns the ID of the image that the container runs in the form sha256:<hex>, empty if the
// engine gave none. Podman leaves the algorithm out.
func imageID(c container.InspectResponse) string {
	hex := strings.TrimPrefix(c.Image, "sha256:")
	if !cgroup.IsID(hex) { // the same 64 digits as a container's
		return ""
	}
	return "sha256:" + hex
}

// describer turns what the engine says into selectors.
type describer struct {
	env      bool
	claimEnv []string
}

// describe returns the selectors of a container. The image is what the engine says of the container's
// own image ID, nil if it is gone; nothing is ever looked up by the image's name, which can be moved
// to another image while the container runs.
func (d describer) describe(c container.InspectResponse, img *client.ImageInspectResult) ([]attestor.Selector, error) {
	if c.Config == nil {
		return nil, errors.New("engine describes a container without a configuration")
	}
	var list selectorList
	for key, value := range c.Config.Labels {
		list.add(docker.Type, "label", key, value)
	}
	for _, variable := range c.Config.Env {
		if d.env {
			list.add(docker.Type, "env", variable)
		}
		if name, value, ok := strings.Cut(variable, "="); ok && slices.Contains(d.claimEnv, name) {
			list.add(docker.ClaimType, "env", name, value)
		}
	}
	if c.Config.Image != "" {
		list.add(docker.Type, "image_id", c.Config.Image)
	}
	if id := imageID(c); id != "" {
		list.add(docker.Type, "image_config_digest", id)
		// Docker's containerd store has the digest of an index or a manifest for an image ID, which
		// says less than that of the configuration: an index has an image for each platform.
		if !inContainerdStore(c, img) {
			list.add(docker.ImageType, "id", id)
		}
	}
	if manifest := c.ImageManifestDescriptor; manifest != nil && manifest.Digest.Validate() == nil {
		list.add(docker.ImageType, "manifest", manifest.Digest.String())
	}
	if img != nil {
		if platform := platformOf(c, img); platform != "" {
			list.add(docker.ImageType, "platform", platform)
		}
		labels := imageLabels(img)
		for key, value := range labels {
			list.add(docker.ClaimType, "image", key, value)
		}
		for key, value := range c.Config.Labels {
			if built, ok := labels[key]; !ok || built != value {
				list.add(docker.ClaimType, "runtime", key, value)
			}
		}
	}
	if len(list) > maxSelectors {
		return nil, fmt.Errorf("container has %d labels and variables, the limit is %d", len(list), maxSelectors)
	}
	return attestor.NewSet(list...).All(), nil
}

type selectorList []attestor.Selector

// add joins the parts of a value. What cannot be a selector (an over-long label, a variable with a line
// break) is left out; that no entry can name it is the same as that it is not there.
func (l *selectorList) add(kind string, parts ...string) {
	if s := (attestor.Selector{Type: kind, Value: strings.Join(parts, ":")}); s.Check() == nil {
		*l = append(*l, s)
	}
}

func imageLabels(img *client.ImageInspectResult) map[string]string {
	if img.Config == nil {
		return nil
	}
	return img.Config.Labels
}

// inContainerdStore reports whether the engine keeps images by manifest (Docker with the containerd
// image store, the default of new installations since Docker 29) and not by configuration.
func inContainerdStore(c container.InspectResponse, img *client.ImageInspectResult) bool {
	if c.ImageManifestDescriptor != nil || img != nil && img.Descriptor != nil {
		return true
	}
	// Engines before API 1.48 have neither field; their snapshotter's name gives them away, since
	// no graph driver is called so (Docker's is overlay2, Podman's overlay).
	return c.Driver == "overlayfs"
}

func platformOf(c container.InspectResponse, img *client.ImageInspectResult) string {
	platform := ocispec.Platform{OS: img.Os, Architecture: img.Architecture, Variant: img.Variant}
	// For an index the engine describes the variant for its own platform; the container may run
	// another one.
	if c.ImageManifestDescriptor != nil && c.ImageManifestDescriptor.Platform != nil {
		platform = *c.ImageManifestDescriptor.Platform
	}
	if platform.OS == "" || platform.Architecture == "" {
		return ""
	}
	text := platform.OS + "/" + platform.Architecture
	if platform.Variant != "" {
		text += "/" + platform.Variant
	}
	return text
}
