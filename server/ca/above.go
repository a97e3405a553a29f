package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

// This file is about a CA that is no root: another authority, above it, signs what it makes.
//
// Such an authority is not in the bundle; the root that its chain leads to is, and everything that it signs
// carries the chain. What has become of authorities above is in the journal too, a line each, so that a
// root that was tainted or revoked stays so whatever is above says later:
//
//	followed  it is in the bundle of the authority above, as far as was heard
//	tainted   an operator said so here, or above; or it left that bundle while something here hung on it
//	revoked   it is kept out of the own bundle
//
// An active authority whose root is tainted is replaced at once, as an expired one would be.

// Kinds of lines about authorities above, as the journal spells them. Their IDs are a prefix and the
// identifier that the authority has above.
const (
	kindAbove    = "upstream"
	kindAboveJWT = "upstream-jwt"
	kindAboveWIT = "upstream-wit"

	stateFollowed = "followed"
)

// Errors of what an operator does with authorities above.
var (
	// ErrNoUpstream says that there is none above.
	ErrNoUpstream = errors.New("there is no upstream authority")
	// ErrUpstream says that the authority above is to be tainted and revoked, and not those here.
	ErrUpstream = errors.New("there is an upstream authority")
	// ErrNotAbove says that the bundle has no authority with this subject key ID.
	ErrNotAbove = errors.New("no authority in the bundle has this subject key ID")

	errTaintedAbove = errors.New("the upstream authority signed with a root that is tainted")
)

// farAway is when a JWT key without an end is forgotten, if it has not been heard of since.
const farAway = 10 * 365 * 24 * time.Hour

func aboveID(kind, id string) string { return kind + "-" + id }

func isAbove(kind string) bool {
	return kind == kindAbove || kind == kindAboveJWT || kind == kindAboveWIT
}

// aboveKinds are the kinds of token keys, as their lines are when they are heard of from above.
var aboveKinds = map[string]string{KindJWT: kindAboveJWT, KindWIT: kindAboveWIT}

// hangsOn says whether the authority's chain leads to the root.
func (a *authority) hangsOn(root string) bool {
	return a != nil && root != "" && a.line.UpstreamID == root
}

// unsuited says that the authority is not to sign any longer for what is above it: it is a root and there
// is one above now, or the other way round, or the root above it is tainted.
func (c *CA) unsuited(a *authority) bool {
	if a == nil || a.line.Kind != KindX509 {
		return false
	}
	return (a.line.UpstreamID != "") != (c.cfg.Upstream != nil) || c.taintedAbove(a.line.UpstreamID)
}

func (c *CA) taintedAbove(root string) bool {
	line := c.lines[aboveID(kindAbove, root)]
	return root != "" && line != nil && line.line.State != stateFollowed
}

// signAbove has the new authority signed and fills in what came of it. Nothing of it is believed that was
// not checked.
func (c *CA) signAbove(ctx context.Context, a *made, now time.Time) error {
	serial := randomSerial()
	subject := c.cfg.Subject
	subject.SerialNumber = serial.String()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{
			Country: subject.Country, Organization: subject.Organization, OrganizationalUnit: subject.OrganizationalUnit,
			CommonName: subject.CommonName, SerialNumber: subject.SerialNumber,
		},
		URIs: []*url.URL{c.td.ID().URL()},
	}, a.signer)
	if err != nil {
		return fmt.Errorf("make certificate request: %w", err)
	}
	asking, cancel := context.WithTimeout(ctx, upstream.Patience)
	defer cancel()
	signed, err := c.cfg.Upstream.Sign(asking, upstream.Request{CSR: csr, TTL: c.cfg.CATTL, Now: now})
	if err != nil {
		c.metrics.above.WithLabelValues("sign").Inc()
		return fmt.Errorf("ask the upstream authority: %w", err)
	}
	// Asking took its time.
	checked, err := upstream.Check(signed, a.signer, c.td, c.cfg.Now())
	if err != nil {
		c.metrics.above.WithLabelValues("sign").Inc()
		return err
	}
	cert := checked.Chain[0]
	if err := CheckKey(cert.PublicKey); err != nil {
		return err
	}
	a.line.Certificate, a.line.UpstreamID = cert.Raw, upstream.RootID(checked.Root)
	for _, link := range checked.Chain[1:] {
		a.line.Chain = append(a.line.Chain, link.Raw)
	}
	a.line.NotBefore, a.line.NotAfter = cert.NotBefore.UTC(), checked.NotAfter.Truncate(time.Second).UTC()
	a.line.AuthorityID = fmt.Sprintf("%x", cert.SubjectKeyId)
	a.roots = checked.Roots
	return nil
}

// decodeChain parses what is above an authority. Each signed the one before it.
func (a *authority) decodeChain() error {
	below := a.cert
	for _, der := range a.line.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("parse chain: %w", err)
		}
		if err := below.CheckSignatureFrom(cert); err != nil {
			return fmt.Errorf("chain is broken: %w", err)
		}
		a.above = append(a.above, cert)
		below = cert
	}
	return nil
}

