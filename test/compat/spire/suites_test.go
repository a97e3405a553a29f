package spire

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

// TestDelegatedIdentity: whoever is named in the agent's configuration has the identities of others, by their
// selectors; nobody else does.
func TestDelegatedIdentity(t *testing.T) {
	alone(t)
	t.Parallel()
	s := serverAlone(t)
	extra := "authorized_delegates = [\"spiffe://example.org/blackbox/delegate\"]"
	admin := filepath.Join(s.Dir, "agent", "private", "admin.sock")
	if realAgent() {
		extra += fmt.Sprintf("\n  admin_socket_path = %q", admin)
	}
	g, _ := field(t, s, "agent", site.AgentOptions{Extra: extra})
	conn, err := grpc.NewClient("unix://"+admin, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := delegatedidentityv1.NewDelegatedIdentityClient(conn)
	workload := []*types.Selector{{Type: "unix", Value: "uid:4242"}}
	svids := func(selectors []*types.Selector) (*delegatedidentityv1.SubscribeToX509SVIDsResponse, error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := client.SubscribeToX509SVIDs(ctx, &delegatedidentityv1.SubscribeToX509SVIDsRequest{Selectors: selectors})
		if err != nil {
			return nil, err
		}
		return stream.Recv()
	}
	of := func(e *types.Entry) {
		e.Selectors = workload
	}
	for _, path := range []string{"/workload", "/boss"} {
		g.entry(t, path, func(e *types.Entry) { of(e); e.Admin = path == "/boss" })
	}
	g.entry(t, "/somebody", nil) // this process is somebody, and no delegate
	g.api(t, "fetch", "x509")

	_, err = svids(workload)
	code(t, err, codes.PermissionDenied)
	_, err = client.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Selectors: workload, Audience: []string{"a"}})
	code(t, err, codes.PermissionDenied)
	for name, subscribe := range map[string]func(context.Context) error{
		"X.509 bundles": func(ctx context.Context) error {
			stream, err := client.SubscribeToX509Bundles(ctx, &delegatedidentityv1.SubscribeToX509BundlesRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"JWT bundles": func(ctx context.Context) error {
			stream, err := client.SubscribeToJWTBundles(ctx, &delegatedidentityv1.SubscribeToJWTBundlesRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
	} {
		if err := subscribe(t.Context()); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s for somebody: %v", name, err)
		}
		defer func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if err := subscribe(ctx); err != nil {
				t.Errorf("%s for the delegate: %v", name, err)
			}
		}()
	}

	g.entry(t, "/delegate", nil)
	var got *delegatedidentityv1.SubscribeToX509SVIDsResponse
	eventually(t, "the workload's SVID", func() (err error) {
		if got, err = svids(workload); err == nil && len(got.GetX509Svids()) == 0 {
			err = errors.New("there is none yet")
		}
		return err
	})
	if n := len(got.GetX509Svids()); n != 1 || g.text(got.GetX509Svids()[0].GetX509Svid().GetId()) != g.text(g.id("/workload")) || len(got.GetX509Svids()[0].GetX509SvidKey()) == 0 {
		t.Errorf("got %d SVIDs: %v", n, got.GetX509Svids())
	}
	jwt, err := client.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Selectors: workload, Audience: []string{"a"}})
	if err != nil || len(jwt.GetSvids()) != 1 || g.text(jwt.GetSvids()[0].GetId()) != g.text(g.id("/workload")) {
		t.Errorf("JWT-SVIDs: %v, %v", jwt, err)
	}
	_, err = client.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Selectors: workload})
	code(t, err, codes.InvalidArgument)
	_, err = client.FetchJWTSVIDs(t.Context(), &delegatedidentityv1.FetchJWTSVIDsRequest{Audience: []string{"a"}})
	code(t, err, codes.InvalidArgument)
	_, err = svids(nil)
	code(t, err, codes.InvalidArgument)
	if got, err := svids([]*types.Selector{{Type: "unix", Value: "uid:4243"}}); err != nil || len(got.GetX509Svids()) != 0 {
		t.Errorf("for selectors of nobody: %v, %v", got, err)
	}
}

// started starts an agent again and again, as a service manager does: SPIRE's ends when it learns that what it
// had is good no more.
func started(ctx context.Context, t *testing.T, a *site.Agent) {
	t.Helper()
	eventually(t, "the agent to stay", func() error {
		if err := a.Start(ctx); err != nil {
			return err
		}
		ended := time.NewTimer(2 * time.Second)
		defer ended.Stop()
		select {
		case <-a.Done():
			return errors.New("it ended")
		case <-ended.C:
			return nil
		}
	})
}

