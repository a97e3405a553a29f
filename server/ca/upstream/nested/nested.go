// Package nested is an upstream authority that is a server of the same trust domain, ours or SPIRE's, which
// has an entry for this one with "downstream" set.
//
// This server is a workload there: it has its SVID from the Workload API of an agent beside it, which hangs
// on the server above. With it, it asks for authorities (NewDownstreamX509CA), makes its JWT keys known
// (PublishJWTAuthority), and follows the bundle: pushed by a server of ours, and asked for every five
// seconds where the server above is SPIRE's and answers Unimplemented to the push.
//
// Why it is so: nothing here reaches for the agent or the server above before it is needed, because a
// server that has an authority starts and serves with it however long those are away.
package nested

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/wire/downstreamv1"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Config says where the server above is. All of it is required.
type Config struct {
	TrustDomain   spiffeid.TrustDomain
	ServerAddress string
	ServerPort    int
	// Socket is the path of the Workload API's socket.
	Socket string
	Log    logrus.FieldLogger
}

const (
	// pollEvery is how often a server is asked that does not push.
	pollEvery = 5 * time.Second
	// maxMessage is the largest answer: a bundle of as many authorities as there may be.
	maxMessage = 4 << 20
)

// Authority is the server above.
type Authority struct {
	cfg Config
	id  spiffeid.ID // the server's

	mu     sync.Mutex
	source *workloadapi.X509Source // nil until it was needed; mu guards it
}

var _ upstream.Authority = (*Authority)(nil)

// New returns the authority. Close it.
func New(cfg Config) (*Authority, error) {
	id, err := spiffeid.FromPath(cfg.TrustDomain, "/spire/server")
	if err != nil {
		return nil, err
	}
	return &Authority{cfg: cfg, id: id}, nil
}

// Close lets go of the Workload API.
func (a *Authority) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.source == nil {
		return nil
	}
	err := a.source.Close()
	a.source = nil
	return err
}

// svid returns where this server's own SVID comes from.
func (a *Authority) svid(ctx context.Context) (*workloadapi.X509Source, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.source != nil {
		return a.source, nil
	}
	address := a.cfg.Socket
	if !strings.Contains(address, ":") {
		address = "unix://" + address
	}
	ctx, cancel := context.WithTimeout(ctx, upstream.Patience/2)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(address)))
	if err != nil {
		return nil, fmt.Errorf("get this server's SVID from the Workload API at %s (is there an agent, and an entry for this server?): %w", a.cfg.Socket, err)
	}
	a.source = source
	return source, nil
}

// dial connects. Each connection shows the SVID of the moment.
func (a *Authority) dial(ctx context.Context, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	source, err := a.svid(ctx)
	if err != nil {
		return nil, err
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("get this server's SVID: %w", err)
	}
	if !svid.ID.MemberOf(a.cfg.TrustDomain) {
		return nil, fmt.Errorf("the Workload API at %s gives this server the SVID %q, which is not of trust domain %s", a.cfg.Socket, svid.ID, a.cfg.TrustDomain.Name())
	}
	tls := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(a.id))
	address := net.JoinHostPort(a.cfg.ServerAddress, strconv.Itoa(a.cfg.ServerPort))
	return grpc.NewClient("passthrough:///"+address, append(options,
		grpc.WithTransportCredentials(credentials.NewTLS(tls)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithDisableServiceConfig(),
	)...)
}

// Sign implements upstream.Authority.
func (a *Authority) Sign(ctx context.Context, r upstream.Request) (*upstream.Signed, error) {
	conn, err := a.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	resp, err := svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{
		Csr: r.CSR, PreferredTtl: int32(min(r.TTL/time.Second, math.MaxInt32)), //nolint:gosec // capped
	})
	if err != nil {
		return nil, a.explain("sign an X.509 authority", err)
	}
	s := new(upstream.Signed)
	if s.Chain, err = parse(resp.GetCaCertChain(), upstream.MaxChain); err != nil {
		return nil, fmt.Errorf("%w: its chain: %w", upstream.ErrRefused, err)
	}
	if s.Roots, err = parse(resp.GetX509Authorities(), identity.MaxAuthorities); err != nil {
		return nil, fmt.Errorf("%w: its roots: %w", upstream.ErrRefused, err)
	}
	return s, nil
}

func parse(list [][]byte, most int) ([]*x509.Certificate, error) {
	if len(list) > most {
		return nil, fmt.Errorf("%d certificates, the limit is %d", len(list), most)
	}
	certs := make([]*x509.Certificate, len(list))
	for i, der := range list {
		var err error
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i+1, err)
		}
	}
	return certs, nil
}

