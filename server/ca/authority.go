package ca

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/records"
)

// Kinds of authorities, as the journal spells them.
const (
	KindX509 = "x509"
	KindJWT  = "jwt"
	KindWIT  = "wit"
)

// States of an authority, as the journal spells them. They follow each other in this order; most
// authorities are never aside.
const (
	StatePrepared = "prepared" // has a key; verifies, does not sign yet
	StateActive   = "active"   // signs
	StateAside    = "aside"    // made way because of the clock, and has its key; may sign again
	StateOld      = "old"      // verifies what it signed
	StateTainted  = "tainted"  // an old one whose SVIDs are to be replaced at once
	StateRevoked  = "revoked"  // a tainted one that verifies nothing any more: it is in no bundle
)

// authority is a line of the journal in its parsed form. It is immutable; with changes its line.
type authority struct {
	line   records.Journal
	public crypto.PublicKey
	signer crypto.Signer // nil unless prepared, active or aside
	// lister signs lists of revoked certificates; nil if there is no key for that, or the kind has none.
	lister crypto.Signer

	hash crypto.Hash // what is signed is a digest of this kind

	cert      *x509.Certificate   // X.509 only
	above     []*x509.Certificate // X.509 only: what is between it and the root
	algorithm []byte              // X.509 only: the AlgorithmIdentifier of its signatures

	header string // JWT only: the encoded header of its tokens
}

// with returns a copy in another state.
func (a *authority) with(state string, now time.Time) *authority {
	b := *a
	b.line.State = state
	if state == StateActive {
		b.line.ActivatedAt = now.Truncate(time.Second).UTC()
	} else if state != StatePrepared && state != StateAside {
		b.signer = nil
	}
	if state == StateRevoked {
		b.lister = nil
	}
	return &b
}

func (a *authority) expired(now time.Time) bool { return !now.Before(a.line.NotAfter) }

// early says that the clock was set back to before the authority was made: nobody with the right time
// accepts yet what it signs.
func (a *authority) early(now time.Time) bool { return now.Before(a.line.NotBefore) }

// valid says that what the authority signs now is accepted.
func (a *authority) valid(now time.Time) bool { return !a.expired(now) && !a.early(now) }

// lifetime is what the schedule divides.
func (a *authority) lifetime() time.Duration { return a.line.NotAfter.Sub(a.line.CreatedAt) }

// Shares of an authority's lifetime, and what they are at most.
const (
	maxPreparation = 30 * 24 * time.Hour
	maxActivation  = 7 * 24 * time.Hour
	// pruneAfter is how long an expired authority stays in the bundle, for verifiers whose clock is
	// behind and for whoever reads logs.
	pruneAfter = 24 * time.Hour
)

// preparation is how long before the end of an authority its successor is prepared, activation how
// long before it the successor takes over.
func preparation(lifetime time.Duration) time.Duration { return min(lifetime/2, maxPreparation) }
func activation(lifetime time.Duration) time.Duration  { return min(lifetime/6, maxActivation) }

// shouldPrepare and shouldActivate say of an active authority what its successor's time is.
func (a *authority) shouldPrepare(now time.Time) bool {
	return !now.Before(a.line.NotAfter.Add(-preparation(a.lifetime())))
}

func (a *authority) shouldActivate(now time.Time) bool { return !now.Before(a.activateAt()) }

// activateAt is when the successor of an active authority takes over.
func (a *authority) activateAt() time.Time { return a.line.NotAfter.Add(-activation(a.lifetime())) }

// prunable says that nothing the authority signed can be valid anywhere.
func (a *authority) prunable(now time.Time) bool {
	return !now.Before(a.line.NotAfter.Add(pruneAfter))
}

// made is an authority that nobody knows of yet, with the roots that came with it if another one signed it.
type made struct {
	*authority
	roots []*x509.Certificate
}

// makeAuthority generates the key of a new authority and its public half, which the authority above signs
// if there is one. Nothing knows of it yet. It needs no lock.
func (c *CA) makeAuthority(ctx context.Context, kind string) (*made, error) {
	// The key is named before the authority, whose ID may be a digest of the key.
	name, keyType := "ca-"+kind+"-"+randomID(), c.cfg.KeyType
	if isToken(kind) {
		keyType = c.cfg.JWTKeyType
	}
	signer, err := c.keys.Generate(ctx, name, keyType)
	if err != nil {
		return nil, fmt.Errorf("make %s authority: %w", kind, err)
	}
	a, err := c.certify(ctx, kind, name, signer)
	if err != nil {
		// An upstream authority that says no for a day does not fill the key file.
		if deleted := c.keys.Delete(context.WithoutCancel(ctx), name); deleted != nil {
			c.log.WithError(deleted).WithField("key", name).Warn("Key of an authority that came to nothing could not be deleted")
		}
		return nil, fmt.Errorf("make %s authority: %w", kind, err)
	}
	return a, nil
}

