// Package upstream is about what is above the server's own X.509 authority: how an authority is asked for,
// and what is believed of the answer. Whom to ask is in the folders below, one for each kind.
//
// Why it is so: whoever signs this server's authority is trusted to say who is in the trust domain, but not
// to be in working order. So nothing of an answer is taken over unlooked at, and all of them pass through
// one place (Check): the certificate must be of our key and of our trust domain, it must lead to one of the
// roots that came with it, and an SVID that it signs, made for trial, must verify the way that workloads
// verify one. What fails is told in one sentence, and the authority that signs at the moment goes on.
package upstream

import (
	"context"
	"crypto/sha1" //nolint:gosec // RFC 5280 4.2.1.2 method 1 names it; it is an identifier, not a signature
	"crypto/x509"
	"encoding/hex"
	"errors"
	"time"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/assay-id/assay/workloadapi/identity"
)

var (
	// ErrRefused says that what an upstream authority answered is not believed.
	ErrRefused = errors.New("answer of the upstream authority is refused")
	// ErrNoJWT says that the upstream authority does not publish the keys of JWT-SVIDs.
	ErrNoJWT = errors.New("upstream authority publishes no JWT keys")
	// ErrNoBundle says that the upstream authority has no bundle that could be followed: its roots are
	// those that come with each certificate.
	ErrNoBundle = errors.New("upstream authority has no bundle to follow")
)

// Request is what an upstream authority is asked to sign.
type Request struct {
	// CSR is the DER of a request that names the trust domain, signed by the new authority's key.
	CSR []byte
	// TTL is the lifetime that is asked for. It may be given less.
	TTL time.Duration
	// Now is when it is asked.
	Now time.Time
}

// Signed is an answer, before anybody has looked at it.
type Signed struct {
	// Chain is the new authority first, and what leads to a root, without the root.
	Chain []*x509.Certificate
	// Roots are what verifiers need to know.
	Roots []*x509.Certificate
}

// Bundle is what an upstream authority that is followed publishes.
type Bundle struct {
	X509 []identity.X509Authority
	JWT  []identity.JWTAuthority
	WIT  []identity.JWTAuthority
	// Partial says that there may be more: what is not in it has not left it.
	Partial bool
}

// Limits of what is taken from an upstream authority.
const (
	// MaxChain is how many certificates may be between a root and an SVID.
	MaxChain = 8
	// MaxRoots is how many roots may come with a certificate.
	MaxRoots = 100
	// MaxAnswer is how long any answer may be, in bytes.
	MaxAnswer = 1 << 20
	// Patience is how long one question may take.
	Patience = 30 * time.Second
)

// RootID names a root: the hexadecimal of its key identifier, or of the one that RFC 5280 4.2.1.2 would give
// its key if it names none.
func RootID(root *x509.Certificate) string {
	if len(root.SubjectKeyId) > 0 {
		return hex.EncodeToString(root.SubjectKeyId)
	}
	in := cryptobyte.String(root.RawSubjectPublicKeyInfo)
	var bits []byte
	if !in.ReadASN1(&in, casn1.SEQUENCE) || !in.SkipASN1(casn1.SEQUENCE) || !in.ReadASN1BitStringAsBytes(&bits) {
		bits = root.RawSubjectPublicKeyInfo
	}
	sum := sha1.Sum(bits) //nolint:gosec // an identifier, see the import
	return hex.EncodeToString(sum[:])
}

// Authority is what every kind of upstream authority is. Each call ends with its context, and in Patience.
type Authority interface {
	// Sign has an authority signed. What it returns is to be checked.
	Sign(ctx context.Context, r Request) (*Signed, error)
	// PublishJWT makes a key known from above, or returns an error wrapping ErrNoJWT.
	PublishJWT(ctx context.Context, key identity.JWTAuthority) error
	// PublishWIT does so with a key that verifies WIT-SVIDs.
	PublishWIT(ctx context.Context, key identity.JWTAuthority) error
	// Follow calls fn with what is published, at once and after every change, until ctx ends or following
	// fails. It returns an error wrapping ErrNoBundle if there is nothing to follow.
	Follow(ctx context.Context, fn func(Bundle)) error
}
