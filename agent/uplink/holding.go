package uplink

import (
	"context"
	"slices"
	"time"

	"github.com/assay-id/assay/server/wire/feedv1"
)

// authorities is the capability of servers that want to know who signed what is held.
const authorities = "authorities"

// HeldBy is how many SVIDs are held that an authority signed.
type HeldBy struct {
	Authority string // the hexadecimal key identifier of an X.509 authority, the key ID of a JWT authority
	X509, JWT int
}

// Holding says by whom what is held was signed, sorted by authority.
type Holding struct {
	By []HeldBy
	// Latest are the authorities that signed last.
	Latest []string
}

// differs reports whether the change from one to the other is worth telling: not if there is only more
// or less of what the authorities signed that signed last.
func (h Holding) differs(from Holding) bool {
	if !slices.Equal(h.Latest, from.Latest) {
		return true
	}
	return !slices.EqualFunc(h.By, from.By, func(a, b HeldBy) bool {
		return a == b || a.Authority == b.Authority && slices.Contains(h.Latest, a.Authority)
	})
}

// maxHolding is of how many authorities the server is told.
const maxHolding = 100

// settleTime is how long what is held may change before the server is told, so that a batch that is
// signed is told of at once.
const settleTime = 200 * time.Millisecond

// reportHolding tells the server what is held, and again whenever that is worth telling.
func (u *Uplink) reportHolding(ctx context.Context, w *sender) {
	told, changed := u.cfg.Holding()
	for first := true; ; first = false {
		now := told
		if !first {
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
			timer := time.NewTimer(settleTime)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			now, changed = u.cfg.Holding()
			if !now.differs(told) {
				continue
			}
		}
		m := &feedv1.Holding{}
		for _, by := range now.By[:min(len(now.By), maxHolding)] {
			m.Authorities = append(m.Authorities, &feedv1.HeldAuthority{
				AuthorityId: by.Authority, X509Svids: uint32(by.X509), JwtSvids: uint32(by.JWT), //nolint:gosec // counts of things in memory
			})
		}
		if err := w.send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Holding{Holding: m}}); err != nil {
			return // Recv says it too
		}
		told = now
	}
}
