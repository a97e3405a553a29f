package workloadapitest

import (
	"context"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

// Target is a Workload API that the suite is run against.
type Target struct {
	// Socket is the path of its socket.
	Socket string
	// TrustDomain is its own.
	TrustDomain spiffeid.TrustDomain
	// Grant gives the test process the identity with this path, by an entry that counts as younger
	// than all granted before (made in one second, its ID comes after theirs), and returns
	// what takes it away again. There are no identities at the start.
	Grant func(t *testing.T, path, hint string) (withdraw func())
	// Patience is how long anything may take; 0 means a minute.
	Patience time.Duration
}

// Run checks what every Workload API must do, with the public client and with raw calls. open is
// called for each case and cleans up after itself.
func Run(t *testing.T, open func(t *testing.T) Target) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, context.Context, Target)
	}{
		{"two workloads make mTLS with what X509Source fetched", mutualTLS},
		{"an open stream gets what is granted and ends when all is withdrawn", grantAndWithdraw},
		{"identities come oldest first, with their hints", hints},
		{"a JWT-SVID is fetched, verified by JWTSource and validated by the agent", jwtSVID},
		{"wrong requests for JWT-SVIDs get the code for it", wrongJWT},
		{"bundles are those that the SVIDs verify with", bundles},
		{"requests need the security header, once and true", header},
		{"WIT-SVIDs are for callers with an identity", wit},
		{"health and reflection answer without the header", services},
	} {
		t.Run(c.name, func(t *testing.T) {
			target := open(t)
			if target.Patience == 0 {
				target.Patience = time.Minute
			}
			ctx, cancel := context.WithTimeout(t.Context(), target.Patience)
			defer cancel()
			c.run(t, ctx, target)
		})
	}
}

// Client returns go-spiffe's option for a socket.
func Client(socket string) workloadapi.ClientOption {
	return workloadapi.WithAddr("unix://" + socket)
}

// Dial returns a raw client of the Workload API at a socket.
func Dial(t testing.TB, socket string) (workload.SpiffeWorkloadAPIClient, *grpc.ClientConn) {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return workload.NewSpiffeWorkloadAPIClient(conn), conn
}

// Header returns a context with the security header.
func Header(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// WantCode fails the test unless the error has the code.
func WantCode(t testing.TB, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("got %v (%v), want %v", got, err, want)
	}
}

