package issue

import (
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	"github.com/assay-id/assay/workloadapi/identity"
)

// maxRevoked is how many authorities are remembered that left the bundle before they expired.
const maxRevoked = 100

// revoked are authorities that left the own bundle before they expired: what one of them signed while
// that was on its way is thrown away.
type revoked struct {
	certs []*x509.Certificate
	keys  map[string]struct{}
}

// see takes in what left a bundle, and forgets what has come back.
func (r *revoked) see(was, is *identity.Bundle, now time.Time) {
	for _, a := range was.X509 {
		// An authority that left because it had expired has nothing valid to its name.
		if !is.HasX509(a.Certificate) && now.Before(a.Certificate.NotAfter) {
			r.certs = append(r.certs, a.Certificate)
		}
	}
	r.certs = slices.DeleteFunc(r.certs, func(c *x509.Certificate) bool { return is.HasX509(c) || !now.Before(c.NotAfter) })
	r.certs = r.certs[max(0, len(r.certs)-maxRevoked):]
	for _, a := range slices.Concat(was.JWT, was.WIT) {
		if a.ExpiresAt.IsZero() || now.Before(a.ExpiresAt) {
			if r.keys == nil || len(r.keys) >= maxRevoked {
				r.keys = map[string]struct{}{}
			}
			r.keys[a.KeyID] = struct{}{}
		}
	}
	for _, a := range slices.Concat(is.JWT, is.WIT) {
		delete(r.keys, a.KeyID)
	}
}

// has reports whether the JWT authority is one of them.
func (r *revoked) has(keyID string) bool {
	_, gone := r.keys[keyID]
	return gone
}

// errRevoked says that a server is behind the bundle it has sent.
var errRevoked = errors.New("server signed with an authority that is revoked")

// replace has the SVIDs replaced that the authority signed, whether or not somebody follows them:
// whoever asks next is not to get one of them. mu is held.
func (i *Issuer) replace(authority *x509.Certificate, now time.Time) {
	for _, sl := range i.slots {
		if sl.svid != nil && sl.top != nil && signedBy(sl.top, authority) {
			sl.forced, sl.renewAt = true, now
			sl.retryAt, sl.failures = time.Time{}, 0
		}
	}
}

// withdrawn takes the SVIDs away that the authority signed. mu is held.
func (i *Issuer) withdrawn(authority *x509.Certificate) {
	for _, sl := range i.slots {
		if sl.top != nil && signedBy(sl.top, authority) {
			sl.svid, sl.top = nil, nil
		}
	}
}

// distrusted says that tokens signed with the key are not to be given out. mu is held.
func (i *Issuer) distrusted(keyID string) bool {
	if i.revoked.has(keyID) {
		return true
	}
	own := i.own()
	return own != nil && slices.ContainsFunc(slices.Concat(own.JWT, own.WIT), func(a identity.JWTAuthority) bool { return a.Tainted && a.KeyID == keyID })
}

// Held is how many SVIDs are held that an authority signed.
type Held struct {
	Authority string // the hexadecimal key identifier of an X.509 authority, the key ID of a JWT authority
	X509, JWT int
}

// Holding says by whom what is held was signed, sorted by authority.
type Holding struct {
	By []Held
	// Latest are the authorities that signed last here.
	Latest [2]string
}

// Holding returns by whom what is held was signed, and a channel that is closed when that may be
// different.
func (i *Issuer) Holding() (Holding, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	by := map[string]Held{}
	for _, sl := range i.slots {
		if sl.svid != nil && sl.signer != "" {
			h := by[sl.signer]
			h.X509++
			by[sl.signer] = h
		}
	}
	for _, sl := range i.jwts.slots {
		if sl.svid != nil && sl.keyID != "" {
			h := by[sl.keyID]
			h.JWT++
			by[sl.keyID] = h
		}
	}
	h := Holding{Latest: i.latest}
	for id, held := range by {
		held.Authority = id
		h.By = append(h.By, held)
	}
	slices.SortFunc(h.By, func(a, b Held) int { return cmp.Compare(a.Authority, b.Authority) })
	return h, i.holds
}

// held says that what is held may be different. mu is held.
func (i *Issuer) held() {
	close(i.holds)
	i.holds = make(chan struct{})
}

// signerOf names the authority that signed a chain's leaf.
func signerOf(leaf []byte) string {
	cert, err := x509.ParseCertificate(leaf)
	if err != nil {
		return ""
	}
	return hex.EncodeToString(cert.AuthorityKeyId)
}

// fromRevoked says of what the server sent that an authority signed it that is revoked. mu is held.
func (i *Issuer) fromRevoked(svid *identity.X509SVID) bool {
	if len(i.revoked.certs) == 0 {
		return false
	}
	top, err := x509.ParseCertificate(svid.Chain[len(svid.Chain)-1])
	return err == nil && slices.ContainsFunc(i.revoked.certs, func(a *x509.Certificate) bool { return signedBy(top, a) })
}
