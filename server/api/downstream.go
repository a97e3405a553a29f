package api

import (
	"context"
	"crypto/x509"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/turn"
)

// NewDownstreamX509CA signs the authority of a server that has a downstream entry. Of its request it
// takes the public key and the lifetime, and nothing else.
func (s *svidService) NewDownstreamX509CA(ctx context.Context, req *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	who := caller.FromContext(ctx)
	if err := s.api.sign.wait(ctx, who.Share(), 1); err != nil {
		return nil, err
	}
	if len(who.Entries) == 0 { // deleted since the call was let in
		return nil, refusal(codes.PermissionDenied, "caller is not a downstream workload")
	}
	td := s.api.cfg.TrustDomain
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) { line.EntryID, line.SPIFFEID = who.Entries[0].ID, td.IDString() })
	csr, err := parseCSR(req.GetCsr())
	if err != nil {
		return nil, err
	}
	ttl, err := mintTTL(req.GetPreferredTtl())
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	// All that is below this server hangs on it.
	err = s.api.inTurn(ctx, turn.Urgent, who, func() (err error) {
		chain, err = s.api.CA.SignDownstream(ctx, csr.PublicKey, ttl)
		return err
	})
	if err != nil {
		return nil, fail("failed to sign downstream X.509 CA", err)
	}
	b, ok := s.api.View.Bundle(td)
	if !ok {
		return nil, refusal(codes.NotFound, "bundle not found")
	}
	resp := &svidv1.NewDownstreamX509CAResponse{}
	for _, cert := range chain {
		resp.CaCertChain = append(resp.CaCertChain, cert.Raw)
	}
	for _, a := range b.X509 {
		resp.X509Authorities = append(resp.X509Authorities, a.Certificate.Raw)
	}
	l.note(func(line *audit.Line) {
		line.Serial, line.ExpiresAt = chain[0].SerialNumber.String(), chain[0].NotAfter.Truncate(time.Second)
	})
	s.api.issued.WithLabelValues("downstream").Inc()
	return resp, nil
}
