package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/awsiid"
)

const (
	// defaultRefresh is how often EC2 is asked about all admitted instances, and minRefresh how often at
	// most.
	defaultRefresh = time.Minute
	minRefresh     = 5 * time.Second
	// maxRefreshPause bounds the wait before a region is asked again that could not be.
	maxRefreshPause = 10 * time.Minute
	// betweenBatches is the pause between two requests, which leaves most of what EC2 allows an account to
	// others.
	betweenBatches = 200 * time.Millisecond
)

// looked are the beginnings of the selectors out of EC2 and IAM; all others are of the document.
var looked = []string{"tag:", "sg:", "iamrole:"}

// Follow asks EC2 about the instances whose agents were admitted, again and again, many with one request:
// their selectors become what EC2 says now, and the agent of an instance that was terminated is evicted. A
// stopped instance keeps its agent, because it is the same one when it is started again. Follow returns nil
// when ctx ends.
//
// Why it is so: EC2 tells nobody who does not poll, short of a queue of EventBridge events in each account
// and region. And nothing is concluded from silence: an instance is gone when EC2 says that it was
// terminated, or, to credentials of its own account, that it knows no such one.
func (j *judge) Follow(ctx context.Context, agents attestor.Admitted) error {
	if !j.config.LookupInstance {
		<-ctx.Done()
		return nil
	}
	places := map[place]*followed{}
	// The first round is soon: who knows how long the server was away.
	for pause := min(j.refresh, minRefresh); awsapi.Rest(ctx, pause); pause = j.refresh {
		now := j.now()
		for at, nodes := range j.admitted(agents) {
			f := places[at]
			if f == nil {
				f = new(followed)
				places[at] = f
			}
			if now.Before(f.next) {
				continue
			}
			err := j.refreshPlace(ctx, at, nodes, agents)
			if ctx.Err() != nil {
				break
			}
			f.pause = f.after(err, j.refresh)
			f.next = now.Add(f.pause - j.refresh/2) // due at the round that is nearest
			if err != nil {
				j.log.WithError(err).WithField("region", at.region).WithField("account", at.account).WithField("pause", f.pause).
					Warn("instances of the region cannot be looked up again; selectors of their agents stay as they are until they can")
			}
		}
	}
	return nil
}

// followed is how asking about a place goes.
type followed struct {
	pause time.Duration
	next  time.Time
}

// after is the pause after a round: twice the last one after a failure.
func (f *followed) after(err error, refresh time.Duration) time.Duration {
	if err == nil {
		return refresh
	}
	return min(2*max(f.pause, refresh), max(maxRefreshPause, refresh))
}

// member is the agent of an instance, as it was admitted.
type member struct {
	document  awsiid.Document // as far as its selectors tell
	path      string
	selectors attestor.Set
}

// admitted are the agents by where they are looked up, those of accounts that are followed.
func (j *judge) admitted(agents attestor.Admitted) map[place][]member {
	found := map[place][]member{}
	for path, selectors := range agents.Each() {
		var d awsiid.Document
		for _, s := range selectors.All() {
			for begin, into := range map[string]*string{"account_id:": &d.AccountID, "region:": &d.Region, "instance:id:": &d.InstanceID} {
				if value, ok := strings.CutPrefix(s.Value, begin); ok {
					*into = value
				}
			}
		}
		if awsapi.IsAccount(d.AccountID) && awsapi.IsRegion(d.Region) && d.InstanceID != "" {
			at := j.cloud.at(d.AccountID, d.Region)
			found[at] = append(found[at], member{d, path, selectors})
		}
	}
	return found
}

// refreshPlace asks about the instances of one place.
func (j *judge) refreshPlace(ctx context.Context, at place, all []member, agents attestor.Admitted) error {
	slices.SortFunc(all, func(a, b member) int { return strings.Compare(a.path, b.path) })
	var missing []member
	first := true
	for some := range slices.Chunk(all, maxBatch) {
		if !first && !awsapi.Rest(ctx, betweenBatches) {
			return ctx.Err()
		}
		first = false
		ids := make([]string, len(some))
		for i, m := range some {
			ids[i] = m.document.InstanceID
		}
		found, err := j.cloud.describeAll(ctx, at, ids)
		if err != nil {
			return fmt.Errorf("look instances up: %w", err)
		}
		for _, m := range some {
			i, known := found[m.document.InstanceID]
			if !known {
				missing = append(missing, m)
			} else if err := j.refreshOne(ctx, m, i, agents); err != nil {
				return err
			}
		}
	}
	return j.refreshMissing(ctx, at, missing, agents)
}

// refreshMissing finds out about instances that EC2 did not name. To the credentials of another account
// every instance is missing, so it matters whose the server's are.
func (j *judge) refreshMissing(ctx context.Context, at place, missing []member, agents attestor.Admitted) error {
	if len(missing) == 0 {
		return nil
	}
	own, err := j.cloud.client(at).Account(ctx, at.region)
	if err != nil {
		return err
	}
	for _, m := range missing {
		if m.document.AccountID != own {
			continue
		}
		gone, err := j.cloud.isGone(ctx, at, m.document.InstanceID)
		if err != nil {
			return fmt.Errorf("look instance up: %w", err)
		}
		if !gone {
			return errors.New("EC2 knows an instance by its ID and not by a filter for its ID")
		}
		if err := agents.Evict(ctx, m.path); err != nil {
			return err
		}
	}
	return nil
}

// refreshOne acts on what EC2 says of one instance.
func (j *judge) refreshOne(ctx context.Context, m member, found instance, agents attestor.Admitted) error {
	if found.Owner != m.document.AccountID {
		return nil // shared by another account, and not what was admitted
	}
	if found.State == "terminated" || found.State == "shutting-down" {
		return agents.Evict(ctx, m.path)
	}
	values, _, err := j.facts(ctx, m.document, found)
	if err != nil {
		return err
	}
	for _, s := range m.selectors.All() {
		if !slices.ContainsFunc(looked, func(begin string) bool { return strings.HasPrefix(s.Value, begin) }) {
			values = append(values, s.Value)
		}
	}
	now := selectors(values)
	if attestor.NewSet(now...).Equal(m.selectors) {
		return nil
	}
	return agents.Update(ctx, m.path, now)
}
