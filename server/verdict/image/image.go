// Package image says whether a report, a signature or a provenance is about the image that a container
// runs.
//
// A container's image is known by its config digest alone, which the runtime says by the container's
// ID. It fixes the bytes of the root file system, whatever registry they came from and however they
// were packed. Scanners and signers name other digests: of a manifest, or of an index that has a
// manifest for each platform. A link from these to the config digest counts only if it was proved: by
// bytes that hash to the digest and that name the next one. Names and tags never match anything, since
// whoever may push can move them.
//
// Links holds what was proved, Match is the rule, and Fetcher gets the bytes from registries.
package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/assay-id/assay/workloadapi/identity"
)

// Strength is how surely a claim is about an image.
type Strength int

// The strengths. A weak match is by the digest of an index and a platform that the claim states itself:
// it counts only where a policy says so.
const (
	None Strength = iota
	Weak
	Strong
)

// String returns "none", "weak" or "strong".
func (s Strength) String() string {
	switch s {
	case Weak:
		return "weak"
	case Strong:
		return "strong"
	default:
		return "none"
	}
}

// Subject is the image of a container.
type Subject struct {
	// Config is the config digest, "sha256:…". Empty: the runtime does not say, and nothing matches.
	Config string
	// Platform is "os/architecture" or "os/architecture/variant"; empty: unknown.
	Platform string
}

// Claim is what evidence says that it is about.
type Claim struct {
	// ImageID is the config digest, where the evidence states one.
	ImageID string
	// Digests are those of manifests or indexes that the evidence names.
	Digests []string
	// Platform that the evidence states; empty: none.
	Platform string
	// Whole says that the evidence is about all that its digests name, as signatures and provenance
	// are. A scan of an index has looked at one platform.
	Whole bool
}

// Link is a proved step from one digest to the next.
type Link struct {
	From, To string
	// Platform is what an index says of its manifest; empty for the step from a manifest to the
	// config.
	Platform string
}

// String returns the link for people: from → to (platform).
func (l Link) String() string {
	if l.Platform == "" {
		return l.From + " → " + l.To
	}
	return l.From + " → " + l.To + " (" + l.Platform + ")"
}

// Match says whether the claim is about the subject, and by which proved links.
//
// It is if it states the config digest, or names a manifest that was proved to have it (strong). A
// claim on an index that was proved to lead to it is strong if it is about the whole index; otherwise
// weak, and only if it states the subject's platform. A claim that states another image never
// matches, whatever else it names.
func Match(c Claim, s Subject, links *Links) (Strength, []Link) {
	if !identity.ValidDigest(s.Config) {
		return None, nil
	}
	if c.ImageID == s.Config {
		return Strong, nil
	}
	digests := c.Digests
	if c.ImageID != "" {
		// Engines that keep images by manifest have the digest of one, or of an index, for an ID.
		if !links.has(c.ImageID) {
			return None, nil
		}
		digests = []string{c.ImageID}
	}
	best, proof := None, []Link(nil)
	for _, digest := range digests {
		strength, path := links.match(digest, c, s)
		if strength > best {
			best, proof = strength, path
		}
	}
	return best, proof
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

// Links are the links that were proved. They stay true for ever. It is safe for concurrent use; the zero
// value has none.
type Links struct {
	mu        sync.RWMutex // guards the rest
	manifests map[string]string
	indexes   map[string][]Link
}

// Proved is what bytes have proved of a digest.
type Proved struct {
	// Config is the config digest that a manifest names; empty for an index.
	Config string
	// Manifests are what an index names, attestations left out.
	Manifests []Link
}

// Prove takes in the content of a manifest or an index, if it hashes to the digest.
func (l *Links) Prove(digest string, content []byte) (Proved, error) {
	if !identity.ValidDigest(digest) {
		return Proved{}, fmt.Errorf("%w: %.80q is no sha256 digest", ErrDigest, digest)
	}
	if sumOf(content) != digest {
		return Proved{}, fmt.Errorf("%w %s", ErrDigest, digest)
	}
	p, err := parse(digest, content)
	if err != nil {
		return Proved{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.manifests == nil {
		l.manifests, l.indexes = map[string]string{}, map[string][]Link{}
	}
	if p.Config != "" {
		l.manifests[digest] = p.Config
	} else {
		l.indexes[digest] = p.Manifests
	}
	return p, nil
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
		link := Link{From: digest, To: m.Digest}
		if m.Platform != nil && m.Platform.OS != "unknown" {
			link.Platform = Platform(m.Platform.OS, m.Platform.Architecture, m.Platform.Variant)
		}
		p.Manifests = append(p.Manifests, link)
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

// normal is Platform of a text.
func normal(platform string) string {
	parts := strings.SplitN(platform, "/", 3)
	if len(parts) < 2 {
		return ""
	}
	return Platform(parts[0], parts[1], strings.Join(parts[2:], ""))
}

// has reports whether anything is proved of a digest.
func (l *Links) has(digest string) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	_, manifest := l.manifests[digest]
	_, index := l.indexes[digest]
	return manifest || index
}

// match follows the links from a digest to the subject.
func (l *Links) match(digest string, c Claim, s Subject) (Strength, []Link) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if config, ok := l.manifests[digest]; ok {
		if config != s.Config {
			return None, nil
		}
		return Strong, []Link{{From: digest, To: config}}
	}
	at := slices.IndexFunc(l.indexes[digest], func(child Link) bool {
		return l.manifests[child.To] == s.Config &&
			// A manifest may stand in an index for several platforms.
			(s.Platform == "" || child.Platform == "" || normal(s.Platform) == child.Platform)
	})
	if at < 0 {
		return None, nil
	}
	child := l.indexes[digest][at]
	proof := []Link{child, {From: child.To, To: s.Config}}
	switch {
	case c.Whole:
		return Strong, proof
	case c.Platform != "" && s.Platform != "" && normal(c.Platform) == normal(s.Platform) && child.Platform == normal(s.Platform):
		return Weak, proof
	}
	return None, nil
}

func sumOf(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}
