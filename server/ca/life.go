package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

// kinds is the order in which authorities are looked after.
var kinds = []string{KindX509, KindJWT, KindWIT}

// kinds are those that this server signs with. Others may be in the journal, and verify what they signed.
func (c *CA) kinds() []string {
	if c.cfg.WIT {
		return kinds
	}
	return kinds[:2]
}

// maxGrace is how long an authority that was prepared late is given to reach the verifiers before
// it takes over from one that is still valid. SPIRE's agents ask for the bundle every 5 seconds.
const maxGrace = 30 * time.Second

// load reads the journal into lines. Nothing signs after it: turn publishes first.
func (c *CA) load(ctx context.Context) error {
	stored, err := c.store.Journal(ctx)
	if err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	if len(stored) == 0 {
		if err := c.checkEmptyJournal(ctx); err != nil {
			return err
		}
	}
	for _, line := range stored {
		var signer crypto.Signer
		if line.State == StatePrepared || line.State == StateActive || line.State == StateAside {
			if signer, err = c.keys.Get(ctx, line.KeyID); err != nil && !errors.Is(err, keys.ErrNotFound) {
				return fmt.Errorf("get key of %s authority %s: %w", line.Kind, line.AuthorityID, err)
			}
			if err != nil {
				signer = nil
			}
		}
		a, err := decode(line, signer, c.td)
		if err != nil {
			return err
		}
		if err := c.loadLister(ctx, a); err != nil {
			return err
		}
		c.lines[line.AuthorityID] = a
	}
	defer c.relist()
	return c.retire(ctx)
}

// checkEmptyJournal tells a new trust domain from one whose journal was lost: the latter has
// authorities in its bundle that somebody made.
func (c *CA) checkEmptyJournal(ctx context.Context) error {
	b, err := c.store.Bundle(ctx, c.td)
	if errors.Is(err, records.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read bundle: %w", err)
	}
	valid, now := 0, c.cfg.Now()
	for _, a := range b.X509 {
		if now.Before(a.Certificate.NotAfter) {
			valid++
		}
	}
	for _, a := range slices.Concat(b.JWT, b.WIT) {
		if now.Before(a.ExpiresAt) {
			valid++
		}
	}
	switch {
	case valid == 0:
		return nil
	case c.cfg.NewAuthorityOnLostKey:
		c.log.WithField("authorities", valid).
			Error("The journal of authorities is lost while the bundle still names some: new ones are made because new_authority_on_lost_key says so")
		return nil
	}
	return fmt.Errorf("%w: it is empty, but the bundle of %s names %d authorities that have not expired: "+
		"restore the store from a backup, or set new_authority_on_lost_key once to make new authorities beside them",
		ErrJournal, c.td.Name(), valid)
}

// retire makes old what load found and cannot sign. It decides about all lines before it writes.
func (c *CA) retire(ctx context.Context) error {
	now := c.cfg.Now()
	var changed []*authority
	for _, kind := range kinds {
		// There is one of each: what is found first is the newest, and all others make way.
		active, prepared := c.find(kind, StateActive), c.find(kind, StatePrepared)
		for _, a := range c.lines {
			if a.line.Kind != kind || a.line.State != StateActive && a.line.State != StatePrepared {
				continue
			}
			log := c.log.WithFields(a.fields())
			switch {
			case a != active && a != prepared:
				log.WithField("state", a.line.State).Error("Second authority in this state: it is taken for old")
			case a.signer != nil:
				continue
			case !c.keys.Persistent():
				log.Info("Keys in memory ended with the last run: the authority is old now")
			case a == prepared:
				log.Warn("Private key of the prepared authority is lost: another one will be prepared")
			case a.expired(now):
				log.Warn("Private key of the active authority is lost, but it has expired anyway")
			case prepared != nil && prepared.signer != nil && prepared.valid(now):
				// As after a restored backup from before the successor took over. The bundle names it.
				log.WithField("successor", prepared.line.AuthorityID).
					Error("Private key of the active authority is lost: its prepared successor takes over")
			case c.cfg.NewAuthorityOnLostKey:
				log.Error("Private key of the active authority is lost: a new one is made because new_authority_on_lost_key says so")
			default:
				return fmt.Errorf("%w: %s authority %s, valid until %s, has no key %s in the key manager: "+
					"put the keys back (with key_manager \"disk\": the key file), or set new_authority_on_lost_key once to start with a new authority "+
					"(what the lost one signed stays valid until then)",
					ErrLostKey, kind, a.line.AuthorityID, a.line.NotAfter.Format(time.RFC3339), a.line.KeyID)
			}
			changed = append(changed, a.with(StateOld, now))
		}
	}
	if len(changed) == 0 {
		return nil
	}
	return c.put(ctx, changed...)
}

