package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/fake/fakeserver"
)

// TestDelegateAndEnvoy has the two that are served beside the Workload API tried through a whole agent:
// this process is a delegate, and an Envoy.
func TestDelegateAndEnvoy(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	n := newNode(t, server)
	n.cfg.AdminSocketPath = filepath.Join(filepath.Dir(n.cfg.DataDir), "private", "admin.sock")
	n.cfg.AuthorizedDelegates = []spiffeid.ID{spiffeid.RequireFromPath(fakeserver.TrustDomain, "/proxy")}
	other := "unix:uid:4000000000"
	admin := fakeserver.Entry("admin", "/admin", other)
	admin.Admin = true
	server.Put(fakeserver.Entry("proxy", "/proxy", mine), fakeserver.Entry("app", "/app", other), admin)
	n.start()
	// The picture is there when the Workload API has an answer.
	p := n.process()
	if _, err := p.follow().stream.Recv(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	dial := func(socket string) *grpc.ClientConn {
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	api := delegatedv1.NewDelegatedIdentityClient(dial(n.cfg.AdminSocketPath))
	selectors := []*types.Selector{{Type: "unix", Value: "uid:4000000000"}}

	st, err := api.SubscribeToX509SVIDs(ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := st.Recv()
	if err != nil || len(resp.GetX509Svids()) != 1 || resp.GetX509Svids()[0].GetX509Svid().GetId().GetPath() != "/app" {
		t.Fatalf("got %v, %v", resp, err)
	}
	tokens, err := api.FetchJWTSVIDs(ctx, &delegatedv1.FetchJWTSVIDsRequest{Selectors: selectors, Audience: []string{"a"}})
	if err != nil || len(tokens.GetSvids()) != 1 || tokens.GetSvids()[0].GetId().GetPath() != "/app" {
		t.Fatalf("got %v, %v", tokens, err)
	}
	own, err := api.SubscribeToX509SVIDs(ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: int32(os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	if resp, err = own.Recv(); err != nil || len(resp.GetX509Svids()) != 1 || resp.GetX509Svids()[0].GetX509Svid().GetId().GetPath() != "/proxy" {
		t.Fatalf("got %v, %v", resp, err)
	}
	bundles, err := api.SubscribeToX509Bundles(ctx, &delegatedv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := bundles.Recv(); err != nil || len(got.GetCaCertificates()[fakeserver.TrustDomain.IDString()]) == 0 {
		t.Fatalf("got %v, %v", got, err)
	}
	envoy := secretv3.NewSecretDiscoveryServiceClient(dial(n.cfg.SocketPath))
	if got, err := envoy.FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}}); err != nil || len(got.GetResources()) != 2 {
		t.Fatalf("got %v, %v", got, err)
	}

	server.Delete("proxy")
	for _, recv := range []func() error{
		func() error { _, err := st.Recv(); return err }, func() error { _, err := bundles.Recv(); return err },
	} {
		if err := recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("a delegate that is none any more is told %v", err)
		}
	}
}
