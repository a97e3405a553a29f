// Package external is an upstream authority that is a plugin of SPIRE.
//
// Such a plugin signs an authority and answers, in the same breath, with roots; whoever wishes may keep listening
// for other roots. What it says so adds to what is believed, and takes nothing away but what it calls tainted:
// SPIRE's plugins say what is new, not what is left. Only a plugin that publishes the bundle of the trust domain
// (SubscribeToLocalBundle) says what is all.
package external

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	upstreamauthorityv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/upstreamauthority/v1"
	"github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor"
	block "github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/plugin"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/workloadapi/identity"
)

// Authority asks a plugin.
type Authority struct {
	*plugin.Plugin

	listening  sync.WaitGroup
	publishing chan struct{} // holds a token while a JWT key is published: answers come in the order of the questions
	mu         sync.Mutex    // guards the rest
	closed     bool
	voice      *voice // whose answers about JWT keys count: those to the last question that was answered
	x509       []identity.X509Authority
	jwt        []identity.JWTAuthority
	changed    chan struct{} // closed and made anew whenever the two above change
	more       bool          // somebody says more than what comes with a signature
}

var _ upstream.Authority = (*Authority)(nil)

// voice is one question and all that is answered to it, for as long as it may be.
type voice struct {
	over bool // nobody waits for the first answer any more; Authority.mu guards it
}

// errOvertaken ends a conversation that has nothing more to say.
var errOvertaken = errors.New("another question was answered since")

// Open starts the plugin.
func Open(c *block.Config, needs attestor.Needs) (*Authority, error) {
	p, err := plugin.OpenBlock(c, "UpstreamAuthority", upstreamauthorityv1.UpstreamAuthority_ServiceDesc.ServiceName, nil, needs)
	if err != nil {
		return nil, err
	}
	return &Authority{Plugin: p, publishing: make(chan struct{}, 1), changed: make(chan struct{})}, nil
}

// Close ends the plugin and everybody who listens to it.
func (a *Authority) Close() error {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	err := a.Plugin.Close() // ends what is listened to
	a.listening.Wait()
	return err
}

// forever is the patience with a stream that says something when there is something to say.
const forever = 10 * 365 * 24 * time.Hour

// conversation hands all answers of a stream to hear, one after the other, in a goroutine that Close waits for. It
// returns the first one after it was heard.
func conversation[A any](ctx context.Context, a *Authority, open func(context.Context, upstreamauthorityv1.UpstreamAuthorityClient) (grpc.ServerStreamingClient[A], error), hear func(it *A, first bool) error) (*A, error) {
	type answer struct {
		it  *A
		err error
	}
	first := make(chan answer, 1)
	streaming, stop := context.WithCancel(context.WithoutCancel(ctx))
	listen := func() {
		defer stop()
		told := false
		err := a.Do(streaming, forever, func(ctx context.Context, conn grpc.ClientConnInterface) error {
			stream, err := open(ctx, upstreamauthorityv1.NewUpstreamAuthorityClient(conn))
			for err == nil {
				var got *A
				if got, err = stream.Recv(); err != nil {
					break
				}
				if err = hear(got, !told); err != nil {
					return err
				}
				if !told {
					told = true
					first <- answer{it: got}
				}
			}
			if errors.Is(err, io.EOF) && told {
				return nil
			}
			if errors.Is(err, io.EOF) {
				err = errors.New("it ended without an answer")
			}
			return plugin.Explain(err)
		})
		if !told {
			first <- answer{err: err}
		}
	}
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		stop()
		return nil, errors.New("upstream authority is closed")
	}
	a.listening.Go(listen)
	a.mu.Unlock()
	select {
	case got := <-first:
		return got.it, got.err
	case <-ctx.Done():
		stop() // who does not answer in time has nothing more to say
		return nil, ctx.Err()
	}
}

