package compat

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/site"
)

// level is one server of several above each other, with its agent and a workload.
type level struct {
	*site.Site
	agent  *site.Agent
	local  localauthorityv1.LocalAuthorityClient
	source *workloadapi.X509Source
	id     spiffeid.ID
}

// newLevel starts a server that hangs on the one above, if there is one, with its agent and a workload.
func newLevel(t *testing.T, name string, above *level) *level {
	t.Helper()
	l := &level{id: spiffeid.RequireFromString("spiffe://example.org/work/" + name)}
	l.Site = newSite(t, func(s *site.Site) {
		s.ServerBlocks = `node_attestor "join_token" {}`
		if above != nil {
			s.ServerBlocks += fmt.Sprintf(`
upstream_authority "spire" {
  server_address      = "127.0.0.1"
  server_port         = %d
  workload_api_socket = %q
}`, above.Port, above.agent.Socket)
		}
	})
	conn, err := l.DialServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	l.local = localauthorityv1.NewLocalAuthorityClient(conn)
	l.agent = newAgent(t, l.Site, "agent-"+name)
	parent := onlyAgent(t, l.Site)
	createEntry(t, entries(t, l.Site), &types.Entry{
		SpiffeId: &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: "/server/below-" + name}, Downstream: true,
		ParentId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: parent},
		Selectors: []*types.Selector{{Type: "unix", Value: "path:" + real(t, filepath.Join(l.Bin, "assay-server"))}},
	})
	createEntry(t, entries(t, l.Site), &types.Entry{
		SpiffeId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: l.id.Path()},
		ParentId:  &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: parent},
		Selectors: []*types.Selector{{Type: "unix", Value: "path:" + real(t, os.Args[0])}},
	})
	if l.source, err = workloadapi.NewX509Source(patiently(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+l.agent.Socket))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.source.Close() })
	return l
}

