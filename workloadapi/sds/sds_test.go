package sds_test

import (
	"strconv"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/workloadapi/sds"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

// noHold keeps callers without an identity from being held.
const noHold = -1

func ask(minor uint32, names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{Node: envoy(minor), TypeUrl: secretType, ResourceNames: names}
}

func TestWhatCanBeAskedFor(t *testing.T) {
	s := serve(t, sds.Config{}, noHold)
	s.src.Federate(workloadapitest.NewAuthority(t, foreign).Bundle())
	s.put("/one", foreign)
	s.put("/two")
	const one, two, own, other = "spiffe://example.org/one", "spiffe://example.org/two", "spiffe://example.org", "spiffe://other.test"
	many := make([]string, 1001)
	for i := range many {
		many[i] = strconv.Itoa(i)
	}
	for _, c := range []struct {
		name string
		req  *discoveryv3.DiscoveryRequest
		want string
		code codes.Code
	}{
		{"what Istio asks for", ask(30, "default", "ROOTCA"), "ROOTCA=spiffe:example.org default=/one", 0},
		{"SPIFFE IDs", ask(30, two, one), one + "=/one " + two + "=/two", 0},
		{"one identity under two names", ask(30, one, "default"), "default=/one " + one + "=/one", 0},
		{"a name twice", ask(30, one, one), one + "=/one", 0},
		{"trust domains", ask(30, own, other), own + "=spiffe:example.org " + other + "=spiffe:other.test", 0},
		{"all bundles", ask(30, "ALL"), "ALL=spiffe:example.org,other.test", 0},
		{
			"nothing, which is everything", ask(30),
			one + "=/one " + two + "=/two " + own + "=spiffe:example.org " + other + "=spiffe:other.test", 0,
		},
		{"an Envoy before 1.18", ask(17, "ROOTCA"), "ROOTCA=plain:example.org", 0},
		{"a client of no version", &discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}}, "ROOTCA=spiffe:example.org", 0},
		{
			"a node that wants no validator",
			&discoveryv3.DiscoveryRequest{Node: envoy(30, "disable_spiffe_cert_validation", true), ResourceNames: []string{other}},
			other + "=plain:other.test", 0,
		},
		{
			"the same as text",
			&discoveryv3.DiscoveryRequest{Node: envoy(30, "disable_spiffe_cert_validation", "true"), ResourceNames: []string{own}},
			own + "=plain:example.org", 0,
		},
		{
			"a node that says that it wants one",
			&discoveryv3.DiscoveryRequest{Node: envoy(30, "disable_spiffe_cert_validation", false), ResourceNames: []string{own}},
			own + "=spiffe:example.org", 0,
		},
		{"all bundles without validator", ask(17, "ALL"), "all bundles can only be had", codes.InvalidArgument},
		{"an unknown name", ask(30, "default", "spiffe://example.org/three"), `not authorized for the requested identities ["spiffe://example.org/three"]`, codes.InvalidArgument},
		{"an unknown trust domain", ask(30, "spiffe://third.test"), "not authorized", codes.InvalidArgument},
		{"an empty name", ask(30, ""), "not authorized", codes.InvalidArgument},
		{"far too many names", ask(30, many...), "1001 resource names", codes.InvalidArgument},
		{"another type", &discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, "unexpected resource type", codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, err := s.api.FetchSecrets(t.Context(), c.req)
			st := s.stream(t)
			send(t, st, c.req)
			streamed, streamErr := st.Recv()
			if c.code != codes.OK {
				wantStatus(t, err, c.code, c.want)
				wantStatus(t, streamErr, c.code, c.want)
				return
			}
			if err != nil || streamErr != nil {
				t.Fatal(err, streamErr)
			}
			if got := say(t, resp.GetResources()...); got != c.want {
				t.Errorf("fetched %s, want %s", got, c.want)
			}
			if got := say(t, streamed.GetResources()...); got != c.want || streamed.GetVersionInfo() != resp.GetVersionInfo() {
				t.Errorf("streamed %s, want %s", got, c.want)
			}
		})
	}
	t.Run("the audit line says which identities were handed out", func(t *testing.T) {
		if _, err := s.api.FetchSecrets(t.Context(), ask(30, two, "ROOTCA")); err != nil {
			t.Fatal(err)
		}
		if l := s.audit.last(); l.Event != "sds" || l.Outcome != "allow" || strings.Join(l.SPIFFEIDs, " ") != two || len(l.EntryIDs) != 1 {
			t.Errorf("got %+v", l)
		}
	})
}