// ahead makes the authorities whose time has come, and makes known above what has to be. It is what may
// take long, so mu is not held meanwhile; turn finds what it made.
func (c *CA) ahead(ctx context.Context) error {
	var errs []error
	for _, kind := range c.kinds() {
		c.mu.Lock()
		err := c.absorb(ctx, c.cfg.Now())
		due := err == nil && c.due(kind, c.cfg.Now()) && c.usable(kind, c.cfg.Now()) == nil
		c.mu.Unlock()
		if !due {
			errs = append(errs, err)
			continue
		}
		next, err := c.makeAuthority(ctx, kind)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c.mu.Lock()
		if c.taintedAbove(next.line.UpstreamID) {
			errs = append(errs, fmt.Errorf("make %s authority: %w: %s", kind, errTaintedAbove, next.line.UpstreamID))
			c.deleteKey(ctx, next.authority)
		} else {
			c.dropPending(ctx, kind)
			c.pending[kind] = next
		}
		c.mu.Unlock()
	}
	return errors.Join(append(errs, c.tellAbove(ctx))...)
}

// due says that a successor, or the first authority, is to be prepared.
func (c *CA) due(kind string, now time.Time) bool {
	active, prepared := c.find(kind, StateActive), c.find(kind, StatePrepared)
	if prepared != nil && prepared.valid(now) && !c.unsuited(prepared) {
		return false
	}
	return prepared != nil || active == nil || active.early(now) || active.shouldPrepare(now) || c.unsuited(active)
}

// usable returns the pending authority of the kind if it is as good as new, or nil. An authority that
// could not be journaled is tried again as it is: a store that is away for an hour costs one key, and one
// that said no but wrote the line is not left with a line without a key.
func (c *CA) usable(kind string, now time.Time) *made {
	next := c.pending[kind]
	if next == nil || next.early(now) || next.shouldActivate(now) || c.unsuited(next.authority) {
		return nil
	}
	return next
}

// turn brings everything to where it should be by now, each step only once the one before it is
// stored. Callers hold mu. What could not be done is in the error; what signs goes on signing.
func (c *CA) turn(ctx context.Context) error {
	now := c.cfg.Now()
	errs := []error{c.absorb(ctx, now)}
	for _, kind := range c.kinds() {
		errs = append(errs, c.resume(ctx, kind, now), c.prepare(ctx, kind, now))
	}
	if err := c.publish(ctx, now); err != nil {
		return errors.Join(append(errs, err)...) // nothing takes over that is not published
	}
	for _, kind := range c.kinds() {
		errs = append(errs, c.activate(ctx, kind, now))
	}
	errs = append(errs, c.prune(ctx, now))
	return errors.Join(errs...)
}

// resume lets an authority sign again that made way because of the clock, now that the clock says that
// it is valid and the active one is not. Who was away meanwhile knows it, and no other.
func (c *CA) resume(ctx context.Context, kind string, now time.Time) error {
	active := c.find(kind, StateActive)
	if active != nil && active.valid(now) {
		return nil
	}
	var back *authority
	for _, a := range c.lines {
		if a.line.Kind == kind && a.line.State == StateAside && a.signer != nil && a.valid(now) && (back == nil || older(back, a) < 0) {
			back = a
		}
	}
	if back == nil {
		return nil
	}
	changed := []*authority{back.with(StateActive, now)}
	if active != nil {
		changed = append(changed, active.with(StateAside, now))
	}
	if err := c.put(ctx, changed...); err != nil {
		return fmt.Errorf("resume %s authority: %w", kind, err)
	}
	c.log.WithFields(back.fields()).Error("The clock was set: an authority that was taken for expired, or for early, signs again")
	return nil
}