// chain returns what everything that the authority signs carries along.
func (a *authority) chain() []*x509.Certificate {
	if a.line.UpstreamID == "" {
		return nil
	}
	return append([]*x509.Certificate{a.cert}, a.above...)
}

// followAbove keeps an ear on what is above until ctx ends.
func (c *CA) followAbove(ctx context.Context) {
	const first, most = time.Second, 30 * time.Second
	wait := first
	for ctx.Err() == nil {
		err := c.cfg.Upstream.Follow(ctx, func(b upstream.Bundle) {
			wait = first
			b, err := upstream.CheckBundle(b, c.cfg.Now())
			if err != nil {
				c.metrics.failures.Inc()
				c.metrics.above.WithLabelValues("bundle").Inc()
				c.log.WithError(err).Error("What the upstream authority publishes is not taken over")
				return
			}
			c.news.Store(&b)
			c.poke()
		})
		if errors.Is(err, upstream.ErrNoBundle) || ctx.Err() != nil {
			return
		}
		c.metrics.above.WithLabelValues("bundle").Inc()
		c.log.WithError(err).WithField("again_in", wait.String()).Warn("The upstream authority's bundle cannot be followed")
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, most)
	}
}

// poke makes Run look at once.
func (c *CA) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// absorb writes down what was heard from above since the last time. mu is held.
func (c *CA) absorb(ctx context.Context, now time.Time) error {
	news := c.news.Load()
	if news == nil {
		return nil
	}
	changed := map[string]*authority{}
	if news != c.absorbed {
		c.takeIn(changed, news, now)
	}
	if !news.Partial {
		c.missAbove(changed, now)
	}
	for some := range slices.Chunk(slices.SortedFunc(maps.Values(changed), older), 50) {
		if err := c.put(ctx, some...); err != nil {
			return fmt.Errorf("note what the upstream authority publishes: %w", err)
		}
	}
	c.absorbed = news
	return nil
}

// takeIn puts what is new of what was heard into changed. mu is held.
func (c *CA) takeIn(changed map[string]*authority, news *upstream.Bundle, now time.Time) {
	c.roots, c.there = news.X509, map[string]bool{}
	c.keysAbove = map[string][]identity.JWTAuthority{KindJWT: news.JWT, KindWIT: news.WIT}
	for _, a := range news.X509 {
		id := upstream.RootID(a.Certificate)
		c.there[aboveID(kindAbove, id)] = true
		c.noteAbove(changed, kindAbove, id, a.Tainted, a.Certificate.NotAfter, now)
	}
	for _, kind := range []string{KindJWT, KindWIT} {
		for _, k := range c.keysAbove[kind] {
			if own := c.lines[k.KeyID]; own != nil && own.line.Kind == kind {
				continue // our own, come back from above
			}
			until := k.ExpiresAt
			if until.IsZero() {
				until = now.Add(farAway)
			}
			c.there[aboveID(aboveKinds[kind], k.KeyID)] = true
			c.noteAbove(changed, aboveKinds[kind], k.KeyID, k.Tainted, until, now)
		}
	}
}

// noteAbove puts what was heard of an authority into changed, if that is news. Nothing untaints.
func (c *CA) noteAbove(changed map[string]*authority, kind, id string, tainted bool, until, now time.Time) {
	key := aboveID(kind, id)
	line := changed[key]
	if line == nil {
		line = c.lines[key]
	}
	until = until.Truncate(time.Second).UTC()
	switch {
	case line == nil:
		line = newAbove(kind, id, until, now)
		if tainted {
			line = line.with(StateTainted, now)
		}
	case tainted && line.line.State == stateFollowed:
		c.log.WithFields(line.fields()).Warn("Authority tainted above: what hangs on it is being replaced")
		line = line.with(StateTainted, now)
	case until.After(line.line.NotAfter):
		later := *line
		later.line.NotAfter = until
		line = &later
	default:
		return
	}
	changed[key] = line
}

func newAbove(kind, id string, until, now time.Time) *authority {
	made := now.Truncate(time.Second).UTC()
	return &authority{line: records.Journal{
		Kind: kind, AuthorityID: aboveID(kind, id), State: stateFollowed,
		NotBefore: made.Add(-time.Second), NotAfter: until, CreatedAt: made,
	}}
}

// missAbove is about authorities that have left the bundle above: whoever asks there believes them no
// longer. One that the active authority hangs on is tainted first, so that there is another to sign with.
func (c *CA) missAbove(changed map[string]*authority, now time.Time) {
	active := c.find(KindX509, StateActive)
	for key, line := range c.lines {
		if !isAbove(line.line.Kind) || c.there[key] || line.line.State == StateRevoked || line.expired(now) {
			continue
		}
		state := StateRevoked
		if line.line.Kind == kindAbove && active.hangsOn(strings.TrimPrefix(key, kindAbove+"-")) {
			state = StateTainted
		}
		if line.line.State != state {
			c.log.WithFields(line.fields()).WithField("state", state).Warn("Authority has left the bundle of the upstream authority")
			changed[key] = line.with(state, now)
		}
	}
}

