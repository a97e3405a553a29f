package ca

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
)

// Errors of a rotation that an operator forces. They tell why nothing was done.
var (
	// ErrUnknownAuthority says that there is no authority of this kind with this ID.
	ErrUnknownAuthority = errors.New("unknown authority")
	// ErrNotPrepared says that the authority to be activated is not prepared.
	ErrNotPrepared = errors.New("authority is not prepared")
	// ErrActive says that the authority signs at the moment: another is to be activated first.
	ErrActive = errors.New("authority is active")
	// ErrNotOld says that the authority has not signed anything yet.
	ErrNotOld = errors.New("authority is not old")
	// ErrTainted says that the authority is tainted already.
	ErrTainted = errors.New("authority is already tainted")
	// ErrNotTainted says that the authority must be tainted before it is revoked: what it signed is
	// replaced first.
	ErrNotTainted = errors.New("authority is not tainted")
	// ErrManyAuthorities says that no other authority is made before some have left the bundle.
	ErrManyAuthorities = errors.New("there are too many authorities: taint and revoke old ones")
)

// maxLive is how many authorities of a kind may be in the bundle before an operator is given no other:
// everybody who verifies has to take all of them.
const maxLive = 200

// A forced rotation is four steps of an operator, each of them here, in this order:
//
//	PrepareAuthority   another key, known to all verifiers soon; it takes the place of one prepared before
//	ActivateAuthority  it signs from now on, the one before it is old
//	TaintAuthority     what the old one signed is replaced at once, by agents and by this server
//	RevokeAuthority    the old one leaves the bundle: what it signed is worth nothing
//
// Each is journaled before it is published, and what a crash leaves between the two is published by
// the next start: a step that was begun is not taken back.

