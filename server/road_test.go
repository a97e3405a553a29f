package server

import (
	"crypto/x509"
	"os"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/wire/feedv1"
)

// TestTheMainRoad goes from nothing to a workload's certificate, and on to its end.
func TestTheMainRoad(t *testing.T) {
	w := start(t)
	ctx := w.context()

	token, err := w.agents().CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: id("/node")})
	if err != nil {
		t.Fatal(err)
	}
	cert, result, err := w.attest("join_token", []byte(token.GetValue()), "")
	if err != nil {
		t.Fatal(err)
	}
	if result.GetReattestable() || result.GetSvid().GetId().GetPath() != "/spire/agent/join_token/"+token.GetValue() {
		t.Errorf("admitted as %v", result)
	}
	conn := w.dial(cert)
	entry := w.create(&types.Entry{SpiffeId: id("/shop"), ParentId: id("/node"), Selectors: selectors("unix:uid:1000"), DnsNames: []string{"shop.example.org"}, Hint: "h"})

	t.Run("the agent is told of its entries at once", func(t *testing.T) {
		resp, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, e := range resp.GetEntries() {
			found = found || e.GetId() == entry.GetId()
		}
		if !found {
			t.Errorf("got %v", resp.GetEntries())
		}
	})
	t.Run("the agent is pushed its entries", func(t *testing.T) {
		stream, err := feedv1.NewFeedClient(conn).Follow(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: &feedv1.Hello{}}}); err != nil {
			t.Fatal(err)
		}
		if resp, err := stream.Recv(); err != nil || !resp.GetFull() || len(resp.GetEntries()) == 0 {
			t.Errorf("got %v, %v", resp, err)
		}
	})
	t.Run("the workload gets its certificate and token", func(t *testing.T) {
		key := newKey(t)
		resp, err := svidv1.NewSVIDClient(conn).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{
			Params: []*svidv1.NewX509SVIDParams{{EntryId: entry.GetId(), Csr: csr(t, key, "spiffe://example.org/shop")}},
		})
		if err != nil {
			t.Fatal(err)
		}
		r := resp.GetResults()[0]
		if r.GetStatus().GetCode() != 0 {
			t.Fatal(r.GetStatus())
		}
		leaf, err := x509.ParseCertificate(r.GetSvid().GetCertChain()[0])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: w.bundle(), DNSName: "shop.example.org", KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Error(err)
		}
		line := w.lastAudit("svid.x509.new")
		if line["spiffe_id"] != "spiffe://example.org/shop" || line["serial"] != leaf.SerialNumber.String() ||
			line["entry_id"] != entry.GetId() || line["outcome"] != "allow" || line["rev"] == nil || line["agent_id"] != line["caller"] {
			t.Errorf("audit line %v", line)
		}
		token, err := svidv1.NewSVIDClient(conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: entry.GetId(), Audience: []string{"db", ""}})
		if err != nil || token.GetSvid().GetToken() == "" || token.GetSvid().GetHint() != "h" || token.GetSvid().GetIssuedAt() == 0 {
			t.Errorf("got %v, %v", token, err)
		}
	})
	t.Run("a deleted entry is signed for no longer", func(t *testing.T) {
		if _, err := w.entries().BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{entry.GetId()}}); err != nil {
			t.Fatal(err)
		}
		resp, err := svidv1.NewSVIDClient(conn).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{
			Params: []*svidv1.NewX509SVIDParams{{EntryId: entry.GetId(), Csr: csr(t, newKey(t))}},
		})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != int32(codes.NotFound) {
			t.Errorf("got %v, %v", resp, err)
		}
	})
}

