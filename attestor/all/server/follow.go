package server

import (
	"context"
	"iter"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/all"
)

// Follow lets the parts that can tell of changes tell of those at the nodes of their combination.
func (j *judge) Follow(ctx context.Context, agents attestor.Admitted) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, c := range j.combinations {
		for _, p := range c.parts {
			if f, ok := p.judge.(attestor.Follower); ok {
				group.Go(func() error { return f.Follow(ctx, &admitted{c: c, kind: p.kind, agents: agents, log: j}) })
			}
		}
	}
	return group.Wait()
}

// admitted are the nodes of a combination as one of its parts sees them: by the paths that it proved, and with
// its own selectors.
type admitted struct {
	c      *combination
	kind   string
	agents attestor.Admitted
	log    *judge
}

// each yields the nodes' own paths beside the parts', and all of their selectors.
func (a *admitted) each(yield func(whole, path string, set attestor.Set) bool) {
	for whole, set := range a.agents.Each() {
		if !strings.HasPrefix(whole, all.Type+"/"+a.c.name+"/") {
			continue
		}
		for _, s := range set.All() {
			path, ok := strings.CutPrefix(s.Value, all.PartSelector+a.kind+"/")
			if s.Type == all.Type && ok {
				if !yield(whole, a.kind+"/"+path, set) {
					return
				}
				break
			}
		}
	}
}

// Each yields the part's paths and selectors.
func (a *admitted) Each() iter.Seq2[string, attestor.Set] {
	return func(yield func(string, attestor.Set) bool) {
		a.each(func(_, path string, set attestor.Set) bool {
			var own []attestor.Selector
			for _, s := range set.All() {
				if s.Type == a.kind {
					own = append(own, s)
				}
			}
			return yield(path, attestor.NewSet(own...))
		})
	}
}

// Update gives the node other selectors of the part. If the parts have no longer in common what they must, the
// node is none any more.
func (a *admitted) Update(ctx context.Context, path string, selectors []attestor.Selector) error {
	whole, set, found := a.find(path)
	if !found {
		return nil
	}
	next := slices.Clone(selectors)
	for _, s := range set.All() {
		if s.Type != a.kind {
			next = append(next, s)
		}
	}
	after := attestor.NewSet(next...)
	if err := a.c.together(after); err != nil {
		a.log.log.WithError(err).WithField("agent", whole).Warn("the parts of a node do not belong together any more; it is evicted")
		return a.agents.Evict(ctx, whole)
	}
	return a.agents.Update(ctx, whole, after.All())
}

// Evict forgets a node one of whose parts is no more.
func (a *admitted) Evict(ctx context.Context, path string) error {
	whole, _, found := a.find(path)
	if !found {
		return nil
	}
	return a.agents.Evict(ctx, whole)
}

func (a *admitted) find(path string) (whole string, set attestor.Set, found bool) {
	a.each(func(w, p string, s attestor.Set) bool {
		if p == path {
			whole, set, found = w, s, true
		}
		return !found
	})
	return whole, set, found
}
