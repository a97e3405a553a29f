package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/assay-id/assay/workloadapi/identity"
)

// maxAttached bounds how many things attached to one image are looked at.
const maxAttached = 100

// Attachment is a document that somebody has attached to an image in a registry. Whoever may push can
// attach anything: it is worth what its own signature is worth.
type Attachment struct {
	// MediaType of the document, as the manifest that carries it says.
	MediaType string
	// Digest of the document; Content has it.
	Digest  string
	Content []byte
}

// attachment is a manifest that refers to an image.
type attachment struct {
	Subject *struct {
		Digest string `json:"digest"`
	} `json:"subject"`
	Layers []struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int64  `json:"size"`
	} `json:"layers"`
}

// Attached returns the documents attached to a manifest or index in the repository whose media type wanted
// says yes to: by the referrers of OCI 1.1, by the tag that stands in for them in registries that
// have none (OCI Distribution 1.1, "Referrers Tag Schema"), and by the tag that cosign before version 3 gave
// to attestations. What a list says of an attachment's kind is not believed, since some registries and tools
// write another: each manifest is looked at. One that cannot be had does not keep the others back: what was
// found is returned beside the error.
func (f *Fetcher) Attached(ctx context.Context, repository, digest string, wanted func(mediaType string) bool) ([]Attachment, error) {
	if !identity.ValidDigest(digest) {
		return nil, fmt.Errorf("fetch attachments: %w: %.80q is no sha256 digest", ErrDigest, digest)
	}
	ref, err := f.reference(repository)
	if err != nil {
		return nil, err
	}
	listing, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	options, err := f.options(listing, ref)
	if err != nil {
		return nil, err
	}
	index, err := remote.Referrers(ref.Digest(digest), options...)
	if err != nil {
		return nil, fmt.Errorf("list attachments of %s@%s: %w", repository, digest, reason(err))
	}
	list, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("list attachments of %s@%s: %w", repository, digest, reason(err))
	}
	var found []Attachment
	var errs []error
	for n, d := range list.Manifests {
		if n == maxAttached {
			errs = append(errs, fmt.Errorf("%w: %s@%s has %d attachments, the limit is %d", ErrTooLarge, repository, digest, len(list.Manifests), maxAttached))
			break
		}
		some, err := f.attachment(ctx, repository, d.Digest.String(), digest, wanted)
		found, errs = append(found, some...), append(errs, err)
	}
	some, err := f.attestations(ctx, ref, repository, digest, wanted)
	return append(found, some...), errors.Join(append(errs, err)...)
}

// attestations returns the wanted documents below cosign's tag. Anybody who may push can move a tag: it is the
// signature in a document that says what it is about.
func (f *Fetcher) attestations(ctx context.Context, ref name.Repository, repository, digest string, wanted func(string) bool) ([]Attachment, error) {
	asking, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	tag := ref.Tag(strings.Replace(digest, ":", "-", 1) + ".att")
	options, err := f.options(asking, ref)
	if err != nil {
		return nil, err
	}
	got, err := remote.Get(tag, options...)
	if failed, ok := errors.AsType[*transport.Error](err); ok && failed.StatusCode == http.StatusNotFound {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", tag, reason(err))
	}
	var m attachment
	if err := json.Unmarshal(got.Manifest, &m); err != nil {
		return nil, fmt.Errorf("attestations %s: %w", tag, err)
	}
	return f.documents(ctx, repository, &m, wanted)
}

// attachment returns the wanted documents of one manifest that refers to subject.
func (f *Fetcher) attachment(ctx context.Context, repository, digest, subject string, wanted func(string) bool) ([]Attachment, error) {
	raw, err := f.Fetch(ctx, repository, digest)
	if err != nil {
		return nil, err
	}
	var m attachment
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("attachment %s@%s: %w", repository, digest, err)
	}
	if m.Subject == nil || m.Subject.Digest != subject {
		return nil, nil // a list may name anything
	}
	return f.documents(ctx, repository, &m, wanted)
}

// documents returns the wanted ones of a manifest.
func (f *Fetcher) documents(ctx context.Context, repository string, m *attachment, wanted func(string) bool) ([]Attachment, error) {
	var found []Attachment
	var errs []error
	for n, layer := range m.Layers {
		if n == maxAttached {
			break
		}
		if !wanted(layer.MediaType) {
			continue
		}
		content, err := f.blob(ctx, repository, layer.Digest)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		found = append(found, Attachment{MediaType: layer.MediaType, Digest: layer.Digest, Content: content})
	}
	return found, errors.Join(errs...)
}

// blob returns the content with the digest, from disk or from the repository.
func (f *Fetcher) blob(ctx context.Context, repository, digest string) ([]byte, error) {
	if !identity.ValidDigest(digest) {
		return nil, fmt.Errorf("fetch attachment: %w: %.80q is no sha256 digest", ErrDigest, digest)
	}
	if content, ok := f.disk.get(digest); ok {
		return content, nil
	}
	ref, err := f.reference(repository)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, asDocument{}, true), f.cfg.Timeout)
	defer cancel()
	options, err := f.options(ctx, ref)
	if err != nil {
		return nil, err
	}
	layer, err := remote.Layer(ref.Digest(digest), options...)
	if err != nil {
		return nil, fmt.Errorf("fetch %s@%s: %w", repository, digest, reason(err))
	}
	stream, err := layer.Compressed() // as it is in the registry
	if err != nil {
		return nil, fmt.Errorf("fetch %s@%s: %w", repository, digest, reason(err))
	}
	defer func() { _ = stream.Close() }()
	content, err := io.ReadAll(stream) // the gate bounds it
	if err != nil {
		return nil, fmt.Errorf("fetch %s@%s: %w", repository, digest, reason(err))
	}
	if sumOf(content) != digest {
		return nil, fmt.Errorf("fetch %s@%s: %w", repository, digest, ErrDigest)
	}
	f.disk.put(digest, content)
	return content, nil
}

// SigstoreBundle reports whether a media type is that of a Sigstore bundle, of any version.
func SigstoreBundle(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.dev.sigstore.bundle")
}

// Signed reports whether a document of the media type may hold a signature of its own: a Sigstore bundle, or a
// DSSE envelope.
func Signed(mediaType string) bool {
	return SigstoreBundle(mediaType) || strings.HasPrefix(mediaType, "application/vnd.dsse.envelope")
}
