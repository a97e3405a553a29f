// Package node is the agent's side of node attestation by a plugin of SPIRE.
package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/plugin"
)

// patience is how long one attestation may take, the server's part included. The agent's own is the same.
const patience = time.Minute

// Kind returns the agent's side of external plugins.
func Kind() attestor.NodeKind {
	return attestor.NodeKind{Type: external.Type, Config: func() any { return new(external.Config) }, Open: open}
}

type node struct {
	*plugin.Plugin
	name string
}

func open(config any, needs attestor.Needs) (attestor.Node, error) {
	c, ok := config.(*external.Config)
	if !ok {
		return nil, fmt.Errorf("external configuration is a %T", config)
	}
	p, err := plugin.OpenBlock(c, "NodeAttestor", nodeattestorv1.NodeAttestor_ServiceDesc.ServiceName, nil, needs)
	if err != nil {
		return nil, err
	}
	return &node{p, c.Name}, nil
}

// said is a message of the plugin, or why there is none.
type said struct {
	bytes []byte
	err   error
}

// Evidence implements attestor.Node. The conversation with the plugin goes on until ctx ends, for there may
// be challenges.
func (n *node) Evidence(ctx context.Context) ([]byte, attestor.Ask, error) {
	answers, challenges := make(chan said, 1), make(chan []byte)
	go func() { // ends with ctx, or with the plugin
		err := n.Do(ctx, patience, func(ctx context.Context, conn grpc.ClientConnInterface) error {
			return converse(ctx, conn, challenges, answers)
		})
		if err == nil {
			err = fmt.Errorf("plugin %q answers no challenges", n.name)
		}
		for { // whoever asks still is told why there is no answer
			select {
			case answers <- said{err: err}:
			case <-challenges:
			case <-ctx.Done():
				return
			}
		}
	}()
	payload, err := receive(ctx, answers)
	if err == nil {
		err = n.sound(payload)
	}
	if err != nil {
		return nil, nil, err
	}
	return payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		if len(challenge) == 0 || len(challenge) > attestor.MaxEvidence {
			return nil, fmt.Errorf("challenge has %d bytes", len(challenge))
		}
		select {
		case challenges <- challenge:
		case early := <-answers:
			return nil, early.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		answer, err := receive(ctx, answers)
		if err == nil && len(answer) > attestor.MaxEvidence {
			err = n.sound(answer)
		}
		return answer, err
	}, nil
}

func (n *node) sound(payload []byte) error {
	if len(payload) == 0 || len(payload) > attestor.MaxEvidence {
		return fmt.Errorf("plugin %q answered evidence of %d bytes; there must be some, and %d at most", n.name, len(payload), attestor.MaxEvidence)
	}
	return nil
}

func receive(ctx context.Context, answers <-chan said) ([]byte, error) {
	select {
	case a := <-answers:
		return a.bytes, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// converse hands on the payload, and the answer to each challenge.
func converse(ctx context.Context, conn grpc.ClientConnInterface, challenges <-chan []byte, answers chan<- said) error {
	stream, err := nodeattestorv1.NewNodeAttestorClient(conn).AidAttestation(ctx)
	if err != nil {
		return plugin.Explain(err)
	}
	first, err := stream.Recv()
	if err != nil {
		return ended(err, "before it answered evidence")
	}
	if _, ok := first.GetData().(*nodeattestorv1.PayloadOrChallengeResponse_Payload); !ok {
		return errors.New("its first answer is no evidence")
	}
	answers <- said{bytes: first.GetPayload()}
	for {
		var challenge []byte
		select {
		case challenge = <-challenges:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := stream.Send(&nodeattestorv1.Challenge{Challenge: challenge}); err != nil && !errors.Is(err, io.EOF) {
			return plugin.Explain(err)
		}
		next, err := stream.Recv() // says why, if sending failed
		if err != nil {
			return ended(err, "before it answered the challenge")
		}
		if _, ok := next.GetData().(*nodeattestorv1.PayloadOrChallengeResponse_ChallengeResponse); !ok {
			return errors.New("its answer to a challenge is none")
		}
		select {
		case answers <- said{bytes: next.GetChallengeResponse()}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func ended(err error, when string) error {
	if errors.Is(err, io.EOF) {
		return errors.New("it ended the conversation " + when)
	}
	return plugin.Explain(err)
}
