package broker

import (
	"context"
	"crypto/x509"
	"fmt"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
)

// SubscribeToX509SVID streams the X509-SVIDs of the process, and again whenever they change. None is an empty
// answer: the broker may be there before the entry is.
func (s *Server) SubscribeToX509SVID(req *brokerapi.SubscribeToX509SVIDRequest, stream grpc.ServerStreamingServer[brokerapi.SubscribeToX509SVIDResponse]) error {
	ctx := stream.Context()
	return s.errand(ctx, eventX509, req.GetReference(), nil, func(e *errand) error {
		return follow(ctx, e, stream.Send, func() (*brokerapi.SubscribeToX509SVIDResponse, workloadapi.Handed, <-chan struct{}, error) {
			x, changed, err := s.cfg.Source.X509(ctx, e.facts())
			if err != nil {
				return nil, workloadapi.Handed{}, nil, err
			}
			resp, handed, err := x509Response(x)
			return resp, handed, changed, err
		})
	})
}

func x509Response(x identity.X509Context) (*brokerapi.SubscribeToX509SVIDResponse, workloadapi.Handed, error) {
	handed := workloadapi.Handed{Rev: x.Rev}
	resp := &brokerapi.SubscribeToX509SVIDResponse{}
	if len(x.SVIDs) == 0 {
		return resp, handed, nil
	}
	if x.Bundle == nil {
		return nil, handed, identity.ErrUnavailable
	}
	own := workloadapi.X509Bundle(x.Bundle)
	resp.Crl = append(resp.Crl, x.Bundle.CRLs...)
	for _, b := range x.Federated {
		if resp.FederatedBundles == nil {
			resp.FederatedBundles = map[string][]byte{}
		}
		resp.FederatedBundles[b.TrustDomain.IDString()] = workloadapi.X509Bundle(b)
	}
	for _, svid := range x.SVIDs {
		key := svid.KeyDER
		if len(key) == 0 {
			var err error
			if key, err = x509.MarshalPKCS8PrivateKey(svid.Key); err != nil {
				return nil, handed, fmt.Errorf("encode key of %s: %w", svid.ID, err)
			}
		}
		var chain []byte
		for _, der := range svid.Chain {
			chain = append(chain, der...)
		}
		resp.Svids = append(resp.Svids, &brokerapi.X509SVID{SpiffeId: svid.ID.String(), X509Svid: chain, X509SvidKey: key, Bundle: own, Hint: svid.Hint})
		handed.SPIFFEIDs = append(handed.SPIFFEIDs, svid.ID.String())
		handed.EntryIDs = append(handed.EntryIDs, svid.EntryID)
	}
	return resp, handed, nil
}

// FetchJWTSVID returns JWT-SVIDs of the process.
func (s *Server) FetchJWTSVID(ctx context.Context, req *brokerapi.FetchJWTSVIDRequest) (*brokerapi.FetchJWTSVIDResponse, error) {
	audience, err := workloadapi.Audiences(req.GetAudience())
	if err != nil {
		return nil, s.status(ctx, err)
	}
	var id spiffeid.ID
	if text := req.GetSpiffeId(); text != "" {
		if id, err = spiffeid.FromString(text); err != nil {
			return nil, status.Error(codes.InvalidArgument, "invalid requested SPIFFE ID")
		}
	}
	resp := &brokerapi.FetchJWTSVIDResponse{}
	err = s.errand(ctx, eventJWT, req.GetReference(), audience, func(e *errand) error {
		svids, _, err := s.cfg.Source.JWT(ctx, e.facts(), audience, id)
		if err == nil && len(svids) == 0 {
			err = errNobody
		}
		if err == nil {
			err = e.authorize() // signing takes its time
		}
		if err == nil && !e.of.Alive() {
			err = e.of.Gone()
		}
		if err != nil {
			return err
		}
		var handed workloadapi.Handed
		for _, svid := range svids {
			resp.Svids = append(resp.Svids, &brokerapi.JWTSVID{SpiffeId: svid.ID.String(), Svid: svid.Token, Hint: svid.Hint})
			handed.SPIFFEIDs = append(handed.SPIFFEIDs, svid.ID.String())
			handed.EntryIDs = append(handed.EntryIDs, svid.EntryID)
		}
		e.audit(handed, nil)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// SubscribeToX509Bundles streams the X.509 bundles of all trust domains that the agent holds.
func (s *Server) SubscribeToX509Bundles(req *brokerapi.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[brokerapi.SubscribeToX509BundlesResponse]) error {
	ctx := stream.Context()
	return s.errand(ctx, eventX509Bundles, req.GetReference(), nil, func(e *errand) error {
		return follow(ctx, e, stream.Send, func() (*brokerapi.SubscribeToX509BundlesResponse, workloadapi.Handed, <-chan struct{}, error) {
			bundles, changed := s.cfg.Bundles()
			resp := &brokerapi.SubscribeToX509BundlesResponse{Bundles: map[string][]byte{}}
			for _, b := range bundles {
				resp.Bundles[b.TrustDomain.IDString()] = workloadapi.X509Bundle(b)
				resp.Crl = append(resp.Crl, b.CRLs...)
			}
			return resp, workloadapi.Handed{}, changed, nil
		})
	})
}

// SubscribeToJWTBundles streams the JWT bundles of all trust domains that the agent holds.
func (s *Server) SubscribeToJWTBundles(req *brokerapi.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[brokerapi.SubscribeToJWTBundlesResponse]) error {
	ctx := stream.Context()
	return s.errand(ctx, eventJWTBundles, req.GetReference(), nil, func(e *errand) error {
		return follow(ctx, e, stream.Send, func() (*brokerapi.SubscribeToJWTBundlesResponse, workloadapi.Handed, <-chan struct{}, error) {
			bundles, changed := s.cfg.Bundles()
			resp := &brokerapi.SubscribeToJWTBundlesResponse{Bundles: map[string][]byte{}}
			for _, b := range bundles {
				keys, err := workloadapi.JWTBundle(b)
				if err != nil {
					return nil, workloadapi.Handed{}, nil, err
				}
				resp.Bundles[b.TrustDomain.IDString()] = keys
			}
			return resp, workloadapi.Handed{}, changed, nil
		})
	})
}
