package api

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/admit"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/workloadapi/identity"
)

// AttestAgent admits a node: parameters in, challenges to and fro, result out.
func (s *agentService) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	ctx := stream.Context()
	who := caller.FromContext(ctx)
	// Before the first message is read, so that a flood costs nothing but patience.
	if err := s.api.attest.wait(ctx, who.Source(), 1); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.api.attestDuration())
	defer cancel()
	in := receive(ctx, stream)
	params, err := attestParams(ctx, in)
	if err != nil {
		return err
	}
	csr, err := parseCSR(params.GetParams().GetCsr())
	if err != nil {
		return err
	}
	out, err := s.api.Desk.Attest(ctx, admit.Request{
		Type:      params.GetData().GetType(),
		Payload:   params.GetData().GetPayload(),
		PublicKey: csr.PublicKey,
		Previous:  len(metadata.ValueFromIncomingContext(ctx, attestor.PreviousHeader)) > 0,
		Ask: func(ctx context.Context, challenge []byte) ([]byte, error) {
			return ask(ctx, stream, in, challenge)
		},
	})
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) {
		if !out.ID.IsZero() {
			line.Agent, line.SPIFFEID = out.ID.String(), out.ID.String()
		}
		line.Facts, line.Rev = out.Selectors.Strings(), out.Rev
		if out.Previous {
			line.Facts = append(line.Facts, "the key of the SVID it had before")
		}
		if len(out.Chain) > 0 {
			line.Serial, line.ExpiresAt = out.Chain[0].SerialNumber.String(), out.Chain[0].NotAfter
		}
	})
	if errors.Is(err, admit.ErrUnknownType) {
		return fail("error getting node attestor", err)
	}
	if err != nil {
		return fail("failed to attest", err)
	}
	s.api.settle(ctx, out.Rev)
	if err := l.write(nil); err != nil {
		return err
	}
	s.api.issued.WithLabelValues("agent").Inc()
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{
			Svid:         svidWire(out.Chain, &identity.Entry{SPIFFEID: out.ID}),
			Reattestable: out.CanReattest,
		},
	}})
}

// received is one message of the agent, or why there is none.
type received struct {
	req *agentv1.AttestAgentRequest
	err error
}

// receive reads the agent's messages one at a time, as they are asked for, and gives up with ctx:
// a stream's own Recv would wait for a silent agent for as long as the connection lives. The reader
// ends with the stream, that is, soon after the method returned.
func receive(ctx context.Context, stream agentv1.Agent_AttestAgentServer) func() (*agentv1.AttestAgentRequest, error) {
	return func() (*agentv1.AttestAgentRequest, error) {
		next := make(chan received, 1)
		go func() {
			req, err := stream.Recv()
			next <- received{req, err}
		}()
		select {
		case got := <-next:
			if errors.Is(got.err, io.EOF) {
				return nil, refusal(codes.InvalidArgument, "failed to receive request from stream: EOF")
			}
			return got.req, got.err
		case <-ctx.Done():
			return nil, fail("failed to attest", ctx.Err())
		}
	}
}

// attestParams reads and checks the first message.
func attestParams(_ context.Context, in func() (*agentv1.AttestAgentRequest, error)) (*agentv1.AttestAgentRequest_Params, error) {
	req, err := in()
	if err != nil {
		return nil, err
	}
	p := req.GetParams()
	var missing string
	switch {
	case p == nil:
		missing = "missing params"
	case p.GetData() == nil:
		missing = "missing attestation data"
	case p.GetParams() == nil:
		missing = "missing X509-SVID parameters"
	case len(p.GetParams().GetCsr()) == 0:
		missing = "missing CSR"
	case p.GetData().GetType() == "":
		missing = "missing attestation data type"
	case len(p.GetData().GetPayload()) == 0:
		missing = "missing attestation data payload"
	default:
		return p, nil
	}
	return nil, malformed("malformed param", errors.New(missing))
}

// ask sends a challenge and waits for its answer.
func ask(_ context.Context, stream agentv1.Agent_AttestAgentServer, in func() (*agentv1.AttestAgentRequest, error), challenge []byte) ([]byte, error) {
	err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}})
	if err != nil {
		return nil, err
	}
	req, err := in()
	if err != nil {
		return nil, err
	}
	answer, ok := req.GetStep().(*agentv1.AttestAgentRequest_ChallengeResponse)
	if !ok {
		return nil, malformed("malformed param", errors.New("missing challenge response"))
	}
	return answer.ChallengeResponse, nil
}

// RenewAgent gives the calling agent a new SVID. Its old one stays good until the new one is used.
func (s *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	who := caller.FromContext(ctx)
	if err := s.api.sign.wait(ctx, who.Share(), 1); err != nil {
		return nil, err
	}
	if req.GetParams() == nil {
		return nil, refusal(codes.InvalidArgument, "params cannot be nil")
	}
	csr, err := parseCSR(req.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	chain, rev, err := s.api.Desk.Renew(ctx, who.ID, who.Cert.SerialNumber.String(), csr.PublicKey)
	if err != nil {
		return nil, fail("failed to renew agent", err)
	}
	ledgerOf(ctx).note(func(line *audit.Line) {
		line.SPIFFEID, line.Rev = who.ID.String(), rev
		line.Serial, line.ExpiresAt = chain[0].SerialNumber.String(), chain[0].NotAfter
	})
	s.api.settle(ctx, rev)
	s.api.issued.WithLabelValues("agent").Inc()
	return &agentv1.RenewAgentResponse{Svid: svidWire(chain, &identity.Entry{SPIFFEID: who.ID})}, nil
}

// svidWire returns the public form of a signed chain.
func svidWire(chain []*x509.Certificate, e *identity.Entry) *types.X509SVID {
	w := &types.X509SVID{Id: identity.IDWire(e.SPIFFEID), ExpiresAt: chain[0].NotAfter.Unix(), Hint: e.Hint}
	for _, cert := range chain {
		w.CertChain = append(w.CertChain, cert.Raw)
	}
	return w
}

// attestDuration is how long an attestation may take from its first message on.
func (a *API) attestDuration() time.Duration {
	if a.cfg.AttestDuration > 0 {
		return a.cfg.AttestDuration
	}
	return 30 * time.Second
}