// certify makes the public half of an authority.
func (c *CA) certify(ctx context.Context, kind, name string, signer crypto.Signer) (*made, error) {
	now := c.cfg.Now()
	a := &made{authority: &authority{signer: signer, line: records.Journal{
		Kind: kind, State: StatePrepared, KeyID: name,
		NotBefore: now.Add(-c.cfg.Backdate).Truncate(time.Second).UTC(),
		NotAfter:  now.Add(c.cfg.CATTL).Truncate(time.Second).UTC(),
		CreatedAt: now.Truncate(time.Second).UTC(),
	}}}
	line := &a.line
	var err error
	if line.PublicKey, err = x509.MarshalPKIXPublicKey(signer.Public()); err != nil {
		return nil, err
	}
	switch {
	case isToken(kind):
		line.AuthorityID = randomID()
	case c.cfg.Upstream != nil:
		if err := c.signAbove(ctx, a, now); err != nil {
			return nil, err
		}
	default:
		cert, err := c.selfSign(signer, line.NotBefore, line.NotAfter)
		if err != nil {
			return nil, err
		}
		line.Certificate = cert.Raw
		line.AuthorityID = hex.EncodeToString(cert.SubjectKeyId)
	}
	if a.authority, err = decode(*line, signer, c.td); err != nil {
		return nil, err
	}
	return a, nil
}

// decode parses a line of the journal and fits it with its key, which may be nil for authorities
// that do not sign any more or whose key is lost. The error wraps ErrJournal.
func decode(line records.Journal, signer crypto.Signer, td spiffeid.TrustDomain) (*authority, error) {
	broken := func(format string, args ...any) (*authority, error) {
		return nil, fmt.Errorf("%w: %s authority %q: %w", ErrJournal, line.Kind, line.AuthorityID, fmt.Errorf(format, args...))
	}
	switch line.State {
	case StatePrepared, StateActive, StateAside, StateOld, StateTainted, StateRevoked:
	case stateFollowed:
		if !isAbove(line.Kind) {
			return broken("state %q is not for this kind", line.State)
		}
	default:
		return broken("state %q is unknown: was it written by a newer version?", line.State)
	}
	if !line.NotBefore.Before(line.NotAfter) || line.CreatedAt.IsZero() || line.NotAfter.Before(line.CreatedAt) {
		return broken("times make no sense")
	}
	if isAbove(line.Kind) {
		return &authority{line: line}, nil
	}
	public, err := x509.ParsePKIXPublicKey(line.PublicKey)
	if err != nil {
		return broken("parse public key: %w", err)
	}
	if err := CheckKey(public); err != nil {
		return broken("%w", err)
	}
	a := &authority{line: line, public: public, signer: signer}
	if signer != nil && !samePublic(public, signer.Public()) {
		return broken("key %s is another one", line.KeyID)
	}
	switch line.Kind {
	case KindX509:
		if a.cert, err = x509.ParseCertificate(line.Certificate); err != nil {
			return broken("parse certificate: %w", err)
		}
		switch {
		case !samePublic(public, a.cert.PublicKey):
			return broken("certificate is of another key")
		case a.cert.NotAfter.Before(line.NotAfter) || line.UpstreamID == "" && !a.cert.NotAfter.Equal(line.NotAfter):
			return broken("certificate expires at another time")
		case hex.EncodeToString(a.cert.SubjectKeyId) != line.AuthorityID:
			return broken("certificate is of another authority")
		case (line.UpstreamID == "" || len(a.cert.URIs) != 0) && (len(a.cert.URIs) != 1 || a.cert.URIs[0].String() != td.IDString()):
			return broken("certificate is not of trust domain %s", td.Name())
		case !a.cert.IsCA || !a.cert.BasicConstraintsValid:
			return broken("certificate is no CA certificate")
		}
		if err := errors.Join(a.decodeChain(), a.prepareX509()); err != nil {
			return broken("%w", err)
		}
		if signer != nil {
			a.lister = signer
		}
	case KindJWT, KindWIT:
		if line.AuthorityID == "" {
			return broken("no key ID")
		}
		if err := a.prepareJWT(); err != nil {
			return broken("%w", err)
		}
	default:
		return broken("kind is unknown: was it written by a newer version?")
	}
	if signer != nil {
		if err := a.prove(); err != nil {
			return broken("%w", err)
		}
	}
	return a, nil
}

// isToken says that authorities of the kind sign tokens, and not certificates.
func isToken(kind string) bool { return kind == KindJWT || kind == KindWIT }

// prepareJWT fills in what all tokens of the authority have in common (RFC 7515 4.1, JWT-SVID 2, WIT-SVID 2).
func (a *authority) prepareJWT() error {
	var alg string
	switch key := a.public.(type) {
	case *rsa.PublicKey:
		alg, a.hash = "RS256", crypto.SHA256
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			alg, a.hash = "ES256", crypto.SHA256
		case elliptic.P384():
			alg, a.hash = "ES384", crypto.SHA384
		default:
			return fmt.Errorf("no JWT algorithm for curve %s", key.Curve.Params().Name)
		}
	}
	header, err := json.Marshal(struct {
		Algorithm string `json:"alg"`
		KeyID     string `json:"kid"`
		Type      string `json:"typ"`
	}{alg, a.line.AuthorityID, map[string]string{KindJWT: "JWT", KindWIT: "wit+jwt"}[a.line.Kind]})
	if err != nil {
		return err
	}
	a.header = base64.RawURLEncoding.EncodeToString(header) + "."
	return nil
}

func samePublic(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}

// randomID returns 32 characters of a-z and 2-7: 160 random bits.
func randomID() string {
	var b [20]byte
	_, _ = rand.Read(b[:]) // never fails
	return strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}

// older orders authorities by when they were made, then by ID.
func older(a, b *authority) int {
	return cmp.Or(a.line.CreatedAt.Compare(b.line.CreatedAt), cmp.Compare(a.line.AuthorityID, b.line.AuthorityID))
}

// sorted returns the lines, oldest first, so that the bundle has one order on every run.
func (c *CA) sorted() []*authority { return slices.SortedFunc(maps.Values(c.lines), older) }
