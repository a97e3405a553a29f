// Package terms carries what an agent goes by when it has something signed: the revision of the entry, and the
// verdicts on images that give what the entry demands, each with its sequence number. The server compares it
// with what holds, so that a request that was made before a change and comes after it is refused, and not
// answered with what the agent did not ask for.
//
// Why it is so: the calls are SPIRE's, and their messages have no room for it; metadata is ignored by servers
// that do not know it. It is here because both sides must mean the same by it.
package terms

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server/wire/feedv1"
)

// Key is the name in the metadata. gRPC encodes values of names that end in -bin.
const Key = "assay-signing-terms-bin"

// Limits. Headers are 16 KiB in all, and grow by a third on the wire.
const (
	maxBytes = 8 << 10
	// MaxVerdicts is how many verdicts one item may name.
	MaxVerdicts = 64
)

// Verdict is one verdict as the agent holds it.
type Verdict struct {
	Digest string // sha256:…
	Seq    uint64
}

// Item is what one request goes by.
type Item struct {
	Revision int64 // of the entry
	Verdicts []Verdict
}

// ErrMalformed says that terms cannot be read.
var ErrMalformed = errors.New("malformed signing terms")

const prefix = "sha256:"

// encode returns the bytes of what items go by, or false if they are too many for one call.
func encode(items []Item) ([]byte, bool) {
	m, places := &feedv1.SigningTerms{}, map[Verdict]uint32{}
	for _, item := range items {
		w := &feedv1.SigningTerms_Item{EntryRevision: item.Revision}
		for _, v := range item.Verdicts[:min(len(item.Verdicts), MaxVerdicts)] {
			place, known := places[v]
			if !known {
				digest, err := hex.DecodeString(strings.TrimPrefix(v.Digest, prefix))
				if err != nil || len(digest) != 32 {
					continue // none that a server could know
				}
				place = uint32(len(m.GetVerdicts())) //nolint:gosec // bounded
				places[v] = place
				m.Verdicts = append(m.Verdicts, &feedv1.SigningTerms_HeldVerdict{Digest: digest, SequenceNumber: v.Seq})
			}
			w.Verdicts = append(w.Verdicts, place)
		}
		m.Items = append(m.Items, w)
	}
	raw, err := proto.Marshal(m)
	return raw, err == nil && len(raw) <= maxBytes
}

// Fit reports whether the items go into one call.
func Fit(items []Item) bool {
	_, ok := encode(items)
	return ok
}

// With returns a context whose call carries the terms.
func With(ctx context.Context, items ...Item) context.Context {
	raw, ok := encode(items)
	if !ok {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, Key, string(raw))
}

// Of returns the terms of a call with so many requests, nil if the caller says none: then it is no agent of
// ours. The error wraps ErrMalformed.
func Of(ctx context.Context, requests int) ([]Item, error) {
	values := metadata.ValueFromIncomingContext(ctx, Key)
	if len(values) == 0 {
		return nil, nil
	}
	var m feedv1.SigningTerms
	if len(values) > 1 || len(values[0]) > maxBytes || proto.Unmarshal([]byte(values[0]), &m) != nil {
		return nil, fmt.Errorf("%w: they cannot be read", ErrMalformed)
	}
	if len(m.GetItems()) != requests {
		return nil, fmt.Errorf("%w: for %d requests, of which there are %d", ErrMalformed, len(m.GetItems()), requests)
	}
	items := make([]Item, requests)
	for n, w := range m.GetItems() {
		items[n].Revision = w.GetEntryRevision()
		if len(w.GetVerdicts()) > MaxVerdicts {
			return nil, fmt.Errorf("%w: more than %d verdicts", ErrMalformed, MaxVerdicts)
		}
		for _, place := range w.GetVerdicts() {
			if int(place) >= len(m.GetVerdicts()) || len(m.GetVerdicts()[place].GetDigest()) != 32 {
				return nil, fmt.Errorf("%w: a verdict is not there", ErrMalformed)
			}
			v := m.GetVerdicts()[place]
			items[n].Verdicts = append(items[n].Verdicts, Verdict{Digest: prefix + hex.EncodeToString(v.GetDigest()), Seq: v.GetSequenceNumber()})
		}
	}
	return items, nil
}
