// Package vaultpki is an upstream authority that is the PKI engine of Vault or OpenBao.
//
// The policy that the server's token needs, with the mount pki:
//
//	path "pki/root/sign-intermediate" { capabilities = ["update"] }
package vaultpki

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/vault"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Authority is a mount of the PKI engine.
type Authority struct {
	vault *vault.Client
	mount string
	td    spiffeid.TrustDomain
}

var _ upstream.Authority = (*Authority)(nil)

// New returns the authority. The mount is "pki" if it is empty.
func New(client *vault.Client, mount string, td spiffeid.TrustDomain) *Authority {
	if mount == "" {
		mount = "pki"
	}
	return &Authority{vault: client, mount: strings.Trim(mount, "/"), td: td}
}

// Sign implements upstream.Authority.
func (a *Authority) Sign(ctx context.Context, r upstream.Request) (*upstream.Signed, error) {
	var out struct {
		Certificate string   `json:"certificate"`
		IssuingCA   string   `json:"issuing_ca"`
		Chain       []string `json:"ca_chain"`
	}
	in := map[string]any{
		"csr":                 string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR})),
		"use_csr_values":      true, // subject and the trust domain's URI
		"common_name":         a.td.Name(),
		"ttl":                 fmt.Sprintf("%ds", int64(r.TTL.Seconds())),
		"format":              "pem",
		"not_before_duration": "30s",
	}
	if err := a.vault.Do(ctx, http.MethodPost, a.mount+"/root/sign-intermediate", in, &out); err != nil {
		return nil, fmt.Errorf("have Vault sign an authority at %s: %w", a.mount, err)
	}
	chain, err := upstream.ParsePEM([]byte(out.Certificate))
	if err != nil {
		return nil, fmt.Errorf("%w: its certificate: %w", upstream.ErrRefused, err)
	}
	above := out.Chain
	if len(above) == 0 {
		above = []string{out.IssuingCA}
	}
	certs, err := upstream.ParsePEM([]byte(strings.Join(above, "\n")))
	if err != nil {
		return nil, fmt.Errorf("%w: its chain: %w", upstream.ErrRefused, err)
	}
	return split(chain, certs), nil
}

// split tells what is above an authority into the chain and the root, which is the last one.
func split(chain, above []*x509.Certificate) *upstream.Signed {
	return &upstream.Signed{Chain: append(chain, above[:len(above)-1]...), Roots: above[len(above)-1:]}
}

// Keep renews the token that the server was given, until ctx ends.
func (a *Authority) Keep(ctx context.Context, log logrus.FieldLogger) { a.vault.Keep(ctx, log) }

// PublishJWT implements upstream.Authority: Vault's PKI knows of certificates only.
func (a *Authority) PublishJWT(context.Context, identity.JWTAuthority) error {
	return upstream.ErrNoJWT
}

// PublishWIT implements upstream.Authority, as PublishJWT does.
func (a *Authority) PublishWIT(ctx context.Context, key identity.JWTAuthority) error {
	return a.PublishJWT(ctx, key)
}

// Follow implements upstream.Authority.
func (a *Authority) Follow(context.Context, func(upstream.Bundle)) error { return upstream.ErrNoBundle }