// TestNodeReattestation: an agent that is evicted attests again by itself if its evidence may be used again,
// and never comes back if not; one that is banned stays away until it is evicted.
func TestNodeReattestation(t *testing.T) {
	alone(t)
	t.Parallel()
	node := newPop(t)
	s := serverAlone(t, func(s *site.Site) {
		ours, spires := part("node_attestor", "x509pop", "ca_bundle_path = %q", node.root)
		with(s, ours, spires)
	})
	byToken, tokenAgent := field(t, s, "by-token", site.AgentOptions{})
	var o site.AgentOptions
	machine(node, &o)
	g, a := field(t, s, "by-certificate", o)
	client := agentv1.NewAgentClient(g.conn)
	id := &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: node.path}
	have := func(id *types.SPIFFEID) func() error {
		return func() error {
			_, err := client.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: id})
			return err
		}
	}
	eventually(t, "the agent with the certificate", have(id))
	if n, err := client.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: id}); err != nil || !n.GetCanReattest() ||
		!slices.ContainsFunc(n.GetSelectors(), func(s *types.Selector) bool { return s.GetType() == "x509pop" && s.GetValue() == "subject:cn:machine" }) {
		t.Errorf("it is %v, %v", n, err)
	}
	tokenID := byToken.agentID
	for _, id := range []*types.SPIFFEID{id, tokenID} {
		if out, err := g.cli(t, "agent", "evict", "-spiffeID", g.text(id)); err != nil {
			t.Fatalf("evict: %s, %v", out, err)
		}
	}
	eventually(t, "the agent with the certificate, again", have(id))
	code(t, have(tokenID)(), codes.NotFound)

	t.Run("restarted, only the one with the certificate comes back", func(t *testing.T) {
		_ = tokenAgent.Stop(15 * time.Second)
		_ = a.Stop(15 * time.Second)
		if err := tokenAgent.Launch(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		started(ctx, t, a)
		eventually(t, "the agent with the certificate", have(id))
		code(t, have(tokenID)(), codes.NotFound)
	})
	t.Run("banned, it is served no more, and attests again once it is evicted", func(t *testing.T) {
		g.entry(t, "/banned", func(e *types.Entry) { e.ParentId = id })
		g.agentSocket = a.Socket
		g.api(t, "fetch", "x509")
		if out, err := g.cli(t, "agent", "ban", "-spiffeID", g.text(id)); err != nil || !strings.Contains(out, "Agent banned successfully") {
			t.Fatalf("ban: %s, %v", out, err)
		}
		if out, err := g.cli(t, "agent", "show", "-spiffeID", g.text(id)); err != nil || !strings.Contains(out, "Banned            : true") {
			t.Errorf("show: %s, %v", out, err)
		}
		if out, err := g.cli(t, "agent", "purge", "-expiredFor", "1s"); err != nil || strings.Contains(out, node.path) {
			t.Errorf("purge: %s, %v", out, err)
		}
		eventually(t, "the banned agent to serve nobody", func() error {
			if out, err := site.Run(t.Context(), nil, g.agent, "api", "fetch", "x509", "-socketPath", a.Socket, "-timeout", "2s"); err == nil {
				return fmt.Errorf("it serves %s", out)
			}
			return nil
		})
		_ = a.Stop(15 * time.Second)
		if out, err := g.cli(t, "agent", "evict", "-spiffeID", g.text(id)); err != nil {
			t.Fatalf("evict: %s, %v", out, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		started(ctx, t, a)
		eventually(t, "the agent, forgiven", have(id))
		if out, err := g.cli(t, "agent", "show", "-spiffeID", g.text(id)); err != nil || strings.Contains(out, "Banned            : true") {
			t.Errorf("show: %s, %v", out, err)
		}
		g.api(t, "fetch", "x509")
	})
}

// TestRotation: with lifetimes of seconds, what a workload has is valid at each look, past a change of the authority.
func TestRotation(t *testing.T) {
	alone(t)
	t.Parallel() // it waits, most of the time
	s := serverAlone(t, func(s *site.Site) { s.ServerExtra = "ca_ttl = \"1m\"\n  default_x509_svid_ttl = \"10s\"" })
	g, _ := field(t, s, "agent", site.AgentOptions{})
	id := g.text(g.entry(t, "/rotating", nil).GetSpiffeId())
	g.api(t, "fetch", "x509")
	issuers, serials := map[string]bool{}, map[string]bool{}
	every(t, time.Second, "SVIDs of two authorities", func() error {
		leaf, _, err := g.written(t)
		if err != nil {
			t.Fatalf("what the workload has is not valid: %v", err)
		}
		if leaf.URIs[0].String() != id {
			t.Fatalf("it is of %s", leaf.URIs[0])
		}
		issuers[hex.EncodeToString(leaf.AuthorityKeyId)], serials[leaf.SerialNumber.String()] = true, true
		if len(issuers) < 2 {
			return fmt.Errorf("%d authorities", len(issuers))
		}
		return nil
	})
	if len(serials) < 4 {
		t.Errorf("%d SVIDs in the life of an authority, of which each lived ten seconds", len(serials))
	}
}

// TestSyncAuthorizedEntries: an agent with more entries than one message holds has them all.
func TestSyncAuthorizedEntries(t *testing.T) {
	alone(t)
	t.Parallel()
	s := serverAlone(t)
	g, _ := field(t, s, "agent", site.AgentOptions{})
	type selector struct {
		Type  string `json:"type"`
		Value string `json:"value"`
	}
	type entry struct {
		Parent    string     `json:"parent_id"`
		ID        string     `json:"spiffe_id"`
		Selectors []selector `json:"selectors"`
	}
	var file struct {
		Entries []entry `json:"entries"`
	}
	for n := range 511 {
		file.Entries = append(file.Entries, entry{g.text(g.agentID), g.text(g.id(fmt.Sprintf("/many/%d", n))), []selector{{"unix", fmt.Sprintf("uid:%d", n+1)}}})
	}
	raw, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "entries.json")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := g.cli(t, "entry", "create", "-data", path); err != nil {
		t.Fatalf("entry create: %s, %v", out, err)
	}
	if out, err := g.cli(t, "entry", "count"); err != nil || !strings.Contains(out, "511 registration entries") {
		t.Errorf("entry count: %s, %v", out, err)
	}
	last := g.text(g.entry(t, "/many/last", nil).GetSpiffeId())
	eventually(t, "the last entry", func() error {
		if out := g.api(t, "fetch", "x509"); !strings.Contains(out, last) {
			return errors.New(out)
		}
		return nil
	})
}

// TestPagesOfEntries: SyncAuthorizedEntries names more entries than one message holds by their revisions, and
// gives those that are asked for.
func TestPagesOfEntries(t *testing.T) {
	alone(t)
	t.Parallel()
	w := newWords(t, serverAlone(t))
	w.ask(t, &question{who: "local", method: "agent.CreateJoinToken", request: `{"ttl":600,"token":"one"}`})
	w.ask(t, &question{who: "anyone", method: "agent.AttestAgent", request: `[{"params":{"data":{"type":"join_token","payload":"${b64 one}"},"params":{"csr":"${csr }"}}}]`})
	const many = 501
	for from := 0; from < many; from += 100 {
		var list []*types.Entry
		for n := from; n < min(many, from+100); n++ {
			e := callerEntry(fmt.Sprintf("/many/%d", n), &types.Entry{Id: fmt.Sprintf("many-%03d", n)})
			e.ParentId = &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: "/spire/agent/join_token/one"}
			list = append(list, e)
		}
		if _, err := entryv1.NewEntryClient(w.local).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: list}); err != nil {
			t.Fatal(err)
		}
	}
	client := entryv1.NewEntryClient(w.conn(t, "agent/one"))
	mask := &types.EntryMask{SpiffeId: true, RevisionNumber: true, CreatedAt: true}
	var stream entryv1.Entry_SyncAuthorizedEntriesClient
	revisions := map[string]*entryv1.EntryRevision{}
	pages := 0
	eventually(t, "all entries", func() (err error) {
		clear(revisions)
		pages = 0
		if stream, err = client.SyncAuthorizedEntries(t.Context()); err != nil {
			return err
		}
		if err = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask}); err != nil {
			return err
		}
		for {
			resp, err := stream.Recv()
			if err != nil {
				return err
			}
			if pages++; len(resp.GetEntryRevisions()) > 500 {
				t.Fatalf("a page of %d", len(resp.GetEntryRevisions()))
			}
			for _, r := range resp.GetEntryRevisions() {
				revisions[r.GetId()] = r
			}
			if !resp.GetMore() {
				break
			}
		}
		if len(revisions) != many {
			return fmt.Errorf("%d of %d entries", len(revisions), many)
		}
		return nil
	})
	if r := revisions["many-500"]; pages < 2 || r.GetCreatedAt() == 0 || r.GetRevisionNumber() != 0 {
		t.Errorf("%d pages, with %v", pages, r)
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: []string{"many-500", "nobody-knows", "many-001"}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || resp.GetMore() || len(resp.GetEntries()) != 2 {
		t.Fatalf("got %v, %v", resp, err)
	}
	for _, e := range resp.GetEntries() {
		if e.GetCreatedAt() == 0 || e.GetSpiffeId().GetPath() == "" || len(e.GetSelectors()) > 0 {
			t.Errorf("got %v", e)
		}
	}
}

