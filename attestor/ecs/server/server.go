// Package server is the server's side of ecs: it has a task prove itself by its role, and asks ECS about it
// where that is configured.
//
// Why it is so: what a container can say of its task is what its metadata service told it, and anybody can say
// the same. But ECS issues the credentials of a task's role under the task's ID as the session's name, so who can
// sign with them, with our nonce inside, runs in that task. A session's name can be chosen by whoever may assume
// the role otherwise, which is why the roles that count are named. That name says no more than account, role and
// task; region, cluster, family and service are ECS's to say, so without asking it they are no selectors.
package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/ecs"
)

// Kind returns the server's side of ecs.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: ecs.Type, Config: func() any { return new(ecs.ServerConfig) }, Open: open}
}

type judge struct {
	config      ecs.ServerConfig
	client      *awsapi.Client
	accounts    *awsapi.Accounts
	refresh     time.Duration
	trustDomain string
	log         logrus.FieldLogger
	now         func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*ecs.ServerConfig)
	if !ok {
		return nil, fmt.Errorf("ecs configuration is a %T", config)
	}
	j := &judge{config: *c, trustDomain: needs.TrustDomain.Name(), log: needs.Log, now: needs.Now, refresh: defaultRefresh}
	if j.now == nil {
		j.now = time.Now
	}
	if j.log == nil {
		j.log = logrus.StandardLogger()
	}
	for _, list := range []struct {
		key   string
		names []string
		is    func(string) bool
		what  string
	}{
		{"account_ids", c.AccountIDs, awsapi.IsAccount, "an account, which is a number of twelve digits"},
		{"regions", c.Regions, awsapi.IsRegion, "a region"},
		{"task_roles", c.TaskRoles, func(name string) bool { return name != "" && !strings.ContainsAny(name, "/:*") }, "the name of a role, without a path"},
		{"clusters", c.Clusters, ecs.IsCluster, "the name of a cluster"},
	} {
		if len(list.names) == 0 && list.key != "clusters" {
			return nil, fmt.Errorf("%s is empty: tasks of nowhere are accepted", list.key)
		}
		for _, name := range list.names {
			if !list.is(name) {
				return nil, fmt.Errorf("%s: %q is not %s", list.key, name, list.what)
			}
		}
	}
	if !c.LookupTask && (len(c.Clusters) > 0 || c.RefreshInterval != "") {
		return nil, errors.New("clusters and refresh_interval need lookup_task: only ECS knows which cluster a task is in and whether it still runs")
	}
	if c.RefreshInterval != "" {
		every, err := time.ParseDuration(c.RefreshInterval)
		if err != nil || every < minRefresh {
			return nil, fmt.Errorf("refresh_interval: %q is no length of time of %s or more, as 5m is", c.RefreshInterval, minRefresh)
		}
		j.refresh = every
	}
	if !c.LookupTask && (c.AssumeRole != "" || c.ExternalID != "" || len(c.Accounts) > 0) {
		return nil, errors.New("assume_role, external_id and account need lookup_task, which is what they are for")
	}
	err := awsapi.CheckEndpoint("ecs_endpoint", c.ECSEndpoint)
	if err == nil {
		j.client, err = awsapi.NewClient(awsapi.Config{
			AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey,
			MetadataEndpoint: c.MetadataEndpoint, STSEndpoint: c.STSEndpoint, Now: j.now,
		})
	}
	if err == nil {
		j.accounts, err = awsapi.NewAccounts(j.client, awsapi.Account{AssumeRole: c.AssumeRole, ExternalID: c.ExternalID}, c.Accounts, "assay-server@"+j.trustDomain)
	}
	return j, err
}

// Judge has the task prove itself, and looks it up.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if err := ctx.Err(); err != nil {
		return attestor.Proof{}, err
	}
	if len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is too large")
	}
	var evidence ecs.Evidence
	if json.Unmarshal(payload, &evidence) != nil {
		return attestor.Proof{}, attestor.Refusef("read evidence: it is not the JSON it should be")
	}
	task, err := ecs.ParseTask(evidence.TaskARN)
	switch {
	case err != nil:
		return attestor.Proof{}, attestor.Refusef("read evidence: %w", err)
	case !slices.Contains(j.config.AccountIDs, task.Account):
		return attestor.Proof{}, attestor.Refusef("task is of an account that is not accepted")
	case !slices.Contains(j.config.Regions, task.Region):
		return attestor.Proof{}, attestor.Refusef("task is of a region that is not accepted")
	}
	session, err := j.client.Challenge(ctx, task.Region, j.trustDomain, ask)
	switch {
	case err != nil:
		return attestor.Proof{}, err
	case session.Account != task.Account, session.Name != task.ID:
		return attestor.Proof{}, attestor.Refusef("verify proof: it is by another task")
	case !slices.Contains(j.config.TaskRoles, session.Role):
		return attestor.Proof{}, attestor.Refusef("verify proof: it is by a role that is not one of the server's task_roles")
	}
	values := []string{"account_id:" + task.Account, "task-id:" + task.ID, "task-role:" + session.Role}
	if j.config.LookupTask {
		found, err := j.lookUp(ctx, task)
		if err != nil {
			return attestor.Proof{}, err
		}
		values = append(values, found...)
	}
	var selectors []attestor.Selector
	for _, value := range values {
		if s := (attestor.Selector{Type: ecs.Type, Value: value}); s.Check() == nil {
			selectors = append(selectors, s)
		}
	}
	return attestor.Proof{
		Path:        strings.Join([]string{ecs.Type, task.Account, task.ID}, "/"),
		Selectors:   attestor.NewSet(selectors...).All(),
		CanReattest: true,
	}, nil
}

// lookUp asks ECS about the task: it must be one that runs.
func (j *judge) lookUp(ctx context.Context, task ecs.Task) ([]string, error) {
	if task.Cluster == "" {
		return nil, attestor.Refusef("task has an ARN of the old form, which does not name its cluster")
	}
	found, gone, err := j.describe(ctx, place{task.Account, task.Region, task.Cluster}, []string{task.ARN})
	if err != nil {
		return nil, fmt.Errorf("look task up: %w", err)
	}
	is, ok := found[task.ARN]
	switch {
	case (gone[task.ARN] || !ok) && j.accounts.Whose(task.Account) == "":
		return nil, attestor.Refusef("look task up: ECS knows no such task in the account of the server's credentials; if account %s is another one, set assume_role", task.Account)
	case gone[task.ARN], !ok:
		return nil, attestor.Refusef("look task up: ECS knows no such task in account %s", task.Account)
	case is.ended() || is.Last == "DEACTIVATING" || is.Last == "STOPPING":
		return nil, attestor.Refusef("task does not run")
	case len(j.config.Clusters) > 0 && !slices.Contains(j.config.Clusters, task.Cluster):
		return nil, attestor.Refusef("task is of a cluster that is not accepted")
	}
	values := []string{"region:" + task.Region, "cluster:" + task.Cluster, "task-arn:" + task.ARN}
	family, revision, _ := strings.Cut(ecs.LastPart(is.Definition), ":")
	if family != "" && revision != "" {
		values = append(values, "family:"+family, "revision:"+revision)
	}
	if service, ok := strings.CutPrefix(is.Group, "service:"); ok {
		values = append(values, "service:"+service)
	}
	if is.LaunchType != "" {
		values = append(values, "launch-type:"+is.LaunchType)
	}
	return values, nil
}