// prepare journals the successor that ahead made, when it is time, or the first authority. It makes none itself:
// keys may be elsewhere, and whoever asks about authorities would wait for them.
func (c *CA) prepare(ctx context.Context, kind string, now time.Time) error {
	if !c.due(kind, now) {
		return nil
	}
	next := c.usable(kind, now)
	if next == nil {
		return nil // ahead says why
	}
	changed := []*authority{next.authority}
	prepared := c.find(kind, StatePrepared)
	switch {
	case prepared == nil:
	case prepared.valid(now): // unsuited
		changed = append(changed, prepared.with(StateRevoked, now))
	default: // the server was down all its life, or the clock was set
		changed = append(changed, prepared.with(StateAside, now))
	}
	if err := c.put(ctx, changed...); err != nil {
		return fmt.Errorf("prepare %s authority: %w", kind, err)
	}
	c.took(next)
	delete(c.pending, kind)
	c.log.WithFields(next.fields()).Info("Authority prepared")
	return nil
}

// took sees to it that the roots that came with an authority are in the next bundle.
func (c *CA) took(a *made) {
	for _, root := range a.roots {
		if !slices.ContainsFunc(c.roots, func(b identity.X509Authority) bool { return b.Certificate.Equal(root) }) {
			c.roots = append(slices.Clip(c.roots), identity.X509Authority{Certificate: root})
		}
	}
}

// activate lets the prepared authority take over when it is time. It is in the bundle by now.
func (c *CA) activate(ctx context.Context, kind string, now time.Time) error {
	active, prepared := c.find(kind, StateActive), c.find(kind, StatePrepared)
	slot := c.slot(kind)
	if active != nil && slot.Load() != active { // the start, or resumed: it is in the bundle, so it may sign
		slot.Store(active)
		c.metrics.active(kind, active)
	}
	if prepared == nil {
		return nil
	}
	if active != nil && active.early(now) {
		c.log.WithFields(active.fields()).
			Error("The clock was set back to before the active authority was made: what it signs is not accepted yet, another one takes over")
	}
	if active != nil && active.valid(now) {
		if c.untold(prepared) {
			return nil // who verifies elsewhere does not know it yet; ahead says why
		}
		due := active.activateAt()
		if c.unsuited(active) {
			due = now
		}
		grace := min(maxGrace, active.lifetime()/60)
		if c.taintedAbove(active.line.UpstreamID) {
			grace = 0 // its root was in the bundle before, or agents that are connected are waited for
		}
		if ready := prepared.line.CreatedAt.Add(grace); ready.After(due) {
			due = ready
		}
		if now.Before(due) {
			return nil
		}
		late := due.Add(patience(active.lifetime()))
		if c.unsuited(active) {
			late = prepared.line.CreatedAt.Add(grace + maxForcedWait)
		}
		if n := c.behind(); n > 0 && now.Before(late) {
			c.log.WithFields(prepared.fields()).WithField("agents", n).
				Info("The prepared authority's time has come; it waits for connected agents that do not have it in their bundle")
			return nil
		}
	}
	return c.takeOver(ctx, kind, active, prepared, now)
}

// takeOver lets the prepared authority sign instead of the active one, if there is one.
func (c *CA) takeOver(ctx context.Context, kind string, active, prepared *authority, now time.Time) error {
	changed := []*authority{prepared.with(StateActive, now)}
	state := StateOld
	if active != nil {
		if !active.valid(now) {
			state = StateAside // the clock may be wrong, and be set right
		}
		changed = append(changed, active.with(state, now))
	}
	if err := c.put(ctx, changed...); err != nil {
		return fmt.Errorf("activate %s authority: %w", kind, err)
	}
	c.slot(kind).Store(changed[0])
	c.metrics.active(kind, changed[0])
	c.log.WithFields(changed[0].fields()).Info("Authority activated")
	if active != nil && state == StateOld && !c.lists(c.lines[active.line.AuthorityID], now) {
		c.deleteKey(ctx, active)
	}
	if active != nil && c.taintedAbove(active.line.UpstreamID) {
		return c.renewServer(active)
	}
	return nil
}