// TestForcedUpstreamRotation: the root above is exchanged, tainted and revoked, and workloads follow.
func TestForcedUpstreamRotation(t *testing.T) {
	alone(t)
	t.Parallel()
	dir := t.TempDir()
	newRoot(t, dir, "upstream", "first root")
	next := newRoot(t, dir, "next", "second root")
	s := serverAlone(t, func(s *site.Site) {
		ours, spires := part("upstream_authority", "disk", "cert_file_path = %q\nkey_file_path = %q", filepath.Join(dir, "upstream.pem"), filepath.Join(dir, "upstream.key"))
		with(s, ours, spires)
	})
	g, _ := field(t, s, "agent", site.AgentOptions{})
	g.entry(t, "/below", nil)
	g.api(t, "fetch", "x509")
	shown := func(slot string) (a struct {
		ID       string `json:"authority_id"`
		Upstream string `json:"upstream_authority_subject_key_id"`
	}) {
		t.Helper()
		out, err := g.cli(t, "localauthority", "x509", "show", "-output", "json")
		var all map[string]json.RawMessage
		if err != nil || json.Unmarshal([]byte(out), &all) != nil || json.Unmarshal(all[slot], &a) != nil {
			t.Fatalf("%s: %s, %v", slot, out, err)
		}
		return a
	}
	roots := func() (n, tainted int) {
		t.Helper()
		out, err := g.cli(t, "bundle", "show", "-output", "json")
		var b struct {
			Authorities []struct {
				Tainted bool `json:"tainted"`
			} `json:"x509_authorities"`
		}
		if err != nil || json.Unmarshal([]byte(out), &b) != nil {
			t.Fatalf("bundle show: %s, %v", out, err)
		}
		for _, a := range b.Authorities {
			if a.Tainted {
				tainted++
			}
		}
		return len(b.Authorities), tainted
	}
	first := shown("active").Upstream
	for from, to := range map[string]string{next.cert: "upstream.pem", next.key: "upstream.key"} {
		text, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, to), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	prepared := g.authority(t, "prepared_authority", "x509", "prepare")
	if n, _ := roots(); n != 2 {
		t.Errorf("%d roots after it was prepared", n)
	}
	if got := shown("prepared"); got.ID != prepared || got.Upstream != hex.EncodeToString(next.ca.SubjectKeyId) {
		t.Errorf("prepared is %v", got)
	}
	if out, err := g.cli(t, "upstreamauthority", "taint", "-subjectKeyID", first); err == nil {
		t.Errorf("what is active was tainted: %s", out)
	}
	g.authority(t, "activated_authority", "x509", "activate", "-authorityID", prepared)
	if got := shown("old").Upstream; got != first {
		t.Errorf("old hangs on %s, want %s", got, first)
	}
	if out, err := g.cli(t, "localauthority", "x509", "taint", "-authorityID", shown("old").ID); err == nil || !strings.Contains(out+err.Error(), "local authority can't be tainted if there is an upstream authority") {
		t.Errorf("localauthority taint: %s, %v", out, err)
	}
	if out, err := g.cli(t, "upstreamauthority", "revoke", "-subjectKeyID", first); err == nil {
		t.Errorf("what is not tainted was revoked: %s", out)
	}
	if out, err := g.cli(t, "upstreamauthority", "taint", "-subjectKeyID", first); err != nil {
		t.Fatalf("upstreamauthority taint: %s, %v", out, err)
	}
	if n, tainted := roots(); n != 2 || tainted != 1 {
		t.Errorf("%d roots, %d of them tainted", n, tainted)
	}
	onlyNext := x509.NewCertPool()
	onlyNext.AddCert(next.ca)
	eventually(t, "an SVID that hangs on the new root", func() error {
		leaf, got, err := g.written(t)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(got, next.ca.Equal) {
			return errors.New("the bundle is without it")
		}
		if want := shown("active").ID; hex.EncodeToString(leaf.AuthorityKeyId) != want {
			return fmt.Errorf("it is signed by %x, want %s", leaf.AuthorityKeyId, want)
		}
		return nil
	})
	if out, err := g.cli(t, "upstreamauthority", "revoke", "-subjectKeyID", first); err != nil {
		t.Fatalf("upstreamauthority revoke: %s, %v", out, err)
	}
	eventually(t, "the new root alone", func() error {
		_, got, err := g.written(t)
		if err == nil && (len(got) != 1 || !got[0].Equal(next.ca)) {
			err = fmt.Errorf("%d roots", len(got))
		}
		return err
	})
}