// stateAbove is what has become of an authority above; empty if it was not heard of.
func (c *CA) stateAbove(kind, id string) string {
	if line := c.lines[aboveID(kind, id)]; line != nil {
		return line.line.State
	}
	return ""
}

// mergeRoots adds the roots that are believed above to those of a bundle, and takes away what is not.
func (c *CA) mergeRoots(x509s []identity.X509Authority, now time.Time) (kept []identity.X509Authority, changed bool) {
	kept = make([]identity.X509Authority, 0, len(x509s)+len(c.roots))
	for _, a := range x509s {
		st := c.stateAbove(kindAbove, upstream.RootID(a.Certificate))
		if st == StateRevoked {
			changed = true
			continue
		}
		if st == StateTainted && !a.Tainted {
			a.Tainted, changed = true, true
		}
		kept = append(kept, a)
	}
	limit := now.Add(-pruneAfter)
	for _, a := range c.roots {
		st := c.stateAbove(kindAbove, upstream.RootID(a.Certificate))
		known := slices.ContainsFunc(kept, func(b identity.X509Authority) bool { return b.Certificate.Equal(a.Certificate) })
		if st == StateRevoked || known || !a.Certificate.NotAfter.After(limit) || c.revokedX509(a.Certificate) {
			continue
		}
		kept, changed = append(kept, identity.X509Authority{Certificate: a.Certificate, Tainted: st == StateTainted}), true
	}
	return kept, changed
}

// mergeKeys does so with keys of tokens.
func (c *CA) mergeKeys(kind string, keys []identity.JWTAuthority, now time.Time) (kept []identity.JWTAuthority, changed bool) {
	limit := now.Add(-pruneAfter)
	kept = make([]identity.JWTAuthority, 0, len(keys)+len(c.keysAbove[kind]))
	for _, k := range keys {
		switch st := c.stateAbove(aboveKinds[kind], k.KeyID); {
		case st == StateRevoked && c.lines[k.KeyID] == nil:
			changed = true
			continue
		case st == StateTainted && !k.Tainted:
			k.Tainted, changed = true, true
		}
		kept = append(kept, k)
	}
	for _, k := range c.keysAbove[kind] {
		known := slices.ContainsFunc(kept, func(b identity.JWTAuthority) bool { return b.KeyID == k.KeyID })
		st := c.stateAbove(aboveKinds[kind], k.KeyID)
		if known || st == StateRevoked || c.lines[k.KeyID] != nil || !k.ExpiresAt.IsZero() && !k.ExpiresAt.After(limit) {
			continue
		}
		k.Tainted = st == StateTainted
		kept, changed = append(kept, k), true
	}
	return kept, changed
}

// PublishAbove makes the key of a server below this one known to the authority above, if there is one that
// takes them. It verifies tokens of the kind.
func (c *CA) PublishAbove(ctx context.Context, kind string, key identity.JWTAuthority) error {
	if c.cfg.Upstream == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, upstream.Patience)
	defer cancel()
	publish := c.cfg.Upstream.PublishJWT
	if kind == KindWIT {
		publish = c.cfg.Upstream.PublishWIT
	}
	if err := publish(ctx, key); err != nil && !errors.Is(err, upstream.ErrNoJWT) {
		return fmt.Errorf("publish %s key at the upstream authority: %w", strings.ToUpper(kind), err)
	}
	return nil
}

// tellAbove publishes the own keys of tokens above, those that are not known there yet. mu is not held: it may
// take its time.
func (c *CA) tellAbove(ctx context.Context) error {
	if c.cfg.Upstream == nil {
		return nil
	}
	c.mu.Lock()
	var untold []*authority
	for _, a := range c.lines {
		if isToken(a.line.Kind) && (a.line.State == StatePrepared || a.line.State == StateActive) && !c.told[a.line.AuthorityID] {
			untold = append(untold, a)
		}
	}
	for kind := range aboveKinds {
		if next := c.pending[kind]; next != nil && !c.told[next.line.AuthorityID] {
			untold = append(untold, next.authority)
		}
	}
	c.mu.Unlock()
	for _, a := range untold {
		if err := c.PublishAbove(ctx, a.line.Kind, identity.JWTAuthority{KeyID: a.line.AuthorityID, Key: a.public, ExpiresAt: a.line.NotAfter}); err != nil {
			return err
		}
		c.mu.Lock()
		c.told[a.line.AuthorityID] = true
		c.mu.Unlock()
	}
	return nil
}

// untold says of an authority of tokens that it is not known above yet.
func (c *CA) untold(a *authority) bool {
	return c.cfg.Upstream != nil && isToken(a.line.Kind) && !c.told[a.line.AuthorityID]
}
