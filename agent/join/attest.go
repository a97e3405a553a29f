package join

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/dial"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// callTimeout bounds one attestation or renewal. A SPIRE server makes callers wait for their turn.
const callTimeout = time.Minute

// maxChallenges bounds the conversation; an attestor needs one, and several of them together as many.
const maxChallenges = 10

// attest proves to the server where the agent runs and takes the SVID and bundle it is given.
func (j *Joiner) attest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := j.bootstrap(ctx); err != nil {
		return err
	}
	key, csr, err := newCSR(j.store)
	if err != nil {
		return err
	}
	hash, err := attestor.HashKey(key.Public())
	if err != nil {
		return err
	}
	payload, answer, err := attestor.Gather(ctx, j.cfg.Node, hash)
	if err != nil {
		return fmt.Errorf("gather %s evidence: %w", j.cfg.Type, err)
	}
	conn, err := dial.Server(j.cfg.Target, j.trust.tls(nil))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	asking := ctx
	if previous := j.store.Own(); previous != nil && !previous.Reattestable {
		asking = metadata.AppendToOutgoingContext(ctx, attestor.PreviousHeader, "1")
		answer = attestor.AnswerPrevious(j.cfg.TrustDomain.Name(), previous.Key, hash, answer)
	}
	result, err := converse(asking, agentv1.NewAgentClient(conn), &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: j.cfg.Type, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}, answer)
	if err != nil {
		return fmt.Errorf("attest with %s: %w", j.cfg.Type, err)
	}
	wire, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return fmt.Errorf("get bundle: %w", err)
	}
	bundle, err := identity.BundleFromWire(wire)
	if err != nil {
		return fmt.Errorf("get bundle: %w", err)
	}
	if bundle.TrustDomain != j.cfg.TrustDomain {
		return fmt.Errorf("get bundle: server's trust domain is %q, not %q", bundle.TrustDomain, j.cfg.TrustDomain)
	}
	own, err := j.parse(result.GetSvid(), key, bundle.X509Bundle())
	if err != nil {
		return err
	}
	own.Reattestable = result.GetReattestable()
	j.SetBundle(bundle)
	j.adopt(own, "agent attested")
	return nil
}

// renew replaces the SVID by showing the one there is.
func (j *Joiner) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := j.bootstrap(ctx); err != nil {
		return err
	}
	old, _ := j.Own()
	if old == nil {
		return errors.New("renew agent SVID: it has expired")
	}
	key, csr, err := newCSR(j.store)
	if err != nil {
		return err
	}
	conn, err := dial.Server(j.cfg.Target, j.trust.tls(old))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	resp, err := agentv1.NewAgentClient(conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	})
	if err != nil {
		return fmt.Errorf("renew agent SVID: %w", err)
	}
	// What signed it may be newer than the bundle held here, so only its form is checked.
	own, err := j.parse(resp.GetSvid(), key, nil)
	if err != nil {
		return err
	}
	if was, now := old.Chain[0].URIs[0].String(), own.Chain[0].URIs[0].String(); was != now {
		return fmt.Errorf("renew agent SVID: it is for %q, not %q: %w", now, was, errChain)
	}
	own.Reattestable = old.Reattestable
	j.adopt(own, "agent SVID renewed")
	return nil
}

// adopt keeps the SVID before it is used: the server forgets the old one at the first use of the new.
func (j *Joiner) adopt(own *keep.Own, what string) {
	if err := j.store.SaveOwn(own); err != nil {
		j.log.WithError(err).Warn("agent SVID cannot be kept on disk; a restart will need fresh evidence")
	}
	leaf := own.Chain[0]
	// Servers date SVIDs back, by more than the whole lifetime if that is short; and one whose clock is
	// ahead of ours dates them into our future, which must not put the rotation off.
	now := j.now()
	life := leaf.NotAfter.Sub(now)
	if leaf.NotBefore.After(now) {
		life = leaf.NotAfter.Sub(leaf.NotBefore)
	}
	j.take(own, rotationTime(now, now.Add(life)))
	j.log.WithFields(map[string]any{
		"spiffe_id":    leaf.URIs[0].String(),
		"expires_at":   leaf.NotAfter.UTC().Format(time.RFC3339),
		"reattestable": own.Reattestable,
	}).Info(what)
}

// bootstrap reads the bootstrap source when the bundle there is does not do.
func (j *Joiner) bootstrap(ctx context.Context) error {
	need, certain := j.trust.need()
	if !need {
		return nil
	}
	insecure := j.cfg.Bootstrap.Insecure
	if insecure && !certain {
		return nil // whoever answers must be known to the bundle, while it can know anybody
	}
	authorities, err := j.cfg.Bootstrap.load(ctx, j.cfg.TrustDomain)
	if err != nil {
		return err
	}
	if insecure && !j.warned {
		j.warned = true
		j.log.Warn("INSECURE BOOTSTRAP: trusting whoever answers at " + j.cfg.Target +
			"; an attacker on the network could pose as the server. Use trust_bundle_path or trust_bundle_url in production")
	}
	j.trust.believe(authorities, insecure)
	return nil
}

