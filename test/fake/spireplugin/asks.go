package spireplugin

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	identityproviderv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/identityprovider/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// measure tells the host of what it measures in every way there is, and of something that cannot be.
func (p *Plugin) measure(ctx context.Context) error {
	if !p.measures {
		return status.Error(codes.FailedPrecondition, "there is no Metrics service")
	}
	labels := []*metricsv1.Label{{Name: "how", Value: "well"}}
	_, err1 := p.metrics.SetGauge(ctx, &metricsv1.SetGaugeRequest{Key: []string{"level"}, Val: 7, Labels: labels})
	_, err2 := p.metrics.IncrCounter(ctx, &metricsv1.IncrCounterRequest{Key: []string{"asked"}, Val: 1, Labels: labels})
	_, err3 := p.metrics.AddSample(ctx, &metricsv1.AddSampleRequest{Key: []string{"size"}, Val: 3, Labels: labels})
	_, err4 := p.metrics.MeasureSince(ctx, &metricsv1.MeasureSinceRequest{Key: []string{"took"}, Time: time.Now().Add(-time.Second).UnixNano()})
	_, err5 := p.metrics.EmitKey(ctx, &metricsv1.EmitKeyRequest{Key: []string{"key"}, Val: 1})
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return status.Errorf(codes.Internal, "measure: %v", err)
	}
	if _, err := p.metrics.IncrCounter(ctx, &metricsv1.IncrCounterRequest{Key: []string{"level"}, Val: 1}); status.Code(err) != codes.InvalidArgument {
		return status.Errorf(codes.Internal, "a gauge was counted: %v", err)
	}
	return nil
}

// identity writes down the identity that it is given, or the code of the error.
func (p *Plugin) identity(ctx context.Context, dir string) error {
	if !p.identified {
		return status.Error(codes.FailedPrecondition, "there is no IdentityProvider service")
	}
	out, err := p.identities.FetchX509Identity(ctx, &identityproviderv1.FetchX509IdentityRequest{})
	var text strings.Builder
	fmt.Fprintln(&text, status.Code(err))
	if err == nil {
		cert, err := x509.ParseCertificate(out.GetIdentity().GetCertChain()[0])
		if err != nil {
			return err
		}
		b := out.GetBundle()
		fmt.Fprintln(&text, cert.URIs[0], b.GetTrustDomain(), len(b.GetX509Authorities()), len(b.GetJwtAuthorities()), b.GetSequenceNumber())
		for _, der := range out.GetIdentity().GetCertChain() {
			_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: der})
		}
		_ = pem.Encode(&text, &pem.Block{Type: "PRIVATE KEY", Bytes: out.GetIdentity().GetPrivateKey()})
		for _, authority := range b.GetX509Authorities() {
			_ = pem.Encode(&text, &pem.Block{Type: "AUTHORITY", Bytes: authority.GetAsn1()})
		}
	}
	return os.WriteFile(filepath.Join(dir, "identity"), []byte(text.String()), 0o600)
}
