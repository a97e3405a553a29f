package broker_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/identity"
)

const podUID = "79261129-6b60-11e9-9054-0800277ac80f"

// cluster knows one pod, or none.
type cluster struct {
	mu      sync.Mutex // guards the rest
	facts   []attestor.Selector
	err     error
	changed chan struct{}
}

func (c *cluster) Pod(_ context.Context, of attestor.PodReference) ([]attestor.Selector, <-chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return nil, nil, c.err
	case len(c.facts) == 0 || of.Name != "" && of.Name != "cart-1" || of.UID != "" && of.UID != podUID:
		return nil, nil, fmt.Errorf("%w: nobody told of it", attestor.ErrNoPod)
	}
	return c.facts, c.changed, nil
}

func (c *cluster) become(err error, facts ...attestor.Selector) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.facts, c.err = facts, err
	if c.changed != nil {
		close(c.changed)
	}
	c.changed = make(chan struct{})
}

func byObject(t *testing.T, ref *brokerapi.KubernetesObjectReference) *brokerapi.WorkloadReference {
	t.Helper()
	object, err := anypb.New(ref)
	if err != nil {
		t.Fatal(err)
	}
	return &brokerapi.WorkloadReference{Reference: object}
}

func podNamed(namespace, name, uid string) *brokerapi.KubernetesObjectReference {
	ref := &brokerapi.KubernetesObjectReference{Type: &brokerapi.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: uid}
	if namespace+name != "" {
		ref.Key = &brokerapi.KubernetesObjectKey{Namespace: namespace, Name: name}
	}
	return ref
}

