package server

import (
	"testing"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

func TestGetBundle(t *testing.T) {
	w := start(t)
	ctx := w.context()
	t.Run("anyone gets it", func(t *testing.T) {
		b, err := bundlev1.NewBundleClient(w.dial(nil)).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err != nil || b.GetTrustDomain() != "example.org" || len(b.GetX509Authorities()) != 1 || len(b.GetJwtAuthorities()) != 1 || b.GetSequenceNumber() == 0 {
			t.Errorf("got %v, %v", b, err)
		}
	})
	t.Run("the mask is kept", func(t *testing.T) {
		b, err := w.bundles().GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{JwtAuthorities: true}})
		if err != nil || len(b.GetX509Authorities()) != 0 || len(b.GetJwtAuthorities()) != 1 || b.GetSequenceNumber() != 0 {
			t.Errorf("got %v, %v", b, err)
		}
	})
}

func TestFederatedBundles(t *testing.T) {
	w := start(t)
	ctx := w.context()
	c := w.bundles()
	own, err := c.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	foreign := func(td string) *types.Bundle {
		b := proto.Clone(own).(*types.Bundle)
		b.TrustDomain = td
		return b
	}
	code := func(s *types.Status) codes.Code { return codes.Code(s.GetCode()) }
	create := func(b *types.Bundle) codes.Code {
		t.Helper()
		resp, err := c.BatchCreateFederatedBundle(ctx, &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil {
			t.Fatal(err)
		}
		return code(resp.GetResults()[0].GetStatus())
	}
	remove := func(td string, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) codes.Code {
		t.Helper()
		resp, err := c.BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{td}, Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		return code(resp.GetResults()[0].GetStatus())
	}
	t.Run("one is created once", func(t *testing.T) {
		if got := create(foreign("a.test")); got != codes.OK {
			t.Errorf("first: %s", got)
		}
		if got := create(foreign("a.test")); got != codes.AlreadyExists {
			t.Errorf("second: %s", got)
		}
	})
	t.Run("bad ones are refused", func(t *testing.T) {
		for _, b := range []*types.Bundle{
			nil, foreign(""), foreign("No"), foreign("example.org"),
			{TrustDomain: "x.test", X509Authorities: []*types.X509Certificate{{Asn1: []byte("x")}}},
			{TrustDomain: "x.test", JwtAuthorities: []*types.JWTKey{{PublicKey: []byte("x"), KeyId: "k"}}},
			{TrustDomain: "x.test", RefreshHint: -1},
		} {
			if got := create(b); got != codes.InvalidArgument {
				t.Errorf("%v: %s", b, got)
			}
			if line := w.lastAudit("bundle.create"); line["outcome"] != "deny" {
				t.Errorf("audit line %v", line)
			}
		}
	})
	t.Run("update needs one, set does not", func(t *testing.T) {
		up, err := c.BatchUpdateFederatedBundle(ctx, &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: []*types.Bundle{foreign("b.test")}})
		if err != nil || code(up.GetResults()[0].GetStatus()) != codes.NotFound {
			t.Errorf("got %v, %v", up, err)
		}
		set, err := c.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{foreign("b.test")}})
		if err != nil || code(set.GetResults()[0].GetStatus()) != codes.OK {
			t.Errorf("got %v, %v", set, err)
		}
		up, err = c.BatchUpdateFederatedBundle(ctx, &bundlev1.BatchUpdateFederatedBundleRequest{
			Bundle: []*types.Bundle{{TrustDomain: "b.test", RefreshHint: 60}}, InputMask: &types.BundleMask{RefreshHint: true},
		})
		if b := up.GetResults()[0].GetBundle(); err != nil || b.GetRefreshHint() != 60 || len(b.GetX509Authorities()) != 1 {
			t.Errorf("got %v, %v", up, err)
		}
	})
	t.Run("they are listed in pages, without our own", func(t *testing.T) {
		first, err := c.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{PageSize: 1})
		if err != nil || len(first.GetBundles()) != 1 || first.GetBundles()[0].GetTrustDomain() != "a.test" {
			t.Fatalf("got %v, %v", first, err)
		}
		second, err := c.ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{PageSize: 1, PageToken: first.GetNextPageToken()})
		if err != nil || len(second.GetBundles()) != 1 || second.GetBundles()[0].GetTrustDomain() != "b.test" || second.GetNextPageToken() != "" {
			t.Errorf("got %v, %v", second, err)
		}
		if n, err := c.CountBundles(ctx, &bundlev1.CountBundlesRequest{}); err != nil || n.GetCount() != 3 {
			t.Errorf("counted %v, %v", n, err)
		}
	})
	t.Run("an agent reads one", func(t *testing.T) {
		_, _, conn := w.agent("reader")
		b, err := bundlev1.NewBundleClient(conn).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "a.test"})
		if err != nil || len(b.GetX509Authorities()) != 1 {
			t.Errorf("got %v, %v", b, err)
		}
		_, err = c.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "none.test"})
		refused(t, err, codes.NotFound, "bundle not found")
		_, err = c.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "example.org"})
		refused(t, err, codes.InvalidArgument, "own trust domain")
	})
	t.Run("one that entries need is deleted as the mode says", func(t *testing.T) {
		e := w.create(shop(func(e *types.Entry) { e.FederatesWith = []string{"a.test", "b.test"} }))
		if got := remove("a.test", bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT); got != codes.FailedPrecondition {
			t.Errorf("restrict: %s", got)
		}
		if got := remove("a.test", bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE); got != codes.OK {
			t.Errorf("dissociate: %s", got)
		}
		left, err := w.entries().GetEntry(ctx, &entryv1.GetEntryRequest{Id: e.GetId()})
		if err != nil || len(left.GetFederatesWith()) != 1 || left.GetRevisionNumber() != 1 {
			t.Errorf("got %v, %v", left, err)
		}
		if got := remove("b.test", bundlev1.BatchDeleteFederatedBundleRequest_DELETE); got != codes.OK {
			t.Errorf("delete: %s", got)
		}
		_, err = w.entries().GetEntry(ctx, &entryv1.GetEntryRequest{Id: e.GetId()})
		refused(t, err, codes.NotFound, "")
		if got := remove("b.test", bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT); got != codes.NotFound {
			t.Errorf("again: %s", got)
		}
		if got := remove("example.org", bundlev1.BatchDeleteFederatedBundleRequest_DELETE); got != codes.InvalidArgument {
			t.Errorf("our own: %s", got)
		}
		told := 0
		for _, line := range w.audit() {
			if line["event"] == "bundle.delete" && line["entry_id"] == e.GetId() {
				told++
			}
		}
		if told != 2 {
			t.Errorf("%d audit lines name the entry that was changed and then deleted", told)
		}
	})
	t.Run("authorities are appended to our own", func(t *testing.T) {
		_, err := c.AppendBundle(ctx, &bundlev1.AppendBundleRequest{})
		refused(t, err, codes.InvalidArgument, "no authorities")
		b, err := c.AppendBundle(ctx, &bundlev1.AppendBundleRequest{X509Authorities: own.GetX509Authorities()})
		if err != nil || len(b.GetX509Authorities()) != 1 {
			t.Errorf("got %v, %v", b, err)
		}
	})
	w.unharmed()
}
