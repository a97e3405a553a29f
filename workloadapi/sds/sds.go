// Package sds serves the identities of the Workload API in Envoy's words: the Secret Discovery Service,
// version 3, on the same socket, state of the world (StreamSecrets, FetchSecrets) and delta
// (DeltaSecrets). Who calls is found out as for the Workload API, and may have the same: one's own
// certificates, the own trust domain's bundle and those one's entries federate with.
//
// What can be asked for:
//
//	default                   the default identity: certificate, chain and key
//	spiffe://td/path          the identity with this SPIFFE ID
//	ROOTCA                    the own trust domain's bundle
//	spiffe://td               the bundle of this trust domain
//	ALL                       all bundles, each for its own trust domain only
//	nothing                   everything, under SPIFFE IDs and trust domain IDs
//
// The three words can be other ones (Config). Istio asks for "default" and "ROOTCA" at
// /var/run/secrets/workload-spiffe-uds/socket in its proxies' containers: a socket_path that ends in
// "socket", in a directory that is mounted there, is all it needs.
//
// A bundle comes as configuration of Envoy's SPIFFE validator, which verifies a peer only with the
// bundle of the trust domain that its SPIFFE ID names; so it does, as with SPIRE, for clients that do not say
// their version. Envoys before 1.18 do not know it; they, and whoever asks for it by configuration or with
// disable_spiffe_cert_validation in its node's metadata, get a plain trusted_ca. That trusts each
// authority for any name, which is why ALL cannot be had so.
//
// Why it is so:
//   - Versions are digests of what is sent. An agent that restarted says the same as before, so that a
//     client that reconnects with delta is sent nothing it has.
//   - A name that is unknown fails the request with InvalidArgument, as in SPIRE. One that was served and
//     is gone is another matter: state of the world has no word for "gone", and Envoy ignores the one
//     that delta has; both keep the certificate until it expires. So it is replaced: the client is sent a
//     certificate that is expired, names nobody and that nobody trusts, and whoever it speaks to from
//     then on refuses it. A caller that has no identity at all any more is then told PermissionDenied,
//     as on the Workload API. Connections that Envoy has open stay open: it never asks again.
//   - Only what is known to be withdrawn is replaced. An attestation that fails or an agent that ends
//     changes nothing in Envoy.
//   - Lists of revoked certificates come with the bundles, while there is anything on them, for whoever
//     keeps a certificate that was withdrawn instead of asking for it here. Envoy's SPIFFE validator finds
//     them among the authorities. Given a list, Envoy refuses what it has no list for; so it is given none
//     unless each authority has one and no server below signs with one of its own.
//   - The security header of the Workload API is not asked for: Envoy's configuration can send one, but
//     nobody's does, and a browser cannot speak HTTP/2 to a Unix socket.
package sds

import (
	"context"
	"io"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/assay-id/assay/workloadapi"
)

// Defaults of Config. They are SPIRE's, and what Istio asks for.
const (
	DefaultSVIDName       = "default"
	DefaultBundleName     = "ROOTCA"
	DefaultAllBundlesName = "ALL"
)

// event names this service in audit lines and metrics.
const event = "sds"

// typeURL is the only type of resource there is here.
const typeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// maxNames is how many resources one client may ask for by name.
const maxNames = 1000

// noValidator is the key in a node's metadata that asks for plain bundles.
const noValidator = "disable_spiffe_cert_validation"

// Config is how clients ask. The zero value works.
type Config struct {
	// DefaultSVIDName asks for the default identity; empty means DefaultSVIDName.
	DefaultSVIDName string
	// DefaultBundleName asks for the own trust domain's bundle; empty means DefaultBundleName.
	DefaultBundleName string
	// DefaultAllBundlesName asks for all bundles; empty means DefaultAllBundlesName.
	DefaultAllBundlesName string
	// DisableSPIFFEValidation gives everybody plain bundles in place of Envoy's SPIFFE validator.
	DisableSPIFFEValidation bool
	// KeepWithdrawn leaves withdrawn certificates in Envoy until they expire, as SPIRE does, in place of
	// replacing them.
	KeepWithdrawn bool
	// CRL is CRLAuto (or empty): lists of revoked certificates are given if they are of all who sign for the
	// trust domain; CRLAlways: whatever there is; or CRLNever.
	CRL string
	Log logrus.FieldLogger
}