func (x Target) id(t *testing.T, path string) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromPath(x.TrustDomain, path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func mutualTLS(t *testing.T, ctx context.Context, x Target) {
	x.Grant(t, "/peer", "")
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(Client(x.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	svid, err := source.GetX509SVID()
	if err != nil || svid.ID != x.id(t, "/peer") {
		t.Fatalf("got %v, %v", svid, err)
	}
	only := tlsconfig.AuthorizeID(svid.ID)
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	server := tls.Server(a, tlsconfig.MTLSServerConfig(source, source, only))
	client := tls.Client(b, tlsconfig.MTLSClientConfig(source, source, only))
	done := make(chan error, 1)
	go func() { done <- server.HandshakeContext(ctx) }()
	if err := client.HandshakeContext(ctx); err != nil {
		t.Errorf("client: %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("server: %v", err)
	}
}

func grantAndWithdraw(t *testing.T, ctx context.Context, x Target) {
	first := x.Grant(t, "/one", "")
	api, _ := Dial(t, x.Socket)
	stream, err := api.FetchX509SVID(Header(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want ...string) {
		t.Helper()
		for { // a picture in between is allowed
			resp, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if len(resp.GetSvids()) != len(want) {
				continue
			}
			for i, s := range resp.GetSvids() {
				if s.GetSpiffeId() != x.id(t, want[i]).String() {
					t.Fatalf("got %s in place %d, want %s", s.GetSpiffeId(), i, want[i])
				}
				if len(s.GetBundle()) == 0 || len(s.GetX509Svid()) == 0 || len(s.GetX509SvidKey()) == 0 {
					t.Fatalf("%s is incomplete", s.GetSpiffeId())
				}
			}
			return
		}
	}
	expect("/one")
	second := x.Grant(t, "/two", "")
	expect("/one", "/two")
	first()
	expect("/two")
	second()
	for {
		_, err := stream.Recv()
		if err == nil {
			continue
		}
		WantCode(t, err, codes.PermissionDenied)
		return
	}
}

func hints(t *testing.T, ctx context.Context, x Target) {
	x.Grant(t, "/plain", "")
	x.Grant(t, "/inside", "internal")
	x.Grant(t, "/late", "internal") // the hint is taken by an older entry
	svids, err := workloadapi.FetchX509SVIDs(ctx, Client(x.Socket))
	if err != nil {
		t.Fatal(err)
	}
	if len(svids) != 2 || svids[0].ID != x.id(t, "/plain") || svids[1].ID != x.id(t, "/inside") || svids[1].Hint != "internal" {
		t.Errorf("got %v", svids)
	}
}

func jwtSVID(t *testing.T, ctx context.Context, x Target) {
	x.Grant(t, "/caller", "")
	x.Grant(t, "/other", "")
	svids, err := workloadapi.FetchJWTSVIDs(ctx, jwtsvid.Params{Audience: "bank", ExtraAudiences: []string{"till"}}, Client(x.Socket))
	if err != nil {
		t.Fatal(err)
	}
	if len(svids) != 2 || svids[0].ID != x.id(t, "/caller") || svids[1].ID != x.id(t, "/other") {
		t.Fatalf("got %v", svids)
	}
	one, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "bank", Subject: x.id(t, "/other")}, Client(x.Socket))
	if err != nil || one.ID != x.id(t, "/other") {
		t.Fatalf("got %v, %v", one, err)
	}
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(Client(x.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	if _, err := jwtsvid.ParseAndValidate(one.Marshal(), source, []string{"bank"}); err != nil {
		t.Errorf("the fetched bundle does not verify the fetched token: %v", err)
	}
	got, err := workloadapi.ValidateJWTSVID(ctx, one.Marshal(), "bank", Client(x.Socket))
	if err != nil || got.ID != one.ID || got.Claims["sub"] != one.ID.String() {
		t.Errorf("the agent does not validate its own token: %v, %v", got, err)
	}
	_, err = workloadapi.ValidateJWTSVID(ctx, one.Marshal(), "thief", Client(x.Socket))
	WantCode(t, err, codes.InvalidArgument)
}

func wrongJWT(t *testing.T, ctx context.Context, x Target) {
	x.Grant(t, "/caller", "")
	api, _ := Dial(t, x.Socket)
	ctx = Header(ctx)
	for _, c := range []struct {
		name string
		call func() error
		want codes.Code
	}{
		{"no audience", func() error { _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{}); return err }, codes.InvalidArgument},
		{"an empty audience", func() error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{""}})
			return err
		}, codes.InvalidArgument},
		{"no SPIFFE ID where one is asked for", func() error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "caller"})
			return err
		}, codes.InvalidArgument},
		{"somebody else's SPIFFE ID", func() error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: x.id(t, "/king").String()})
			return err
		}, codes.PermissionDenied},
		{"validation without an audience", func() error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Svid: "a.b.c"})
			return err
		}, codes.InvalidArgument},
		{"validation without a token", func() error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a"})
			return err
		}, codes.InvalidArgument},
		{"validation of garbage", func() error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "a.b.c"})
			return err
		}, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) { WantCode(t, c.call(), c.want) })
	}
}

