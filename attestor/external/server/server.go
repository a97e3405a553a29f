// Package server is the server's side of node attestation by a plugin of SPIRE. The plugin decides which node
// it is; that the agent's ID is one of this trust domain, in the plugin's own place, is decided here.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/plugin"
)

// patience is how long one attestation may take, with what the agent thinks about challenges.
const patience = 30 * time.Second

// Kind returns the server's side of external plugins.
func Kind() attestor.JudgeKind {
	return attestor.JudgeKind{Type: external.Type, Config: func() any { return new(external.Config) }, Open: open}
}

type judge struct {
	*plugin.Plugin
	name string
	td   spiffeid.TrustDomain
}

func open(config any, needs attestor.Needs) (attestor.Judge, error) {
	c, ok := config.(*external.Config)
	if !ok {
		return nil, fmt.Errorf("external configuration is a %T", config)
	}
	services := []plugin.Service{{Name: agentstorev1.AgentStore_ServiceDesc.ServiceName, Register: func(r grpc.ServiceRegistrar) {
		agentstorev1.RegisterAgentStoreServer(r, &agents{known: needs.Agents, td: needs.TrustDomain})
	}}}
	p, err := plugin.OpenBlock(c, "NodeAttestor", nodeattestorv1.NodeAttestor_ServiceDesc.ServiceName, services, needs)
	if err != nil {
		return nil, err
	}
	return &judge{p, c.Name, needs.TrustDomain}, nil
}

// Judge implements attestor.Judge.
func (j *judge) Judge(ctx context.Context, payload []byte, ask attestor.Ask) (attestor.Proof, error) {
	if len(payload) == 0 || len(payload) > attestor.MaxEvidence {
		return attestor.Proof{}, attestor.Refusef("evidence has %d bytes", len(payload))
	}
	var answer *nodeattestorv1.AgentAttributes
	var unanswered error // which is not the plugin's fault
	err := j.Do(ctx, patience, func(ctx context.Context, conn grpc.ClientConnInterface) (err error) {
		answer, err = j.converse(ctx, conn, payload, func(ctx context.Context, challenge []byte) (answer []byte, err error) {
			answer, err = ask(ctx, challenge)
			unanswered = err
			return answer, err
		})
		return err
	})
	if unanswered != nil {
		return attestor.Proof{}, unanswered
	}
	if err != nil {
		return attestor.Proof{}, err
	}
	return j.proof(answer)
}

// converse lets the plugin and the agent talk until the plugin has decided.
func (j *judge) converse(ctx context.Context, conn grpc.ClientConnInterface, payload []byte, ask attestor.Ask) (*nodeattestorv1.AgentAttributes, error) {
	stream, err := nodeattestorv1.NewNodeAttestorClient(conn).Attest(ctx)
	if err != nil {
		return nil, plugin.Explain(err)
	}
	say := &nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_Payload{Payload: payload}}
	for {
		if err := stream.Send(say); err != nil && !errors.Is(err, io.EOF) {
			return nil, plugin.Explain(err)
		}
		got, err := stream.Recv() // says why, if sending failed
		if err != nil {
			return nil, j.refusal(err)
		}
		switch r := got.GetResponse().(type) {
		case *nodeattestorv1.AttestResponse_AgentAttributes:
			return r.AgentAttributes, nil
		case *nodeattestorv1.AttestResponse_Challenge:
			if len(r.Challenge) == 0 || len(r.Challenge) > attestor.MaxEvidence {
				return nil, fmt.Errorf("challenge of %d bytes", len(r.Challenge))
			}
			answer, err := ask(ctx, r.Challenge)
			if err != nil {
				return nil, err
			}
			if len(answer) > attestor.MaxEvidence {
				return nil, attestor.Refusef("answer to the challenge has %d bytes", len(answer))
			}
			say = &nodeattestorv1.AttestRequest{Request: &nodeattestorv1.AttestRequest_ChallengeResponse{ChallengeResponse: answer}}
		default:
			return nil, errors.New("answer that is neither a challenge nor a decision")
		}
	}
}

// refusal tells a plugin that does not believe the evidence from one that could not decide.
func (j *judge) refusal(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("it ended the conversation without a decision")
	case status.Code(err) == codes.PermissionDenied: // as SPIRE's plugins say that evidence was used before
		return fmt.Errorf("%w: %s", attestor.ErrUsed, plugin.Said(err))
	case status.Code(err) == codes.InvalidArgument, status.Code(err) == codes.Unauthenticated, status.Code(err) == codes.NotFound:
		return attestor.Refusef("%s", plugin.Said(err))
	}
	return plugin.Explain(err)
}

// proof looks at what the plugin decided.
func (j *judge) proof(a *nodeattestorv1.AgentAttributes) (attestor.Proof, error) {
	id, err := spiffeid.FromString(a.GetSpiffeId())
	if err != nil {
		return attestor.Proof{}, fmt.Errorf("plugin %q answered no SPIFFE ID: %w", j.name, err)
	}
	own := "/spire/agent/"
	path, ok := strings.CutPrefix(id.Path(), own)
	if id.TrustDomain() != j.td || !ok || !strings.HasPrefix(path, j.name+"/") {
		return attestor.Proof{}, fmt.Errorf("plugin %q answered the ID %s, which is not below spiffe://%s%s%s/", j.name, id, j.td, own, j.name)
	}
	selectors, err := external.Selectors(j.name, a.GetSelectorValues())
	if err != nil {
		return attestor.Proof{}, err
	}
	return attestor.Proof{Path: path, Selectors: selectors, CanReattest: a.GetCanReattest()}, nil
}

// agents answers plugins that ask whether an agent was admitted before, to trust on first use.
type agents struct {
	agentstorev1.UnimplementedAgentStoreServer
	known attestor.Agents
	td    spiffeid.TrustDomain
}

// GetAgentInfo implements SPIRE's host service.
func (a *agents) GetAgentInfo(ctx context.Context, in *agentstorev1.GetAgentInfoRequest) (*agentstorev1.GetAgentInfoResponse, error) {
	id, err := spiffeid.FromString(in.GetAgentId())
	if err != nil || id.TrustDomain() != a.td {
		return nil, status.Error(codes.InvalidArgument, "no agent ID of this trust domain")
	}
	if a.known == nil {
		return nil, status.Error(codes.Unavailable, "agents are not known yet")
	}
	admitted, err := a.known.Admitted(ctx, id)
	switch {
	case err != nil:
		return nil, status.Error(codes.Internal, "agents cannot be looked up")
	case !admitted:
		return nil, status.Error(codes.NotFound, "no such agent")
	}
	return &agentstorev1.GetAgentInfoResponse{Info: &agentstorev1.AgentInfo{AgentId: id.String()}}, nil
}
