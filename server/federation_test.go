package server

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

var abroadTD = spiffeid.RequireTrustDomainFromString("abroad.test")

func (w *world) federations() trustdomainv1.TrustDomainClient {
	return trustdomainv1.NewTrustDomainClient(w.local)
}

// newAbroad is a server of another trust domain, with a bundle endpoint.
func newAbroad(t *testing.T) *world {
	t.Helper()
	return start(t, func(c *Config) {
		c.TrustDomain = abroadTD
		c.Federation.Endpoint = &BundleEndpoint{Address: "127.0.0.1"}
	})
}

// with returns the relationship with a server abroad, with the profile https_spiffe.
func (w *world) with(far *world) *types.FederationRelationship {
	w.t.Helper()
	own, err := far.bundles().GetBundle(w.context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	return &types.FederationRelationship{
		TrustDomain: abroadTD.Name(), BundleEndpointUrl: "https://" + far.running.BundleEndpoint.String() + "/",
		BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: "spiffe://abroad.test/spire/server"}},
		TrustDomainBundle:     own,
	}
}

func TestFederation(t *testing.T) {
	w, far := start(t), newAbroad(t)
	ctx := w.context()
	r := w.with(far)
	made, err := w.federations().BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{r}})
	if err != nil || made.GetResults()[0].GetStatus().GetCode() != 0 {
		t.Fatalf("%v, %v", made, err)
	}
	t.Run("what the authority abroad makes is here after a refresh", func(t *testing.T) {
		if _, err := localauthorityv1.NewLocalAuthorityClient(far.local).PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{}); err != nil {
			t.Fatal(err)
		}
		want := far.ownBundle()
		for len(want.GetX509Authorities()) < 2 { // the picture abroad follows its store
			want = far.ownBundle()
		}
		if _, err := w.federations().RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: abroadTD.Name()}); err != nil {
			t.Fatal(err)
		}
		have, err := w.bundles().GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: abroadTD.Name()})
		if err != nil || len(have.GetX509Authorities()) != 2 ||
			len(have.GetJwtAuthorities()) != len(want.GetJwtAuthorities()) {
			t.Errorf("have %v, want %v, %v", have, want, err)
		}
		if line := w.lastAudit("federation.fetch"); line["outcome"] != "allow" || line["spiffe_id"] != "spiffe://abroad.test" {
			t.Errorf("%v", line)
		}
	})
	t.Run("go-spiffe reads the bundle endpoint", func(t *testing.T) {
		pool, err := spiffebundle.Parse(abroadTD, far.endpointText(t))
		if err != nil {
			t.Fatal(err)
		}
		if n, ok := pool.SequenceNumber(); !ok || n == 0 {
			t.Error("there is no sequence number")
		}
		if hint, ok := pool.RefreshHint(); !ok || hint.Minutes() != 5 {
			t.Errorf("hint %s", hint)
		}
	})
	t.Run("it cannot be made twice", func(t *testing.T) {
		made, err := w.federations().BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{r}})
		if err != nil || codes.Code(made.GetResults()[0].GetStatus().GetCode()) != codes.AlreadyExists {
			t.Errorf("%v, %v", made, err)
		}
	})
	t.Run("it is shown as the mask says", func(t *testing.T) {
		got, err := w.federations().GetFederationRelationship(ctx, &trustdomainv1.GetFederationRelationshipRequest{
			TrustDomain: "spiffe://abroad.test", OutputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true},
		})
		if err != nil || got.GetBundleEndpointUrl() != r.GetBundleEndpointUrl() || got.GetBundleEndpointProfile() != nil || got.GetTrustDomainBundle() != nil {
			t.Errorf("%v, %v", got, err)
		}
	})
	t.Run("an update changes what the mask says", func(t *testing.T) {
		change := proto.CloneOf(r)
		change.BundleEndpointUrl = "https://127.0.0.1:1/"
		change.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
		done, err := w.federations().BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{
			FederationRelationships: []*types.FederationRelationship{change}, InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true},
		})
		if err != nil {
			t.Fatal(err)
		}
		got := done.GetResults()[0].GetFederationRelationship()
		if got.GetBundleEndpointUrl() != change.GetBundleEndpointUrl() || got.GetHttpsSpiffe() == nil {
			t.Errorf("%v", done)
		}
	})
	t.Run("a refresh that fails says why and leaves the bundle", func(t *testing.T) {
		_, err := w.federations().RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: abroadTD.Name()})
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "connection refused") {
			t.Error(err)
		}
		if b, err := w.bundles().GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: abroadTD.Name()}); err != nil || len(b.GetX509Authorities()) != 2 {
			t.Error(err)
		}
	})
	t.Run("it is listed page by page", func(t *testing.T) {
		more := &types.FederationRelationship{TrustDomain: "zzz.test", BundleEndpointUrl: "https://127.0.0.1:1/", BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}}
		if _, err := w.federations().BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{more}}); err != nil {
			t.Fatal(err)
		}
		var names []string
		for token := ""; ; {
			page, err := w.federations().ListFederationRelationships(ctx, &trustdomainv1.ListFederationRelationshipsRequest{PageSize: 1, PageToken: token})
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range page.GetFederationRelationships() {
				names = append(names, f.GetTrustDomain())
			}
			if token = page.GetNextPageToken(); token == "" {
				break
			}
		}
		if strings.Join(names, " ") != "abroad.test zzz.test" {
			t.Error(names)
		}
	})
	t.Run("it ends and leaves the bundle", func(t *testing.T) {
		for _, want := range []codes.Code{codes.OK, codes.NotFound} {
			done, err := w.federations().BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{abroadTD.Name()}})
			if err != nil || codes.Code(done.GetResults()[0].GetStatus().GetCode()) != want {
				t.Errorf("%v, %v", done, err)
			}
		}
		if _, err := w.bundles().GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: abroadTD.Name()}); err != nil {
			t.Error(err)
		}
		if _, err := w.federations().RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: abroadTD.Name()}); status.Code(err) != codes.NotFound {
			t.Error(err)
		}
	})
	w.unharmed()
}