// Sign implements upstream.Authority.
func (a *Authority) Sign(ctx context.Context, r upstream.Request) (*upstream.Signed, error) {
	in := &upstreamauthorityv1.MintX509CARequest{Csr: r.CSR, PreferredTtl: int32(min(r.TTL/time.Second, math.MaxInt32))} //nolint:gosec // it fits
	got, err := conversation(ctx, a,
		func(ctx context.Context, c upstreamauthorityv1.UpstreamAuthorityClient) (grpc.ServerStreamingClient[upstreamauthorityv1.MintX509CAResponse], error) {
			return c.MintX509CAAndSubscribe(ctx, in)
		},
		func(it *upstreamauthorityv1.MintX509CAResponse, first bool) error {
			if first {
				return nil // they are returned
			}
			return a.roots(it.GetUpstreamX509Roots())
		})
	if err != nil {
		return nil, fmt.Errorf("have the plugin sign an authority: %w", err)
	}
	s := new(upstream.Signed)
	if s.Chain, err = certificates(got.GetX509CaChain(), upstream.MaxChain); err != nil {
		return nil, fmt.Errorf("%w: its chain: %w", upstream.ErrRefused, err)
	}
	if s.Roots, err = certificates(got.GetUpstreamX509Roots(), upstream.MaxRoots); err != nil {
		return nil, fmt.Errorf("%w: its roots: %w", upstream.ErrRefused, err)
	}
	return s, nil
}