// converse holds the AttestAgent conversation.
func converse(ctx context.Context, client agentv1.AgentClient, params *agentv1.AttestAgentRequest_Params,
	answer func(context.Context, []byte) ([]byte, error),
) (*agentv1.AttestAgentResponse_Result, error) {
	stream, err := client.AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	send := func(req *agentv1.AttestAgentRequest) error {
		// io.EOF says that the server ended the stream; why, Recv says.
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return nil
	}
	if err := send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: params}}); err != nil {
		return nil, err
	}
	for range maxChallenges {
		resp, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		switch step := resp.GetStep().(type) {
		case *agentv1.AttestAgentResponse_Result_:
			_ = stream.CloseSend()
			// Reading on to the end lets the stream go; what comes after the result is of no use.
			_, _ = stream.Recv()
			return step.Result, nil
		case *agentv1.AttestAgentResponse_Challenge:
			if answer == nil {
				return nil, errors.New("server sent a challenge, and the attestor knows none")
			}
			reply, err := answer(ctx, step.Challenge)
			if err != nil {
				return nil, fmt.Errorf("answer challenge: %w", err)
			}
			if err := send(&agentv1.AttestAgentRequest{
				Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: reply},
			}); err != nil {
				return nil, err
			}
		default:
			return nil, errors.New("server sent neither challenge nor result")
		}
	}
	return nil, fmt.Errorf("server sent more than %d challenges", maxChallenges)
}

// parse checks the SVID the server sent: its key, its ID, and with a bundle that it verifies.
func (j *Joiner) parse(svid *types.X509SVID, key crypto.Signer, bundle *x509bundle.Bundle) (*keep.Own, error) {
	own := &keep.Own{Key: key}
	for _, der := range svid.GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errChain, err)
		}
		own.Chain = append(own.Chain, cert)
	}
	if len(own.Chain) == 0 {
		return nil, fmt.Errorf("%w: no certificate", errChain)
	}
	id, err := own.ID()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errChain, err)
	}
	public, ok := key.Public().(*ecdsa.PublicKey)
	switch {
	case id.TrustDomain() != j.cfg.TrustDomain, !strings.HasPrefix(id.Path(), "/spire/agent/"):
		return nil, fmt.Errorf("%w: %q is no agent of trust domain %q", errChain, id, j.cfg.TrustDomain)
	case !ok || !public.Equal(own.Chain[0].PublicKey):
		return nil, fmt.Errorf("%w: it is for another key", errChain)
	case j.expired(own):
		return nil, fmt.Errorf("%w: it expired at %s; check the clocks", errChain, own.Chain[0].NotAfter.UTC().Format(time.RFC3339))
	}
	if bundle != nil {
		// The leaf's life begins with the server's clock, which may be ahead of this one.
		at := j.now()
		if nb := own.Chain[0].NotBefore; at.Before(nb) {
			at = nb
		}
		if _, _, err := x509svid.Verify(own.Chain, bundle, x509svid.WithTime(at)); err != nil {
			return nil, fmt.Errorf("%w: %w", errChain, err)
		}
	}
	return own, nil
}

// newCSR makes a key and the request that SPIRE's servers expect of agents: without a URI, because
// who the agent is, the server says.
func newCSR(store Store) (crypto.Signer, []byte, error) {
	key, err := store.NewKey()
	if err != nil {
		return nil, nil, fmt.Errorf("make agent key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:            pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
		SignatureAlgorithm: x509.ECDSAWithSHA256,
	}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make agent CSR: %w", err)
	}
	return key, csr, nil
}

// reasonOf returns the reason of a refusal that concerns the agent itself, UNKNOWN for all other
// errors. The detail counts, not the text; only that a banned agent is refused attestation is said
// by SPIRE in words alone.
func reasonOf(err error) types.PermissionDeniedDetails_Reason {
	st, ok := status.FromError(err)
	if !ok || st.Code() != codes.PermissionDenied {
		return types.PermissionDeniedDetails_UNKNOWN
	}
	for _, detail := range st.Details() {
		if d, ok := detail.(*types.PermissionDeniedDetails); ok {
			return d.GetReason()
		}
	}
	if strings.HasSuffix(st.Message(), "agent is banned") {
		return types.PermissionDeniedDetails_AGENT_BANNED
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

// isRefusal reports whether the server understood and said no.
func isRefusal(err error) bool {
	switch codeOf(err) {
	case codes.PermissionDenied, codes.InvalidArgument, codes.FailedPrecondition, codes.Unauthenticated, codes.NotFound:
		return true
	}
	return false
}

// summary is what two errors of one cause have in common: gRPC puts changing details, as the number
// of a port, into the text.
func summary(err error) string {
	if c := codeOf(err); c == codes.Unavailable || c == codes.DeadlineExceeded {
		return c.String()
	}
	return ""
}

// codeOf returns the gRPC code in err's chain, codes.Unknown if there is none.
func codeOf(err error) codes.Code {
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return st.GRPCStatus().Code()
	}
	return codes.Unknown
}
