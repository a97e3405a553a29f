// Package identity holds the nouns that server, agent and Workload API share: Entry, Bundle and
// SVID, each in its one parsed form, with the one conversion to and from SPIRE's public protos.
//
// Past these conversions a value is well formed, so nothing further in validates again. Values are
// immutable once they have been published to another goroutine.
package identity

import (
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// X509SVID is a certificate chain with its key, as a workload gets it.
type X509SVID struct {
	EntryID string      // of the entry that it was signed for
	ID      spiffeid.ID // the certificate's only URI name (X509-SVID 2)
	// Chain is DER, leaf first, without the root.
	Chain [][]byte
	// Key is the leaf's private key; KeyDER the same as PKCS #8.
	Key    crypto.Signer
	KeyDER []byte
	// NotBefore and NotAfter are the leaf's, in whole seconds.
	NotBefore time.Time
	NotAfter  time.Time
	Hint      string // the entry's
}

// JWTSVID is a signed token, as a workload gets it.
type JWTSVID struct {
	EntryID   string      // of the entry that it was signed for; empty: it was minted without one
	ID        spiffeid.ID // its subject (JWT-SVID 3.1)
	Token     string      // JWS in compact form: a secret until it expires
	Hint      string      // the entry's
	IssuedAt  time.Time   // whole seconds
	ExpiresAt time.Time   // whole seconds
}

// WITSVID is a signed token that is worth something only to who has the key that it names.
type WITSVID struct {
	JWTSVID
	// Key is the private key.
	Key crypto.Signer
}

// Checksum returns a digest of what an agent holds: the entries by ID, revision and creation time,
// and the bundles by trust domain and sequence number. Server and agent compute it independently of
// each other after each picture, so that an agent that drifted is found out and starts afresh.
// The order of the arguments' elements does not matter.
func Checksum(entries []*Entry, bundles []*Bundle) []byte {
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b *Entry) int { return strings.Compare(a.ID, b.ID) })
	bundles = slices.Clone(bundles)
	slices.SortFunc(bundles, func(a, b *Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })

	h := sha256.New()
	var buf []byte
	text := func(s string) { buf = binary.BigEndian.AppendUint32(buf, uint32(len(s))); buf = append(buf, s...) } //nolint:gosec // lengths are limited
	number := func(n uint64) { buf = binary.BigEndian.AppendUint64(buf, n) }
	number(uint64(len(entries)))
	for _, e := range entries {
		text(e.ID)
		number(uint64(e.Revision))               //nolint:gosec // never negative
		number(uint64(unixSeconds(e.CreatedAt))) //nolint:gosec // never negative
		h.Write(buf)
		buf = buf[:0]
	}
	for _, b := range bundles {
		text(b.TrustDomain.Name())
		number(b.Sequence)
	}
	h.Write(buf)
	return h.Sum(nil)
}
