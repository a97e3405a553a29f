package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// Limits on a bundle that came from outside.
const (
	MaxAuthorities = 1000
	MaxKeyID       = 255 // bytes
)

// Bundle holds the authorities of one trust domain. It is immutable once published; Clone it to
// change it.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	X509        []X509Authority // verify X509-SVIDs
	JWT         []JWTAuthority  // verify JWT-SVIDs
	WIT         []JWTAuthority  // verify WIT-SVIDs, and nothing else
	RefreshHint time.Duration   // whole seconds; 0: none
	Sequence    uint64          // grows by one with each change
	// Origin is the sequence number that another trust domain's bundle endpoint gave its document. 0: it
	// gave none, or the bundle came from elsewhere. It stays inside the server.
	Origin uint64
	// CRLs are the lists of revoked certificates, DER, one of each X.509 authority of the trust domain; none:
	// nothing is revoked. They are signed, and travel beside the bundle.
	CRLs [][]byte
	// Nested says that servers below sign for the trust domain too, by authorities that these have signed and
	// that have no list among CRLs. It travels with them.
	Nested bool
}

// X509Authority is a CA certificate that X509-SVIDs are verified against.
type X509Authority struct {
	Certificate *x509.Certificate
	// Tainted authorities still verify, but nothing they signed is to be used any longer than it
	// takes to replace it.
	Tainted bool
}

// JWTAuthority is a public key that JWT-SVIDs are verified with.
type JWTAuthority struct {
	KeyID     string // what tokens name it by in their header (JWT-SVID 2.2)
	Key       crypto.PublicKey
	ExpiresAt time.Time // zero: unknown
	Tainted   bool      // as X509Authority's
}

// Clone returns a copy that can be changed without the original noticing.
func (b *Bundle) Clone() *Bundle {
	c := *b
	c.X509 = slices.Clone(b.X509)
	c.JWT = slices.Clone(b.JWT)
	c.WIT = slices.Clone(b.WIT)
	c.CRLs = slices.Clone(b.CRLs)
	return &c
}

// X509Bundle returns the X.509 authorities, tainted ones included, for go-spiffe's verifiers.
func (b *Bundle) X509Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(b.TrustDomain, b.certificates())
}

// JWTBundle returns the JWT authorities, tainted ones included, for go-spiffe's verifiers.
func (b *Bundle) JWTBundle() *jwtbundle.Bundle {
	return jwtbundle.FromJWTAuthorities(b.TrustDomain, keys(b.JWT))
}

// SPIFFEBundle returns the bundle as the SPIFFE bundle document that bundle endpoints and files hold.
func (b *Bundle) SPIFFEBundle() *spiffebundle.Bundle {
	out := spiffebundle.New(b.TrustDomain)
	out.SetX509Authorities(b.certificates())
	out.SetJWTAuthorities(keys(b.JWT))
	if len(b.WIT) > 0 {
		out.SetWITAuthorities(keys(b.WIT))
	}
	out.SetSequenceNumber(b.Sequence)
	if b.RefreshHint > 0 {
		out.SetRefreshHint(b.RefreshHint)
	}
	return out
}

func (b *Bundle) certificates() []*x509.Certificate {
	certs := make([]*x509.Certificate, len(b.X509))
	for i, a := range b.X509 {
		certs[i] = a.Certificate
	}
	return certs
}

func keys(list []JWTAuthority) map[string]crypto.PublicKey {
	out := make(map[string]crypto.PublicKey, len(list))
	for _, a := range list {
		out[a.KeyID] = a.Key
	}
	return out
}