// real is a path as the kernel names it.
func real(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// until waits for what the workload has.
func (l *level) until(t *testing.T, what string, good func() bool) {
	t.Helper()
	ctx := patiently(t)
	for !good() {
		if err := l.source.WaitUntilUpdated(ctx); err != nil {
			t.Fatalf("%s: no %s: %v", l.id, what, err)
		}
	}
}

// hangsOn says whether the workload's SVID leads to the root.
func (l *level) hangsOn(root string) func() bool {
	return func() bool {
		svid, err := l.source.GetX509SVID()
		return err == nil && hex.EncodeToString(svid.Certificates[len(svid.Certificates)-1].AuthorityKeyId) == root
	}
}

// believes says whether the workload has just this root.
func (l *level) believes(root string) func() bool {
	return func() bool {
		b, err := l.source.GetX509BundleForTrustDomain(l.id.TrustDomain())
		return err == nil && len(b.X509Authorities()) == 1 && hex.EncodeToString(b.X509Authorities()[0].SubjectKeyId) == root
	}
}

// TestNested is about three servers, each of which is signed by the one before it.
func TestNested(t *testing.T) {
	top := newLevel(t, "top", nil)
	middle := newLevel(t, "middle", top)
	bottom := newLevel(t, "bottom", middle)
	all := []*level{top, middle, bottom}
	root := func() string {
		t.Helper()
		state, err := top.local.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return state.GetActive().GetAuthorityId()
	}

	t.Run("all have one root, and as many certificates between as there are servers", func(t *testing.T) {
		for n, l := range all {
			l.until(t, "SVID that leads to the root", l.hangsOn(root()))
			l.until(t, "bundle with the root alone", l.believes(root()))
			svid, err := l.source.GetX509SVID()
			if err != nil || len(svid.Certificates) != n+1 {
				t.Errorf("%s has %d certificates (%v), want %d", l.id, len(svid.Certificates), err, n+1)
			}
		}
	})
	t.Run("everybody speaks mTLS with everybody", func(t *testing.T) { greetAll(t, all) })
	t.Run("everybody verifies everybody's tokens", func(t *testing.T) {
		for _, from := range all {
			token, err := workloadapi.FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: "all"}, workloadapi.WithAddr("unix://"+from.agent.Socket))
			if err != nil {
				t.Fatal(err)
			}
			for _, at := range all {
				validate(t, at, token.Marshal(), from.id)
			}
		}
	})
	t.Run("what is below has no root of its own to taint", func(t *testing.T) {
		for _, args := range [][]string{
			{"localauthority", "x509", "taint", "-authorityID", "aa"},
			{"localauthority", "x509", "revoke", "-authorityID", "aa"},
		} {
			out, err := bottom.ServerCLI(t.Context(), args...)
			if err == nil || !strings.Contains(out+err.Error(), "if there is an upstream authority") {
				t.Errorf("%v: %v %s", args, err, out)
			}
		}
		out, err := middle.ServerCLI(t.Context(), "upstreamauthority", "taint", "-subjectKeyID", root())
		if err == nil || !strings.Contains(out+err.Error(), "unable to use upstream authority singing current authority") {
			t.Errorf("%v %s", err, out)
		}
		out, err = top.ServerCLI(t.Context(), "upstreamauthority", "taint", "-subjectKeyID", root())
		if err == nil || !strings.Contains(out+err.Error(), "upstream authority is not configured") {
			t.Errorf("%v %s", err, out)
		}
	})
	t.Run("a forced rotation at the top replaces everything below, and then the old root is nowhere", func(t *testing.T) {
		old := root()
		ctx := patiently(t)
		prepared, err := top.local.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
		if err != nil {
			t.Fatal(err)
		}
		next := prepared.GetPreparedAuthority().GetAuthorityId()
		if _, err := top.local.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: next}); err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		if _, err := top.local.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: old}); err != nil {
			t.Fatal(err)
		}
		for _, l := range all {
			l.until(t, "SVID that leads to the new root", l.hangsOn(next))
			t.Logf("%s followed after %s", l.id, time.Since(started).Round(time.Millisecond))
		}
		greetAll(t, all)
		if _, err := top.local.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: old}); err != nil {
			t.Fatal(err)
		}
		for _, l := range all {
			l.until(t, "bundle without the old root", l.believes(next))
		}
		greetAll(t, all)
		state, err := bottom.local.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
		if err != nil || state.GetActive().GetUpstreamAuthoritySubjectKeyId() != next {
			t.Errorf("%v, %v", state, err)
		}
	})
	t.Run("a server that starts while what is above is away serves with what it has", func(t *testing.T) {
		before, err := bottom.local.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if err := middle.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := bottom.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := bottom.StartServer(patiently(t)); err != nil {
			t.Fatal(err)
		}
		conn, err := bottom.DialServer()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		after, err := localauthorityv1.NewLocalAuthorityClient(conn).GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
		if err != nil || after.GetActive().GetAuthorityId() != before.GetActive().GetAuthorityId() {
			t.Errorf("before %v, after %v (%v)", before, after, err)
		}
		if err := middle.StartServer(patiently(t)); err != nil {
			t.Fatal(err)
		}
		greetAll(t, all)
	})
}

// greetAll does mTLS between all workloads, in both roles.
func greetAll(t *testing.T, all []*level) {
	t.Helper()
	for _, server := range all {
		for _, client := range all {
			if err := greetBetween(patiently(t), server.source, server.id, client.source, client.id); err != nil {
				t.Errorf("%s to %s: %v", client.id, server.id, err)
			}
		}
	}
}

// validate has a token verified by a level's agent. Keys take a moment to be everywhere.
func validate(t *testing.T, at *level, token string, want spiffeid.ID) {
	t.Helper()
	client, err := workloadapi.New(patiently(t), workloadapi.WithAddr("unix://"+at.agent.Socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var last error
	_ = client.WatchJWTBundles(ctx, jwtWatch(func() {
		svid, err := client.ValidateJWTSVID(ctx, token, "all")
		if last = err; err != nil {
			return
		}
		if svid.ID != want {
			t.Errorf("verified as %s, want %s", svid.ID, want)
		}
		cancel()
	}))
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Errorf("%s does not verify a token of %s: %v", at.id, want, last)
	}
}

// jwtWatch is called whenever there are other JWT bundles.
type jwtWatch func()

func (w jwtWatch) OnJWTBundlesUpdate(*jwtbundle.Set) { w() }
func (w jwtWatch) OnJWTBundlesWatchError(error)      {}
