package main

import (
	"context"
	"fmt"

	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/ca/aws"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/awspca"
	"github.com/assay-id/assay/server/ca/upstream/certmanager"
	"github.com/assay-id/assay/server/ca/upstream/disk"
	externalupstream "github.com/assay-id/assay/server/ca/upstream/external"
	"github.com/assay-id/assay/server/ca/upstream/nested"
	"github.com/assay-id/assay/server/ca/upstream/vaultpki"
)

// tryUpstream says what is wrong with the files that an authority above is made of. Others are not asked: they may
// be away while a file is looked at.
func tryUpstream(from conf.Chosen) error {
	if c, ok := from.Config.(*conf.UpstreamDisk); ok {
		_, err := disk.Open(disk.Config{CertPath: c.CertPath, KeyPath: c.KeyPath, BundlePath: c.BundlePath})
		return err
	}
	return nil
}

// upstreamAuthority returns how the authority above is opened that the file names; nil if it names none.
func upstreamAuthority(from conf.Chosen) func(server.Needs) (upstream.Authority, error) {
	switch c := from.Config.(type) {
	case nil:
		return nil
	case *conf.UpstreamDisk:
		return func(server.Needs) (upstream.Authority, error) {
			return disk.Open(disk.Config{CertPath: c.CertPath, KeyPath: c.KeyPath, BundlePath: c.BundlePath})
		}
	case *conf.UpstreamSPIRE:
		return func(n server.Needs) (upstream.Authority, error) {
			return nested.New(nested.Config{
				TrustDomain: n.TrustDomain, ServerAddress: c.Address, ServerPort: c.Port, Socket: c.Socket, Log: n.Log,
			})
		}
	case *conf.UpstreamVault:
		return func(n server.Needs) (upstream.Authority, error) {
			client, err := vaultClient(&c.Vault)
			if err != nil {
				return nil, err
			}
			return vaultpki.New(client, c.Mount, n.TrustDomain), nil
		}
	case *conf.UpstreamPCA:
		return func(server.Needs) (upstream.Authority, error) {
			client, err := aws.New(context.Background(), aws.PCA, aws.Config{Region: c.Region, Endpoint: c.Endpoint, AssumeRoleARN: c.Role})
			if err != nil {
				return nil, err
			}
			return awspca.New(client, awspca.Config{
				ARN: c.ARN, SigningAlgorithm: c.Algorithm, TemplateARN: c.Template, SupplementalBundlePath: c.Supplemental,
			}), nil
		}
	case *external.Config:
		return func(n server.Needs) (upstream.Authority, error) {
			return externalupstream.Open(c, pluginNeeds(n, c))
		}
	case *conf.UpstreamCertManager:
		return func(server.Needs) (upstream.Authority, error) {
			return certmanager.Open(certmanager.Config{
				Namespace: c.Namespace, Name: c.Name, Kind: c.Kind, Group: c.Group, KubeConfig: c.KubeConfig,
			})
		}
	}
	return func(server.Needs) (upstream.Authority, error) {
		return nil, fmt.Errorf("upstream authority %q is not in this program", from.Kind)
	}
}