func TestConfiguredNames(t *testing.T) {
	s := serve(t, sds.Config{DefaultSVIDName: "me", DefaultBundleName: "ours", DefaultAllBundlesName: "theirs", DisableSPIFFEValidation: true}, noHold)
	s.put("/one")
	resp, err := s.api.FetchSecrets(t.Context(), ask(30, "me", "ours"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := say(t, resp.GetResources()...), "me=/one ours=plain:example.org"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for _, name := range []string{"default", "ROOTCA", "ALL", "theirs"} {
		_, err := s.api.FetchSecrets(t.Context(), ask(30, name))
		wantStatus(t, err, codes.InvalidArgument, "")
	}
}

func TestStream(t *testing.T) {
	s := serve(t, sds.Config{}, noHold)
	s.put("/one")
	st := s.stream(t)
	send(t, st, ask(30, "default", "ROOTCA"))
	first := receive(t, st)
	send(t, st, acknowledge(first, "default", "ROOTCA"))
	t.Run("a change is pushed, with another version and nonce", func(t *testing.T) {
		s.src.Rotate()
		second := receive(t, st)
		if second.GetVersionInfo() == first.GetVersionInfo() || second.GetNonce() == first.GetNonce() {
			t.Error("the version or the nonce is the same")
		}
		first = second
	})
	t.Run("what is refused is not sent again, and said in the log", func(t *testing.T) {
		no := acknowledge(first, "default", "ROOTCA")
		no.VersionInfo, no.ErrorDetail = "", &status.Status{Code: 3, Message: "cannot use it"}
		send(t, st, no)
		s.put("/two") // is no concern of who asked for the default
		send(t, st, acknowledge(first, "default"))
		resp := receive(t, st)
		if got := say(t, resp.GetResources()...); got != "default=/one" {
			t.Errorf("after the subscription changed, got %s", got)
		}
		if !strings.Contains(s.log.String(), "cannot use it") {
			t.Errorf("the log says %s", s.log.String())
		}
		first = resp
	})
	t.Run("the word on a response that is not the last counts for nothing", func(t *testing.T) {
		send(t, st, &discoveryv3.DiscoveryRequest{ResponseNonce: "0", ResourceNames: []string{"no such"}})
		send(t, st, &discoveryv3.DiscoveryRequest{ResponseNonce: first.GetNonce(), ResourceNames: []string{"ROOTCA"}})
		resp := receive(t, st)
		if got := say(t, resp.GetResources()...); got != "ROOTCA=spiffe:example.org" {
			t.Errorf("got %s", got)
		}
	})
	t.Run("a client that has nothing more to say is let go", func(t *testing.T) {
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err == nil || err.Error() != "EOF" {
			t.Errorf("got %v", err)
		}
	})
}

func TestWithdrawal(t *testing.T) {
	const gone = "identity withdrawn"
	begin := func(t *testing.T, s *site, names ...string) stream {
		st := s.stream(t)
		send(t, st, ask(30, names...))
		receive(t, st)
		return st
	}
	t.Run("the certificate is replaced and the stream ends", func(t *testing.T) {
		s := serve(t, sds.Config{}, time.Hour)
		e := s.put("/one")
		st := begin(t, s, "default", "ROOTCA")
		s.src.Delete(e.ID)
		if got, want := say(t, receive(t, st).GetResources()...), "ROOTCA=spiffe:example.org default="+gone; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		_, err := st.Recv()
		wantStatus(t, err, codes.PermissionDenied, "no identity issued")
		if l := s.audit.last(); l.Outcome != "deny" || l.Event != "sds" {
			t.Errorf("got %+v", l)
		}
	})
	t.Run("it is kept if the operator wants so", func(t *testing.T) {
		s := serve(t, sds.Config{KeepWithdrawn: true}, time.Hour)
		e := s.put("/one")
		st := begin(t, s, "default")
		s.src.Delete(e.ID)
		_, err := st.Recv()
		wantStatus(t, err, codes.PermissionDenied, "no identity issued")
	})
	t.Run("of two identities only the one is replaced", func(t *testing.T) {
		s := serve(t, sds.Config{}, time.Hour)
		s.put("/one")
		e := s.put("/two")
		st := begin(t, s, "spiffe://example.org/two", "spiffe://example.org/one")
		s.src.Delete(e.ID)
		if got, want := say(t, receive(t, st).GetResources()...), "spiffe://example.org/one=/one spiffe://example.org/two="+gone; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		_, err := st.Recv()
		wantStatus(t, err, codes.PermissionDenied, "no identity issued")
	})
	t.Run("whoever never had one is refused", func(t *testing.T) {
		s := serve(t, sds.Config{}, noHold)
		st := s.stream(t)
		send(t, st, ask(30, "default"))
		_, err := st.Recv()
		wantStatus(t, err, codes.PermissionDenied, "no identity issued")
		_, err = s.api.FetchSecrets(t.Context(), ask(30))
		wantStatus(t, err, codes.PermissionDenied, "no identity issued")
	})
	t.Run("a caller is held for its entry", func(t *testing.T) {
		s := serve(t, sds.Config{}, time.Hour)
		st := s.stream(t)
		send(t, st, ask(30, "default"))
		s.put("/late")
		if got := say(t, receive(t, st).GetResources()...); got != "default=/late" {
			t.Errorf("got %s", got)
		}
	})
}

// TestShare keeps one user from all the streams in which clients go on sending.
func TestShare(t *testing.T) {
	s := serve(t, sds.Config{}, noHold)
	s.put("/one")
	for n := range 1024 {
		st := s.stream(t)
		_ = st.Send(ask(30, "ROOTCA")) // of a stream that is refused already it says only that it has ended
		if _, err := st.Recv(); err != nil {
			wantStatus(t, err, codes.ResourceExhausted, "too many streams")
			if n != 512 {
				t.Errorf("refused after %d", n)
			}
			return
		}
	}
	t.Error("one user got all")
}