// publish sees to it that the bundle names every authority of the journal, and none that expired
// more than a day ago.
func (c *CA) publish(ctx context.Context, now time.Time) error {
	b, err := c.store.Bundle(ctx, c.td)
	if err != nil && !errors.Is(err, records.ErrNotFound) {
		return fmt.Errorf("read bundle: %w", err)
	}
	if err == nil && !c.merge(b.Clone(), now) {
		return nil
	}
	b, rev, err := c.store.UpdateBundle(ctx, c.td, func(b *identity.Bundle) error {
		c.merge(b, now)
		return nil
	})
	if err != nil {
		return fmt.Errorf("publish authorities: %w", err)
	}
	c.bundleRev = rev
	c.log.WithFields(logrus.Fields{"sequence": b.Sequence, "x509": len(b.X509), "jwt": len(b.JWT)}).Info("Bundle published")
	return nil
}

// merge changes the bundle and reports whether it did. Authorities that others put there (an
// operator's append) stay until they expire; nobody's taint is taken back.
func (c *CA) merge(b *identity.Bundle, now time.Time) (changed bool) {
	limit := now.Add(-pruneAfter)
	x509s := make([]identity.X509Authority, 0, len(b.X509)+1)
	for _, a := range b.X509 {
		if !a.Certificate.NotAfter.After(limit) || c.revokedX509(a.Certificate) {
			changed = true
			continue
		}
		x509s = append(x509s, a)
	}
	keep := func(list []identity.JWTAuthority, kind string) []identity.JWTAuthority {
		kept := make([]identity.JWTAuthority, 0, len(list)+1)
		for _, a := range list {
			if !a.ExpiresAt.IsZero() && !a.ExpiresAt.After(limit) || c.revokedKey(kind, a.KeyID) {
				changed = true
				continue
			}
			kept = append(kept, a)
		}
		return kept
	}
	jwts, wits := keep(b.JWT, KindJWT), keep(b.WIT, KindWIT)
	for _, a := range c.sorted() {
		if a.prunable(now) || a.line.State == StateRevoked || isAbove(a.line.Kind) || a.line.UpstreamID != "" {
			continue // what another one signed is verified by that one's root
		}
		var entryChanged bool
		switch a.line.Kind {
		case KindX509:
			known := len(x509s)
			if x509s, entryChanged = addX509(x509s, a); len(x509s) > known {
				c.listAlong(b, a, now)
			}
		case KindWIT:
			wits, entryChanged = addJWT(wits, a)
		default:
			jwts, entryChanged = addJWT(jwts, a)
		}
		changed = changed || entryChanged
	}
	var rootsChanged, jwtsChanged, witsChanged bool
	b.X509, rootsChanged = c.mergeRoots(x509s, now)
	b.JWT, jwtsChanged = c.mergeKeys(KindJWT, jwts, now)
	b.WIT, witsChanged = c.mergeKeys(KindWIT, wits, now)
	return changed || rootsChanged || jwtsChanged || witsChanged
}

// revokedX509 and revokedKey say of an authority in a bundle that it was revoked, whoever put it there.
func (c *CA) revokedX509(cert *x509.Certificate) bool {
	a := c.lines[hex.EncodeToString(cert.SubjectKeyId)]
	return a != nil && a.line.State == StateRevoked && samePublic(a.public, cert.PublicKey)
}

func (c *CA) revokedKey(kind, keyID string) bool {
	a := c.lines[keyID]
	return a != nil && a.line.State == StateRevoked && a.line.Kind == kind
}

func addX509(list []identity.X509Authority, a *authority) ([]identity.X509Authority, bool) {
	tainted := a.line.State == StateTainted
	for i := range list {
		if bytes.Equal(list[i].Certificate.Raw, a.cert.Raw) {
			taint := tainted && !list[i].Tainted
			list[i].Tainted = list[i].Tainted || tainted
			return list, taint
		}
	}
	return append(list, identity.X509Authority{Certificate: a.cert, Tainted: tainted}), true
}

