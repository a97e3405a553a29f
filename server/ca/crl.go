package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"
)

// maxRevoked bounds a list: every verifier reads all of it.
const maxRevoked = 100_000

// SignCRL signs a list of revoked certificates (RFC 5280 section 5) with the active X.509 authority:
// version 2, with the authority's key identifier and the number, which must grow from list to list.
// revoked are serial numbers in decimal and when each was revoked; until is when the next list will
// have come. An empty list is a good one.
//
// It covers what the active authority has signed. A certificate of the authority before it expires soon
// after the new one has begun to sign, for no SVID outlives its half of the schedule; what is revoked of
// those is on the list nevertheless, for verifiers that compare serial numbers alone.
func (c *CA) SignCRL(_ context.Context, number uint64, revoked map[string]time.Time, until time.Time) ([]byte, error) {
	a := c.current(KindX509)
	if a == nil {
		return nil, ErrNoAuthority
	}
	if len(revoked) > maxRevoked {
		return nil, fmt.Errorf("sign CRL: %d certificates are revoked, the limit is %d", len(revoked), maxRevoked)
	}
	now := c.cfg.Now().UTC()
	template := &x509.RevocationList{
		Number: new(big.Int).SetUint64(number), ThisUpdate: now.Add(-c.cfg.Backdate), NextUpdate: until.UTC(),
	}
	for serial, at := range revoked {
		n, ok := new(big.Int).SetString(serial, 10)
		if !ok || n.Sign() <= 0 {
			return nil, fmt.Errorf("sign CRL: %q is no serial number", serial)
		}
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: at.UTC()})
	}
	slices.SortFunc(template.RevokedCertificateEntries, func(a, b x509.RevocationListEntry) int {
		return strings.Compare(a.SerialNumber.Text(62), b.SerialNumber.Text(62))
	})
	der, err := x509.CreateRevocationList(rand.Reader, template, a.cert, a.signer)
	if err != nil {
		return nil, fmt.Errorf("sign CRL: %w", err)
	}
	return der, nil
}
