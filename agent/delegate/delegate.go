// Package delegate serves SPIRE's delegated identity API on the agent's private socket: a few processes
// that the operator names by SPIFFE ID (a node's one proxy, a service mesh's tunnel) get the identities
// of the workloads they act for, by PID or by selectors, and follow their changes.
//
// A delegate is attested as a workload is, and again while it is served: who loses the entry that made
// it one, or turns out to be another process, loses its streams. It is believed what it says of others
// (selectors), as in SPIRE; a PID is pinned and attested by this agent.
//
// Why it is so:
//   - Entries that give power over the server (admin, downstream) are left out below this package, where
//     entries are matched (issue.Delegated), and not here where there are two answers to forget one of.
//     SPIRE forgot the JWT-SVIDs (#6972).
//   - Facts that only a verdict can vouch for are never taken from a delegate; the picture grants them.
//   - A subscription without a match is an empty answer and stays open, because a proxy subscribes before
//     the workload's entry is there. A stream whose process has exited ends.
//   - Whether a caller is a delegate is asked anew before everything that is sent.
package delegate

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
	"github.com/assay-id/assay/workloadapi/peer"
)

// Source turns facts into identities that may be delegated. agent/issue's Delegated is one.
type Source interface {
	X509(ctx context.Context, facts attestor.Set) (identity.X509Context, <-chan struct{}, error)
	JWT(ctx context.Context, facts attestor.Set, audience []string, id spiffeid.ID) ([]*identity.JWTSVID, <-chan struct{}, error)
}

// Config is what the service stands on. All of it is required.
type Config struct {
	// Authorized are the SPIFFE IDs of delegates.
	Authorized []spiffeid.ID
	// Attest follows what is proved about delegates and the processes they name.
	Attest *workloadapi.Server
	// Source has the identities.
	Source Source
	// Entitled returns the SPIFFE IDs that facts entitle to, and a channel that is closed when they may be
	// others.
	Entitled func(facts attestor.Set) ([]spiffeid.ID, <-chan struct{})
	// Bundles returns all bundles the agent holds, and a channel that is closed when they may be others.
	Bundles func() ([]*identity.Bundle, <-chan struct{})
	// Pin pins a process by its PID.
	Pin func(pid int) (*peer.Peer, error)
}

// Register makes a server, whose callers peer pins, serve the API.
func Register(on grpc.ServiceRegistrar, cfg Config) {
	s := &service{Config: cfg, authorized: map[spiffeid.ID]bool{}}
	for _, id := range cfg.Authorized {
		s.authorized[id] = true
	}
	delegatedv1.RegisterDelegatedIdentityServer(on, s)
}

type service struct {
	delegatedv1.UnimplementedDelegatedIdentityServer
	Config
	authorized map[spiffeid.ID]bool
}

// Events in audit lines.
const (
	eventX509        = "delegated_x509_svid"
	eventX509Bundles = "delegated_x509_bundles"
	eventJWT         = "delegated_jwt_svid"
	eventJWTBundles  = "delegated_jwt_bundles"
)

// SubscribeToX509SVIDs streams the X509-SVIDs of the workloads that are meant, and again whenever they
// change.
func (s *service) SubscribeToX509SVIDs(req *delegatedv1.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToX509SVIDsResponse]) error {
	ctx := stream.Context()
	return s.errand(ctx, eventX509, req, func(e *errand) error {
		return follow(ctx, e, stream.Send, func() (*delegatedv1.SubscribeToX509SVIDsResponse, workloadapi.Handed, <-chan struct{}, error) {
			x, changed, err := s.Source.X509(ctx, e.facts())
			if err != nil {
				return nil, workloadapi.Handed{}, nil, err
			}
			resp, handed, err := x509Response(x)
			return resp, handed, changed, err
		})
	})
}

func x509Response(x identity.X509Context) (*delegatedv1.SubscribeToX509SVIDsResponse, workloadapi.Handed, error) {
	handed := workloadapi.Handed{Rev: x.Rev}
	resp := &delegatedv1.SubscribeToX509SVIDsResponse{}
	for _, b := range x.Federated {
		resp.FederatesWith = append(resp.FederatesWith, b.TrustDomain.IDString())
	}
	for _, svid := range x.SVIDs {
		key := svid.KeyDER
		if len(key) == 0 {
			var err error
			if key, err = x509.MarshalPKCS8PrivateKey(svid.Key); err != nil {
				return nil, handed, fmt.Errorf("encode key of %s: %w", svid.ID, err)
			}
		}
		resp.X509Svids = append(resp.X509Svids, &delegatedv1.X509SVIDWithKey{
			X509Svid:    &types.X509SVID{Id: identity.IDWire(svid.ID), CertChain: svid.Chain, ExpiresAt: svid.NotAfter.Unix(), Hint: svid.Hint},
			X509SvidKey: key,
		})
		handed.SPIFFEIDs = append(handed.SPIFFEIDs, svid.ID.String())
		handed.EntryIDs = append(handed.EntryIDs, svid.EntryID)
	}
	return resp, handed, nil
}

