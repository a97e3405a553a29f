package compat

import (
	"crypto/x509"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

// TestBroker is infrastructure that follows the identity of a process it refers to, which never calls itself.
func TestBroker(t *testing.T) {
	if syscall.Geteuid() != 0 {
		lab.Missing(t, "root, to run a process as another user", nil)
	}
	s := newSite(t, nil)
	ctx := patiently(t)
	socket := filepath.Join(s.Dir, "brokers", "broker.sock")
	agent := newAgent(t, s, "agent", `broker {
    socket_path = `+strconv.Quote(socket)+`
    allow "spiffe://`+site.TrustDomain+`/mesh" {
      reference_types = ["type.googleapis.com/spiffe.broker.WorkloadPIDReference"]
    }
  }`)
	const user = 4711
	workload, err := site.Start(filepath.Join(s.Dir, "workload.log"), &syscall.Credential{Uid: user, Gid: user}, "sleep", "600")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(workload.Kill)

	client, node := entries(t, s), onlyAgent(t, s)
	createEntry(t, client, newEntry(node, "/mesh"))
	entry := newEntry(node, "/shop")
	entry.Selectors = []*types.Selector{{Type: "unix", Value: "uid:" + strconv.Itoa(user)}}
	entry = createEntry(t, client, entry)

	watch(t, agent.Socket).until(t, "broker's own SVID", hasID("/mesh"))
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+agent.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(credentials.NewTLS(
		tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString(site.TrustDomain))))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	broker := brokerapi.NewAPIClient(conn)
	ctx = metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
	referred, err := anypb.New(&brokerapi.WorkloadPIDReference{Pid: int32(workload.PID())})
	if err != nil {
		t.Fatal(err)
	}
	reference := &brokerapi.WorkloadReference{Reference: referred}

	svids, err := broker.SubscribeToX509SVID(ctx, &brokerapi.SubscribeToX509SVIDRequest{Reference: reference})
	if err != nil {
		t.Fatal(err)
	}
	got, err := svids.Recv()
	if err != nil || len(got.GetSvids()) != 1 {
		t.Fatal(got, err)
	}
	first := got.GetSvids()[0]
	if want := "spiffe://" + site.TrustDomain + "/shop"; first.GetSpiffeId() != want {
		t.Fatalf("the process is %s, not %s", first.GetSpiffeId(), want)
	}
	if _, err := x509.ParsePKCS8PrivateKey(first.GetX509SvidKey()); err != nil {
		t.Error(err)
	}
	t.Run("its JWT-SVID is for whom the broker says", func(t *testing.T) {
		got, err := broker.FetchJWTSVID(ctx, &brokerapi.FetchJWTSVIDRequest{Reference: reference, Audience: []string{"them"}})
		if err != nil {
			t.Fatal(err)
		}
		svid, err := jwtsvid.ParseInsecure(got.GetSvids()[0].GetSvid(), []string{"them"})
		if err != nil || svid.ID.Path() != "/shop" {
			t.Error(svid, err)
		}
	})
	t.Run("a change is pushed", func(t *testing.T) {
		another := newEntry(node, "/store")
		another.Selectors = entry.GetSelectors()
		createEntry(t, client, another)
		deleteEntry(t, client, entry.GetId())
		for {
			got, err := svids.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if len(got.GetSvids()) == 1 && got.GetSvids()[0].GetSpiffeId() == "spiffe://"+site.TrustDomain+"/store" {
				return
			}
		}
	})
	t.Run("the end of the process ends the stream", func(t *testing.T) {
		workload.Kill()
		for {
			if _, err := svids.Recv(); err != nil {
				return
			}
		}
	})
	t.Run("a process that is not there is refused", func(t *testing.T) {
		_, err := broker.FetchJWTSVID(ctx, &brokerapi.FetchJWTSVIDRequest{Reference: reference, Audience: []string{"them"}})
		if status.Code(err) != codes.NotFound {
			t.Error(err)
		}
	})
}
