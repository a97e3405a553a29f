package compat

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

// TestWIT fetches WIT-SVIDs as a workload does and verifies them with go-spiffe, through a forced rotation.
func TestWIT(t *testing.T) {
	s := newSite(t, func(s *site.Site) { s.ServerExtra = "wit_svids = true" })
	agent := newAgent(t, s, "agent")
	createEntry(t, entries(t, s), newEntry(onlyAgent(t, s), "/shop"))
	conn, err := grpc.NewClient("unix://"+agent.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client := workload.NewSpiffeWorkloadAPIClient(conn)
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(patiently(t), "workload.spiffe.io", "true"))
	defer cancel()
	stream, err := client.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	me := spiffeid.RequireFromString("spiffe://" + site.TrustDomain + "/shop")
	next := func() *witsvid.SVID {
		t.Helper()
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		bundles, err := client.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		keys, err := bundles.Recv()
		if err != nil {
			t.Fatal(err)
		}
		bundle, err := witbundle.Parse(me.TrustDomain(), []byte(keys.GetBundles()[me.TrustDomain().IDString()]))
		if err != nil {
			t.Fatal(err)
		}
		svid, err := witsvid.ParseAndValidate(resp.GetSvids()[0].GetWitSvid(), bundle)
		if err != nil {
			t.Fatal(err)
		}
		var private jose.JSONWebKey
		if err := json.Unmarshal([]byte(resp.GetSvids()[0].GetWitSvidKey()), &private); err != nil {
			t.Fatal(err)
		}
		key, ok := private.Key.(*ecdsa.PrivateKey)
		if svid.ID != me || !ok || !key.PublicKey.Equal(svid.PublicKey) {
			t.Errorf("it is of %s, and its key is a %T", svid.ID, private.Key)
		}
		return svid
	}
	first := next()

	t.Run("one that is asked for by its ID is the same, another is refused", func(t *testing.T) {
		one, err := client.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: me.String()})
		if err != nil {
			t.Fatal(err)
		}
		resp, err := one.Recv()
		if err != nil || len(resp.GetSvids()) != 1 || resp.GetSvids()[0].GetWitSvid() != first.Marshal() {
			t.Errorf("%v, %v", resp, err)
		}
		other, err := client.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: me.String() + "/other"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := other.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("it says %v", err)
		}
	})
	t.Run("after a forced rotation another is pushed, of the new authority", func(t *testing.T) {
		step := func(args ...string) map[string]map[string]string {
			t.Helper()
			out, err := s.ServerCLI(ctx, append([]string{"localauthority", "wit"}, append(args, "-output", "json")...)...)
			if err != nil {
				t.Fatal(err)
			}
			var state map[string]map[string]string
			unmarshal(t, out, &state)
			return state
		}
		id := step("prepare")["prepared_authority"]["authority_id"]
		step("activate", "-authorityID", id)
		step("taint", "-authorityID", first.KeyID)
		for svid := first; svid.KeyID != id; {
			svid = next()
		}
		step("revoke", "-authorityID", first.KeyID)
	})
	t.Run("it is minted, too", func(t *testing.T) {
		out, err := s.ServerCLI(ctx, "wit", "mint", "-spiffeID", me.String(), "-keyType", "rsa-2048", "-signingAlgorithm", "PS256", "-output", "json")
		if err != nil {
			t.Fatal(err)
		}
		var minted struct{ Token string }
		unmarshal(t, out, &minted)
		if svid, err := witsvid.ParseInsecure(minted.Token); err != nil || svid.ID != me {
			t.Errorf("it is %v, %v", svid, err)
		}
	})
	t.Run("the agent's command shows it", func(t *testing.T) {
		out, err := agent.CLI(ctx, "api", "fetch", "wit", "-socketPath", agent.Socket)
		if err != nil || !strings.Contains(out, "token("+me.String()+")") || !strings.Contains(out, "bundle("+me.TrustDomain().IDString()+")") {
			t.Errorf("it says %q, %v", out, err)
		}
	})
}

// TestNestedWIT is about a server that signs WIT-SVIDs below another that does: each verifies what the other
// signs, from the start and after a rotation.
func TestNestedWIT(t *testing.T) {
	top := newSite(t, func(s *site.Site) { s.ServerExtra = "wit_svids = true" })
	agent := newAgent(t, top, "above")
	e := newEntry(onlyAgent(t, top), "/below")
	e.Downstream = true
	createEntry(t, entries(t, top), e)
	below := newSite(t, func(s *site.Site) {
		s.ServerExtra = "wit_svids = true"
		s.ServerBlocks = fmt.Sprintf("node_attestor \"join_token\" {}\nupstream_authority \"spire\" {\n  server_address = \"127.0.0.1\"\n  server_port = %d\n  workload_api_socket = %q\n}", top.Port, agent.Socket)
	})
	verifies := func(by, at *site.Site) error {
		out, err := by.ServerCLI(t.Context(), "wit", "mint", "-spiffeID", "spiffe://example.org/shop", "-output", "json")
		if err != nil {
			return err
		}
		var minted struct{ Token string }
		unmarshal(t, out, &minted)
		keys, err := at.ServerCLI(t.Context(), "bundle", "show", "-format", "spiffe")
		if err != nil {
			return err
		}
		var all struct {
			Keys []map[string]any `json:"keys"`
		}
		unmarshal(t, keys, &all)
		all.Keys = slices.DeleteFunc(all.Keys, func(k map[string]any) bool { return k["use"] != "wit-svid" })
		only, err := json.Marshal(all)
		if err != nil {
			return err
		}
		bundle, err := witbundle.Parse(spiffeid.RequireTrustDomainFromString(site.TrustDomain), only)
		if err == nil {
			_, err = witsvid.ParseAndValidate(minted.Token, bundle)
		}
		return err
	}
	both := func(when string) {
		t.Helper()
		for what, sites := range map[string][2]*site.Site{"below, verified above": {below, top}, "above, verified below": {top, below}} {
			err := below.Server().WaitFor(patiently(t), "a WIT-SVID signed "+what, func() error { return verifies(sites[0], sites[1]) })
			if err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
	}
	both("at first")
	for name, s := range map[string]*site.Site{"below": below, "above": top} {
		out, err := s.ServerCLI(t.Context(), "localauthority", "wit", "prepare", "-output", "json")
		if err != nil {
			t.Fatal(err)
		}
		var state map[string]map[string]string
		unmarshal(t, out, &state)
		if out, err := s.ServerCLI(t.Context(), "localauthority", "wit", "activate", "-authorityID", state["prepared_authority"]["authority_id"]); err != nil {
			t.Fatalf("%s: %s, %v", name, out, err)
		}
	}
	both("after both were rotated")
}
