package ca

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Upstream reports whether another authority signs those of this CA.
func (c *CA) Upstream() bool { return c.cfg.Upstream != nil }

// TaintUpstream says of a root above that what hangs on it is to be replaced. The root is named by its
// subject key ID. It is not that of the active authority: another one that hangs on another root is to be
// activated first. The revision is that of the bundle that says so.
func (c *CA) TaintUpstream(ctx context.Context, id string) (kv.Rev, error) {
	return c.forceAbove(ctx, id, StateTainted, func(line *authority, in bool) error {
		switch {
		case line != nil && line.line.State != stateFollowed:
			return ErrTainted
		case !in:
			return ErrNotAbove
		}
		return nil
	})
}

// RevokeUpstream takes a tainted root above out of the bundle, for good: it stays out whatever the authority
// above publishes.
func (c *CA) RevokeUpstream(ctx context.Context, id string) (kv.Rev, error) {
	return c.forceAbove(ctx, id, StateRevoked, func(line *authority, in bool) error {
		switch {
		case line == nil && in || line != nil && line.line.State == stateFollowed:
			return ErrNotTainted
		case line == nil || line.line.State == StateRevoked:
			return ErrNotAbove
		}
		return nil
	})
}

// forceAbove puts a root above into a state that its line and whether the bundle names it permit.
func (c *CA) forceAbove(ctx context.Context, id, state string, permit func(line *authority, in bool) error) (kv.Rev, error) {
	if c.cfg.Upstream == nil {
		return 0, ErrNoUpstream
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, st := range []string{StateActive, StatePrepared} {
		if c.find(KindX509, st).hangsOn(id) {
			return 0, ErrActive
		}
	}
	b, err := c.store.Bundle(ctx, c.td)
	if err != nil {
		return 0, fmt.Errorf("read bundle: %w", err)
	}
	now := c.cfg.Now()
	until, in := rootEnd(b, id)
	line := c.lines[aboveID(kindAbove, id)]
	if err := permit(line, in); err != nil {
		return 0, err
	}
	if line == nil {
		line = newAbove(kindAbove, id, until, now)
	}
	for _, a := range c.lines {
		if a.hangsOn(id) {
			if err := c.renewServer(a); err != nil {
				return 0, err
			}
		}
	}
	if err := c.put(ctx, line.with(state, now)); err != nil {
		return 0, fmt.Errorf("put upstream authority into state %s: %w", state, err)
	}
	c.log.WithFields(line.fields()).WithField("state", state).Warn("Upstream authority was put into another state, because it was asked for")
	if err := c.publishSoon(ctx, now); err != nil {
		return 0, err
	}
	return c.bundleRev, nil
}

// rootEnd returns when the last certificate of a root ends, and whether the bundle has one.
func rootEnd(b *identity.Bundle, id string) (until time.Time, in bool) {
	for _, a := range b.X509 {
		if upstream.RootID(a.Certificate) == strings.ToLower(id) {
			in = true
			if a.Certificate.NotAfter.After(until) {
				until = a.Certificate.NotAfter
			}
		}
	}
	return until.UTC(), in
}
