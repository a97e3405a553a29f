package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 5280 4.2.1.2 method 1 names it; it is an identifier, not a signature
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/assay-id/assay/workloadapi/identity"
)

// The profiles, also as metrics name them. All SVIDs are the same but for whose ID they may carry:
//
//	              serial  random, 1 to 2^128−1
//	              subject C=US, O=SPIRE, or the request's where it is minted; CN is the first DNS name
//	              validity now − backdate to min(now + TTL, end of the authority)
//	critical      keyUsage digitalSignature, keyEncipherment, keyAgreement
//	critical      basicConstraints CA:false
//	              extKeyUsage serverAuth, clientAuth
//	              subjectKeyIdentifier SHA-1 of the key bits; authorityKeyIdentifier of the authority
//	              subjectAltName one URI, the SPIFFE ID (X509-SVID 2), and the DNS names
//
// An authority has subject C=US, O=SPIFFE and the serial number as its serialNumber attribute, so
// that no two authorities share a name, the trust domain's own ID as its one URI (X509-SVID 4.2),
// CA:true and keyUsage keyCertSign, cRLSign. The authority of a downstream server is the same but for its
// subject, which is that of the authority that signed it with OU=DOWNSTREAM-n, where n counts the
// authorities above it, and for its authorityKeyIdentifier. There are no other extensions.
const (
	profileWorkload   = "workload"
	profileAgent      = "agent"
	profileServer     = "server"
	profileMint       = "mint"
	profileAuthority  = "authority"
	profileDownstream = "downstream"
	profileJWT        = "jwt"
	profileWIT        = "wit"
)

// Reserved paths (SPIRE's convention).
const (
	reservedPath = "/spire"
	serverPath   = "/spire/server"
)

// WorkloadParams say what goes into a workload's X509-SVID.
type WorkloadParams struct {
	PublicKey crypto.PublicKey
	ID        spiffeid.ID // of the own trust domain, with a path outside /spire
	DNSNames  []string
	TTL       time.Duration // 0: Config.X509SVIDTTL; cut short where the authority ends before
	MaxTTL    time.Duration // cuts short whatever TTL comes to; 0: no cap
}

// MintParams say what goes into an X509-SVID that an operator asked for without an entry.
type MintParams struct {
	PublicKey crypto.PublicKey
	ID        spiffeid.ID // of the own trust domain, with a path outside /spire
	DNSNames  []string
	Subject   pkix.Name     // empty: C=US, O=SPIRE. Its common name gives way to the first DNS name.
	TTL       time.Duration // 0: Config.X509SVIDTTL; cut short where the authority ends before
}

// SignWorkload signs a workload's X509-SVID and returns its chain, leaf first, without the root.
// Whether the asker may have it was decided before.
func (c *CA) SignWorkload(ctx context.Context, p WorkloadParams) ([]*x509.Certificate, error) {
	ttl := capped(p.TTL, c.cfg.X509SVIDTTL, p.MaxTTL)
	return c.sign(ctx, profileWorkload, MintParams{PublicKey: p.PublicKey, ID: p.ID, DNSNames: p.DNSNames, TTL: ttl})
}

// capped returns a lifetime, or what stands for none, no longer than the cap, if there is one.
func capped(ttl, none, most time.Duration) time.Duration {
	if ttl == 0 {
		ttl = none
	}
	if most > 0 {
		return min(ttl, most)
	}
	return ttl
}

// SignAgent signs an agent's X509-SVID, which lives for Config.AgentTTL. The ID is of the own trust
// domain and any but the server's.
func (c *CA) SignAgent(ctx context.Context, key crypto.PublicKey, id spiffeid.ID) ([]*x509.Certificate, error) {
	return c.sign(ctx, profileAgent, MintParams{PublicKey: key, ID: id, TTL: c.cfg.AgentTTL})
}

// SignServer signs an X509-SVID of the server itself, spiffe://<trust domain>/spire/server.
func (c *CA) SignServer(ctx context.Context, key crypto.PublicKey) ([]*x509.Certificate, error) {
	id, err := spiffeid.FromPath(c.td, serverPath)
	if err != nil {
		return nil, err
	}
	return c.sign(ctx, profileServer, MintParams{PublicKey: key, ID: id})
}

// SignMint signs an X509-SVID without an entry. The subject is the request's.
func (c *CA) SignMint(ctx context.Context, p MintParams) ([]*x509.Certificate, error) {
	return c.sign(ctx, profileMint, p)
}

func (c *CA) sign(ctx context.Context, profile string, p MintParams) ([]*x509.Certificate, error) {
	chain, err := c.signChecked(ctx, profile, p)
	c.metrics.count(profile, err)
	if err != nil {
		return nil, fmt.Errorf("sign %s X509-SVID: %w", profile, err)
	}
	return chain, nil
}

