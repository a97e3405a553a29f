package server

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/admit"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view"
)

// prunePause is about how long the pruner waits between two looks.
const prunePause = time.Hour

// pruner forgets agents whose SVID expired long ago, as "agent purge" does for an operator. One that is banned
// stays so: whoever banned it meant the name.
type pruner struct {
	expiredFor time.Duration // 0: nobody is forgotten
	once       bool          // those too that cannot attest again, whose evidence may then be used once more
	pictures   *view.View
	desk       *admit.Desk
	log        *audit.Log
	now        func() time.Time
	diary      logrus.FieldLogger
}

// run looks from time to time until ctx ends. Of several servers each does, and one finds what is due.
func (p *pruner) run(ctx context.Context) error {
	if p.expiredFor == 0 {
		return nil
	}
	select {
	case <-p.pictures.Ready():
	case <-ctx.Done():
		return nil
	}
	for {
		if err := p.prune(ctx); err != nil && ctx.Err() == nil {
			p.diary.WithError(err).Warn("Expired agents are kept; they are tried again in an hour")
		}
		timer := time.NewTimer(prunePause*3/4 + rand.N(prunePause/2)) //nolint:gosec // so that servers do not look at once
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

func (p *pruner) prune(ctx context.Context) error {
	for _, n := range p.pictures.Nodes() {
		if !p.due(n) {
			continue
		}
		rev, err := p.desk.Prune(ctx, n.ID, p.due)
		if errors.Is(err, records.ErrNotFound) { // it is gone, or has attested meanwhile
			continue
		}
		if err != nil {
			return err
		}
		err = p.log.Write(audit.Line{
			Event: "agent.prune", Caller: "prune", Agent: n.ID.String(), Outcome: audit.Allow, Rev: rev,
			Reason: "its SVID expired more than " + p.expiredFor.String() + " ago",
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// due says whether a node is to be forgotten.
func (p *pruner) due(n *records.Node) bool {
	end := n.ExpiresAt
	if n.NewExpiresAt.After(end) {
		end = n.NewExpiresAt
	}
	return !n.Banned && (n.CanReattest || p.once) && !end.IsZero() && p.now().Sub(end) > p.expiredFor
}
