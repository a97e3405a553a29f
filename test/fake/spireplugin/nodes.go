package spireplugin

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	agentnodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Type is the name that the node attestors have.
const Type = "shared_secret"

// nodeAgent shows a node's name, and proves by a MAC that it has the secret.
type nodeAgent struct {
	agentnodeattestorv1.UnimplementedNodeAttestorServer
	*Plugin
}

// Proof is the answer of a node that has the secret.
func Proof(secret string, challenge []byte) []byte {
	mac := hmac.New(sha256.New, []byte(secret))
	_, _ = mac.Write(challenge)
	return mac.Sum(nil)
}

// AidAttestation implements the plugin.
func (n *nodeAgent) AidAttestation(stream agentnodeattestorv1.NodeAttestor_AidAttestationServer) error {
	config, err := n.mode(stream.Context())
	if err != nil {
		return err
	}
	payload := []byte("node-one")
	switch config.Mode {
	case "empty":
		payload = nil
	case "huge":
		payload = bytes.Repeat(payload, 100_000)
	case "wrong-message":
		return stream.Send(&agentnodeattestorv1.PayloadOrChallengeResponse{Data: &agentnodeattestorv1.PayloadOrChallengeResponse_ChallengeResponse{ChallengeResponse: payload}})
	case "silent":
		return nil
	}
	if err := stream.Send(&agentnodeattestorv1.PayloadOrChallengeResponse{Data: &agentnodeattestorv1.PayloadOrChallengeResponse_Payload{Payload: payload}}); err != nil {
		return err
	}
	if config.Mode == "no-answer" {
		return nil
	}
	for {
		in, err := stream.Recv()
		if err != nil {
			return err
		}
		if len(in.GetChallenge()) != 16 {
			return status.Error(codes.InvalidArgument, "that is no challenge")
		}
		err = stream.Send(&agentnodeattestorv1.PayloadOrChallengeResponse{Data: &agentnodeattestorv1.PayloadOrChallengeResponse_ChallengeResponse{
			ChallengeResponse: Proof(config.Secret, in.GetChallenge()),
		}})
		if err != nil {
			return err
		}
	}
}

// nodeServer believes nodes that have the secret.
type nodeServer struct {
	nodeattestorv1.UnimplementedNodeAttestorServer
	*Plugin
}

// Attest implements the plugin.
func (n *nodeServer) Attest(stream nodeattestorv1.NodeAttestor_AttestServer) error {
	config, err := n.mode(stream.Context())
	if err != nil {
		return err
	}
	in, err := stream.Recv()
	if err != nil {
		return err
	}
	node := string(in.GetPayload())
	if !slices.Contains([]string{"node-one", "node-two"}, node) {
		return status.Error(codes.InvalidArgument, "no such node")
	}
	id := "spiffe://" + n.td + "/spire/agent/" + Type + "/" + node
	selectors := []string{"node:" + node}
	reattest := true
	switch config.Mode {
	case "foreign":
		id = "spiffe://elsewhere.test/spire/agent/" + Type + "/" + node
	case "workload":
		id = "spiffe://" + n.td + "/shop"
	case "server":
		id = "spiffe://" + n.td + "/spire/server"
	case "neighbour":
		id = "spiffe://" + n.td + "/spire/agent/x509pop/" + node
	case "no-id":
		id = "not an ID"
	case "many":
		selectors = strings.Split(strings.Repeat("x,", 2000), ",")
	case "control":
		selectors = []string{"a\nb"}
	case "silent":
		return nil
	case "big":
		selectors = []string{strings.Repeat("x", 4<<20)}
	case "once":
		reattest = false
		if !n.known {
			return status.Error(codes.Internal, "there is no agent store")
		}
		_, err := n.agents.GetAgentInfo(stream.Context(), &agentstorev1.GetAgentInfoRequest{AgentId: id})
		switch status.Code(err) {
		case codes.NotFound:
		case codes.OK:
			return status.Error(codes.PermissionDenied, "attestation data has already been used to attest an agent")
		default:
			return err
		}
	}
	challenge := make([]byte, 16)
	_, _ = rand.Read(challenge)
	for round := 0; config.Mode == "endless" || round == 0; round++ {
		if err := stream.Send(&nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_Challenge{Challenge: challenge}}); err != nil {
			return err
		}
		if in, err = stream.Recv(); err != nil {
			return err
		}
	}
	if !hmac.Equal(in.GetChallengeResponse(), Proof(config.Secret, challenge)) {
		return status.Error(codes.InvalidArgument, "the node does not know the secret")
	}
	return stream.Send(&nodeattestorv1.AttestResponse{Response: &nodeattestorv1.AttestResponse_AgentAttributes{AgentAttributes: &nodeattestorv1.AgentAttributes{
		SpiffeId: id, SelectorValues: selectors, CanReattest: reattest,
	}}})
}

// workload says of every process that it was seen.
type workload struct {
	workloadattestorv1.UnimplementedWorkloadAttestorServer
	*Plugin
}

// Attest implements the plugin.
func (w *workload) Attest(ctx context.Context, in *workloadattestorv1.AttestRequest) (*workloadattestorv1.AttestResponse, error) {
	config, err := w.mode(ctx)
	if err != nil {
		return nil, err
	}
	if in.GetPid() > 1<<28 {
		return nil, status.Error(codes.NotFound, "there is no such process")
	}
	values := []string{"seen:true", fmt.Sprintf("pid:%d", in.GetPid())}
	switch config.Mode {
	case "nothing":
		values = nil
	case "other-type":
		values = []string{"docker:label:app:shop", "unix:uid:0"}
	case "many":
		values = strings.Split(strings.Repeat("x,", 2000), ",")
	case "empty":
		values = []string{""}
	case "control":
		values = []string{"a\x00b"}
	case "big":
		values = []string{strings.Repeat("x", 4<<20)}
	}
	return &workloadattestorv1.AttestResponse{SelectorValues: values}, nil
}
