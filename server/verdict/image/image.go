// Package image proves which image a digest leads to.
//
// A container's image is known by its config digest alone, which the runtime says by the container's
// ID. It fixes the bytes of the root file system, whatever registry they came from and however they
// were packed. Scanners and signers name other digests: of a manifest, or of an index that has a
// manifest for each platform. A link from these to the config digest counts only if it was proved: by
// bytes that hash to the digest and that name the next one. Names and tags never match anything, since
// whoever may push can move them.
//
// Prove is the proof, and Fetcher gets the bytes from registries. Which document is about which image, given what
// was proved, is verdict's business.
package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/assay-id/assay/workloadapi/identity"
)

// Manifest is what an index says of one of its images.
type Manifest struct {
	Digest string
	// Platform is as Platform writes it; empty: the index does not say.
	Platform string
}

// Errors of a proof.
var (
	// ErrDigest says that bytes do not hash to the digest they were given for.
	ErrDigest = errors.New("content does not have the digest")
	// ErrNoImage says that bytes are neither the manifest of an image nor an index.
	ErrNoImage = errors.New("content is no image manifest and no index")
)

// maxManifests bounds an index: one has a manifest, and perhaps an attestation, for each platform.
const maxManifests = 1000

// Proved is what bytes have proved of a digest.
type Proved struct {
	// Config is the config digest that a manifest names; empty for an index.
	Config string
	// Manifests are what an index names, attestations left out; empty for a manifest.
	Manifests []Manifest
}

// Prove reads the content of a manifest or an index. It returns ErrDigest unless the content hashes to the
// digest ("sha256:…"), and ErrNoImage if it is neither. What it returns stays true for ever, whoever brought
// the content.
func Prove(digest string, content []byte) (Proved, error) {
	if !identity.ValidDigest(digest) {
		return Proved{}, fmt.Errorf("%w: %.80q is no sha256 digest", ErrDigest, digest)
	}
	if sumOf(content) != digest {
		return Proved{}, fmt.Errorf("%w %s", ErrDigest, digest)
	}
	return parse(digest, content)
}

// document is what manifests and indexes have in common. One that is both is refused: different readers
// would see different things in the same bytes.
type document struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     types.MediaType `json:"mediaType"`
	Config        *descriptor     `json:"config"`
	Layers        json.RawMessage `json:"layers"`
	FSLayers      json.RawMessage `json:"fsLayers"`
	Manifests     []descriptor    `json:"manifests"`
}

type descriptor struct {
	MediaType   types.MediaType   `json:"mediaType"`
	Digest      string            `json:"digest"`
	Annotations map[string]string `json:"annotations"`
	Platform    *struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
	} `json:"platform"`
}

func parse(digest string, content []byte) (Proved, error) {
	var d document
	if err := json.Unmarshal(content, &d); err != nil {
		return Proved{}, fmt.Errorf("%w: %s: %w", ErrNoImage, digest, err)
	}
	refuse := func(format string, args ...any) (Proved, error) {
		return Proved{}, fmt.Errorf("%w: %s: %s", ErrNoImage, digest, fmt.Sprintf(format, args...))
	}
	isManifest, isIndex := d.Config != nil || d.Layers != nil, d.Manifests != nil
	switch {
	case d.SchemaVersion != 2:
		return refuse("schema version %d", d.SchemaVersion)
	case d.FSLayers != nil, isManifest && isIndex:
		return refuse("it is two things at once")
	case isIndex && (d.MediaType == "" || d.MediaType.IsIndex()):
		return parseIndex(digest, d.Manifests)
	case isManifest && (d.MediaType == "" || d.MediaType.IsImage()):
		if d.Config == nil || !d.Config.MediaType.IsConfig() {
			return refuse("it has no configuration of an image")
		}
		if !identity.ValidDigest(d.Config.Digest) {
			return refuse("its configuration has no sha256 digest")
		}
		return Proved{Config: d.Config.Digest}, nil
	}
	return refuse("media type %.100q", d.MediaType)
}

func parseIndex(digest string, list []descriptor) (Proved, error) {
	if n := len(list); n > maxManifests {
		return Proved{}, fmt.Errorf("%w: %s: index of %d manifests, the limit is %d", ErrNoImage, digest, n, maxManifests)
	}
	p := Proved{}
	for _, m := range list {
		// Docker's builds put attestations beside the images, of platform unknown/unknown.
		if m.Annotations["vnd.docker.reference.type"] != "" || !m.MediaType.IsImage() || !identity.ValidDigest(m.Digest) {
			continue
		}
		child := Manifest{Digest: m.Digest}
		if m.Platform != nil && m.Platform.OS != "unknown" {
			child.Platform = Platform(m.Platform.OS, m.Platform.Architecture, m.Platform.Variant)
		}
		p.Manifests = append(p.Manifests, child)
	}
	return p, nil
}

// Platform returns the text for a platform, the same for different ways to say it: arm64 has but one
// variant that is written or left out, as has amd64 its first.
func Platform(os, architecture, variant string) string {
	os, architecture, variant = strings.ToLower(os), strings.ToLower(architecture), strings.ToLower(variant)
	if architecture == "arm64" && (variant == "v8" || variant == "8") || architecture == "amd64" && variant == "v1" {
		variant = ""
	}
	text := os + "/" + architecture
	if variant != "" {
		text += "/" + variant
	}
	return text
}

func sumOf(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}
