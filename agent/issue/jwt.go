package issue

import (
	"container/list"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/view"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// jwtSlot holds the JWT-SVID of an entry for an audience, or its WIT-SVID. Issuer.mu guards it.
type jwtSlot struct {
	key string
	// wit is that it is a WIT-SVID, and private the key that this one names.
	wit      bool
	private  crypto.Signer
	entry    *identity.Entry
	audience []string
	svid     *identity.JWTSVID // nil: none
	keyID    string
	renewAt  time.Time
	// used says that somebody was given the token since it was signed.
	used bool

	call     *call
	err      error
	failures int
	retryAt  time.Time

	place *list.Element // nil: not in the cache
}

func (sl *jwtSlot) usable(now time.Time) bool { return sl.svid != nil && now.Before(sl.svid.ExpiresAt) }
func (sl *jwtSlot) fresh(now time.Time) bool  { return sl.usable(now) && now.Before(sl.renewAt) }

func (sl *jwtSlot) finish() {
	if sl.call != nil {
		close(sl.call.done)
		sl.call = nil
	}
}

// jwtCache holds at most size slots, those that were used last.
type jwtCache struct {
	size  int
	slots map[string]*jwtSlot
	order *list.List // of *jwtSlot, the last used in front
	// once has the keys of slots whose tokens turned out to be for one use.
	once map[string]struct{}
}

func newJWTCache(size int) jwtCache {
	return jwtCache{size: size, slots: map[string]*jwtSlot{}, order: list.New(), once: map[string]struct{}{}}
}

// get returns the slot for the entry and audience, making it if need be. A token with a jti is
// for one use, so its slot is not in the cache. Whether there will be one the entry says, or, where the
// server has a profile for the audience, the token itself.
func (c *jwtCache) get(e *identity.Entry, audience []string, wit bool) *jwtSlot {
	if e.JTI && !wit {
		return &jwtSlot{entry: e, audience: audience}
	}
	key := jwtKey(e.ID, audience)
	if wit {
		key = "wit " + e.ID
	}
	if _, once := c.once[key]; once {
		return &jwtSlot{key: key, entry: e, audience: audience}
	}
	sl := c.slots[key]
	if sl == nil {
		sl = &jwtSlot{key: key, entry: e, audience: audience, wit: wit}
		sl.place = c.order.PushFront(sl)
		c.slots[key] = sl
		for len(c.slots) > c.size {
			c.drop(c.order.Back().Value.(*jwtSlot))
		}
		return sl
	}
	c.order.MoveToFront(sl.place)
	return sl
}

// single takes a slot whose token is for one use out of the cache, for whoever waits for it.
func (c *jwtCache) single(sl *jwtSlot) {
	if len(c.once) >= c.size {
		clear(c.once) // what is asked for is learnt again
	}
	c.once[sl.key] = struct{}{}
	c.drop(sl)
}

func (c *jwtCache) drop(sl *jwtSlot) {
	if sl.place != nil {
		c.order.Remove(sl.place)
		sl.place = nil
		delete(c.slots, sl.key)
	}
}

// refresh drops the tokens of entries that are gone or have changed.
func (c *jwtCache) refresh(p *view.Picture) {
	for _, sl := range c.slots {
		if e, ok := p.Entry(sl.entry.ID); !ok || e != sl.entry {
			c.drop(sl)
		}
	}
}

// dropKeys drops the tokens that were signed with one of the keys.
func (c *jwtCache) dropKeys(bad map[string]bool) {
	for _, sl := range c.slots {
		if bad[sl.keyID] {
			c.drop(sl)
		}
	}
}

// jwtKey is the same for the same entry and set of audiences.
func jwtKey(entryID string, audience []string) string {
	set := slices.Clone(audience)
	slices.Sort(set)
	raw, _ := json.Marshal(append([]string{entryID}, slices.Compact(set)...)) // strings never fail
	return string(raw)
}

// JWT returns a JWT-SVID for each entry whose selectors are all in facts, or only for those with the
// SPIFFE ID if it is not zero, in the order of X509, and a channel that is closed when another set of
// entries may match. It waits for what is being signed until ctx ends. No match: nothing and no error.
// A match with nothing valid to give: an error wrapping identity.ErrUnavailable.
func (i *Issuer) JWT(ctx context.Context, facts attestor.Set, audience []string, id spiffeid.ID) ([]*identity.JWTSVID, <-chan struct{}, error) {
	return i.jwt(ctx, facts, false, audience, id)
}

func (i *Issuer) jwt(ctx context.Context, facts attestor.Set, delegated bool, audience []string, id spiffeid.ID) ([]*identity.JWTSVID, <-chan struct{}, error) {
	var svids []*identity.JWTSVID
	changed, err := i.tokens(ctx, facts, delegated, audience, id, false, func(sl *jwtSlot, svid *identity.JWTSVID) { svids = append(svids, svid) })
	return svids, changed, err
}

// WIT does the same with WIT-SVIDs, which have no audience. The channel is closed too when one of them is
// replaced. The error wraps identity.ErrUnsupported if the server signs none.
func (i *Issuer) WIT(ctx context.Context, facts attestor.Set, id spiffeid.ID) ([]*identity.WITSVID, <-chan struct{}, error) {
	var svids []*identity.WITSVID
	changed, err := i.tokens(ctx, facts, false, nil, id, true, func(sl *jwtSlot, svid *identity.JWTSVID) {
		svids = append(svids, &identity.WITSVID{JWTSVID: *svid, Key: sl.private})
	})
	return svids, changed, err
}

// tokens gives each token to give, in order, with mu held.
func (i *Issuer) tokens(ctx context.Context, facts attestor.Set, delegated bool, audience []string, id spiffeid.ID, wit bool,
	give func(*jwtSlot, *identity.JWTSVID),
) (<-chan struct{}, error) {
	i.mu.Lock()
	now := i.now()
	s := i.ask(facts, delegated, now)
	changed := s.changed
	var slots []*jwtSlot
	var fresh []*identity.JWTSVID // by place in slots; nil: to be waited for
	var calls []*call
	some := false
	for _, e := range s.entries {
		if !id.IsZero() && e.SPIFFEID != id {
			continue
		}
		sl := i.jwts.get(e, audience, wit)
		slots = append(slots, sl)
		if sl.fresh(now) {
			sl.used = true
			fresh = append(fresh, sl.svid)
			some = true
			continue
		}
		fresh = append(fresh, nil)
		some = some || sl.usable(now)
		if c := i.requestJWT(sl, now); c != nil {
			calls = append(calls, c)
		}
	}
	i.mu.Unlock()
	if len(slots) == 0 {
		return changed, nil
	}
	var late <-chan time.Time
	if some {
		timer := time.NewTimer(soft)
		defer timer.Stop()
		late = timer.C
	}
	if _, err := await(ctx, calls, late); err != nil {
		return changed, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	now = i.now()
	// What was asked for may have been taken away while it was signed.
	s = i.ask(facts, delegated, now)
	changed = s.changed
	var failed error
	matched, given := false, false
	for n, sl := range slots {
		if !slices.ContainsFunc(s.entries, func(e *identity.Entry) bool { return e.ID == sl.entry.ID }) {
			continue
		}
		matched = true
		switch {
		case fresh[n] != nil && !wit: // a WIT-SVID goes with the key that the slot has now
			given = true
			give(sl, fresh[n])
		case sl.usable(now):
			sl.used, given = true, true
			give(sl, sl.svid)
		case failed == nil:
			failed = sl.err
		}
	}
	if !given && matched {
		return changed, unavailable(failed)
	}
	return changed, nil
}

// requestJWT has the slot's token signed and returns what to wait for, or nil if it has failed
// lately. mu is held.
func (i *Issuer) requestJWT(sl *jwtSlot, now time.Time) *call {
	if sl.call != nil {
		return sl.call
	}
	if i.stopped {
		sl.err = errStopped
		return nil
	}
	if now.Before(sl.retryAt) {
		return nil
	}
	sl.call = &call{done: make(chan struct{})}
	i.jwtQueue = append(i.jwtQueue, sl)
	i.poke()
	return sl.call
}

func (i *Issuer) signJWT(ctx context.Context, sl *jwtSlot) {
	began, kind := time.Now(), "jwt"
	if sl.wit {
		kind = "wit"
	}
	svid, private, err := i.signTrusted(ctx, sl)
	i.metrics.latency.WithLabelValues(kind).Observe(time.Since(began).Seconds())
	i.metrics.count(kind, err)
	if err == nil && svid.ID != sl.entry.SPIFFEID {
		// The entry was changed, and the picture that says so is on its way.
		err = errors.New("server signed for another ID")
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	defer i.poke()
	defer sl.finish()
	i.signing--
	now := i.now()
	if err == nil && !now.Before(svid.ExpiresAt) {
		err = fmt.Errorf("server sent a token that has expired: %w", errClock)
	}
	if err == nil && i.revoked.has(keyID(svid.Token)) {
		err = errRevoked
	}
	if err != nil {
		sl.err = err
		sl.failures++
		sl.retryAt = now.Add(backoff(sl.failures))
		i.log.WithError(err).WithField("entry_id", sl.entry.ID).Debug("JWT-SVID was not signed")
		if sl.place != nil {
			i.due(sl.retryAt)
		}
		return
	}
	hinted := *svid
	hinted.EntryID, hinted.Hint = sl.entry.ID, sl.entry.Hint
	replaced := sl.svid != nil
	sl.private = private
	sl.svid, sl.keyID, sl.used = &hinted, keyID(svid.Token), false // who waits for it says that it is used
	sl.err, sl.failures, sl.retryAt = nil, 0, time.Time{}
	if !i.distrusted(sl.keyID) && !sl.wit {
		i.latest[1] = sl.keyID
	}
	if sl.wit && replaced {
		i.tellWIT(sl, now)
	}
	switch {
	case !sl.wit && hasID(svid.Token) && !sl.entry.JTI:
		i.jwts.single(sl)
	case i.distrusted(sl.keyID):
		i.jwts.drop(sl) // only for those who wait for it
	}
	i.held()
	sl.renewAt = renewalFrom(now, svid.IssuedAt, svid.ExpiresAt)
	if sl.place != nil {
		i.due(sl.renewAt)
	}
}

// tellWIT wakes those who follow the slot's entry: its WIT-SVID has been replaced. mu is held.
func (i *Issuer) tellWIT(sl *jwtSlot, now time.Time) {
	for _, s := range i.subjects {
		if slices.Contains(s.entries, sl.entry) {
			s.wake(now)
		}
	}
}

// signTrusted has a token signed, once more if its key was tainted or revoked, as it may have been while
// the token was on its way. With a WIT-SVID comes the key that it names.
func (i *Issuer) signTrusted(ctx context.Context, sl *jwtSlot) (*identity.JWTSVID, crypto.Signer, error) {
	for again := false; ; again = true {
		svid, private, err := i.signToken(ctx, sl)
		if err != nil {
			return nil, nil, err
		}
		i.mu.Lock()
		bad := i.distrusted(keyID(svid.Token))
		i.mu.Unlock()
		if !bad || again {
			return svid, private, nil
		}
	}
}

func (i *Issuer) signToken(ctx context.Context, sl *jwtSlot) (*identity.JWTSVID, crypto.Signer, error) {
	if !sl.wit {
		svid, err := i.signer.SignJWT(ctx, i.asked(sl.entry), sl.audience)
		return svid, nil, err
	}
	private, err := i.pool.take()
	if err != nil {
		return nil, nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		return nil, nil, err
	}
	svid, err := i.signer.SignWIT(ctx, i.asked(sl.entry), public, identity.TokenAlgorithm(private.Public()))
	return svid, private, err
}

// scanJWT renews the tokens that are used, and drops those that have expired. mu is held.
func (i *Issuer) scanJWT(now time.Time) {
	for _, sl := range i.jwts.slots {
		switch {
		case sl.call != nil:
		case sl.svid == nil || !sl.usable(now):
			i.jwts.drop(sl)
		case now.Before(sl.renewAt):
			i.due(sl.renewAt)
		case sl.used && now.Before(sl.retryAt):
			i.due(sl.retryAt)
		case sl.used:
			i.requestJWT(sl, now)
		default:
			i.due(sl.svid.ExpiresAt)
		}
	}
}

// hasID reports whether a token has a jti claim (RFC 7519 4.1.7): who remembers those refuses it the second
// time.
func hasID(token string) bool {
	parts := strings.SplitN(token, ".", 3)
	if len(parts) != 3 {
		return false
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return false
	}
	var claims struct {
		ID string `json:"jti"`
	}
	return json.Unmarshal(raw, &claims) == nil && claims.ID != ""
}

// keyID reads the kid from a token's header (RFC 7515 4.1.4), empty if there is none.
func keyID(token string) string {
	head, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		return ""
	}
	var header struct {
		KeyID string `json:"kid"`
	}
	if json.Unmarshal(raw, &header) != nil {
		return ""
	}
	return header.KeyID
}
