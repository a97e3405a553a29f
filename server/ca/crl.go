package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

// maxRevoked bounds a list: every verifier reads all of it.
const maxRevoked = 100_000

// SignCRLs signs lists of revoked certificates (RFC 5280 section 5), one for each X.509 authority whose key
// is there, the active one's first: version 2, with the authority's key identifier and the number, which
// must grow from time to time. revoked are certificates with the authority that signed each and when it was
// revoked; one of which it is not known who signed it is on every list. until is when the next lists will
// have come. An empty list is a good one.
//
// A verifier that asks for a list refuses what it has no list for. So there is one of the authority that is
// prepared, before it signs anything, and one of each that is old, for as long as something that it signed
// may be about.
func (c *CA) SignCRLs(_ context.Context, number uint64, revoked []records.Serial, until time.Time) ([][]byte, error) {
	if len(revoked) > maxRevoked {
		return nil, fmt.Errorf("sign CRL: %d certificates are revoked, the limit is %d", len(revoked), maxRevoked)
	}
	now := c.cfg.Now()
	var lists [][]byte
	for _, a := range c.listers.Load().authorities {
		if a.expired(now) {
			continue
		}
		mine := slices.DeleteFunc(slices.Clone(revoked), func(one records.Serial) bool {
			return one.GetAuthorityId() != "" && one.GetAuthorityId() != a.line.AuthorityID
		})
		der, err := c.signCRL(a, new(big.Int).SetUint64(number), mine, now, until)
		if err != nil {
			return nil, err
		}
		lists = append(lists, der)
	}
	if len(lists) == 0 {
		return nil, fmt.Errorf("sign CRL: %w", ErrNoAuthority)
	}
	return lists, nil
}

// signCRL signs the list of one authority.
func (c *CA) signCRL(a *authority, number *big.Int, revoked []records.Serial, now, until time.Time) ([]byte, error) {
	template := &x509.RevocationList{Number: number, ThisUpdate: now.Add(-c.cfg.Backdate).UTC(), NextUpdate: until.UTC()}
	for _, one := range revoked {
		n, ok := new(big.Int).SetString(one.Number, 10)
		if !ok || n.Sign() <= 0 {
			return nil, fmt.Errorf("sign CRL: %q is no serial number", one.Number)
		}
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: n, RevocationTime: time.Unix(one.GetRevokedAt(), 0).UTC()})
	}
	slices.SortFunc(template.RevokedCertificateEntries, func(a, b x509.RevocationListEntry) int {
		return strings.Compare(a.SerialNumber.Text(62), b.SerialNumber.Text(62))
	})
	der, err := x509.CreateRevocationList(rand.Reader, template, a.cert, a.lister)
	if err != nil {
		return nil, fmt.Errorf("sign CRL of authority %s: %w", a.line.AuthorityID, err)
	}
	return der, nil
}

// listAlong gives the lists that are in a bundle one of an authority that comes to it: with the same number
// and end, and empty, for it has signed nothing. Without it there would be a moment in which verifiers
// that demand a list of each authority have one too few.
func (c *CA) listAlong(b *identity.Bundle, a *authority, now time.Time) {
	if len(b.CRLs) == 0 || a.lister == nil {
		return
	}
	var der []byte
	like, err := x509.ParseRevocationList(b.CRLs[0])
	if err == nil {
		der, err = c.signCRL(a, like.Number, nil, now, like.NextUpdate)
	}
	if err != nil {
		c.log.WithError(err).Warn("The list of revoked certificates of a new authority comes later than the authority")
		return
	}
	b.CRLs = append(slices.Clip(b.CRLs), der)
}

// listers are the authorities that can sign lists of revoked certificates.
type listers struct {
	authorities []*authority
	replaced    chan struct{} // closed when there are others
}

// CRLsDue returns a channel that is closed when other authorities sign lists than now: then all are to be
// made anew.
func (c *CA) CRLsDue() <-chan struct{} { return c.listers.Load().replaced }

// relist publishes which authorities can sign lists. mu is held.
func (c *CA) relist() {
	var list []*authority
	for _, a := range c.sorted() {
		if a.lister != nil && (a.signer != nil || c.lists(a, c.cfg.Now())) {
			list = append(list, a)
		}
	}
	slices.SortStableFunc(list, func(a, b *authority) int {
		switch {
		case a.line.State == StateActive:
			return -1
		case b.line.State == StateActive:
			return 1
		}
		return 0
	})
	was := c.listers.Load()
	if was != nil && slices.Equal(was.authorities, list) {
		return
	}
	c.listers.Store(&listers{authorities: list, replaced: make(chan struct{})})
	if was != nil {
		close(was.replaced)
	}
}

// lists reports whether an authority that does not sign any more keeps its key for lists of revoked
// certificates: as long as something that it signed can be valid, and the bundle verifies it.
func (c *CA) lists(a *authority, now time.Time) bool {
	return c.cfg.RevocationLists && a.line.Kind == KindX509 && !a.expired(now) &&
		(a.line.State == StateOld || a.line.State == StateTainted)
}

// loadLister finds the key of an authority that signs lists and nothing else. One whose key is gone signs
// none: what it signed will not be on a list.
func (c *CA) loadLister(ctx context.Context, a *authority) error {
	if !c.lists(a, c.cfg.Now()) {
		return nil
	}
	key, err := c.keys.Get(ctx, a.line.KeyID)
	switch {
	case errors.Is(err, keys.ErrNotFound):
		return nil
	case err != nil:
		return fmt.Errorf("get key of %s authority %s: %w", a.line.Kind, a.line.AuthorityID, err)
	case !samePublic(a.public, key.Public()):
		return nil
	}
	a.lister = key
	return nil
}
