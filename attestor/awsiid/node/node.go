// Package node is the agent's side of aws_iid: it reads the identity document from the instance
// metadata service and, when asked, signs with the instance's role.
//
// Why it is so: a challenge makes the agent sign one request only, GetCallerIdentity of the STS of the
// instance's own region, with the trust domain in it. So no server can have anything else signed, or use
// the answer at another trust domain's server.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/awsiid"
)

// Kind returns the agent's side of aws_iid.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{Type: awsiid.Type, Config: func() any { return new(awsiid.AgentConfig) }, Open: open}
}

type node struct {
	config      awsiid.AgentConfig
	metadata    *awsiid.Metadata
	trustDomain string
	now         func() time.Time
}

func open(config any, needs attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*awsiid.AgentConfig)
	if !ok {
		return nil, fmt.Errorf("aws_iid configuration is a %T", config)
	}
	metadata, err := awsiid.NewMetadata(c.MetadataEndpoint)
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
			if !errors.Is(err, awsiid.ErrNotThere) {
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
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		return n.answer(ctx, document.Region, challenge)
	}, nil
}

func (n *node) answer(ctx context.Context, region string, challenge []byte) ([]byte, error) {
	var c awsiid.Challenge
	if len(challenge) > attestor.MaxEvidence || json.Unmarshal(challenge, &c) != nil {
		return nil, errors.New("challenge is not the JSON it should be")
	}
	if c.Region != region {
		return nil, fmt.Errorf("challenge is for region %q, the instance is in %q", c.Region, region)
	}
	if len(c.Nonce) != awsiid.NonceSize {
		return nil, fmt.Errorf("challenge has a nonce of %d bytes, want %d", len(c.Nonce), awsiid.NonceSize)
	}
	credentials, err := n.metadata.RoleCredentials(ctx)
	if err != nil {
		return nil, fmt.Errorf("get credentials of the instance's role: %w", err)
	}
	request := awsiid.CallerRequest(region, n.trustDomain, c.Nonce)
	request.Sign(credentials, region, "sts", n.now())
	return json.Marshal(awsiid.Response{
		Authorization: request.Headers["Authorization"], Date: request.Headers["X-Amz-Date"], Token: credentials.Token,
	})
}
