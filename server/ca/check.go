package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Check compares the journal of authorities with the keys and with the own trust domain's bundle (nil:
// there is none), and returns what does not fit, in words for an operator; nothing if all does. It
// writes nothing. A key manager that cannot be asked is km nil: then only journal and bundle are
// compared.
func Check(ctx context.Context, journal []records.Journal, bundle *identity.Bundle, km keys.Manager, td spiffeid.TrustDomain, now time.Time) []string {
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	c := &CA{td: td, lines: map[string]*authority{}}
	for _, line := range journal {
		a, err := decode(line, nil, td)
		if err != nil {
			say("%v", err)
			continue
		}
		if km != nil && (line.State == StatePrepared || line.State == StateActive) {
			signer, err := km.Get(ctx, line.KeyID)
			if err != nil && !errors.Is(err, keys.ErrNotFound) {
				say("%s authority %s: its key cannot be looked for: %v", line.Kind, line.AuthorityID, err)
			}
			if err == nil {
				if a, err = decode(line, signer, td); err != nil {
					say("%v", err)
					continue
				}
			}
		}
		c.lines[line.AuthorityID] = a
	}
	for _, kind := range kinds {
		c.checkKind(kind, km != nil && km.Persistent(), now, say)
	}
	if len(journal) == 0 && bundle != nil && len(bundle.X509)+len(bundle.JWT) > 0 {
		say("the journal of authorities is empty, but the bundle of %s names %d", td.Name(), len(bundle.X509)+len(bundle.JWT))
	}
	for _, a := range c.sorted() {
		if isAbove(a.line.Kind) {
			continue
		}
		if !a.prunable(now) && a.line.State != StatePrepared && a.line.State != StateRevoked && !inBundle(bundle, a) {
			if a.line.UpstreamID != "" {
				// What is old may have lost its root on purpose.
				if a.line.State == StateActive {
					say("%s authority %s is active and the root %s that it hangs on is not in the bundle of %s", a.line.Kind, a.line.AuthorityID, a.line.UpstreamID, td.Name())
				}
				continue
			}
			say("%s authority %s is %s and not in the bundle of %s", a.line.Kind, a.line.AuthorityID, a.line.State, td.Name())
		}
	}
	return wrong
}

// checkKind says what is wrong with who signs, and who will.
func (c *CA) checkKind(kind string, lasting bool, now time.Time, say func(string, ...any)) {
	active, prepared := c.find(kind, StateActive), c.find(kind, StatePrepared)
	for _, a := range c.sorted() {
		second := a.line.State == StateActive && a != active || a.line.State == StatePrepared && a != prepared
		if a.line.Kind == kind && second {
			say("%s authority %s is a second one that is %s", kind, a.line.AuthorityID, a.line.State)
		}
	}
	if !lasting || active == nil || active.signer != nil || active.expired(now) {
		return
	}
	if prepared != nil && prepared.signer != nil && prepared.valid(now) {
		say("the private key %s of the active %s authority %s is lost; its successor %s takes over at the next start",
			active.line.KeyID, kind, active.line.AuthorityID, prepared.line.AuthorityID)
		return
	}
	say("the private key %s of the active %s authority %s is lost: put the key file back, or set new_authority_on_lost_key once to start with a new authority",
		active.line.KeyID, kind, active.line.AuthorityID)
}

func inBundle(b *identity.Bundle, a *authority) bool {
	switch {
	case b == nil:
		return false
	case a.line.Kind == KindX509 && a.line.UpstreamID != "":
		return slices.ContainsFunc(b.X509, func(x identity.X509Authority) bool { return upstream.RootID(x.Certificate) == a.line.UpstreamID })
	case a.line.Kind == KindX509:
		return b.HasX509(a.cert)
	}
	list := b.JWT
	if a.line.Kind == KindWIT {
		list = b.WIT
	}
	return slices.ContainsFunc(list, func(j identity.JWTAuthority) bool { return j.KeyID == a.line.AuthorityID })
}
