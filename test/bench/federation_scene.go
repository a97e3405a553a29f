package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

// foreign is the other trust domain.
const foreign = "other.test"

// federated measures how long a change of another trust domain's bundle takes to a workload's open stream:
// put in by hand, and fetched from a real server of that trust domain that has just changed it.
func federated(ctx context.Context, b *bench) error {
	if err := b.startAgent(ctx, ""); err != nil {
		return err
	}
	bundles := bundlev1.NewBundleClient(b.conn)
	first, err := authorityOf(foreign, 0)
	if err != nil {
		return err
	}
	if err := setBundle(ctx, bundles, first); err != nil {
		return err
	}
	e := b.mine("/w")
	e.FederatesWith = []string{foreign}
	if _, err := b.create(ctx, []*types.Entry{e}); err != nil {
		return err
	}
	if err := b.served(ctx); err != nil {
		return err
	}
	s, _, err := open(ctx, b.agent.Socket)
	if err != nil {
		return err
	}
	defer s.close()
	var took times
	rounds := b.rounds(300)
	for i := range rounds {
		next, err := authorityOf(foreign, i+1)
		if err != nil {
			return err
		}
		begun := time.Now()
		if err := setBundle(ctx, bundles, next); err != nil {
			return err
		}
		if err := s.until(func(r *workload.X509SVIDResponse) bool {
			return bytes.Equal(r.GetFederatedBundles()["spiffe://"+foreign], next)
		}); err != nil {
			return err
		}
		took = append(took, time.Since(begun))
	}
	b.report(figure{"federated bundle set → stream, p50", "polled every 5,000 ms", 100, "ms"}, took.at(50), fmt.Sprintf("(%d rounds)", rounds))
	b.report(figure{"federated bundle set → stream, p99", "", 100, "ms"}, took.at(99), "")
	return federatedWithServer(ctx, b, s)
}

// authorityOf makes the nth authority of a trust domain.
func authorityOf(domain string, n int) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(int64(n) + 1), URIs: []*url.URL{{Scheme: "spiffe", Host: domain}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	return x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
}

// setBundle does what "bundle set" does.
func setBundle(ctx context.Context, client bundlev1.BundleClient, authority []byte) error {
	resp, err := client.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{{
		TrustDomain: foreign, X509Authorities: []*types.X509Certificate{{Asn1: authority}},
	}}})
	if err == nil && resp.GetResults()[0].GetStatus().GetCode() != int32(codes.OK) {
		err = errors.New(resp.GetResults()[0].GetStatus().GetMessage())
	}
	return err
}

// federatedWithServer has a server of the other trust domain rotate its authority.
func federatedWithServer(ctx context.Context, b *bench, s *stream) error {
	other, endpoint, err := b.otherServer(ctx)
	if err != nil {
		return err
	}
	conn, err := other.DialServer()
	if err != nil {
		return err
	}
	defer conn.Close()
	now, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return err
	}
	domains := trustdomainv1.NewTrustDomainClient(b.conn)
	made, err := domains.BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{
		FederationRelationships: []*types.FederationRelationship{{
			TrustDomain: foreign, BundleEndpointUrl: endpoint, TrustDomainBundle: now,
			BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{
				HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: "spiffe://" + foreign + "/spire/server"},
			},
		}},
	})
	if err == nil && made.GetResults()[0].GetStatus().GetCode() != int32(codes.OK) {
		err = errors.New(made.GetResults()[0].GetStatus().GetMessage())
	}
	if err != nil {
		return fmt.Errorf("federate: %w", err)
	}
	has := func(count int) func(*workload.X509SVIDResponse) bool {
		return func(r *workload.X509SVIDResponse) bool {
			certs, err := x509.ParseCertificates(r.GetFederatedBundles()["spiffe://"+foreign])
			return err == nil && len(certs) == count
		}
	}
	var took times
	// The other server has changed its bundle; this one is told to look, and its workload has it.
	arrives := func(count int) error {
		begun := time.Now()
		if _, err := domains.RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: foreign}); err != nil {
			return fmt.Errorf("refresh: %w", err)
		}
		if err := s.until(has(count)); err != nil {
			return err
		}
		took = append(took, time.Since(begun))
		return nil
	}
	authorities := localauthorityv1.NewLocalAuthorityClient(conn)
	rotations := b.rounds(30)
	for i := range rotations {
		if err := rotateX509(ctx, authorities, func(step string) error {
			switch step {
			case "prepare":
				return arrives(2)
			case "revoke":
				return arrives(1)
			}
			return nil
		}); err != nil {
			return fmt.Errorf("rotation %d of the other server: %w", i+1, err)
		}
	}
	b.report(figure{"federated server rotated, refresh → stream, p50", "", 100, "ms"}, took.at(50), fmt.Sprintf("(%d rotations; the fetch is in it)", rotations))
	b.report(figure{"federated server rotated, refresh → stream, p99", "", 100, "ms"}, took.at(99), "")
	return nil
}

// rotateX509 replaces a server's X.509 authority and takes the one before out of the bundle.
func rotateX509(ctx context.Context, c localauthorityv1.LocalAuthorityClient, after func(step string) error) error {
	prepared, err := c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
	if err == nil {
		err = after("prepare")
	}
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	_, err = c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: prepared.GetPreparedAuthority().GetAuthorityId()})
	if err == nil {
		err = after("activate")
	}
	if err != nil {
		return fmt.Errorf("activate: %w", err)
	}
	states, err := c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		return err
	}
	old := states.GetOld().GetAuthorityId()
	if _, err = c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: old}); err == nil {
		err = after("taint")
	}
	if err != nil {
		return fmt.Errorf("taint: %w", err)
	}
	if _, err = c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: old}); err == nil {
		err = after("revoke")
	}
	if err != nil {
		return fmt.Errorf("revoke: %w", err)
	}
	return nil
}

// otherServer starts a server of the other trust domain and returns it with the URL of its bundle.
func (b *bench) otherServer(ctx context.Context) (*site.Site, string, error) {
	dir := filepath.Join(b.Dir, "other")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, "", err
	}
	other, err := site.New(dir, b.Bin)
	if err != nil {
		return nil, "", err
	}
	port, err := port.Free()
	if err != nil {
		return nil, "", err
	}
	other.Domain, other.LogLevel, other.SPIRE.Server = foreign, b.LogLevel, b.SPIRE.Server
	other.ServerExtra = fmt.Sprintf(`federation {
    bundle_endpoint {
      address = "127.0.0.1"
      port    = %d
      profile "https_spiffe" {}
    }
  }`, port)
	if err := other.StartServer(ctx); err != nil {
		return nil, "", err
	}
	b.later(func() { _ = other.Stop() })
	return other, fmt.Sprintf("https://127.0.0.1:%d/", port), nil
}