func bundles(t *testing.T, ctx context.Context, x Target) {
	x.Grant(t, "/caller", "")
	set, err := workloadapi.FetchX509Bundles(ctx, Client(x.Socket))
	if err != nil {
		t.Fatal(err)
	}
	if b, ok := set.Get(x.TrustDomain); !ok || len(b.X509Authorities()) == 0 {
		t.Errorf("X.509: got %v", set.Bundles())
	}
	keys, err := workloadapi.FetchJWTBundles(ctx, Client(x.Socket))
	if err != nil {
		t.Fatal(err)
	}
	if b, ok := keys.Get(x.TrustDomain); !ok || len(b.JWTAuthorities()) == 0 {
		t.Errorf("JWT: got %v", keys.Bundles())
	}
}

func header(t *testing.T, ctx context.Context, x Target) {
	x.Grant(t, "/caller", "")
	api, _ := Dial(t, x.Socket)
	const name = "workload.spiffe.io"
	for _, c := range []struct {
		name string
		ctx  context.Context
	}{
		{"absent", ctx},
		{"false", metadata.AppendToOutgoingContext(ctx, name, "false")},
		{"upper case", metadata.AppendToOutgoingContext(ctx, name, "True")},
		{"twice", metadata.AppendToOutgoingContext(ctx, name, "true", name, "true")},
	} {
		calls := map[string]func() error{
			"FetchX509SVID": func() error {
				s, err := api.FetchX509SVID(c.ctx, &workload.X509SVIDRequest{})
				return recv(s, err)
			},
			"FetchX509Bundles": func() error {
				s, err := api.FetchX509Bundles(c.ctx, &workload.X509BundlesRequest{})
				return recv(s, err)
			},
			"FetchJWTBundles": func() error {
				s, err := api.FetchJWTBundles(c.ctx, &workload.JWTBundlesRequest{})
				return recv(s, err)
			},
			"FetchWITSVID": func() error {
				s, err := api.FetchWITSVID(c.ctx, &workload.WITSVIDRequest{})
				return recv(s, err)
			},
			"FetchWITBundles": func() error {
				s, err := api.FetchWITBundles(c.ctx, &workload.WITBundlesRequest{})
				return recv(s, err)
			},
			"FetchJWTSVID": func() error {
				_, err := api.FetchJWTSVID(c.ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
				return err
			},
			"ValidateJWTSVID": func() error {
				_, err := api.ValidateJWTSVID(c.ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "a.b.c"})
				return err
			},
		}
		for method, call := range calls {
			t.Run(method+" "+c.name, func(t *testing.T) {
				err := call()
				WantCode(t, err, codes.InvalidArgument)
				if got := status.Convert(err).Message(); got != "security header missing from request" {
					t.Errorf("got %q", got)
				}
			})
		}
	}
}

// recv returns the error of the first message.
func recv[M any](s grpc.ServerStreamingClient[M], err error) error {
	if err != nil {
		return err
	}
	_, err = s.Recv()
	return err
}

func wit(t *testing.T, ctx context.Context, x Target) {
	api, _ := Dial(t, x.Socket)
	s, err := api.FetchWITSVID(Header(ctx), &workload.WITSVIDRequest{})
	WantCode(t, recv(s, err), codes.PermissionDenied)
	b, err := api.FetchWITBundles(Header(ctx), &workload.WITBundlesRequest{})
	WantCode(t, recv(b, err), codes.PermissionDenied)
	w, err := api.FetchWITSVID(Header(ctx), &workload.WITSVIDRequest{SpiffeId: "no ID"})
	WantCode(t, recv(w, err), codes.InvalidArgument)
}

func services(t *testing.T, ctx context.Context, x Target) {
	_, conn := Dial(t, x.Socket)
	h, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "SpiffeWorkloadAPI"})
	if err != nil || h.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h.GetStatus(), err)
	}
	r, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Send(&reflectionv1.ServerReflectionRequest{
		MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	resp, err := r.Recv()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, s := range resp.GetListServicesResponse().GetService() {
		found = found || s.GetName() == "SpiffeWorkloadAPI"
	}
	if !found {
		t.Errorf("reflection does not list the Workload API: %v", resp)
	}
}
