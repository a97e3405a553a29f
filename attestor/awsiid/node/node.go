// Package node is the agent's side of aws_iid: it reads the identity document from the instance
// metadata service and, when asked, signs with the instance's role.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsapi"
	"github.com/assay-id/assay/attestor/awsiid"
)

// Kind returns the agent's side of aws_iid.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{Type: awsiid.Type, Config: func() any { return new(awsiid.AgentConfig) }, Open: open}
}

type node struct {
	config      awsiid.AgentConfig
	metadata    *awsapi.Metadata
	trustDomain string
	now         func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*awsiid.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("aws_iid configuration is a %T", config)
	}
	metadata, err := awsapi.NewMetadata(c.MetadataEndpoint)
	if err != nil {
		return nil, err
	}
	now := needs.Now
	if now == nil {
		now = time.Now
	}
	return &node{*c, metadata, needs.TrustDomain.Name(), now}, nil
}

// Evidence reads the document as AWS signed it.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	const at = "dynamic/instance-identity/"
	texts, err := n.metadata.Get(ctx, at+"document", at+"signature", at+"rsa2048")
	if err != nil {
		return nil, nil, fmt.Errorf("get identity document: %w", err)
	}
	document, err := awsiid.ParseDocument([]byte(texts[0]))
	if err != nil {
		return nil, nil, fmt.Errorf("read identity document: %w", err)
	}
	evidence := awsiid.Evidence{Document: texts[0], Signature: texts[1], RSA2048: texts[2], Proof: !n.config.DisableProof}
	if evidence.Proof {
		if _, err := n.metadata.RoleCredentials(ctx); err != nil {
			if !errors.Is(err, awsapi.ErrNotThere) {
				return nil, nil, fmt.Errorf("get the instance's role: %w", err)
			}
			evidence.Proof = false // the instance has no role
		}
	}
	payload, err := json.Marshal(evidence)
	if err != nil {
		return nil, nil, err
	}
	if !evidence.Proof {
		return payload, nil, nil
	}
	prover := awsapi.Prover{Region: document.Region, TrustDomain: n.trustDomain, Credentials: n.metadata.RoleCredentials, Now: n.now}
	return payload, prover.Answer, nil
}