// BundleFromWire parses a bundle. Authorities must be CA certificates, keys strong, and key IDs
// unique.
func BundleFromWire(w *types.Bundle) (*Bundle, error) {
	if w == nil {
		return nil, errors.New("missing bundle")
	}
	td, err := ParseTrustDomain(w.GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("invalid trust domain: %w", err)
	}
	hint, err := seconds(w.GetRefreshHint())
	if err != nil {
		return nil, fmt.Errorf("invalid refresh hint: %w", err)
	}
	if n := max(len(w.GetX509Authorities()), len(w.GetJwtAuthorities()), len(w.GetWitAuthorities())); n > MaxAuthorities {
		return nil, fmt.Errorf("invalid bundle: %d authorities, the limit is %d", n, MaxAuthorities)
	}
	b := &Bundle{TrustDomain: td, RefreshHint: hint, Sequence: w.GetSequenceNumber()}
	for _, a := range w.GetX509Authorities() {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("invalid X.509 authority: %w", err)
		}
		if err := CheckAuthority(cert); err != nil {
			return nil, fmt.Errorf("invalid X.509 authority: %w", err)
		}
		if !b.HasX509(cert) {
			b.X509 = append(b.X509, X509Authority{Certificate: cert, Tainted: a.GetTainted()})
		}
	}
	if b.JWT, err = keysFromWire("JWT", w.GetJwtAuthorities()); err != nil {
		return nil, err
	}
	if b.WIT, err = keysFromWire("WIT", w.GetWitAuthorities()); err != nil {
		return nil, err
	}
	return b, nil
}

// wireKey is a JWT or a WIT authority in its public form.
type wireKey interface {
	GetPublicKey() []byte
	GetKeyId() string
	GetExpiresAt() int64
	GetTainted() bool
}

func keysFromWire[K wireKey](kind string, list []K) ([]JWTAuthority, error) {
	var out []JWTAuthority
	for _, k := range list {
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("invalid %s authority: %w", kind, err)
		}
		expires, err := unixTime(k.GetExpiresAt())
		weak := CheckKey(key)
		switch {
		case weak != nil:
			return nil, fmt.Errorf("invalid %s authority: %w", kind, weak)
		case err != nil:
			return nil, fmt.Errorf("invalid %s authority: expiry: %w", kind, err)
		case k.GetKeyId() == "":
			return nil, fmt.Errorf("invalid %s authority: missing key ID", kind)
		case len(k.GetKeyId()) > MaxKeyID:
			return nil, fmt.Errorf("invalid %s authority: key ID is %d bytes long, the limit is %d", kind, len(k.GetKeyId()), MaxKeyID)
		case slices.ContainsFunc(out, func(a JWTAuthority) bool { return a.KeyID == k.GetKeyId() }):
			return nil, fmt.Errorf("invalid %s authority: key ID %q is there twice", kind, k.GetKeyId())
		}
		out = append(out, JWTAuthority{KeyID: k.GetKeyId(), Key: key, ExpiresAt: expires, Tainted: k.GetTainted()})
	}
	return out, nil
}

// HasX509 reports whether the certificate is one of the bundle's authorities.
func (b *Bundle) HasX509(cert *x509.Certificate) bool {
	return slices.ContainsFunc(b.X509, func(a X509Authority) bool {
		return bytes.Equal(a.Certificate.Raw, cert.Raw)
	})
}

// Wire returns the bundle in its public form. It fails only for a JWT key of an unknown kind.
func (b *Bundle) Wire() (*types.Bundle, error) {
	w := &types.Bundle{
		TrustDomain:    b.TrustDomain.Name(),
		RefreshHint:    int64(b.RefreshHint / time.Second),
		SequenceNumber: b.Sequence,
	}
	for _, a := range b.X509 {
		w.X509Authorities = append(w.X509Authorities, &types.X509Certificate{Asn1: a.Certificate.Raw, Tainted: a.Tainted})
	}
	for _, k := range b.JWT {
		der, err := x509.MarshalPKIXPublicKey(k.Key)
		if err != nil {
			return nil, fmt.Errorf("marshal JWT authority %q: %w", k.KeyID, err)
		}
		w.JwtAuthorities = append(w.JwtAuthorities, &types.JWTKey{
			PublicKey: der, KeyId: k.KeyID, ExpiresAt: unixSeconds(k.ExpiresAt), Tainted: k.Tainted,
		})
	}
	for _, k := range b.WIT {
		der, err := x509.MarshalPKIXPublicKey(k.Key)
		if err != nil {
			return nil, fmt.Errorf("marshal WIT authority %q: %w", k.KeyID, err)
		}
		w.WitAuthorities = append(w.WitAuthorities, &types.WITKey{
			PublicKey: der, KeyId: k.KeyID, ExpiresAt: unixSeconds(k.ExpiresAt), Tainted: k.Tainted,
		})
	}
	return w, nil
}