func TestPods(t *testing.T) {
	pods := new(cluster)
	s := serveWith(t, pods)
	shop := attestor.Selector{Type: "k8s", Value: "ns:shop"}
	gold := attestor.Selector{Type: "k8s", Value: "pod-label:tier:gold"}
	put := func(path string, selectors ...attestor.Selector) {
		s.next++
		s.src.Put(&identity.Entry{
			ID: fmt.Sprintf("entry-%d", s.next), SPIFFEID: spiffeid.RequireFromPath(td, path), Selectors: attestor.NewSet(selectors...), CreatedAt: time.Unix(int64(s.next), 0),
		})
	}
	put("/shop", shop)
	put("/gold", shop, gold)
	put("/image", shop, attestor.Selector{Type: "image", Value: "id:1"})
	pods.become(nil, shop)

	api := s.mesh(t)
	both := byObject(t, podNamed("shop", "cart-1", podUID))
	stream := subscribe(t, api, both)
	wantIDs(t, stream, "spiffe://example.org/shop")
	if l := s.last(); l.Event != "broker_x509_svid" || l.ForObject != "pods.core shop/cart-1 "+podUID || l.ForPID != 0 || l.By != meshID.String() || l.Outcome != "allow" {
		t.Errorf("audit line %+v", l)
	}
	t.Run("a label opens an identity on the open stream", func(t *testing.T) {
		pods.become(nil, shop, gold)
		wantIDs(t, stream, "spiffe://example.org/shop spiffe://example.org/gold")
	})
	t.Run("over TCP, by UID alone and by name alone, it is the same", func(t *testing.T) {
		over := s.dial(t, s.tcp, certificate(t, s.src.Authority, meshID))
		wantIDs(t, subscribe(t, over, byObject(t, podNamed("", "", podUID))), "spiffe://example.org/shop spiffe://example.org/gold")
		wantIDs(t, subscribe(t, over, byObject(t, podNamed("shop", "cart-1", ""))), "spiffe://example.org/shop spiffe://example.org/gold")
	})
	t.Run("JWT-SVIDs and bundles are there too", func(t *testing.T) {
		out, err := api.FetchJWTSVID(header(t), &brokerapi.FetchJWTSVIDRequest{Reference: both, Audience: []string{"db"}})
		if err != nil || len(out.GetSvids()) != 2 {
			t.Errorf("got %v, %v", out, err)
		}
		bundles, err := api.SubscribeToX509Bundles(header(t), &brokerapi.SubscribeToX509BundlesRequest{Reference: both})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := bundles.Recv(); err != nil || len(got.GetBundles()) != 2 {
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("that nobody can be asked ends a stream, and why is not the broker's to know", func(t *testing.T) {
		other := subscribe(t, api, both)
		wantIDs(t, other, "spiffe://example.org/shop spiffe://example.org/gold")
		pods.become(errors.New("the kubelet at 10.0.0.7 is away"))
		_, err := other.Recv()
		wantCode(t, err, codes.Unavailable, "nobody can be asked about pods")
		if strings.Contains(err.Error(), "10.0.0.7") {
			t.Errorf("it is told %v", err)
		}
		_, err = stream.Recv()
		wantCode(t, err, codes.Unavailable, "nobody can be asked about pods")
		if l := s.last(); l.Outcome != "error" || !strings.Contains(l.Reason, "10.0.0.7") {
			t.Errorf("audit line %+v", l)
		}
	})
	t.Run("a pod that ends, ends its streams", func(t *testing.T) {
		pods.become(nil, shop)
		other := subscribe(t, api, both)
		wantIDs(t, other, "spiffe://example.org/shop")
		pods.become(nil)
		_, err := other.Recv()
		wantCode(t, err, codes.NotFound, "pod is not on this node")
		if l := s.last(); l.Outcome != "deny" || l.ForObject == "" {
			t.Errorf("audit line %+v", l)
		}
	})
	pods.become(nil, shop)
	object := func(change func(*brokerapi.KubernetesObjectReference)) *brokerapi.WorkloadReference {
		ref := podNamed("shop", "cart-1", podUID)
		change(ref)
		return byObject(t, ref)
	}
	for name, c := range map[string]struct {
		ref  *brokerapi.WorkloadReference
		code codes.Code
		text string
	}{
		"garbage":             {&brokerapi.WorkloadReference{Reference: &anypb.Any{TypeUrl: "type.googleapis.com/spiffe.broker.KubernetesObjectReference", Value: []byte{0xff}}}, codes.InvalidArgument, "workload reference is malformed"},
		"without a type":      {object(func(r *brokerapi.KubernetesObjectReference) { r.Type = nil }), codes.InvalidArgument, "object reference is missing type"},
		"without a plural":    {object(func(r *brokerapi.KubernetesObjectReference) { r.Type.Plural = "" }), codes.InvalidArgument, "object reference type is missing plural"},
		"without a group":     {object(func(r *brokerapi.KubernetesObjectReference) { r.Type.Group = "" }), codes.InvalidArgument, "object reference type is missing group"},
		"without key and UID": {object(func(r *brokerapi.KubernetesObjectReference) { r.Key, r.Uid = nil, "" }), codes.InvalidArgument, "object reference is missing key and UID"},
		"a key without name":  {object(func(r *brokerapi.KubernetesObjectReference) { r.Key.Name = "" }), codes.InvalidArgument, "object reference key is missing name"},
		"without a namespace": {object(func(r *brokerapi.KubernetesObjectReference) { r.Key.Namespace = "" }), codes.InvalidArgument, "namespace is required when name is set"},
		"a deployment": {object(func(r *brokerapi.KubernetesObjectReference) {
			r.Type = &brokerapi.KubernetesObjectType{Plural: "deployments", Group: "apps"}
		}), codes.InvalidArgument, "deployments.apps are not known to this agent"},
		"pods of another group": {object(func(r *brokerapi.KubernetesObjectReference) { r.Type.Group = "example.com" }), codes.InvalidArgument, "pods.example.com are not known"},
		"a name that is none":   {object(func(r *brokerapi.KubernetesObjectReference) { r.Key.Name = "../x\n" }), codes.InvalidArgument, "is no name that Kubernetes gives"},
		"a UID that is none":    {object(func(r *brokerapi.KubernetesObjectReference) { r.Uid = "1234" }), codes.InvalidArgument, "UID is no UUID"},
		"another UID":           {object(func(r *brokerapi.KubernetesObjectReference) { r.Uid = strings.Replace(podUID, "7", "8", 1) }), codes.NotFound, "pod is not on this node"},
		"a pod of nobody":       {object(func(r *brokerapi.KubernetesObjectReference) { r.Key.Name = "other" }), codes.NotFound, "pod is not on this node"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			_, err := subscribe(t, api, c.ref).Recv()
			wantCode(t, err, c.code, c.text)
			if l := s.last(); l.Outcome != "deny" || l.By != meshID.String() {
				t.Errorf("audit line %+v", l)
			}
		})
	}
}

// TestStrangersLeaveALine: whoever does not get through the handshake is in the audit log, with what is known of it.
func TestStrangersLeaveALine(t *testing.T) {
	s := serve(t)
	call := func(target string, cert *tls.Certificate) {
		stream, err := s.dial(t, target, cert).SubscribeToX509SVID(header(t), &brokerapi.SubscribeToX509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if err == nil {
			t.Error("it was let in")
		}
	}
	for _, c := range []struct {
		name   string
		call   func()
		remote bool
		reason string
	}{
		{"without a certificate, at the socket", func() { call("unix:"+s.socket, nil) }, false, "client didn't provide a certificate"},
		{"without a certificate, over TCP", func() { call(s.tcp, nil) }, true, "client didn't provide a certificate"},
		{"with the SVID of no broker", func() { call(s.tcp, certificate(t, s.src.Authority, noneID)) }, true, "spiffe://example.org/shop is no broker here"},
		{"with an SVID of the wrong root", func() { call("unix:"+s.socket, certificate(t, s.far, meshID)) }, false, "certificate signed by unknown authority"},
		{"without TLS", func() {
			conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.tcp)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			_, _ = conn.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
			_, _ = conn.Read(make([]byte, 1))
		}, true, "first record does not look like a TLS handshake"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.call()
			s.told(t, func(l workloadapi.Line) bool {
				return l.Event == "broker_connect" && l.Outcome == "deny" && strings.Contains(l.Reason, c.reason) && (l.Remote != "") == c.remote && (l.PID != 0) != c.remote
			})
		})
	}
}