// Register makes a Workload API serve SDS. It must be called before its Run.
func Register(on *workloadapi.Server, cfg Config) {
	fill := func(name *string, with string) {
		if *name == "" {
			*name = with
		}
	}
	fill(&cfg.DefaultSVIDName, DefaultSVIDName)
	fill(&cfg.DefaultBundleName, DefaultBundleName)
	fill(&cfg.DefaultAllBundlesName, DefaultAllBundlesName)
	if cfg.Log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		cfg.Log = quiet
	}
	s := &service{cfg: cfg, complaints: &rate.Sometimes{First: 5, Interval: 10 * time.Second}}
	s.feed = on.NewFeed(event, new(reader).newMaterial)
	secretv3.RegisterSecretDiscoveryServiceServer(on, s)
}

// service is the SDS of one Workload API.
type service struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	cfg        Config
	feed       *workloadapi.Feed
	complaints *rate.Sometimes // what clients refuse is logged now and then
}

// FetchSecrets answers once.
func (s *service) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (resp *discoveryv3.DiscoveryResponse, err error) {
	w := &world{service: s}
	if err := w.request(req); err != nil {
		return nil, err
	}
	v, err := s.feed.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { v.End(ctx, err) }()
	value, err := v.Next(ctx)
	if err != nil {
		return nil, err
	}
	resp, handed, err := w.respond(value.(*material))
	if err != nil {
		return nil, err
	}
	handed.Rev = v.Rev()
	return resp, v.Tell(handed, func() error { return nil })
}

// plain reports whether a node is to get plain bundles, by its metadata and its version. Metadata is
// text where it comes from an environment variable.
func (s *service) plain(node *corev3.Node) bool {
	if s.cfg.DisableSPIFFEValidation {
		return true
	}
	switch v := node.GetMetadata().GetFields()[noValidator].GetKind().(type) {
	case *structpb.Value_BoolValue:
		if v.BoolValue {
			return true
		}
	case *structpb.Value_StringValue:
		if v.StringValue == "true" {
			return true
		}
	}
	build := node.GetUserAgentBuildVersion()
	version := build.GetVersion()
	return build != nil && (version.GetMajorNumber() < 1 || version.GetMajorNumber() == 1 && version.GetMinorNumber() < 18)
}

// checkType refuses requests for what is not here. A client may leave the type out: the method says it.
func checkType(url string) error {
	if url != "" && url != typeURL {
		return workloadapi.Invalid("unexpected resource type " + quote(url))
	}
	return nil
}

// refused logs that a client cannot use what it was sent: its operator has something to look at.
func (s *service) refused(v *workloadapi.Followed, message string) {
	s.complaints.Do(func() {
		s.cfg.Log.WithField("pid", v.PID()).WithField("err", clip(message)).Warn("SDS client refused its secrets")
	})
}

// inbox is where a client's requests arrive. One is kept at a time: whoever sends faster than it is
// answered waits.
type inbox[T any] struct {
	arrived chan struct{} // receives once for each request
	taken   chan struct{}
	req     T
	err     error
}

// listen receives until recv fails, which it does at the latest when the method has returned: gRPC ends
// the stream then, and the goroutine with it.
func listen[T any](ctx context.Context, recv func() (T, error)) *inbox[T] {
	in := &inbox[T]{arrived: make(chan struct{}), taken: make(chan struct{}, 1)}
	go func() {
		for {
			in.req, in.err = recv()
			failed := in.err != nil
			select {
			case in.arrived <- struct{}{}:
			case <-ctx.Done():
				return
			}
			if failed {
				return
			}
			select {
			case <-in.taken:
			case <-ctx.Done():
				return
			}
		}
	}()
	return in
}

// take returns the request that has arrived.
func (in *inbox[T]) take() (T, error) {
	var none T
	req, err := in.req, in.err
	if err != nil {
		return none, err
	}
	in.req = none // a request names its node's every extension; it is not kept
	in.taken <- struct{}{}
	return req, nil
}
