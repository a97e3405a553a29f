package api

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/audit"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/workloadapi/identity"
)

// maxPublicKey is far more than a key of a kind that is accepted has, in bytes.
const maxPublicKey = 4096

func (s *svidService) witOn() error {
	if !s.api.cfg.WIT {
		return errNoWIT
	}
	return nil
}

// witKey reads the public key of a request.
func witKey(der []byte) (crypto.PublicKey, error) {
	if len(der) == 0 {
		return nil, refusal(codes.InvalidArgument, "missing public key")
	}
	if len(der) > maxPublicKey {
		return nil, malformed("invalid public key", fmt.Errorf("%d bytes, the limit is %d", len(der), maxPublicKey))
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, malformed("invalid public key", errors.New("it is no PKIX key"))
	}
	return key, nil
}

// MintWITSVID signs what an administrator asks for, without an entry.
func (s *svidService) MintWITSVID(ctx context.Context, req *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
	if err := s.witOn(); err != nil {
		return nil, err
	}
	if err := s.api.sign.wait(ctx, caller.FromContext(ctx).Share(), 1); err != nil {
		return nil, err
	}
	id, err := s.api.workloadIDFromWire(req.GetId())
	if err != nil {
		return nil, malformed("invalid SPIFFE ID", err)
	}
	l := ledgerOf(ctx)
	l.note(func(line *audit.Line) { line.SPIFFEID = id.String() })
	key, err := witKey(req.GetPublicKey())
	if err != nil {
		return nil, err
	}
	ttl, err := mintTTL(req.GetTtl())
	if err != nil {
		return nil, err
	}
	if err := outsideID(ctx, id, nil); err != nil {
		return nil, err
	}
	svid, err := s.api.CA.SignWIT(ctx, ca.WITParams{ID: id, PublicKey: key, Algorithm: req.GetSigningAlgorithm(), TTL: ttl})
	if err != nil {
		return nil, fail("failed to sign WIT-SVID", err)
	}
	l.note(func(line *audit.Line) { line.ExpiresAt = svid.ExpiresAt })
	s.api.issued.WithLabelValues("mint_wit").Inc()
	return &svidv1.MintWITSVIDResponse{Svid: witWire(svid, "")}, nil
}

// BatchNewWITSVID signs for entries that the calling agent may hold at this moment. Of a request it takes
// the public key and what it proves with; what is signed comes from the entry.
func (s *svidService) BatchNewWITSVID(ctx context.Context, req *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	if err := s.witOn(); err != nil {
		return nil, err
	}
	b, err := s.batch(ctx, len(req.GetParams()))
	if err != nil {
		return nil, err
	}
	resp := &svidv1.BatchNewWITSVIDResponse{}
	for i, p := range req.GetParams() {
		line := audit.Line{EntryID: p.GetEntryId()}
		result := &svidv1.BatchNewWITSVIDResponse_Result{Status: itemOK()}
		var item *permitted
		var svid *identity.WITSVID
		err := s.api.inTurn(ctx, b.rank, b.who, func() (err error) {
			if p.GetEntryId() == "" {
				return refusal(codes.InvalidArgument, "missing entry ID")
			}
			if item, err = s.permit(b.picture, p.GetEntryId()); err != nil {
				return err
			}
			if err := item.agrees(b.picture, b.terms(i)); err != nil {
				return err
			}
			key, err := witKey(p.GetPublicKey())
			if err != nil {
				return err
			}
			svid, err = s.api.CA.SignWIT(ctx, ca.WITParams{
				ID: item.entry.SPIFFEID, PublicKey: key, Algorithm: p.GetSigningAlgorithm(),
				TTL: item.entry.X509SVIDTTL, MaxTTL: item.most(item.grant.X509, s.api.cfg.Now()),
			})
			if err != nil {
				return fail("failed to sign WIT-SVID", err)
			}
			return s.still(b.picture, s.api.View.Agent(b.who.ID), item)
		})
		if item != nil {
			line = entryLine(item.entry, b.picture.Rev)
			line.Verdicts = item.grant.Names()
		}
		if err != nil {
			result.Status = itemFailed(err)
		} else {
			line.ExpiresAt = svid.ExpiresAt
			result.Svid = witWire(svid, item.entry.Hint)
			s.api.issued.WithLabelValues("wit").Inc()
		}
		b.ledger.item(line, err)
		resp.Results = append(resp.Results, result)
	}
	return resp, nil
}

func witWire(svid *identity.WITSVID, hint string) *types.WITSVID {
	return &types.WITSVID{
		Token: svid.Token, Id: identity.IDWire(svid.ID), Hint: hint,
		ExpiresAt: svid.ExpiresAt.Unix(), IssuedAt: svid.IssuedAt.Unix(),
	}
}