// endpointText gets what the bundle endpoint serves.
func (w *world) endpointText(t *testing.T) []byte {
	t.Helper()
	own, err := w.bundles().GetBundle(w.context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	b := spiffebundle.New(w.cfg.TrustDomain)
	for _, a := range own.GetX509Authorities() {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			t.Fatal(err)
		}
		b.AddX509Authority(cert)
	}
	config := tlsconfig.TLSClientConfig(b, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(w.cfg.TrustDomain, "/spire/server")))
	config.MinVersion = tls.VersionTLS12
	resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}).Get("https://" + w.running.BundleEndpoint.String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", resp.Status, err)
	}
	return text
}

// TestBadRelationships has one flaw per case.
func TestBadRelationships(t *testing.T) {
	w, far := start(t), newAbroad(t)
	good := w.with(far)
	for _, c := range []struct {
		name  string
		flaw  func(*types.FederationRelationship)
		match string
	}{
		{"the own trust domain", func(r *types.FederationRelationship) { r.TrustDomain, r.TrustDomainBundle = td.Name(), nil }, "unable to create federation relationship for server trust domain"},
		{"no trust domain", func(r *types.FederationRelationship) { r.TrustDomain = "" }, "failed to parse trust domain"},
		{"a malformed trust domain", func(r *types.FederationRelationship) { r.TrustDomain = "no domain" }, "failed to parse trust domain"},
		{"no URL", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "" }, "URL is missing"},
		{"http", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "http://abroad.test/" }, "https scheme"},
		{"a file", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "file:///etc/shadow" }, "https scheme"},
		{"a password", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "https://me:secret@abroad.test/" }, "user info"},
		{"no host", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "https:///bundle" }, "host"},
		{"no URL at all", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "https://a b/" }, "malformed"},
		{"a long URL", func(r *types.FederationRelationship) { r.BundleEndpointUrl = "https://a/" + strings.Repeat("x", 3000) }, "limit"},
		{"no profile", func(r *types.FederationRelationship) { r.BundleEndpointProfile = nil }, "unsupported bundle endpoint profile type"},
		{"no endpoint ID", func(r *types.FederationRelationship) { r.GetHttpsSpiffe().EndpointSpiffeId = "" }, "endpoint SPIFFE ID"},
		{"an endpoint ID without path", func(r *types.FederationRelationship) { r.GetHttpsSpiffe().EndpointSpiffeId = "spiffe://abroad.test" }, "no path"},
		{"another trust domain's bundle", func(r *types.FederationRelationship) { r.GetTrustDomainBundle().TrustDomain = "third.test" }, "must match"},
		{"a broken bundle", func(r *types.FederationRelationship) {
			r.GetTrustDomainBundle().GetX509Authorities()[0].Asn1 = []byte("x")
		}, "failed to parse bundle"},
	} {
		t.Run(c.name+" is refused", func(t *testing.T) {
			bad := proto.CloneOf(good)
			c.flaw(bad)
			resp, err := w.federations().BatchCreateFederationRelationship(w.context(), &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: []*types.FederationRelationship{bad}})
			if err != nil {
				t.Fatal(err)
			}
			st := resp.GetResults()[0].GetStatus()
			if codes.Code(st.GetCode()) != codes.InvalidArgument || !strings.Contains(st.GetMessage(), c.match) || strings.Contains(st.GetMessage(), "secret") {
				t.Errorf("%v", st)
			}
		})
	}
	if all, err := w.federations().ListFederationRelationships(w.context(), &trustdomainv1.ListFederationRelationshipsRequest{}); err != nil || len(all.GetFederationRelationships()) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}
