package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// maxAnswer is the largest answer that is taken, in bytes: bundles of many trust domains.
const maxAnswer = 16 << 20

// API is a SPIFFE Workload API; it is a Source.
type API struct {
	conn   *grpc.ClientConn
	client workload.SpiffeWorkloadAPIClient
	// spiffeID restricts JWT-SVIDs.
	spiffeID string
}

// Dial returns the Workload API at an address: a path of a socket, or what SPIFFE_ENDPOINT_SOCKET may
// hold (unix:///path or tcp://127.0.0.1:port). Nothing is connected before it is used. spiffeID restricts
// the JWT-SVIDs that are asked for; it may be empty.
func Dial(address, spiffeID string) (*API, error) {
	target := address
	switch {
	case strings.HasPrefix(address, "tcp://"):
		target = strings.TrimPrefix(address, "tcp://")
	case !strings.HasPrefix(address, "unix:"):
		target = "unix://" + address
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return nil, fmt.Errorf("use workload API at %s: %w", address, err)
	}
	return &API{conn: conn, client: workload.NewSpiffeWorkloadAPIClient(conn), spiffeID: spiffeID}, nil
}

// Close ends the connection.
func (a *API) Close() error { return a.conn.Close() }

// marked adds the header that the Workload API demands (SPIFFE Workload Endpoint section 6.1).
func marked(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// receive calls fn with each message of a stream, and with the zero T when the API says that there is no
// identity.
func receive[T any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[T], error), fn func(*T) error) error {
	ctx, cancel := context.WithCancel(marked(ctx))
	defer cancel()
	stream, err := open(ctx)
	for err == nil {
		var m *T
		if m, err = stream.Recv(); err == nil {
			if err := fn(m); err != nil {
				return err
			}
		}
	}
	if status.Code(err) == codes.PermissionDenied {
		return errors.Join(fn(nil), ErrNoIdentity)
	}
	if errors.Is(err, io.EOF) {
		return errors.New("the workload API has ended the stream")
	}
	return err
}

// X509 implements Source.
func (a *API) X509(ctx context.Context, fn func(*workload.X509SVIDResponse) error) error {
	return receive(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
		return a.client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	}, fn)
}

// JWTBundles implements Source.
func (a *API) JWTBundles(ctx context.Context, fn func(*workload.JWTBundlesResponse) error) error {
	return receive(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
		return a.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	}, fn)
}

// JWT implements Source.
func (a *API) JWT(ctx context.Context, audience []string) (*workload.JWTSVIDResponse, error) {
	resp, err := a.client.FetchJWTSVID(marked(ctx), &workload.JWTSVIDRequest{Audience: audience, SpiffeId: a.spiffeID})
	if status.Code(err) == codes.PermissionDenied {
		return nil, fmt.Errorf("%w: %w", ErrNoIdentity, err)
	}
	return resp, err
}
