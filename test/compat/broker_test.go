package compat

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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

	"github.com/assay-id/assay/test/fake/kube"
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
	cluster := kube.Start(t)
	token, err := s.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	auditLog := filepath.Join(s.Dir, "agent-audit.log")
	agent := startAgent(t, s, "agent", site.AgentOptions{
		Token: token, Extra: fmt.Sprintf(`audit_log_file = %q
  broker {
    socket_path = %q
    allow "spiffe://%s/mesh" {
      reference_types = ["type.googleapis.com/spiffe.broker.WorkloadPIDReference", "type.googleapis.com/spiffe.broker.KubernetesObjectReference"]
    }
  }`, auditLog, socket, site.TrustDomain),
		Blocks: fmt.Sprintf(`node_attestor "join_token" {}
workload_attestor "unix" {}
workload_attestor "k8s" {
  runtime_socket_path    = "none"
  node_name              = %q
  api_server             = %q
  api_server_ca_path     = %q
  disable_kubelet_client = true
  token_path             = %q
}`, kube.Node, cluster.APIServer(), filepath.Join(cluster.Dir, "ca.crt"), filepath.Join(cluster.Dir, "token")),
	})
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
	t.Run("a pod of the node is who its labels say, on a stream that follows them", func(t *testing.T) {
		brokered := newEntry(node, "/cart")
		brokered.Selectors = []*types.Selector{{Type: "k8s", Value: "ns:shop"}, {Type: "k8s", Value: "pod-label:app:cart"}}
		createEntry(t, client, brokered)
		pod := kube.Pod{Namespace: "shop", Name: "cart-1", UID: "79261129-6b60-11e9-9054-0800277ac80f", ServiceAccount: "cart"}
		object, err := anypb.New(&brokerapi.KubernetesObjectReference{
			Type: &brokerapi.KubernetesObjectType{Plural: "pods", Group: "core"}, Key: &brokerapi.KubernetesObjectKey{Namespace: pod.Namespace, Name: pod.Name}, Uid: pod.UID,
		})
		if err != nil {
			t.Fatal(err)
		}
		request := &brokerapi.SubscribeToX509SVIDRequest{Reference: &brokerapi.WorkloadReference{Reference: object}}
		none, err := broker.SubscribeToX509SVID(ctx, request)
		if err == nil {
			_, err = none.Recv()
		}
		if status.Code(err) != codes.NotFound {
			t.Fatalf("of a pod that is not there: %v", err)
		}
		cluster.Put(pod)
		var svids grpc.ServerStreamingClient[brokerapi.SubscribeToX509SVIDResponse]
		if err := agent.WaitFor(ctx, "the agent hears of the pod", func() (err error) {
			if svids, err = broker.SubscribeToX509SVID(ctx, request); err == nil {
				_, err = svids.Recv()
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		until := func(want ...string) {
			t.Helper()
			for {
				got, err := svids.Recv()
				if err != nil {
					t.Fatal(err)
				}
				var ids []string
				for _, svid := range got.GetSvids() {
					ids = append(ids, svid.GetSpiffeId())
				}
				if slices.Equal(ids, want) {
					return
				}
			}
		}
		pod.Labels = map[string]string{"app": "cart"}
		cluster.Put(pod)
		until("spiffe://" + site.TrustDomain + "/cart")
		pod.Labels = nil
		cluster.Put(pod)
		until()
	})
	t.Run("who shows no certificate is refused, and that is in the audit log", func(t *testing.T) {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if _, err := brokerapi.NewAPIClient(conn).FetchJWTSVID(ctx, &brokerapi.FetchJWTSVIDRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
		want := fmt.Sprintf(`"event":"broker_connect","pid":%d,`, os.Getpid())
		if err := agent.WaitFor(ctx, "the audit log tells of it", func() error { // the caller knows before it is written down
			text, err := os.ReadFile(auditLog)
			if err == nil && (!strings.Contains(string(text), want) || !strings.Contains(string(text), "client didn't provide a certificate")) {
				err = fmt.Errorf("no %s in %s", want, text)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	})
	t.Run("a process that is not there is refused", func(t *testing.T) {
		_, err := broker.FetchJWTSVID(ctx, &brokerapi.FetchJWTSVIDRequest{Reference: reference, Audience: []string{"them"}})
		if status.Code(err) != codes.NotFound {
			t.Error(err)
		}
	})
}
