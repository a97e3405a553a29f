package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi/identity"
)

// ErrNoWIT says that this server signs no WIT-SVIDs.
var ErrNoWIT = errors.New("WIT-SVIDs are not enabled")

// WITParams say what goes into a WIT-SVID.
type WITParams struct {
	ID spiffeid.ID // of the own trust domain, with a path outside /spire
	// PublicKey is the workload's, and Algorithm what it will prove with that it has the private key.
	PublicKey crypto.PublicKey
	Algorithm string
	TTL       time.Duration // 0: Config.X509SVIDTTL; cut short where the authority ends before
	MaxTTL    time.Duration // cuts short whatever TTL comes to; 0: no cap
}

// witClaims are in the order they are written. There is no audience: the token is worth nothing without
// the key in cnf (RFC 7800 section 3.2).
type witClaims struct {
	Confirmation confirmation `json:"cnf"`
	ExpiresAt    int64        `json:"exp"`
	IssuedAt     int64        `json:"iat"`
	Issuer       string       `json:"iss,omitempty"`
	Subject      string       `json:"sub"`
}

type confirmation struct {
	JWK jose.JSONWebKey `json:"jwk"`
}

// SignWIT signs a WIT-SVID. Whether the asker may have it was decided before. Of the result, ID, Token,
// IssuedAt and ExpiresAt are set.
func (c *CA) SignWIT(ctx context.Context, p WITParams) (*identity.WITSVID, error) {
	svid, err := c.signWIT(ctx, p)
	c.metrics.count(profileWIT, err)
	if err != nil {
		return nil, fmt.Errorf("sign WIT-SVID: %w", err)
	}
	return svid, nil
}

func (c *CA) signWIT(ctx context.Context, p WITParams) (*identity.WITSVID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !c.cfg.WIT {
		return nil, ErrNoWIT
	}
	if err := c.checkID(profileWIT, p.ID); err != nil {
		return nil, err
	}
	if err := CheckKey(p.PublicKey); err != nil {
		return nil, err
	}
	if err := proves(p.PublicKey, p.Algorithm); err != nil {
		return nil, err
	}
	p.TTL = capped(p.TTL, c.cfg.X509SVIDTTL, p.MaxTTL)
	if err := checkTTL(p.TTL); err != nil {
		return nil, err
	}
	a := c.current(KindWIT)
	if a == nil {
		return nil, ErrNoAuthority
	}
	now := c.cfg.Now()
	issued := now.Truncate(time.Second).UTC()
	expires := earlier(now.Add(p.TTL), a.line.NotAfter).Truncate(time.Second).UTC()
	payload, err := json.Marshal(&witClaims{
		Confirmation: confirmation{jose.JSONWebKey{Key: p.PublicKey, Algorithm: p.Algorithm}},
		ExpiresAt:    expires.Unix(), IssuedAt: issued.Unix(), Issuer: c.cfg.WITIssuer, Subject: p.ID.String(),
	})
	if err != nil {
		return nil, err
	}
	token, err := a.signToken(payload)
	if err != nil {
		return nil, err
	}
	return &identity.WITSVID{JWTSVID: identity.JWTSVID{ID: p.ID, Token: token, IssuedAt: issued, ExpiresAt: expires}}, nil
}

// proves checks that the algorithm is one of WIT-SVID's and one of the key's (RFC 7518 section 3.1).
func proves(key crypto.PublicKey, algorithm string) error {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if slices.Contains([]string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}, algorithm) {
			return nil
		}
	case *ecdsa.PublicKey:
		if want := map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[key.Curve.Params().BitSize]; want == algorithm && want != "" {
			return nil
		}
	}
	return fmt.Errorf("%w: it does not sign with algorithm %q", ErrKey, algorithm)
}
