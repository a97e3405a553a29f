package delegate

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
)

// target says for whom a delegate acts: a process, or whoever shows selectors. The zero value is nobody
// in particular.
type target struct {
	pid   int
	facts attestor.Set
}

// naming is a request that says for whom.
type naming interface {
	GetSelectors() []*types.Selector
	GetPid() int32
}

// newTarget takes a PID or selectors from a request, never both. nil names nobody.
func newTarget(req naming) (target, error) {
	if req == nil {
		return target{}, nil
	}
	selectors, pid := req.GetSelectors(), req.GetPid()
	switch {
	case pid != 0 && len(selectors) > 0:
		return target{}, errOneOf
	case pid > 0:
		return target{pid: int(pid)}, nil
	case pid < 0 || len(selectors) == 0:
		return target{}, errOneOf
	}
	facts, err := identity.SelectorsFromWire(selectors)
	if err != nil {
		return target{}, errSelectors
	}
	return target{facts: facts}, nil
}

// errand is one call of a delegate. One goroutine uses it.
type errand struct {
	*service
	event    string
	target   target
	audience []string

	by       *workloadapi.Followed // the delegate
	as       string                // its SPIFFE ID, once it was looked at
	entitled <-chan struct{}       // closed when it may have other identities
	of       *workloadapi.Followed // the process it acts for; nil: selectors, or nobody
}

// errand runs a call of whoever is a delegate, for whom the request names.
func (s *service) errand(ctx context.Context, event string, req naming, run func(*errand) error) error {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return s.status(ctx, errors.New("identify caller: not a pinned connection"))
	}
	e := &errand{service: s, event: event}
	by, err := s.Attest.Attend(ctx, caller)
	if err != nil {
		return s.status(ctx, err)
	}
	defer by.Leave()
	e.by = by
	if err = e.authorize(); err == nil {
		e.target, err = newTarget(req)
	}
	if err == nil {
		err = e.attend(ctx, run)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, workloadapi.Stopped()) {
		why := err
		if errors.Is(err, errNotDelegate) {
			why = workloadapi.Denied(err.Error())
		}
		e.audit(workloadapi.Handed{}, why)
	}
	return s.status(ctx, err)
}

// attend attests the process that is meant, if one is, and runs the call.
func (e *errand) attend(ctx context.Context, run func(*errand) error) error {
	if e.target.pid == 0 {
		return run(e)
	}
	pinned, err := e.Pin(e.target.pid)
	if errors.Is(err, peer.ErrDead) {
		return errNoProcess
	}
	if err != nil {
		return fmt.Errorf("pin process: %w", err)
	}
	defer pinned.Release()
	of, err := e.Attest.Attend(ctx, pinned)
	if err != nil {
		return err
	}
	defer of.Leave()
	e.of = of
	return run(e)
}

// facts are those of whom the delegate acts for.
func (e *errand) facts() attestor.Set {
	if e.of != nil {
		return e.of.Facts()
	}
	return e.target.facts
}

// authorize asks whether the caller is a delegate, now.
func (e *errand) authorize() error {
	var ids []spiffeid.ID
	ids, e.entitled = e.Entitled(e.by.Facts())
	if len(ids) == 0 {
		e.as = ""
		return errNoIdentity
	}
	e.as = ids[0].String()
	i := slices.IndexFunc(ids, func(id spiffeid.ID) bool { return e.authorized[id] })
	if i < 0 {
		return errNotDelegate
	}
	e.as = ids[i].String()
	return nil
}

// stale reports whether what was asked of the delegate has to be asked again.
func (e *errand) stale() bool {
	select {
	case <-e.entitled:
	case <-e.by.Replaced():
	case <-e.replaced():
	default:
		return false
	}
	return true
}

// replaced is closed when the facts of the process that is meant are others.
func (e *errand) replaced() <-chan struct{} {
	if e.of == nil {
		return nil
	}
	return e.of.Replaced()
}

// wait sleeps until there may be something else to say, or an error ends the call.
func (e *errand) wait(ctx context.Context, changed <-chan struct{}) error {
	var exited <-chan struct{}
	if e.of != nil {
		exited = e.of.Exited()
	}
	select {
	case <-changed:
	case <-e.entitled:
	case <-e.by.Replaced():
		return e.by.Renew()
	case <-e.replaced():
		return e.of.Renew()
	case <-exited:
		return errExited
	case <-e.by.Exited():
		return errExited
	case <-e.Attest.Stopping():
		return workloadapi.Stopped()
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// told says that something new was sent: both processes are looked at again soon.
func (e *errand) told() {
	e.by.Told()
	if e.of != nil {
		e.of.Told()
	}
}

// audit writes the line of an answer, or of the error in its place.
func (e *errand) audit(h workloadapi.Handed, err error) {
	h.By, h.ForPID, h.ForFacts, h.Audience = e.as, e.target.pid, e.target.facts, e.audience
	e.by.Audit(e.event, h, err)
}
