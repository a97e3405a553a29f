package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// Limits of the audience of one JWT-SVID. Tokens travel in headers, which most servers cap at 8 KiB
// together.
const (
	MaxAudiences     = 100
	MaxAudienceBytes = 16 << 10 // together
)

// JWTParams say what goes into a JWT-SVID.
type JWTParams struct {
	ID       spiffeid.ID   // of the own trust domain, with a path outside /spire
	Audience []string      // empty ones are dropped; at least one must remain (JWT-SVID 3.2)
	TTL      time.Duration // 0: Config.JWTSVIDTTL; cut short where the authority ends before
	MaxTTL   time.Duration // cuts short whatever TTL comes to; 0: no cap
	JTI      bool          // put a unique jti claim in
}

// claims are in the order they are written. Times are NumericDates (RFC 7519 2) in whole seconds.
type claims struct {
	Audience  audienceClaim `json:"aud"`
	ExpiresAt int64         `json:"exp"`
	IssuedAt  int64         `json:"iat"`
	Issuer    string        `json:"iss,omitempty"`
	ID        string        `json:"jti,omitempty"`
	Subject   string        `json:"sub"`
}

// SignJWT signs a JWT-SVID. Whether the asker may have it was decided before. Of the result, ID,
// Token, IssuedAt and ExpiresAt are set.
func (c *CA) SignJWT(ctx context.Context, p JWTParams) (*identity.JWTSVID, error) {
	svid, err := c.signJWT(ctx, p)
	c.metrics.count(profileJWT, err)
	if err != nil {
		return nil, fmt.Errorf("sign JWT-SVID: %w", err)
	}
	return svid, nil
}

func (c *CA) signJWT(ctx context.Context, p JWTParams) (*identity.JWTSVID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := c.checkID(profileJWT, p.ID); err != nil {
		return nil, err
	}
	audience, err := checkAudience(p.Audience)
	if err != nil {
		return nil, err
	}
	p.TTL = capped(p.TTL, c.cfg.JWTSVIDTTL, p.MaxTTL)
	if err := checkTTL(p.TTL); err != nil {
		return nil, err
	}
	a := c.current(KindJWT)
	if a == nil {
		return nil, ErrNoAuthority
	}
	now := c.cfg.Now()
	issued := now.Truncate(time.Second).UTC()
	expires := earlier(now.Add(p.TTL), a.line.NotAfter).Truncate(time.Second).UTC()
	profile := c.jwtProfile(p.ID, audience)
	content := claims{
		Audience: audienceClaim{audience, profile.AudienceAsText}, Issuer: c.cfg.JWTIssuer, Subject: p.ID.String(),
		IssuedAt: issued.Unix(), ExpiresAt: expires.Unix(),
	}
	switch {
	case profile.SubjectIssues:
		content.Issuer = content.Subject
	case profile.Issuer != "":
		content.Issuer = profile.Issuer
	}
	if p.JTI || profile.JTI {
		content.ID = tokenID()
	}
	payload, err := json.Marshal(&content)
	if err != nil {
		return nil, err
	}
	token, err := a.signToken(payload)
	if err != nil {
		return nil, err
	}
	return &identity.JWTSVID{ID: p.ID, Token: token, IssuedAt: issued, ExpiresAt: expires}, nil
}

// checkAudience returns the audience without its empty elements.
func checkAudience(list []string) ([]string, error) {
	kept, size := make([]string, 0, min(len(list), MaxAudiences)), 0
	for _, one := range list {
		if one == "" {
			continue
		}
		// The encoder would replace the bytes and sign for somebody else.
		if !utf8.ValidString(one) {
			return nil, fmt.Errorf("%w: not UTF-8", ErrAudience)
		}
		if size += len(one); len(kept) == MaxAudiences || size > MaxAudienceBytes {
			return nil, fmt.Errorf("%w: over %d elements or %d bytes", ErrAudience, MaxAudiences, MaxAudienceBytes)
		}
		kept = append(kept, one)
	}
	if len(kept) == 0 {
		return nil, fmt.Errorf("%w: at least one is required", ErrAudience)
	}
	return kept, nil
}

// signToken returns the compact serialization (RFC 7515 7.1).
func (a *authority) signToken(payload []byte) (string, error) {
	encoding := base64.RawURLEncoding
	token := make([]byte, 0, len(a.header)+encoding.EncodedLen(len(payload))+1+encoding.EncodedLen(512))
	token = append(token, a.header...)
	token = encoding.AppendEncode(token, payload)
	digest := a.hash.New()
	digest.Write(token)
	signature, err := a.signer.Sign(rand.Reader, digest.Sum(nil), a.hash)
	if err != nil {
		return "", fmt.Errorf("sign token: %w", err)
	}
	if key, ok := a.public.(*ecdsa.PublicKey); ok {
		if signature, err = fixedWidth(signature, (key.Curve.Params().BitSize+7)/8); err != nil {
			return "", fmt.Errorf("sign token: %w", err)
		}
	}
	token = append(token, '.')
	return string(encoding.AppendEncode(token, signature)), nil
}

// fixedWidth turns the ASN.1 form of an ECDSA signature into that of JWS (RFC 7518 3.4): r and s,
// each with leading zeroes to the width of the curve.
func fixedWidth(der []byte, width int) ([]byte, error) {
	var parsed struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(der, &parsed)
	if err != nil || len(rest) > 0 {
		return nil, errors.New("signer returned no ECDSA signature")
	}
	if parsed.R.Sign() <= 0 || parsed.S.Sign() <= 0 || parsed.R.BitLen() > 8*width || parsed.S.BitLen() > 8*width {
		return nil, errors.New("signer returned an ECDSA signature out of range")
	}
	out := make([]byte, 2*width)
	parsed.R.FillBytes(out[:width])
	parsed.S.FillBytes(out[width:])
	return out, nil
}

// tokenID returns the bytes of a random UUID (RFC 9562 5.4) in base64url.
func tokenID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return base64.RawURLEncoding.EncodeToString(b[:])
}
