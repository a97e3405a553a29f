package sds_test

import (
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/workloadapi/sds"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

type deltaStream = secretv3.SecretDiscoveryService_DeltaSecretsClient

// open begins a delta stream.
func (s *site) open(t *testing.T, req *discoveryv3.DeltaDiscoveryRequest) deltaStream {
	t.Helper()
	st, err := s.api.DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if req.Node == nil {
		req.Node = envoy(30)
	}
	tell(t, st, req)
	return st
}

func tell(t *testing.T, st deltaStream, req *discoveryv3.DeltaDiscoveryRequest) {
	t.Helper()
	if err := st.Send(req); err != nil {
		t.Fatal(err)
	}
}

// hear returns the next response and what it says; what is removed has a minus.
func hear(t *testing.T, st deltaStream) (*discoveryv3.DeltaDiscoveryResponse, string) {
	t.Helper()
	resp, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetTypeUrl() != secretType || resp.GetNonce() == "" {
		t.Fatalf("response with type %q, nonce %q", resp.GetTypeUrl(), resp.GetNonce())
	}
	var parts []string
	for _, r := range resp.GetResources() {
		if got := secret(t, r.GetResource()).GetName(); got != r.GetName() || r.GetVersion() == "" {
			t.Errorf("resource %q, version %q, holds %q", r.GetName(), r.GetVersion(), got)
		}
		parts = append(parts, say(t, r.GetResource()))
	}
	for _, name := range resp.GetRemovedResources() {
		parts = append(parts, "-"+name)
	}
	return resp, strings.Join(parts, " ")
}

func wantHear(t *testing.T, st deltaStream, want string) *discoveryv3.DeltaDiscoveryResponse {
	t.Helper()
	resp, got := hear(t, st)
	if got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
	return resp
}

func subscribe(names ...string) *discoveryv3.DeltaDiscoveryRequest {
	return &discoveryv3.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: names}
}

func TestDelta(t *testing.T) {
	const one, two, own, other = "spiffe://example.org/one", "spiffe://example.org/two", "spiffe://example.org", "spiffe://other.test"
	s := serve(t, sds.Config{}, noHold)
	s.put("/one")
	st := s.open(t, subscribe("default", "ROOTCA"))
	wantHear(t, st, "ROOTCA=spiffe:example.org default=/one")
	t.Run("only what changed is pushed", func(t *testing.T) {
		s.src.Rotate()
		wantHear(t, st, "default=/one")
	})
	t.Run("a further name brings that one", func(t *testing.T) {
		tell(t, st, subscribe(own))
		wantHear(t, st, own+"=spiffe:example.org")
	})
	t.Run("a name again brings it again", func(t *testing.T) {
		tell(t, st, subscribe("ROOTCA"))
		wantHear(t, st, "ROOTCA=spiffe:example.org")
	})
	t.Run("a name that is not wanted any more is not pushed", func(t *testing.T) {
		tell(t, st, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"default"}})
		tell(t, st, subscribe(one))
		wantHear(t, st, one+"=/one")
		s.src.Rotate()
		wantHear(t, st, one+"=/one")
	})
	t.Run("an unknown name fails the stream", func(t *testing.T) {
		tell(t, st, subscribe("no such"))
		_, err := st.Recv()
		wantStatus(t, err, codes.InvalidArgument, `["no such"]`)
	})
	t.Run("a client that has most of it is sent the rest", func(t *testing.T) {
		whole, _ := hear(t, s.open(t, subscribe("default", "ROOTCA")))
		req := subscribe("default", "ROOTCA")
		req.InitialResourceVersions = map[string]string{"default": "old", "gone": "1"}
		for _, r := range whole.GetResources() {
			if r.GetName() == "ROOTCA" {
				req.InitialResourceVersions["ROOTCA"] = r.GetVersion()
			}
		}
		wantHear(t, s.open(t, req), "default=/one -gone")
	})
	t.Run("everything follows what there is", func(t *testing.T) {
		st := s.open(t, &discoveryv3.DeltaDiscoveryRequest{})
		wantHear(t, st, own+"=spiffe:example.org "+one+"=/one")
		s.src.Federate(workloadapitest.NewAuthority(t, foreign).Bundle())
		e := s.put("/two", foreign)
		wantHear(t, st, two+"=/two "+other+"=spiffe:other.test")
		s.src.Delete(e.ID)
		wantHear(t, st, two+"=identity withdrawn -"+other)
		e = s.put("/two")
		wantHear(t, st, two+"=/two")
		tell(t, st, subscribe(own))
		wantHear(t, st, own+"=spiffe:example.org")
		tell(t, st, &discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"*"}})
		tell(t, st, subscribe(two))
		wantHear(t, st, two+"=/two")
		s.src.Delete(e.ID)
		wantHear(t, st, two+"=identity withdrawn")
	})
}

func TestDeltaWithdrawal(t *testing.T) {
	for _, c := range []struct {
		name string
		keep bool
		want string
	}{
		{"the certificate is replaced", false, "default=identity withdrawn -ROOTCA"},
		{"it is said to be gone if the operator wants so", true, "-ROOTCA -default"},
	} {
		t.Run(c.name+", and the stream ends", func(t *testing.T) {
			s := serve(t, sds.Config{KeepWithdrawn: c.keep}, time.Hour)
			e := s.put("/one")
			st := s.open(t, subscribe("default", "ROOTCA"))
			wantHear(t, st, "ROOTCA=spiffe:example.org default=/one")
			s.src.Delete(e.ID)
			wantHear(t, st, c.want)
			_, err := st.Recv()
			wantStatus(t, err, codes.PermissionDenied, "no identity issued")
		})
	}
	t.Run("a client that comes back after it is told", func(t *testing.T) {
		s := serve(t, sds.Config{}, noHold)
		s.put("/one")
		req := subscribe("spiffe://example.org/two", "default")
		req.InitialResourceVersions = map[string]string{"spiffe://example.org/two": "1"}
		wantHear(t, s.open(t, req), "default=/one spiffe://example.org/two=identity withdrawn")
	})
}

func TestDeltaBadRequests(t *testing.T) {
	s := serve(t, sds.Config{}, noHold)
	s.put("/one")
	versions := map[string]string{}
	for n := range 1001 {
		versions[strconv.Itoa(n)] = "1"
	}
	for _, c := range []struct {
		name, want string
		req        *discoveryv3.DeltaDiscoveryRequest
	}{
		{"another type", "unexpected resource type", &discoveryv3.DeltaDiscoveryRequest{TypeUrl: "x"}},
		{"far too many names", "1001 resource names", subscribe(slices.Repeat([]string{"default"}, 1001)...)},
		{"far too many versions", "1001 resource names", &discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: versions}},
		{"all bundles without validator", "all bundles", &discoveryv3.DeltaDiscoveryRequest{Node: envoy(17), ResourceNamesSubscribe: []string{"ALL"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.open(t, c.req).Recv()
			wantStatus(t, err, codes.InvalidArgument, c.want)
		})
	}
}
