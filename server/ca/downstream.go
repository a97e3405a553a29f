package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"net/url"
	"time"

	"github.com/assay-id/assay/workloadapi/identity"
)

// SignDownstream signs the X.509 authority of a server below this one, which signs SVIDs of the same
// trust domain. It lives for ttl (0: Config.CATTL), but no longer than the authority that signs it. The
// chain is returned without the root. Whether the asker may have it was decided before.
func (c *CA) SignDownstream(ctx context.Context, key crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	chain, err := c.signDownstream(ctx, key, ttl)
	c.metrics.count(profileDownstream, err)
	if err != nil {
		return nil, fmt.Errorf("sign downstream authority: %w", err)
	}
	return chain, nil
}

func (c *CA) signDownstream(ctx context.Context, key crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	if ttl == 0 {
		ttl = c.cfg.CATTL
	}
	if err := checkTTL(ttl); err != nil {
		return nil, err
	}
	a := c.current(KindX509)
	if a == nil {
		return nil, ErrNoAuthority
	}
	if err := c.nest(ctx); err != nil {
		return nil, err
	}
	now, serial := c.cfg.Now(), randomSerial()
	subject := a.cert.Subject
	// The number says how many servers are above. Its own serial number keeps the names of authorities apart
	// (RFC 5280 4.1.2.4).
	subject.OrganizationalUnit, subject.SerialNumber = []string{fmt.Sprintf("DOWNSTREAM-%d", 1+len(a.chain()))}, serial.String()
	w := &want{
		profile: profileDownstream, issuer: a.cert, id: c.td.ID(), now: now,
		notBefore: now.Add(-c.cfg.Backdate).Truncate(time.Second),
		notAfter:  earlier(now.Add(ttl), a.line.NotAfter).Truncate(time.Second),
	}
	var err error
	if w.subject, err = encodeName(subject); err != nil {
		return nil, fmt.Errorf("encode subject: %w", err)
	}
	if w.spki, w.keyID, err = keyIdentifier(key); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	// CreateCertificate verifies what the signer returned.
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, Subject: subject, NotBefore: w.notBefore, NotAfter: w.notAfter,
		URIs:     []*url.URL{w.id.URL()},
		KeyUsage: authorityUsage, BasicConstraintsValid: true, IsCA: true,
		SubjectKeyId: w.keyID,
	}, a.cert, key, a.signer)
	if err != nil {
		return nil, fmt.Errorf("create certificate: %w", err)
	}
	cert, err := readBack(der, w)
	if err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{cert}, a.chain()...), nil
}

// nest notes in the bundle that there are servers below, once and for all: it has no list of what they revoke.
func (c *CA) nest(ctx context.Context) error {
	if c.nested.Load() {
		return nil
	}
	b, err := c.store.Bundle(ctx, c.td)
	if err == nil && !b.Nested {
		_, _, err = c.store.UpdateBundle(ctx, c.td, func(b *identity.Bundle) error { b.Nested = true; return nil })
	}
	if err != nil {
		return fmt.Errorf("note in the bundle that there are servers below: %w", err)
	}
	c.nested.Store(true)
	return nil
}