func certificates(wire []*types.X509Certificate, most int) ([]*x509.Certificate, error) {
	if len(wire) > most {
		return nil, fmt.Errorf("%d certificates, the limit is %d", len(wire), most)
	}
	var certs []*x509.Certificate
	for i, one := range wire {
		cert, err := x509.ParseCertificate(one.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i+1, err)
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

// roots takes over roots that the plugin made known after it had signed.
func (a *Authority) roots(wire []*types.X509Certificate) error {
	authorities, err := x509Authorities(wire)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, one := range authorities {
		known := false
		for i := range a.x509 {
			if a.x509[i].Certificate.Equal(one.Certificate) {
				known = true
				a.x509[i].Tainted = a.x509[i].Tainted || one.Tainted
			}
		}
		if !known {
			a.x509 = append(a.x509, one)
		}
	}
	if extra := len(a.x509) - upstream.MaxRoots; extra > 0 {
		a.x509 = a.x509[extra:]
	}
	a.tell()
	return nil
}

func x509Authorities(wire []*types.X509Certificate) ([]identity.X509Authority, error) {
	certs, err := certificates(wire, upstream.MaxRoots)
	if err != nil {
		return nil, fmt.Errorf("%w: its roots: %w", upstream.ErrRefused, err)
	}
	authorities := make([]identity.X509Authority, 0, len(certs))
	for i, cert := range certs {
		authorities = append(authorities, identity.X509Authority{Certificate: cert, Tainted: wire[i].GetTainted()})
	}
	return authorities, nil
}

func jwtAuthorities(wire []*types.JWTKey) ([]identity.JWTAuthority, error) {
	if len(wire) > identity.MaxAuthorities {
		return nil, fmt.Errorf("%w: %d JWT keys, the limit is %d", upstream.ErrRefused, len(wire), identity.MaxAuthorities)
	}
	authorities := make([]identity.JWTAuthority, 0, len(wire))
	for _, k := range wire {
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("%w: its JWT key: %w", upstream.ErrRefused, err)
		}
		one := identity.JWTAuthority{KeyID: k.GetKeyId(), Key: key, Tainted: k.GetTainted()}
		if k.GetExpiresAt() != 0 {
			one.ExpiresAt = time.Unix(k.GetExpiresAt(), 0)
		}
		authorities = append(authorities, one)
	}
	return authorities, nil
}

// tell wakes who follows. mu is held.
func (a *Authority) tell() {
	a.more = true
	close(a.changed)
	a.changed = make(chan struct{})
}

// PublishJWT implements upstream.Authority.
func (a *Authority) PublishJWT(ctx context.Context, key identity.JWTAuthority) error {
	public, err := x509.MarshalPKIXPublicKey(key.Key)
	if err != nil {
		return fmt.Errorf("publish JWT key: %w", err)
	}
	in := &upstreamauthorityv1.PublishJWTKeyRequest{JwtKey: &types.JWTKey{PublicKey: public, KeyId: key.KeyID}}
	if !key.ExpiresAt.IsZero() {
		in.JwtKey.ExpiresAt = key.ExpiresAt.Unix()
	}
	select {
	case a.publishing <- struct{}{}:
		defer func() { <-a.publishing }()
	case <-ctx.Done():
		return fmt.Errorf("wait until another JWT key is published: %w", ctx.Err())
	}
	who := new(voice)
	_, err = conversation(ctx, a,
		func(ctx context.Context, c upstreamauthorityv1.UpstreamAuthorityClient) (grpc.ServerStreamingClient[upstreamauthorityv1.PublishJWTKeyResponse], error) {
			return c.PublishJWTKeyAndSubscribe(ctx, in)
		},
		func(it *upstreamauthorityv1.PublishJWTKeyResponse, first bool) error {
			return a.keys(who, first, it.GetUpstreamJwtKeys())
		})
	if err != nil {
		a.mu.Lock()
		who.over = true
		a.mu.Unlock()
	}
	switch {
	case status.Code(err) == codes.Unimplemented:
		return upstream.ErrNoJWT
	case err != nil:
		return fmt.Errorf("have the plugin publish a JWT key: %w", err)
	}
	return nil
}

// PublishWIT implements upstream.Authority: SPIRE's plugins know no such keys.
func (a *Authority) PublishWIT(context.Context, identity.JWTAuthority) error {
	return upstream.ErrNoJWT
}

// keys takes over the JWT keys that the plugin answers, each time all. Of several conversations the one counts whose
// question was answered last: what another still says may be of before.
func (a *Authority) keys(who *voice, first bool, wire []*types.JWTKey) error {
	authorities, err := jwtAuthorities(wire)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if first && !who.over {
		a.voice = who
	}
	if a.voice != who {
		return errOvertaken
	}
	a.jwt = authorities
	a.tell()
	return nil
}

// again is when a plugin is asked for its bundle that says it once and no more.
const again = time.Minute

// Follow implements upstream.Authority.
func (a *Authority) Follow(ctx context.Context, fn func(upstream.Bundle)) error {
	for {
		err := a.bundles(ctx, fn)
		if status.Code(err) == codes.Unimplemented {
			return a.pieces(ctx, fn)
		}
		if err != nil {
			return err
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// bundles hands over each bundle of the trust domain that the plugin publishes, until it has no more to say.
func (a *Authority) bundles(ctx context.Context, fn func(upstream.Bundle)) error {
	return a.Do(ctx, forever, func(ctx context.Context, conn grpc.ClientConnInterface) error {
		stream, err := upstreamauthorityv1.NewUpstreamAuthorityClient(conn).SubscribeToLocalBundle(ctx, &upstreamauthorityv1.SubscribeToLocalBundleRequest{})
		if err != nil {
			return plugin.Explain(err)
		}
		for some := false; ; some = true {
			got, err := stream.Recv()
			if errors.Is(err, io.EOF) && some {
				return nil
			}
			b := upstream.Bundle{}
			if err == nil {
				b.X509, err = x509Authorities(got.GetUpstreamX509Roots())
			}
			if err == nil {
				b.JWT, err = jwtAuthorities(got.GetUpstreamJwtKeys())
			}
			if err != nil {
				return plugin.Explain(err)
			}
			fn(b)
		}
	})
}

// pieces hands over what became known beside signatures.
func (a *Authority) pieces(ctx context.Context, fn func(upstream.Bundle)) error {
	for {
		a.mu.Lock()
		changed, b, more := a.changed, upstream.Bundle{X509: append([]identity.X509Authority(nil), a.x509...), JWT: a.jwt, Partial: true}, a.more
		a.mu.Unlock()
		if more {
			fn(b)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