// PublishJWT implements upstream.Authority.
func (a *Authority) PublishJWT(ctx context.Context, key identity.JWTAuthority) error {
	err := a.publish(ctx, key, func(client bundlev1.BundleClient, public []byte, expires int64) error {
		_, err := client.PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: &types.JWTKey{
			PublicKey: public, KeyId: key.KeyID, ExpiresAt: expires,
		}})
		return err
	})
	if err != nil {
		return a.explain("publish a JWT key", err)
	}
	return nil
}

// PublishWIT implements upstream.Authority. SPIRE's server does not take these keys, nor does one of ours
// that signs no WIT-SVIDs.
func (a *Authority) PublishWIT(ctx context.Context, key identity.JWTAuthority) error {
	err := a.publish(ctx, key, func(client bundlev1.BundleClient, public []byte, expires int64) error {
		_, err := client.PublishWITAuthority(ctx, &bundlev1.PublishWITAuthorityRequest{WitAuthority: &types.WITKey{
			PublicKey: public, KeyId: key.KeyID, ExpiresAt: expires,
		}})
		return err
	})
	switch {
	case status.Code(err) == codes.Unimplemented:
		return fmt.Errorf("%w: the upstream server takes no keys of WIT-SVIDs", upstream.ErrNoJWT)
	case err != nil:
		return a.explain("publish a WIT key", err)
	}
	return nil
}

func (a *Authority) publish(ctx context.Context, key identity.JWTAuthority, do func(client bundlev1.BundleClient, public []byte, expires int64) error) error {
	conn, err := a.dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	public, err := x509.MarshalPKIXPublicKey(key.Key)
	if err != nil {
		return fmt.Errorf("encode public key: %w", err)
	}
	var expires int64
	if !key.ExpiresAt.IsZero() {
		expires = key.ExpiresAt.Unix()
	}
	return do(bundlev1.NewBundleClient(conn), public, expires)
}

// Follow implements upstream.Authority.
func (a *Authority) Follow(ctx context.Context, fn func(upstream.Bundle)) error {
	// A server that is gone without a word is noticed within a minute.
	conn, err := a.dial(ctx, grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	err = a.listen(ctx, conn, fn)
	if status.Code(err) != codes.Unimplemented {
		return a.explain("follow the bundle", err)
	}
	a.cfg.Log.WithField("every", pollEvery.String()).Info("The upstream server does not push its bundle; it is asked for it")
	return a.poll(ctx, conn, fn)
}

// listen takes what is pushed, until the stream ends.
func (a *Authority) listen(ctx context.Context, conn *grpc.ClientConn, fn func(upstream.Bundle)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := downstreamv1.NewDownstreamClient(conn).FollowBundle(ctx, &downstreamv1.FollowBundleRequest{})
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := a.take(resp.GetBundle(), fn); err != nil {
			return err
		}
	}
}

// poll asks until it fails.
func (a *Authority) poll(ctx context.Context, conn *grpc.ClientConn, fn func(upstream.Bundle)) error {
	client := bundlev1.NewBundleClient(conn)
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		asking, cancel := context.WithTimeout(ctx, upstream.Patience)
		b, err := client.GetBundle(asking, &bundlev1.GetBundleRequest{})
		cancel()
		if err != nil {
			return a.explain("get the bundle", err)
		}
		if err := a.take(b, fn); err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *Authority) take(w *types.Bundle, fn func(upstream.Bundle)) error {
	b, err := identity.BundleFromWire(w)
	if err != nil {
		return fmt.Errorf("%w: its bundle: %w", upstream.ErrRefused, err)
	}
	if b.TrustDomain != a.cfg.TrustDomain {
		return fmt.Errorf("%w: its bundle is of trust domain %s, and this server is of %s", upstream.ErrRefused, b.TrustDomain.Name(), a.cfg.TrustDomain.Name())
	}
	fn(upstream.Bundle{X509: b.X509, JWT: b.JWT, WIT: b.WIT})
	return nil
}

// calledAs names the SVID that this server has shown: the first one that it gets, where it gets several.
func (a *Authority) calledAs() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.source == nil {
		return ""
	}
	svid, err := a.source.GetX509SVID()
	if err != nil {
		return ""
	}
	return " for " + svid.ID.String() + ", which it called as"
}

// explain says which server said no, and what is usually missing.
func (a *Authority) explain(what string, err error) error {
	if err == nil {
		err = errors.New("it ended the stream")
	}
	hint := ""
	if status.Code(err) == codes.PermissionDenied {
		hint = " (this server needs an entry there with -downstream" + a.calledAs() + ")"
	}
	return fmt.Errorf("have the upstream server %s:%d %s%s: %w", a.cfg.ServerAddress, a.cfg.ServerPort, what, hint, err)
}