func (c *CA) signChecked(ctx context.Context, profile string, p MintParams) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := CheckKey(p.PublicKey); err != nil {
		return nil, err
	}
	if err := c.checkID(profile, p.ID); err != nil {
		return nil, err
	}
	if err := checkDNSNames(p.DNSNames); err != nil {
		return nil, err
	}
	if p.TTL == 0 {
		p.TTL = c.cfg.X509SVIDTTL
	}
	if err := checkTTL(p.TTL); err != nil {
		return nil, err
	}
	a := c.current(KindX509)
	if a == nil {
		return nil, ErrNoAuthority
	}
	now := c.cfg.Now()
	w := &want{
		profile: profile, issuer: a.cert, id: p.ID, dnsNames: p.DNSNames, now: now,
		notBefore: now.Add(-c.cfg.Backdate).Truncate(time.Second),
		notAfter:  earlier(now.Add(p.TTL), a.line.NotAfter).Truncate(time.Second),
	}
	var err error
	if w.subject, err = svidSubject(p.Subject, p.DNSNames); err != nil {
		return nil, fmt.Errorf("encode subject: %w", err)
	}
	if w.spki, w.keyID, err = keyIdentifier(p.PublicKey); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	leaf, err := a.issue(w)
	if err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{leaf}, a.chain()...), nil
}

// selfSign makes the certificate of a new authority.
func (c *CA) selfSign(signer crypto.Signer, notBefore, notAfter time.Time) (*x509.Certificate, error) {
	spki, keyID, err := keyIdentifier(signer.Public())
	if err != nil {
		return nil, err
	}
	serial := randomSerial()
	subject := c.cfg.Subject
	subject.SerialNumber = serial.String()
	w := &want{
		profile: profileAuthority, id: c.td.ID(), now: c.cfg.Now(),
		notBefore: notBefore, notAfter: notAfter, spki: spki, keyID: keyID,
	}
	if w.subject, err = encodeName(subject); err != nil {
		return nil, fmt.Errorf("encode subject: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: subject, NotBefore: notBefore, NotAfter: notAfter,
		URIs:                  []*url.URL{c.td.ID().URL()},
		KeyUsage:              authorityUsage,
		BasicConstraintsValid: true,
		IsCA:                  true,
		SubjectKeyId:          keyID,
	}
	// CreateCertificate verifies what the signer returned.
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("create certificate: %w", err)
	}
	return readBack(der, w)
}

const (
	leafUsage      = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement
	authorityUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
)

// readBack parses what was made and checks that against what was wanted.
func readBack(der []byte, w *want) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: parse: %w", ErrLint, err)
	}
	if err := lint(cert, w); err != nil {
		return nil, err
	}
	return cert, nil
}

// checkID says whose IDs a profile may carry.
func (c *CA) checkID(profile string, id spiffeid.ID) error {
	switch {
	case id.IsZero():
		return fmt.Errorf("%w: missing", ErrID)
	case !id.MemberOf(c.td):
		return fmt.Errorf("%w: %q is not of trust domain %s", ErrID, id, c.td.Name())
	case len(id.String()) > identity.MaxSPIFFEID:
		return fmt.Errorf("%w: %d bytes long, the limit is %d", ErrID, len(id.String()), identity.MaxSPIFFEID)
	case id.Path() == "":
		return fmt.Errorf("%w: %q has no path", ErrID, id)
	}
	switch profile {
	case profileServer:
		return nil
	case profileAgent:
		if id.Path() == serverPath {
			return fmt.Errorf("%w: %q is the server's own", ErrID, id)
		}
	default:
		if reserved(id.Path()) {
			return fmt.Errorf("%w: %q is below the reserved path %s", ErrID, id, reservedPath)
		}
	}
	return nil
}

func reserved(path string) bool {
	return path == reservedPath || strings.HasPrefix(path, reservedPath+"/")
}

func checkTTL(ttl time.Duration) error {
	switch {
	case ttl < 0:
		return fmt.Errorf("%w: %s is negative", ErrTTL, ttl)
	case ttl < time.Second:
		return fmt.Errorf("%w: %s, want at least a second", ErrTTL, ttl)
	}
	return nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// randomSerial returns a number from 1 to 2^128−1.
func randomSerial() *big.Int {
	var b [16]byte
	for {
		_, _ = rand.Read(b[:]) // never fails
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n
		}
	}
}

// keyIdentifier returns the key as it stands in a certificate, and the SHA-1 digest of its bits
// (RFC 5280 4.2.1.2 method 1).
func keyIdentifier(key crypto.PublicKey) (spki, id []byte, err error) {
	if spki, err = x509.MarshalPKIXPublicKey(key); err != nil {
		return nil, nil, err
	}
	in := cryptobyte.String(spki)
	var bits []byte
	if !in.ReadASN1(&in, casn1.SEQUENCE) || !in.SkipASN1(casn1.SEQUENCE) || !in.ReadASN1BitStringAsBytes(&bits) || !in.Empty() {
		return nil, nil, errors.New("encoded public key cannot be read")
	}
	sum := sha1.Sum(bits) //nolint:gosec // an identifier, see the import
	return spki, sum[:], nil
}
