package server

import (
	"context"
	"errors"
	"iter"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/admit"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/view"
)

// followNodes lets the judges that can keep the selectors of the agents they admitted up to date, until ctx
// ends.
func followNodes(ctx context.Context, judges map[string]attestor.Judge, domain spiffeid.TrustDomain, pictures *view.View, desk *admit.Desk, log *audit.Log) error {
	select {
	case <-pictures.Ready():
	case <-ctx.Done():
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	for kind, judge := range judges {
		if f, ok := judge.(attestor.Follower); ok {
			group.Go(func() error { return f.Follow(ctx, &admitted{kind, domain, pictures, desk, log}) })
		}
	}
	return group.Wait()
}

// admitted are the agents that one judge admitted.
type admitted struct {
	kind     string
	domain   spiffeid.TrustDomain
	pictures *view.View
	desk     *admit.Desk
	log      *audit.Log
}

// Each yields them as the picture shows them.
func (a *admitted) Each() iter.Seq2[string, attestor.Set] {
	return func(yield func(string, attestor.Set) bool) {
		for _, n := range a.pictures.Nodes() {
			path, ok := strings.CutPrefix(n.ID.Path(), "/spire/agent/")
			if !ok || n.Type != a.kind || n.Banned {
				continue
			}
			if !yield(path, n.Selectors) {
				return
			}
		}
	}
}

// Update commits other selectors, which the picture then shows.
func (a *admitted) Update(ctx context.Context, path string, selectors []attestor.Selector) error {
	rev, err := a.desk.Refresh(ctx, a.kind, path, selectors)
	if err != nil || rev == 0 {
		return err
	}
	line := audit.Line{Event: "agent.refresh", Rev: rev}
	for _, s := range selectors {
		line.Facts = append(line.Facts, s.String())
	}
	return a.tell(path, line)
}

// tell writes the audit line of something that a judge decided by itself.
func (a *admitted) tell(path string, line audit.Line) error {
	line.Caller, line.Agent, line.Outcome = "attestor/"+a.kind, a.domain.ID().String()+"/spire/agent/"+path, audit.Allow
	return a.log.Write(line)
}

// Evict forgets the agent of a node that is no more. One that is banned stays so: whoever banned it meant the
// name.
func (a *admitted) Evict(ctx context.Context, path string) error {
	for known := range a.Each() {
		if known != path {
			continue
		}
		id, err := spiffeid.FromPath(a.domain, "/spire/agent/"+path)
		if err != nil {
			return err
		}
		rev, err := a.desk.Evict(ctx, id)
		if errors.Is(err, records.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return a.tell(path, audit.Line{Event: "agent.evict", Rev: rev, Reason: "the node is no more"})
	}
	return nil
}

// known answers from the records which agents were admitted.
type known struct{ records *records.Records }

// Admitted implements attestor.Agents.
func (k known) Admitted(ctx context.Context, id spiffeid.ID) (bool, error) {
	_, err := k.records.Node(ctx, id)
	if errors.Is(err, records.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// tellAudit writes the lines of what a part did by itself. A line that cannot be written is counted and
// logged by the log itself; there is nothing to refuse.
func tellAudit(log *audit.Log) func(event, about string, err error) {
	return func(event, about string, err error) {
		line := audit.Line{Event: event, Caller: about, Outcome: audit.Allow}
		if err != nil {
			line.Outcome, line.Reason = audit.Error, err.Error()
		}
		_ = log.Write(line)
	}
}

// keep lets the key manager and the upstream authority see to what they need all the time, as a token that is to be
// renewed, until ctx ends.
func keep(ctx context.Context, log logrus.FieldLogger, parts ...any) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, part := range parts {
		if p, ok := part.(interface {
			Keep(ctx context.Context, log logrus.FieldLogger)
		}); ok {
			group.Go(func() error {
				p.Keep(ctx, log)
				return nil
			})
		}
	}
	return group.Wait()
}