// PrepareAuthority makes an authority of the kind and publishes it. The revision is that of the bundle
// that names it. One that was prepared before leaves the bundle: it has signed nothing, and it may be the
// reason why another is wanted.
func (c *CA) PrepareAuthority(ctx context.Context, kind string) (records.Journal, kv.Rev, error) {
	c.mu.Lock()
	many := c.live(kind, c.cfg.Now()) >= maxLive
	c.mu.Unlock()
	if many {
		return records.Journal{}, 0, ErrManyAuthorities
	}
	// It may take long where another authority signs it; nothing waits for it but the caller.
	next, err := c.makeAuthority(ctx, kind)
	if err != nil {
		return records.Journal{}, 0, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.cfg.Now()
	c.dropPending(ctx, kind)
	if c.taintedAbove(next.line.UpstreamID) {
		c.deleteKey(ctx, next.authority)
		return records.Journal{}, 0, fmt.Errorf("prepare %s authority: %w: %s", kind, errTaintedAbove, next.line.UpstreamID)
	}
	before := c.find(kind, StatePrepared)
	changed := []*authority{next.authority}
	if before != nil {
		changed = append(changed, before.with(StateRevoked, now))
	}
	if err := c.put(ctx, changed...); err != nil {
		c.pending[kind] = next // it may have been written: the next turn uses it or deletes its key
		return records.Journal{}, 0, fmt.Errorf("prepare %s authority: %w", kind, err)
	}
	c.took(next)
	c.log.WithFields(next.fields()).Info("Authority prepared, because it was asked for")
	if before != nil {
		c.deleteKey(ctx, before)
	}
	if err := c.publishSoon(ctx, now); err != nil {
		return records.Journal{}, 0, err
	}
	c.poke() // it is made known above, if that is how it is
	return next.line, c.bundleRev, nil
}

// How long ActivateAuthority waits for agents, and how often it looks. An agent that is connected has a
// bundle within milliseconds, or something is wrong with it.
const (
	maxForcedWait = 5 * time.Second
	lookEvery     = 10 * time.Millisecond
)

// heard waits until all connected agents have the authorities as they are published, for a while.
func (c *CA) heard(ctx context.Context, kind, id string) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	late := time.NewTimer(maxForcedWait)
	defer late.Stop()
	for {
		c.mu.Lock()
		a, err := c.named(kind, id)
		wait := err == nil && a.line.State == StatePrepared && c.behind() > 0
		c.mu.Unlock()
		if !wait {
			return
		}
		select {
		case <-look.C:
		case <-late.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// ActivateAuthority lets the prepared authority sign from now on. It waits a few seconds for connected
// agents that do not have it in their bundle yet, and then for nobody: an operator who replaces a stolen
// key is not held up by an agent that hangs.
func (c *CA) ActivateAuthority(ctx context.Context, kind, id string) (records.Journal, error) {
	if isToken(kind) {
		if err := c.tellAbove(ctx); err != nil {
			c.log.WithError(err).Error("The upstream authority does not know the key that is being activated: who verifies elsewhere in the trust domain will not either")
		}
	}
	c.heard(ctx, kind, id)
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.named(kind, id)
	switch {
	case err != nil:
		return records.Journal{}, err
	case a.line.State != StatePrepared || a.signer == nil:
		return records.Journal{}, fmt.Errorf("%w: it is %s", ErrNotPrepared, a.line.State)
	}
	now := c.cfg.Now()
	// A crash after it was journaled may have left it unpublished.
	if err := c.publish(ctx, now); err != nil {
		return records.Journal{}, err
	}
	if n := c.behind(); n > 0 {
		c.log.WithFields(a.fields()).WithField("agents", n).
			Warn("Authority is activated before all connected agents have it in their bundle")
	}
	if err := c.takeOver(ctx, kind, c.find(kind, StateActive), a, now); err != nil {
		return records.Journal{}, err
	}
	return c.lines[id].line, nil
}

// TaintAuthority says of an old authority that what it signed is to be replaced. The revision is that
// of the bundle that says so.
func (c *CA) TaintAuthority(ctx context.Context, kind, id string) (records.Journal, kv.Rev, error) {
	if kind == KindX509 && c.cfg.Upstream != nil {
		return records.Journal{}, 0, ErrUpstream
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.named(kind, id)
	if err != nil {
		return records.Journal{}, 0, err
	}
	switch a.line.State {
	case StateActive:
		return records.Journal{}, 0, ErrActive
	case StateTainted, StateRevoked:
		return records.Journal{}, 0, ErrTainted
	case StatePrepared:
		return records.Journal{}, 0, fmt.Errorf("%w: it is %s", ErrNotOld, a.line.State)
	}
	if err := c.renewServer(a); err != nil {
		return records.Journal{}, 0, err
	}
	now := c.cfg.Now()
	if err := c.put(ctx, a.with(StateTainted, now)); err != nil {
		return records.Journal{}, 0, fmt.Errorf("taint %s authority: %w", kind, err)
	}
	c.log.WithFields(a.fields()).Warn("Authority tainted: what it signed is being replaced")
	if !c.lists(c.lines[id], now) {
		c.deleteKey(ctx, a) // of one that had made way because of the clock
	}
	if err := c.publishSoon(ctx, now); err != nil {
		return records.Journal{}, 0, err
	}
	return c.lines[id].line, c.bundleRev, nil
}

// RevokeAuthority takes a tainted authority out of the bundle. Its line stays in the journal until it
// would have been forgotten anyway, so that nobody's append brings it back. The revision is that of
// the bundle without it.
func (c *CA) RevokeAuthority(ctx context.Context, kind, id string) (records.Journal, kv.Rev, error) {
	if kind == KindX509 && c.cfg.Upstream != nil {
		return records.Journal{}, 0, ErrUpstream
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	a, err := c.named(kind, id)
	if err != nil {
		return records.Journal{}, 0, err
	}
	switch a.line.State {
	case StateActive:
		return records.Journal{}, 0, ErrActive
	case StatePrepared:
		return records.Journal{}, 0, fmt.Errorf("%w: it is %s", ErrNotOld, a.line.State)
	case StateOld:
		return records.Journal{}, 0, ErrNotTainted
	case StateRevoked:
		return records.Journal{}, 0, fmt.Errorf("%w: it is revoked", ErrUnknownAuthority)
	}
	if err := c.renewServer(a); err != nil {
		return records.Journal{}, 0, err
	}
	now := c.cfg.Now()
	if err := c.put(ctx, a.with(StateRevoked, now)); err != nil {
		return records.Journal{}, 0, fmt.Errorf("revoke %s authority: %w", kind, err)
	}
	c.log.WithFields(a.fields()).Warn("Authority revoked: what it signed is not accepted any more")
	if a.lister != nil {
		c.deleteKey(ctx, a) // it was kept for lists of revoked certificates
	}
	if err := c.publishSoon(ctx, now); err != nil {
		return records.Journal{}, 0, err
	}
	return c.lines[id].line, c.bundleRev, nil
}

// live counts the authorities of the kind in the bundle. mu is held.
func (c *CA) live(kind string, now time.Time) int {
	n := 0
	for _, a := range c.lines {
		if a.line.Kind == kind && a.line.State != StateRevoked && !a.prunable(now) {
			n++
		}
	}
	return n
}

// named returns the authority of the kind with the ID. mu is held.
func (c *CA) named(kind, id string) (*authority, error) {
	a, ok := c.lines[id]
	if !ok || a.line.Kind != kind {
		return nil, ErrUnknownAuthority
	}
	return a, nil
}

// publishSoon publishes what was journaled. If that fails the caller hears of it, and Run tries again.
// mu is held.
func (c *CA) publishSoon(ctx context.Context, now time.Time) error {
	if err := c.publish(ctx, now); err != nil {
		return fmt.Errorf("%w; it is journaled and will be published when the store can be written", err)
	}
	return nil
}

// renewServer replaces the server's own SVID if the authority signed it: agents must be able to
// verify the server with what is left. mu is held.
func (c *CA) renewServer(a *authority) error {
	held := c.server.now.Load()
	if held == nil || a.cert == nil || hex.EncodeToString(held.certificate.Leaf.AuthorityKeyId) != a.line.AuthorityID {
		return nil
	}
	if _, err := c.server.renew(c); err != nil {
		return err
	}
	return nil
}

// behind counts the connected agents that do not have the bundle as it was last written. mu is held.
func (c *CA) behind() int {
	if c.cfg.Behind == nil {
		return 0
	}
	return c.cfg.Behind(c.bundleRev)
}

// maxPatience is the longest that a successor whose time has come waits for agents to have it.
const maxPatience = 5 * time.Minute

// patience is how long past its time a successor waits for agents. SVIDs signed meanwhile may be cut
// short by as much.
func patience(lifetime time.Duration) time.Duration { return min(lifetime/60, maxPatience) }

// Published returns the revision of the last bundle that this CA wrote, 0 if it has written none since it
// was opened.
func (c *CA) Published() kv.Rev {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bundleRev
}