func TestLocalServices(t *testing.T) {
	w := start(t)
	ctx := w.context()
	t.Run("health is serving", func(t *testing.T) {
		resp, err := grpc_health_v1.NewHealthClient(w.local).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		if err != nil || resp.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("got %v, %v", resp, err)
		}
	})
	t.Run("debug tells the server's own SVID and counts", func(t *testing.T) {
		w.agent("counted")
		resp, err := debugv1.NewDebugClient(w.local).GetInfo(ctx, &debugv1.GetInfoRequest{})
		if err != nil || len(resp.GetSvidChain()) != 2 || resp.GetSvidChain()[0].GetId().GetPath() != "/spire/server" || resp.GetAgentsCount() != 1 {
			t.Errorf("got %v, %v", resp, err)
		}
	})
	t.Run("the log level is read, set and reset", func(t *testing.T) {
		c := loggerv1.NewLoggerClient(w.local)
		if l, err := c.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_DEBUG}); err != nil || l.GetCurrentLevel() != types.LogLevel_DEBUG || l.GetLaunchLevel() != types.LogLevel_INFO {
			t.Errorf("got %v, %v", l, err)
		}
		if l, err := c.ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{}); err != nil || l.GetCurrentLevel() != types.LogLevel_INFO {
			t.Errorf("got %v, %v", l, err)
		}
		_, err := c.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{})
		refused(t, err, codes.InvalidArgument, "LogLevel_UNSPECIFIED")
	})
	t.Run("the socket is its group's only", func(t *testing.T) {
		info, err := os.Stat(w.cfg.SocketPath)
		if err != nil || info.Mode().Perm() != 0o770 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	})
	t.Run("what is not served yet says so", func(t *testing.T) {
		_, err := w.bundles().PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{})
		refused(t, err, codes.PermissionDenied, "authorization denied")
		_, err = w.svids().MintWITSVID(ctx, &svidv1.MintWITSVIDRequest{})
		refused(t, err, codes.Unimplemented, "")
	})
}

func TestARestartForgetsNothing(t *testing.T) {
	w := start(t)
	path, cert, _ := w.agent("lasting")
	entry := w.create(&types.Entry{SpiffeId: id("/shop"), ParentId: id(path), Selectors: selectors("unix:uid:1")})
	if err := w.stop(); err != nil {
		t.Fatal(err)
	}
	again := start(t, func(c *Config) { c.DataDir, c.SocketPath = w.cfg.DataDir, w.cfg.SocketPath })
	resp, err := entryv1.NewEntryClient(again.dial(cert)).GetAuthorizedEntries(again.context(), &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil || len(resp.GetEntries()) != 1 || resp.GetEntries()[0].GetId() != entry.GetId() {
		t.Errorf("got %v, %v", resp, err)
	}
}

func TestStoppingEndsStreamsAtOnce(t *testing.T) {
	w := start(t, func(c *Config) { c.Limits.Drain = time.Hour }) // nothing ends because that is over
	_, _, conn := w.agent("following")
	stream, err := feedv1.NewFeedClient(conn).Follow(w.context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&feedv1.FollowRequest{Message: &feedv1.FollowRequest_Hello{Hello: &feedv1.Hello{}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- w.stop() }()
	select {
	case err := <-stopped:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it does not stop while a stream is open")
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v, want Unavailable", err)
	}
}

func TestMetricsAreThere(t *testing.T) {
	registry := prometheus.NewRegistry()
	w := start(t, func(c *Config) { c.Metrics = registry })
	w.agent("counted")
	w.create(shop())
	if _, err := w.svids().MintX509SVID(w.context(), &svidv1.MintX509SVIDRequest{Csr: csr(t, newKey(t), "spiffe://example.org/a")}); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, f := range families {
		have[f.GetName()] = true
	}
	for _, want := range []string{
		"assay_server_attestations_total", "assay_server_svids_issued_total", "assay_server_rpcs_total", "assay_server_rpc_seconds",
		"assay_server_connections_refused_total", "assay_store_commit_seconds", "assay_server_feed_lag_revisions_max",
	} {
		if !have[want] {
			t.Errorf("%s is missing", want)
		}
	}
}