// TestNestedRotation: what one of two servers below the same root publishes reaches the other, after that was
// restarted too; tokens and SVIDs of each verify at the other; and both follow a rotation of the root by force.
// With BLACKBOX_NESTED, only the server above ("above") or one of those below ("below") is SPIRE's.
func TestNestedRotation(t *testing.T) {
	alone(t)
	t.Parallel()
	// ours takes Assay's programs where the others are SPIRE's.
	ours := func(place string) func(*site.Site) {
		return func(s *site.Site) {
			if mix := os.Getenv("BLACKBOX_NESTED"); mix != "" && mix != place {
				s.SPIRE = site.SPIRE{}
			}
		}
	}
	top := serverAlone(t, ours("above"))
	g, above := field(t, top, "above", site.AgentOptions{})
	g.entry(t, "/below", func(e *types.Entry) { e.Downstream = true })
	g.api(t, "fetch", "x509")
	below := func(place string) *site.Site {
		return serverAlone(t, ours(place), func(s *site.Site) {
			// A number in quotes is one to us, and SPIRE wants a text.
			ours, spires := part("upstream_authority", "spire", "server_address = \"127.0.0.1\"\nserver_port = \"%d\"\nworkload_api_socket = %q", top.Port, above.Socket)
			with(s, ours, spires)
		})
	}
	left, right := below("below"), below("beside")
	atLeft, _ := field(t, left, "left", site.AgentOptions{})
	atRight, _ := field(t, right, "right", site.AgentOptions{})
	atLeft.entry(t, "/left", nil)
	atRight.entry(t, "/right", nil)
	for _, at := range []*target{atLeft, atRight} {
		at.api(t, "fetch", "x509")
	}

	check := func() {
		t.Helper()
		for from, to := range map[*target]*target{atLeft: atRight, atRight: atLeft} {
			out := from.api(t, "fetch", "jwt", "-audience", "all", "-output", "json")
			var answer []struct {
				SVIDs []struct {
					SVID string `json:"svid"`
				} `json:"svids"`
			}
			if err := json.Unmarshal([]byte(out), &answer); err != nil || len(answer) == 0 || len(answer[0].SVIDs) == 0 {
				t.Fatalf("%s: %v", out, err)
			}
			to.api(t, "validate", "jwt", "-audience", "all", "-svid", answer[0].SVIDs[0].SVID)
			leaf, roots, err := from.written(t)
			if err != nil || leaf == nil {
				t.Fatal(err)
			}
			_, others, err := to.written(t)
			if err != nil || len(roots) != 1 || len(others) != 1 || !roots[0].Equal(others[0]) {
				t.Errorf("%d and %d roots (%v), want the same one", len(roots), len(others), err)
			}
		}
	}
	check()
	if err := right.Stop(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := right.StartServer(ctx); err != nil {
		t.Fatal(err)
	}
	next := atLeft.authority(t, "prepared_authority", "jwt", "prepare")
	atLeft.authority(t, "activated_authority", "jwt", "activate", "-authorityID", next)
	for name, at := range map[string]*target{"above": g, "beside": atRight} {
		eventually(t, "the key "+name, func() error {
			out, err := at.cli(t, "bundle", "show", "-format", "spiffe")
			if err == nil && !strings.Contains(out, next) {
				err = errors.New("it is not in the bundle")
			}
			return err
		})
	}
	check()

	old := g.rotate(t, "x509")
	for _, at := range []*target{atLeft, atRight} {
		eventually(t, "an SVID that hangs on the new root", func() error {
			chain, _, err := at.chain(t)
			if err == nil && hex.EncodeToString(chain[len(chain)-1].AuthorityKeyId) == old {
				err = errors.New("it hangs on the old one")
			}
			return err
		})
	}
	g.authority(t, "revoked_authority", "x509", "revoke", "-authorityID", old)
	for _, at := range []*target{atLeft, atRight} {
		eventually(t, "the new root alone", func() error {
			_, roots, err := at.chain(t)
			if err == nil && (len(roots) != 1 || hex.EncodeToString(roots[0].SubjectKeyId) == old) {
				err = fmt.Errorf("%d roots", len(roots))
			}
			return err
		})
	}
	check()
}
