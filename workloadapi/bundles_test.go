package workloadapi_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/workloadapitest"
)

func TestBundles(t *testing.T) {
	open := func(t *testing.T, cfg workloadapi.Config) (*world, workload.SpiffeWorkloadAPIClient) {
		cfg.Hold = -1
		w := serve(t, cfg, newFake(say("a:b")))
		w.src.Federate(workloadapitest.NewAuthority(t, foreign).Bundle())
		api, _ := workloadapitest.Dial(t, w.socket)
		return w, api
	}
	t.Run("federated bundles come with the entries that ask for them", func(t *testing.T) {
		w, api := open(t, workloadapi.Config{})
		e := *w.put("/one", "a:b")
		s := w.stream(t, t.Context())
		first, err := s.Recv()
		if err != nil || len(first.GetFederatedBundles()) != 0 {
			t.Fatalf("got %v, %v", first, err)
		}
		e.FederatesWith = []spiffeid.TrustDomain{foreign}
		w.src.Put(&e)
		second, err := s.Recv()
		if err != nil || len(second.GetFederatedBundles()["spiffe://other.test"]) == 0 {
			t.Fatalf("got %v, %v", second, err)
		}
		b, err := api.FetchJWTBundles(workloadapitest.Header(t.Context()), &workload.JWTBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := b.Recv()
		if err != nil || len(got.GetBundles()) != 2 {
			t.Fatalf("got %v, %v", got, err)
		}
		for name, text := range got.GetBundles() {
			if _, err := jwtbundle.Parse(spiffeid.RequireTrustDomainFromString(name), text); err != nil {
				t.Error(err)
			}
			if bytes.Contains(text, []byte(`"use"`)) {
				t.Errorf("%s: has a use: %s", name, text)
			}
		}
	})
	t.Run("verifiers without an identity get no bundle, but an answer about a token of the own trust domain", func(t *testing.T) {
		w, api := open(t, workloadapi.Config{Hold: -1})
		s, err := api.FetchX509Bundles(workloadapitest.Header(t.Context()), &workload.X509BundlesRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		workloadapitest.WantCode(t, err, codes.PermissionDenied)
		_, err = api.ValidateJWTSVID(workloadapitest.Header(t.Context()), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
		workloadapitest.WantCode(t, err, codes.InvalidArgument)
		for _, authority := range []*workloadapitest.Authority{w.src.Authority, workloadapitest.NewAuthority(t, foreign)} {
			own := authority == w.src.Authority
			token, err := authority.JWT(map[string]any{"sub": "spiffe://" + authority.Bundle().TrustDomain.Name() + "/x", "aud": "a", "exp": time.Now().Add(time.Minute).Unix()})
			if err != nil {
				t.Fatal(err)
			}
			resp, err := api.ValidateJWTSVID(workloadapitest.Header(t.Context()), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
			if own && (err != nil || resp.GetSpiffeId() != "spiffe://example.org/x") {
				t.Errorf("our token: %v, %v", resp, err)
			}
			if !own {
				workloadapitest.WantCode(t, err, codes.InvalidArgument)
			}
		}
	})
	t.Run("or, if allowed, the own bundle", func(t *testing.T) {
		w, api := open(t, workloadapi.Config{AllowUnauthenticatedVerifiers: true})
		ctx := workloadapitest.Header(t.Context())
		s, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Recv()
		if err != nil || len(got.GetBundles()) != 1 || len(got.GetBundles()["spiffe://example.org"]) == 0 {
			t.Errorf("got %v, %v", got, err)
		}
		token, err := w.src.Authority.JWT(map[string]any{"sub": "spiffe://example.org/x", "aud": "a", "exp": time.Now().Add(time.Minute).Unix()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token}); err != nil {
			t.Error(err)
		}
		x := w.stream(t, t.Context())
		wantEnd(t, x, codes.PermissionDenied, "no identity issued")
	})
}

func TestValidate(t *testing.T) {
	w := serve(t, workloadapi.Config{Hold: -1, AllowedForeignJWTClaims: []string{"team"}}, newFake(say("a:b")))
	other := workloadapitest.NewAuthority(t, foreign)
	w.src.Federate(other.Bundle())
	e := *w.put("/one", "a:b")
	e.FederatesWith = []spiffeid.TrustDomain{foreign}
	w.src.Put(&e)
	api, _ := workloadapitest.Dial(t, w.socket)
	validate := func(token string) (*workload.ValidateJWTSVIDResponse, error) {
		return api.ValidateJWTSVID(workloadapitest.Header(t.Context()), &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
	}
	claims := func(sub string, change func(map[string]any)) map[string]any {
		m := map[string]any{
			"sub": sub, "aud": []string{"b", "a"}, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(),
			"team": "red", "secret": "x",
		}
		change(m)
		return m
	}
	own, alien := "spiffe://example.org/x", "spiffe://other.test/x"
	nothing := func(map[string]any) {}
	stranger := workloadapitest.NewAuthority(t, spiffeid.RequireTrustDomainFromString("unknown.test"))
	for _, c := range []struct {
		name   string
		by     *workloadapitest.Authority
		sub    string
		change func(map[string]any)
	}{
		{"no exp", w.src.Authority, own, func(m map[string]any) { delete(m, "exp") }},
		{"expired", w.src.Authority, own, func(m map[string]any) { m["exp"] = time.Now().Add(-time.Hour).Unix() }},
		{"no aud", w.src.Authority, own, func(m map[string]any) { delete(m, "aud") }},
		{"another aud", w.src.Authority, own, func(m map[string]any) { m["aud"] = "c" }},
		{"no sub", w.src.Authority, own, func(m map[string]any) { delete(m, "sub") }},
		{"a sub that is no SPIFFE ID", w.src.Authority, "root", nothing},
		{"signed by the federated domain for ours", other, own, nothing},
		{"signed by us for the federated domain", w.src.Authority, alien, nothing},
		{"a trust domain that does not concern the caller", stranger, "spiffe://unknown.test/x", nothing},
	} {
		t.Run("refused: "+c.name, func(t *testing.T) {
			token, err := c.by.JWT(claims(c.sub, c.change))
			if err != nil {
				t.Fatal(err)
			}
			_, err = validate(token)
			workloadapitest.WantCode(t, err, codes.InvalidArgument)
		})
	}
	t.Run("refused: no signature", func(t *testing.T) {
		// {"alg":"none"}, {"sub":"spiffe://example.org/x","aud":"a","exp":9999999999}
		_, err := validate("eyJhbGciOiJub25lIn0.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy94IiwiYXVkIjoiYSIsImV4cCI6OTk5OTk5OTk5OX0.")
		workloadapitest.WantCode(t, err, codes.InvalidArgument)
	})
	t.Run("all claims of an own token are returned", func(t *testing.T) {
		token, err := w.src.Authority.JWT(claims(own, nothing))
		if err != nil {
			t.Fatal(err)
		}
		got, err := validate(token)
		if err != nil || got.GetSpiffeId() != own || got.GetClaims().AsMap()["secret"] != "x" {
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("only trusted claims of a foreign token are returned", func(t *testing.T) {
		token, err := other.JWT(claims(alien, nothing))
		if err != nil {
			t.Fatal(err)
		}
		got, err := validate(token)
		if err != nil {
			t.Fatal(err)
		}
		m := got.GetClaims().AsMap()
		if m["secret"] != nil || m["team"] != "red" || m["sub"] != alien || m["exp"] == nil {
			t.Errorf("got %v", m)
		}
	})
}
