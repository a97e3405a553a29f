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
	"github.com/assay-id/assay/attestor/ecs"
)

const (
	// defaultRefresh is how often ECS is asked about all admitted tasks, and minRefresh how often at most.
	defaultRefresh = time.Minute
	minRefresh     = 5 * time.Second
	// maxPause bounds the wait before ECS is asked again when it could not be.
	maxPause = 10 * time.Minute
	// maxBatch is how many tasks ECS takes in one request.
	maxBatch = 100
	// betweenBatches is the pause between two requests.
	betweenBatches = 200 * time.Millisecond
)

// place is a cluster of an account's; the account is empty where the server's own credentials are used.
type place struct{ account, region, cluster string }

// task is what ECS says of one.
type task struct {
	ARN        string `json:"taskArn"`
	Definition string `json:"taskDefinitionArn"`
	Group      string `json:"group"`
	LaunchType string `json:"launchType"`
	Last       string `json:"lastStatus"`
}

// ended says that the task will not run any more.
func (t task) ended() bool {
	return t.Last == "STOPPED" || t.Last == "DEPROVISIONING" || t.Last == "DELETED"
}

// describe asks ECS about tasks of one cluster: what it knows of them, and of which it says that they are not
// there.
func (j *judge) describe(ctx context.Context, at place, arns []string) (found map[string]task, gone map[string]bool, err error) {
	var said struct {
		Tasks    []task `json:"tasks"`
		Failures []struct {
			ARN    string `json:"arn"`
			Reason string `json:"reason"`
		} `json:"failures"`
	}
	err = j.accounts.Client(at.account, at.region).Call(ctx, j.config.ECSEndpoint, "ecs."+at.region+"."+awsapi.Suffix(at.region), "ecs", at.region,
		"AmazonEC2ContainerServiceV20141113.DescribeTasks", map[string]any{"cluster": at.cluster, "tasks": arns}, &said)
	if err != nil {
		return nil, nil, err
	}
	found, gone = map[string]task{}, map[string]bool{}
	for _, t := range said.Tasks {
		if _, twice := found[t.ARN]; twice {
			return nil, nil, errors.New("ECS names a task twice")
		}
		found[t.ARN] = t
	}
	for _, f := range said.Failures {
		if f.Reason == "MISSING" {
			gone[f.ARN] = true
		}
	}
	return found, gone, nil
}

// Follow asks ECS about the tasks whose agents were admitted, again and again, many with one request, and
// evicts the agents of those that ended. What else it says of a task does not change while the task runs. It
// returns nil when ctx ends.
func (j *judge) Follow(ctx context.Context, agents attestor.Admitted) error {
	if !j.config.LookupTask {
		<-ctx.Done()
		return nil
	}
	// The first round is soon: who knows how long the server was away.
	for pause := min(j.refresh, minRefresh); awsapi.Rest(ctx, pause); {
		err := j.round(ctx, agents)
		switch {
		case ctx.Err() != nil:
		case err == nil:
			pause = j.refresh
		default:
			pause = min(2*max(pause, j.refresh), max(maxPause, j.refresh))
			j.log.WithError(err).WithField("pause", pause).Warn("tasks cannot be looked up again; their agents stay as they are until they can")
		}
	}
	return nil
}

// round asks once about all admitted tasks. Trouble with one cluster is not that of the others.
func (j *judge) round(ctx context.Context, agents attestor.Admitted) error {
	members := map[place][]string{}
	paths := map[string]string{}
	for path, selectors := range agents.Each() {
		for _, s := range selectors.All() {
			arn, ok := strings.CutPrefix(s.Value, "task-arn:")
			if !ok {
				continue
			}
			if t, err := ecs.ParseTask(arn); err == nil && t.Cluster != "" {
				at := place{j.accounts.Whose(t.Account), t.Region, t.Cluster}
				members[at] = append(members[at], arn)
				paths[arn] = path
			}
		}
	}
	var errs []error
	first := true
	for at, arns := range members {
		slices.Sort(arns)
		for some := range slices.Chunk(arns, maxBatch) {
			if !first && !awsapi.Rest(ctx, betweenBatches) {
				return ctx.Err()
			}
			first = false
			if err := j.evict(ctx, agents, at, some, paths); err != nil {
				errs = append(errs, fmt.Errorf("cluster %s in %s: %w", at.cluster, at.region, err))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// evict evicts the agents of those of the tasks that ended. To the credentials of another account every task
// is missing, so it matters whose the server's are.
func (j *judge) evict(ctx context.Context, agents attestor.Admitted, at place, arns []string, paths map[string]string) error {
	found, gone, err := j.describe(ctx, at, arns)
	if err != nil {
		return err
	}
	own := ""
	if len(gone) > 0 {
		if own, err = j.accounts.Client(at.account, at.region).Account(ctx, at.region); err != nil {
			return err
		}
	}
	for _, arn := range arns {
		t, err := ecs.ParseTask(arn)
		if err != nil {
			return err
		}
		if found[arn].ended() || gone[arn] && t.Account == own {
			if err := agents.Evict(ctx, paths[arn]); err != nil {
				return err
			}
		}
	}
	return nil
}
