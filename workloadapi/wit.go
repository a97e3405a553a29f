package workloadapi

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi/identity"
)

// FetchWITSVID streams a WIT-SVID with its key for each identity of the caller, or for the one it asks for,
// and again whenever one of them is replaced.
func (s *Server) FetchWITSVID(req *workload.WITSVIDRequest, stream grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	id := req.GetSpiffeId()
	if id == "" {
		return s.follow(stream, s.wits)
	}
	if len(id) > identity.MaxSPIFFEID {
		return invalid("invalid requested SPIFFE ID: too long")
	}
	if _, err := spiffeid.FromString(id); err != nil {
		return invalid("invalid requested SPIFFE ID: " + err.Error())
	}
	ctx := stream.Context()
	v, err := s.wits.Open(ctx)
	if err != nil {
		return err
	}
	err = v.pumpWIT(ctx, stream, id)
	v.End(ctx, err)
	return err
}

// pumpWIT is pump with one identity only.
func (v *Visit) pumpWIT(ctx context.Context, stream grpc.ServerStream, id string) error {
	var sent *workload.WITSVIDResponse
	for {
		a, err := v.next(ctx)
		if err != nil {
			return err
		}
		all, _ := a.value.(*workload.WITSVIDResponse)
		one := &workload.WITSVIDResponse{}
		for _, svid := range all.GetSvids() {
			if svid.GetSpiffeId() == id {
				one.Svids = append(one.Svids, svid)
			}
		}
		switch {
		case len(one.GetSvids()) == 0 && sent != nil:
			return withdrawn
		case len(one.GetSvids()) == 0:
			return noMatch
		case sent == nil || !proto.Equal(one, sent):
			if err := v.tell(a, func() error { return stream.SendMsg(one) }); err != nil {
				return err
			}
			sent = one
		}
		if _, err := v.Wait(ctx, nil); err != nil {
			return err
		}
	}
}

// FetchWITBundles streams the keys that verify WIT-SVIDs of the own trust domain and of those the caller's
// entries federate with.
func (s *Server) FetchWITBundles(_ *workload.WITBundlesRequest, stream grpc.ServerStreamingServer[workload.WITBundlesResponse]) error {
	return s.follow(stream, s.witBundles)
}

// makeWIT makes the answer of WIT-SVID streams.
func (s *Server) makeWIT(ctx context.Context, facts attestor.Set) (*answer, error) {
	svids, changed, err := s.src.WIT(ctx, facts, spiffeid.ID{})
	if err != nil {
		return nil, err
	}
	a := &answer{changed: changed}
	if len(svids) == 0 {
		return a, nil
	}
	resp := &workload.WITSVIDResponse{}
	for _, svid := range svids {
		key, err := json.Marshal(jose.JSONWebKey{Key: svid.Key, Algorithm: identity.TokenAlgorithm(svid.Key.Public())})
		if err != nil {
			return nil, fmt.Errorf("encode key of %s: %w", svid.ID, err)
		}
		resp.Svids = append(resp.Svids, &workload.WITSVID{
			SpiffeId: svid.ID.String(), WitSvid: svid.Token, WitSvidKey: string(key), Hint: svid.Hint,
		})
		a.ids = append(a.ids, svid.ID.String())
		a.entries = append(a.entries, svid.EntryID)
		a.expires(svid.ExpiresAt)
	}
	a.matched, a.value = true, resp
	a.frame, err = newFrame(resp)
	return a, err
}

// makeWITBundles makes the answer of WIT bundle streams. A trust domain without such keys is left out.
func (s *Server) makeWITBundles(_ context.Context, facts attestor.Set) (*answer, error) {
	a, bundles, err := s.bundles(facts)
	if err != nil || !a.matched {
		return a, err
	}
	resp := &workload.WITBundlesResponse{Bundles: make(map[string]string, len(bundles))}
	for _, b := range bundles {
		if len(b.WIT) == 0 {
			continue
		}
		keys, err := jwks(b.TrustDomain, b.WIT)
		if err != nil {
			return nil, err
		}
		resp.Bundles[b.TrustDomain.IDString()] = string(keys)
	}
	if len(resp.GetBundles()) == 0 {
		return nil, identity.ErrUnsupported
	}
	a.frame, err = newFrame(resp)
	return a, err
}
