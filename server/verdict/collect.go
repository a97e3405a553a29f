package verdict

import (
	"context"
	"errors"
	"fmt"

	proofs "github.com/assay-id/assay/server/verdict/image"
)

// Collected is a document that was attached to an image in its registry, and what became of it.
type Collected struct {
	// Digest is the document's own, MediaType what the registry says that it is. Both are empty where Refused is about
	// what could not be asked for.
	Digest, MediaType string
	Pushed            *Pushed // nil if it was refused
	Refused           error   // why
}

// maxCollectedFrom is of how many digests of one image attachments are looked for: whoever signs an image names
// the index, its manifest, or both.
const maxCollectedFrom = 8

// Collect fetches what is attached to an image in its registry and takes it in as if the caller had pushed it,
// except that only what is signed counts, even from an administrator: whoever may push to a registry can attach
// anything. That one document is refused or cannot be had keeps none of the others back; the error is about
// what could not be asked for at all.
func (s *Service) Collect(ctx context.Context, who Pusher, image string) ([]Collected, error) {
	in := &incoming{now: s.cfg.Now()}
	if err := in.image(who, Document{Image: image}); err != nil {
		return nil, err
	}
	switch {
	case in.repository == "":
		return nil, clash(ErrImage, "where is the image? Write registry/repository@sha256:…")
	case s.Fetcher == nil:
		return nil, clash(ErrImage, "this server asks no registry: name those it may ask in evidence { registries = […] }")
	}
	if err := s.resolve(ctx, in); err != nil {
		return nil, clash(ErrImage, "the registry cannot say what the image is: %w", err)
	}
	var list []Collected
	var errs []error
	seen := map[string]bool{}
	for n, digest := range append([]string{in.digest}, in.wanted...) {
		if seen[digest] || n > maxCollectedFrom {
			continue
		}
		seen[digest] = true
		found, err := s.Fetcher.Attached(ctx, in.repository, digest, proofs.Signed)
		if err != nil && (digest == in.digest || len(found) > 0) {
			errs = append(errs, err) // of the others a registry need not have all
		}
		for _, a := range found {
			if seen[a.Digest] {
				continue
			}
			seen[a.Digest] = true
			one := Collected{Digest: a.Digest, MediaType: clip(a.MediaType)}
			one.Pushed, one.Refused = s.Push(ctx, who, Document{Image: image, Content: a.Content, Signed: true})
			if one.Refused != nil && !errors.Is(one.Refused, ErrRefused) {
				return list, fmt.Errorf("take in attachment %s: %w", a.Digest, one.Refused)
			}
			list = append(list, one)
		}
	}
	if len(list) == 0 && len(errs) > 0 {
		return nil, clash(ErrImage, "what is attached to the image cannot be had: %w", errors.Join(errs...))
	}
	for _, err := range errs {
		list = append(list, Collected{Refused: err})
	}
	return list, nil
}
