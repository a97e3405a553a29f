package main

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/ca/aws"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/ca/keys/awskms"
	externalkeys "github.com/assay-id/assay/server/ca/keys/external"
	"github.com/assay-id/assay/server/ca/keys/pkcs11"
	"github.com/assay-id/assay/server/ca/keys/transit"
)

// keyManager returns how the key manager is opened that the file names; nil if the server has it itself.
func keyManager(from conf.Chosen) func(context.Context, server.Needs) (keys.Manager, error) {
	switch c := from.Config.(type) {
	case *conf.KeysVault:
		return func(context.Context, server.Needs) (keys.Manager, error) {
			client, err := vaultClient(&c.Vault)
			if err != nil {
				return nil, err
			}
			return transit.New(client, c.Mount, c.Prefix), nil
		}
	case *conf.KeysAWS:
		return func(ctx context.Context, _ server.Needs) (keys.Manager, error) { return awsKeys(ctx, c) }
	case *external.Config:
		return func(_ context.Context, n server.Needs) (keys.Manager, error) {
			return externalkeys.Open(c, n.DataDir, pluginNeeds(n, c))
		}
	case *conf.KeysPKCS11:
		return func(ctx context.Context, n server.Needs) (keys.Manager, error) { return pkcs11Keys(ctx, n, c) }
	}
	return nil
}

func awsKeys(ctx context.Context, c *conf.KeysAWS) (keys.Manager, error) {
	policy := ""
	if c.PolicyPath != "" {
		text, err := os.ReadFile(c.PolicyPath)
		if err != nil {
			return nil, fmt.Errorf("read the policy of keys: %w", err)
		}
		policy = string(text)
	}
	client, err := aws.New(ctx, aws.KMS, aws.Config{
		Region: c.Region, Endpoint: c.Endpoint, AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretKey,
	})
	if err != nil {
		return nil, err
	}
	return awskms.New(client, awskms.Config{Prefix: c.Prefix, Policy: policy, Tags: c.Tags}), nil
}

func pkcs11Keys(ctx context.Context, n server.Needs, c *conf.KeysPKCS11) (keys.Manager, error) {
	pin, err := os.ReadFile(c.PINPath)
	if err != nil {
		return nil, fmt.Errorf("read the PIN: %w", err)
	}
	return pkcs11.Open(ctx, pkcs11.Config{
		Helper: c.Helper, Module: c.Module, TokenLabel: c.Token, PIN: string(bytes.TrimSpace(pin)), Prefix: c.Prefix, Log: n.Log,
	})
}

// pluginNeeds are what a plugin of SPIRE gets that is no attestor.
func pluginNeeds(n server.Needs, c *external.Config) attestor.Needs {
	return attestor.Needs{
		TrustDomain: n.TrustDomain, Log: n.Log.WithField("plugin", c.Name), Now: n.Now, Audit: n.Audit, Identity: n.Identity, Measure: n.Measure,
	}
}