func addJWT(list []identity.JWTAuthority, a *authority) ([]identity.JWTAuthority, bool) {
	tainted := a.line.State == StateTainted
	for i := range list {
		if list[i].KeyID == a.line.AuthorityID {
			taint := tainted && !list[i].Tainted
			list[i].Tainted = list[i].Tainted || tainted
			return list, taint
		}
	}
	return append(list, identity.JWTAuthority{
		KeyID: a.line.AuthorityID, Key: a.public, ExpiresAt: a.line.NotAfter, Tainted: tainted,
	}), true
}

// prune forgets authorities that nobody can need any more.
func (c *CA) prune(ctx context.Context, now time.Time) error {
	var ids []string
	for id, a := range c.lines {
		if a.prunable(now) && a.line.State != StateActive && a.line.State != StatePrepared {
			c.deleteKey(ctx, a)
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	if err := c.store.PutJournal(ctx, nil, ids); err != nil {
		return fmt.Errorf("prune journal: %w", err)
	}
	for _, id := range ids {
		c.log.WithFields(c.lines[id].fields()).Info("Authority pruned")
		delete(c.lines, id)
	}
	c.relist()
	return nil
}

// put journals the authorities and then holds them to be so.
func (c *CA) put(ctx context.Context, changed ...*authority) error {
	lines := make([]records.Journal, len(changed))
	for i, a := range changed {
		lines[i] = a.line
	}
	if err := c.store.PutJournal(ctx, lines, nil); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	for _, a := range changed {
		if a.signer == nil && !c.lists(a, c.cfg.Now()) {
			a.lister = nil // nobody has seen it yet
		}
		c.lines[a.line.AuthorityID] = a
	}
	c.relist()
	return nil
}

// sweepKeys deletes the keys of authorities that became old in a run that did not get to it. Keys
// that no line names stay: after a backup of the store was restored, they may be all there is.
func (c *CA) sweepKeys(ctx context.Context) {
	for _, a := range c.lines {
		if (a.line.State == StateOld || a.line.State == StateTainted || a.line.State == StateRevoked) && !c.lists(a, c.cfg.Now()) {
			c.deleteKey(ctx, a)
		}
	}
}

// deleteKey is for the keys of authorities that will not sign. One that cannot be deleted is
// tried again at the next start and when the authority is pruned.
func (c *CA) deleteKey(ctx context.Context, a *authority) {
	if a.line.KeyID == "" {
		return // an authority above
	}
	if err := c.keys.Delete(ctx, a.line.KeyID); err != nil {
		c.log.WithError(err).WithFields(a.fields()).Warn("Private key of an authority that is not needed could not be deleted")
	}
}

// dropPending gives up authorities that could not be journaled. If one of them was, after all, it
// is found at the next start to have lost its key before it signed anything.
func (c *CA) dropPending(ctx context.Context, kinds ...string) {
	for _, kind := range kinds {
		if a := c.pending[kind]; a != nil {
			c.deleteKey(ctx, a.authority)
			delete(c.pending, kind)
		}
	}
}

// find returns the newest authority of the kind in the state, or nil.
func (c *CA) find(kind, state string) *authority {
	var newest *authority
	for _, a := range c.lines {
		if a.line.Kind == kind && a.line.State == state && (newest == nil || older(newest, a) < 0) {
			newest = a
		}
	}
	return newest
}

func (c *CA) slot(kind string) *atomic.Pointer[authority] {
	switch kind {
	case KindX509:
		return &c.x509
	case KindWIT:
		return &c.wit
	}
	return &c.jwt
}

// current returns the authority that signs, or nil.
func (c *CA) current(kind string) *authority {
	a := c.slot(kind).Load()
	if a == nil || !a.valid(c.cfg.Now()) {
		return nil
	}
	return a
}

func (a *authority) fields() logrus.Fields {
	return logrus.Fields{"kind": a.line.Kind, "authority_id": a.line.AuthorityID, "expires_at": a.line.NotAfter.Format(time.RFC3339)}
}