// FetchJWTSVIDs returns JWT-SVIDs of the workloads that are meant.
func (s *service) FetchJWTSVIDs(ctx context.Context, req *delegatedv1.FetchJWTSVIDsRequest) (*delegatedv1.FetchJWTSVIDsResponse, error) {
	audience, err := workloadapi.Audiences(req.GetAudience())
	if err != nil {
		return nil, s.status(ctx, err)
	}
	resp := &delegatedv1.FetchJWTSVIDsResponse{}
	err = s.errand(ctx, eventJWT, req, func(e *errand) error {
		e.audience = audience
		svids, _, err := s.Source.JWT(ctx, e.facts(), audience, spiffeid.ID{})
		if err == nil && len(svids) == 0 {
			err = workloadapi.Denied("no entry matches that may be delegated")
		}
		if err == nil {
			err = e.authorize() // signing takes its time
		}
		if err != nil {
			return err
		}
		var handed workloadapi.Handed
		for _, svid := range svids {
			resp.Svids = append(resp.Svids, &types.JWTSVID{
				Token: svid.Token, Id: identity.IDWire(svid.ID), ExpiresAt: svid.ExpiresAt.Unix(), IssuedAt: svid.IssuedAt.Unix(), Hint: svid.Hint,
			})
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
func (s *service) SubscribeToX509Bundles(_ *delegatedv1.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToX509BundlesResponse]) error {
	ctx := stream.Context()
	return s.errand(ctx, eventX509Bundles, nil, func(e *errand) error {
		return follow(ctx, e, stream.Send, func() (*delegatedv1.SubscribeToX509BundlesResponse, workloadapi.Handed, <-chan struct{}, error) {
			bundles, changed := s.Bundles()
			resp := &delegatedv1.SubscribeToX509BundlesResponse{CaCertificates: map[string][]byte{}}
			for _, b := range bundles {
				resp.CaCertificates[b.TrustDomain.IDString()] = workloadapi.X509Bundle(b)
			}
			return resp, workloadapi.Handed{}, changed, nil
		})
	})
}

// SubscribeToJWTBundles streams the JWT bundles of all trust domains that the agent holds.
func (s *service) SubscribeToJWTBundles(_ *delegatedv1.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToJWTBundlesResponse]) error {
	ctx := stream.Context()
	return s.errand(ctx, eventJWTBundles, nil, func(e *errand) error {
		return follow(ctx, e, stream.Send, func() (*delegatedv1.SubscribeToJWTBundlesResponse, workloadapi.Handed, <-chan struct{}, error) {
			bundles, changed := s.Bundles()
			resp := &delegatedv1.SubscribeToJWTBundlesResponse{Bundles: map[string][]byte{}}
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

// follow sends what compose returns, and again whenever it says something else, until the delegate leaves
// or is none any more.
func follow[M proto.Message](ctx context.Context, e *errand, send func(M) error, compose func() (M, workloadapi.Handed, <-chan struct{}, error)) error {
	var sent M
	first := true
	for {
		if err := e.authorize(); err != nil {
			return err
		}
		resp, handed, changed, err := compose()
		if err != nil {
			return err
		}
		switch {
		case e.stale(): // it took a while, and who asks may be somebody else by now
			if err := e.wait(ctx, changed); err != nil {
				return err
			}
			continue
		case first || !proto.Equal(resp, sent):
			if !e.by.Alive() {
				return errExited
			}
			e.audit(handed, nil)
			if err := send(resp); err != nil {
				return err
			}
			if !first {
				e.told()
			}
			sent, first = resp, false
		}
		if err := e.wait(ctx, changed); err != nil {
			return err
		}
	}
}

// Errors of an errand.
var (
	errExited      = workloadapi.Denied("process has exited")
	errNoIdentity  = workloadapi.Denied("caller matches no entry")
	errNotDelegate = errors.New("caller not configured as an authorized delegate")
	errNoProcess   = errors.New("there is no such process")
	errOneOf       = workloadapi.Invalid("must provide either selectors or non-zero PID, but not both")
	errSelectors   = workloadapi.Invalid("could not parse provided selectors")
)

// status turns an error into what a delegate is told.
func (s *service) status(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, errNotDelegate):
		return status.Error(codes.PermissionDenied, errNotDelegate.Error())
	case errors.Is(err, errNoProcess):
		return status.Error(codes.NotFound, errNoProcess.Error())
	}
	method, _ := grpc.Method(ctx)
	return s.Attest.Status(ctx, method, err)
}
