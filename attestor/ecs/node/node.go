// Package node is the agent's side of ecs: it says which task it is in and, when asked, signs with the task's
// role.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/ecs"
)

// Kind returns the agent's side of ecs.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{Type: ecs.Type, Config: func() any { return new(ecs.AgentConfig) }, Open: open}
}

type node struct {
	config      ecs.AgentConfig
	trustDomain string
	now         func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*ecs.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("ecs configuration is a %T", config)
	}
	for key, address := range map[string]string{"metadata_uri": c.MetadataURI, "credentials_uri": c.CredentialsURI} {
		if address == "" {
			continue
		}
		if err := awsapi.CheckLocal(key, address); err != nil {
			return nil, err
		}
	}
	now := needs.Now
	if now == nil {
		now = time.Now
	}
	return &node{*c, needs.TrustDomain.Name(), now}, nil
}

// Evidence reads which task this is.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	address := n.config.MetadataURI
	if address == "" {
		address = awsapi.TaskMetadataURI()
	}
	if address == "" {
		return nil, nil, errors.New("this is no container of an ECS task: ECS_CONTAINER_METADATA_URI_V4 is not set")
	}
	if err := awsapi.CheckLocal("ECS_CONTAINER_METADATA_URI_V4", address); err != nil {
		return nil, nil, err
	}
	var said ecs.Metadata
	if err := awsapi.Local(ctx, "the task metadata service", address+"/task", &said); err != nil {
		return nil, nil, err
	}
	task, err := ecs.ParseTask(said.TaskARN)
	if err != nil {
		return nil, nil, fmt.Errorf("read what the task metadata service says: %w", err)
	}
	payload, err := json.Marshal(ecs.Evidence{TaskARN: task.ARN})
	if err != nil {
		return nil, nil, err
	}
	prover := awsapi.Prover{Region: task.Region, TrustDomain: n.trustDomain, Credentials: n.credentials, Now: n.now}
	return payload, prover.Answer, nil
}

func (n *node) credentials(ctx context.Context) (awsapi.Credentials, error) {
	if n.config.CredentialsURI != "" {
		return awsapi.CredentialsAt(ctx, n.config.CredentialsURI)
	}
	found, err := awsapi.TaskCredentials(ctx)
	if errors.Is(err, awsapi.ErrNotThere) {
		return found, fmt.Errorf("%w; the task needs a role, taskRoleArn in its definition, that is one of the server's task_roles", err)
	}
	return found, err
}
