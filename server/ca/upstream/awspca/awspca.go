// Package awspca is an upstream authority that is a certificate authority of AWS Private CA.
//
// What the server's role needs: acm-pca:DescribeCertificateAuthority, acm-pca:IssueCertificate and
// acm-pca:GetCertificate. AWS gives no CA certificate more than the shortest path there is unless a template
// says otherwise: a server that has servers below it needs SubordinateCACertificate_PathLen1/V1 or longer.
package awspca

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"time"

	"github.com/assay-id/assay/server/ca/aws"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Config says which authority it is.
type Config struct {
	// ARN is the authority's.
	ARN string
	// SigningAlgorithm is what it signs with. Empty: what it was made with.
	SigningAlgorithm string
	// TemplateARN is the template of certificates. Empty: SubordinateCACertificate_PathLen0/V1.
	TemplateARN string
	// SupplementalBundlePath is a PEM file with more roots, as while one is replaced by another. Empty: none.
	SupplementalBundlePath string
}

const defaultTemplate = "arn:aws:acm-pca:::template/SubordinateCACertificate_PathLen0/V1"

// Authority is one of AWS Private CA.
type Authority struct {
	pca *aws.Client
	cfg Config
}

var _ upstream.Authority = (*Authority)(nil)

// New returns the authority.
func New(client *aws.Client, cfg Config) *Authority {
	if cfg.TemplateARN == "" {
		cfg.TemplateARN = defaultTemplate
	}
	return &Authority{pca: client, cfg: cfg}
}

// Sign implements upstream.Authority.
func (a *Authority) Sign(ctx context.Context, r upstream.Request) (*upstream.Signed, error) {
	var more []*x509.Certificate
	if a.cfg.SupplementalBundlePath != "" {
		text, err := os.ReadFile(a.cfg.SupplementalBundlePath)
		if err != nil {
			return nil, fmt.Errorf("read supplemental bundle: %w", err)
		}
		if more, err = upstream.ParsePEM(text); err != nil {
			return nil, fmt.Errorf("read supplemental bundle %s: %w", a.cfg.SupplementalBundlePath, err)
		}
	}
	algorithm, err := a.algorithm(ctx)
	if err != nil {
		return nil, err
	}
	var issued struct {
		ARN string `json:"CertificateArn"`
	}
	if err := a.pca.Do(ctx, "IssueCertificate", map[string]any{
		"CertificateAuthorityArn": a.cfg.ARN, "SigningAlgorithm": algorithm, "TemplateArn": a.cfg.TemplateARN,
		"Csr":      pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}),
		"Validity": map[string]any{"Type": "ABSOLUTE", "Value": r.Now.Add(r.TTL).Unix()},
	}, &issued); err != nil {
		return nil, err
	}
	chain, above, err := a.wait(ctx, issued.ARN)
	if err != nil {
		return nil, err
	}
	// The root is last.
	return &upstream.Signed{Chain: append(chain, above[:len(above)-1]...), Roots: append(above[len(above)-1:], more...)}, nil
}

func (a *Authority) algorithm(ctx context.Context) (string, error) {
	if a.cfg.SigningAlgorithm != "" {
		return a.cfg.SigningAlgorithm, nil
	}
	var out struct {
		CA struct {
			Status        string `json:"Status"`
			Configuration struct {
				SigningAlgorithm string `json:"SigningAlgorithm"`
			} `json:"CertificateAuthorityConfiguration"`
		} `json:"CertificateAuthority"`
	}
	if err := a.pca.Do(ctx, "DescribeCertificateAuthority", map[string]any{"CertificateAuthorityArn": a.cfg.ARN}, &out); err != nil {
		return "", err
	}
	if out.CA.Status != "ACTIVE" {
		return "", fmt.Errorf("the private CA %s is %q, and not ACTIVE", a.cfg.ARN, out.CA.Status)
	}
	return out.CA.Configuration.SigningAlgorithm, nil
}

// wait asks for the certificate until it is there, or ctx ends.
func (a *Authority) wait(ctx context.Context, arn string) (chain, above []*x509.Certificate, err error) {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 3*time.Second) {
		var out struct {
			Certificate string `json:"Certificate"`
			Chain       string `json:"CertificateChain"`
		}
		err := a.pca.Do(ctx, "GetCertificate", map[string]any{"CertificateAuthorityArn": a.cfg.ARN, "CertificateArn": arn}, &out)
		switch {
		case err == nil:
			if chain, err = upstream.ParsePEM([]byte(out.Certificate)); err != nil {
				return nil, nil, fmt.Errorf("%w: its certificate: %w", upstream.ErrRefused, err)
			}
			if above, err = upstream.ParsePEM([]byte(out.Chain)); err != nil {
				return nil, nil, fmt.Errorf("%w: its chain: %w", upstream.ErrRefused, err)
			}
			return chain, above, nil
		case !aws.Is(err, "RequestInProgressException"):
			return nil, nil, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("wait for the certificate: %w", ctx.Err())
		}
	}
}

// PublishJWT implements upstream.Authority: AWS Private CA knows of certificates only.
func (a *Authority) PublishJWT(context.Context, identity.JWTAuthority) error {
	return upstream.ErrNoJWT
}

// PublishWIT implements upstream.Authority, as PublishJWT does.
func (a *Authority) PublishWIT(ctx context.Context, key identity.JWTAuthority) error {
	return a.PublishJWT(ctx, key)
}

// Follow implements upstream.Authority.
func (a *Authority) Follow(context.Context, func(upstream.Bundle)) error { return upstream.ErrNoBundle }
