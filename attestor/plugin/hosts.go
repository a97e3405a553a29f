package plugin

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	identityproviderv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/identityprovider/v1"
	"github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
)

// What Audit is told of besides: a plugin asked for an identity of the server.
const identityGiven = "plugin.identity"

// hosted are the services that every plugin may ask: Metrics, and IdentityProvider where there is a server.
func hosted(c *external.Config, needs attestor.Needs) []Service {
	services := []Service{{Name: metricsv1.Metrics_ServiceDesc.ServiceName, Register: func(r grpc.ServiceRegistrar) {
		metricsv1.RegisterMetricsServer(r, &metrics{source: c.Name, measure: needs.Measure, log: needs.Log, now: needs.Now})
	}}}
	if needs.Identity != nil || needs.Trial { // one that cannot do without it is tried with it
		services = append(services, Service{Name: identityproviderv1.IdentityProvider_ServiceDesc.ServiceName, Register: func(r grpc.ServiceRegistrar) {
			identityproviderv1.RegisterIdentityProviderServer(r, &identities{name: c.Name, granted: c.Identity, needs: needs})
		}})
	}
	return services
}

// metrics hands over what the plugin measures.
type metrics struct {
	metricsv1.UnimplementedMetricsServer
	source  string
	measure func(attestor.Measurement) error // nil: nobody wants to know
	log     logrus.FieldLogger
	now     func() time.Time

	once sync.Once // the first refusal is logged
}

func (m *metrics) take(kind attestor.MeasureKind, key []string, value float64, labels []*metricsv1.Label) (*emptypb.Empty, error) {
	if m.measure == nil {
		return &emptypb.Empty{}, nil
	}
	of := attestor.Measurement{Source: m.source, Kind: kind, Key: key, Value: value}
	for _, label := range labels {
		if label != nil {
			of.Labels = append(of.Labels, attestor.Label{Name: label.GetName(), Value: label.GetValue()})
		}
	}
	if err := m.measure(of); err != nil {
		m.once.Do(func() {
			m.log.WithError(err).Warn("what the plugin measures cannot be shown; it is told, and the next ones are not logged")
		})
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &emptypb.Empty{}, nil
}

// SetGauge implements the Metrics service.
func (m *metrics) SetGauge(_ context.Context, in *metricsv1.SetGaugeRequest) (*emptypb.Empty, error) {
	return m.take(attestor.Gauge, in.GetKey(), float64(in.GetVal()), in.GetLabels())
}

// EmitKey implements the Metrics service. Prometheus knows nothing of the kind, and SPIRE drops it there too.
func (m *metrics) EmitKey(context.Context, *metricsv1.EmitKeyRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// IncrCounter implements the Metrics service.
func (m *metrics) IncrCounter(_ context.Context, in *metricsv1.IncrCounterRequest) (*emptypb.Empty, error) {
	return m.take(attestor.Counter, in.GetKey(), float64(in.GetVal()), in.GetLabels())
}

// AddSample implements the Metrics service.
func (m *metrics) AddSample(_ context.Context, in *metricsv1.AddSampleRequest) (*emptypb.Empty, error) {
	return m.take(attestor.Sample, in.GetKey(), float64(in.GetVal()), in.GetLabels())
}

// MeasureSince implements the Metrics service: a sample of milliseconds, as SPIRE has it.
func (m *metrics) MeasureSince(_ context.Context, in *metricsv1.MeasureSinceRequest) (*emptypb.Empty, error) {
	took := m.now().Sub(time.Unix(0, in.GetTime()))
	return m.take(attestor.Sample, in.GetKey(), float64(took)/float64(time.Millisecond), in.GetLabels())
}

// identities hands out the server's identity, if the operator allows it.
type identities struct {
	identityproviderv1.UnimplementedIdentityProviderServer
	name    string
	granted bool
	needs   attestor.Needs

	mu   sync.Mutex // guards the rest
	told []byte     // the leaf that was audited last
	said bool       // a refusal was audited
}

var errNotGranted = errors.New("the operator has not allowed it: plugin_identity = true in the plugin's block does")

// FetchX509Identity implements the IdentityProvider service.
func (i *identities) FetchX509Identity(ctx context.Context, _ *identityproviderv1.FetchX509IdentityRequest) (*identityproviderv1.FetchX509IdentityResponse, error) {
	if !i.granted {
		i.audit(nil, errNotGranted)
		return nil, status.Error(codes.PermissionDenied, errNotGranted.Error())
	}
	given, err := (*attestor.ServerIdentity)(nil), attestor.ErrNoIdentity
	if i.needs.Identity != nil {
		given, err = i.needs.Identity(ctx)
	}
	if errors.Is(err, attestor.ErrNoIdentity) {
		return nil, status.Error(codes.FailedPrecondition, "IdentityProvider host service has not been initialized") // SPIRE's words
	}
	if err != nil {
		i.needs.Log.WithError(err).Warn("plugin asks for an identity of the server and there is none to give")
		return nil, status.Error(codes.Unavailable, "the server has no identity to give at the moment")
	}
	out, err := identityWire(i.needs.TrustDomain.Name(), given)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	i.audit(given.Chain[0].Raw, nil)
	return out, nil
}

// audit writes a line for each identity that is given out, and for the first refusal.
func (i *identities) audit(leaf []byte, err error) {
	i.mu.Lock()
	known := err != nil && i.said || err == nil && bytes.Equal(leaf, i.told)
	if err != nil {
		i.said = true
	} else {
		i.told = leaf
	}
	i.mu.Unlock()
	if !known && i.needs.Audit != nil && !i.needs.Trial {
		i.needs.Audit(identityGiven, "plugin/"+i.name, err)
	}
}

func identityWire(td string, given *attestor.ServerIdentity) (*identityproviderv1.FetchX509IdentityResponse, error) {
	key, err := x509.MarshalPKCS8PrivateKey(given.Key)
	if err != nil {
		return nil, err
	}
	identity := &identityproviderv1.X509Identity{PrivateKey: key}
	for _, cert := range given.Chain {
		identity.CertChain = append(identity.CertChain, cert.Raw)
	}
	bundle := &types.Bundle{TrustDomain: td, RefreshHint: int64(given.RefreshHint / time.Second), SequenceNumber: given.Sequence}
	for _, a := range given.X509 {
		bundle.X509Authorities = append(bundle.X509Authorities, &types.X509Certificate{Asn1: a.DER, Tainted: a.Tainted})
	}
	for _, k := range given.JWT {
		bundle.JwtAuthorities = append(bundle.JwtAuthorities, &types.JWTKey{PublicKey: k.PKIX, KeyId: k.ID, ExpiresAt: seconds(k.ExpiresAt), Tainted: k.Tainted})
	}
	for _, k := range given.WIT {
		bundle.WitAuthorities = append(bundle.WitAuthorities, &types.WITKey{PublicKey: k.PKIX, KeyId: k.ID, ExpiresAt: seconds(k.ExpiresAt), Tainted: k.Tainted})
	}
	return &identityproviderv1.FetchX509IdentityResponse{Identity: identity, Bundle: bundle}, nil
}

func seconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
