// Package spire replays what SPIRE's own integration suites show, as black-box cases through the public API
// and the command line only: what holds of SPIRE holds of Assay.
//
// By itself it starts a server and an agent of ours. It can be pointed at a running SPIRE, whose agent has
// attested and whose unix workload attestor is on, by all of these environment variables:
//
//	BLACKBOX_SERVER         the server's command, as spire-server
//	BLACKBOX_AGENT          the agent's command, as spire-agent
//	BLACKBOX_SERVER_SOCKET  the server's private socket
//	BLACKBOX_AGENT_SOCKET   the Workload API's socket
//	BLACKBOX_ADDRESS        the server's TCP address
//	BLACKBOX_TRUST_DOMAIN   the trust domain
//
// It makes entries below /blackbox and deletes them again. With the two commands alone, BLACKBOX_SERVER and
// BLACKBOX_AGENT, it starts servers and agents of that SPIRE as it starts ours, and plays everything to them. With one
// of the two, the suites are played to SPIRE's servers with our agents, or to ours with SPIRE's agents.
package spire

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

const patience = 90 * time.Second

// target is what the cases are played against.
type target struct {
	server, agent             string // commands
	serverSocket, agentSocket string
	address, domain           string
	agentID                   *types.SPIFFEID
	conn                      *grpc.ClientConn // the private socket
}

// newTarget starts ours, or finds what the environment names.
func newTarget(t *testing.T) *target {
	t.Helper()
	g := &target{
		server: os.Getenv("BLACKBOX_SERVER"), agent: os.Getenv("BLACKBOX_AGENT"),
		serverSocket: os.Getenv("BLACKBOX_SERVER_SOCKET"), agentSocket: os.Getenv("BLACKBOX_AGENT_SOCKET"),
		address: os.Getenv("BLACKBOX_ADDRESS"), domain: os.Getenv("BLACKBOX_TRUST_DOMAIN"),
	}
	if g.serverSocket == "" { // of ours, or of the SPIRE whose programs are named
		g, _ := field(t, serverAlone(t), "agent", site.AgentOptions{})
		return g
	}
	conn, err := grpc.NewClient("unix://"+g.serverSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	g.conn = conn
	g.agentID = onlyAgent(t, g)
	return g
}

func (g *target) id(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: g.domain, Path: "/blackbox" + path}
}

func (g *target) text(id *types.SPIFFEID) string {
	return "spiffe://" + id.GetTrustDomain() + id.GetPath()
}

// cli runs a command of the server.
func (g *target) cli(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return site.Run(t.Context(), nil, g.server, append(args, "-socketPath", g.serverSocket)...)
}

// api runs a command of the agent, until it goes well.
func (g *target) api(t *testing.T, args ...string) string {
	t.Helper()
	var out string
	eventually(t, strings.Join(args, " "), func() (err error) {
		out, err = site.Run(t.Context(), nil, g.agent, append(append([]string{"api"}, args...), "-socketPath", g.agentSocket)...)
		return err
	})
	return out
}

// eventually asks until there is no error.
func eventually(t *testing.T, what string, ask func() error) {
	t.Helper()
	every(t, 100*time.Millisecond, what, ask)
}

// every is eventually with a pause.
func every(t *testing.T, pause time.Duration, what string, ask func() error) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("wait for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

// entry makes an entry for the processes of this user, which is deleted with the test.
func (g *target) entry(t *testing.T, path string, change func(e *types.Entry)) *types.Entry {
	t.Helper()
	e := &types.Entry{SpiffeId: g.id(path), ParentId: g.agentID, Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}}}
	if change != nil {
		change(e)
	}
	made, s := g.create(t, e)
	if codes.Code(s.GetCode()) != codes.OK {
		t.Fatalf("create entry: %v", s)
	}
	t.Cleanup(func() {
		_, _ = entryv1.NewEntryClient(g.conn).BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: []string{made.GetId()}})
	})
	return made
}

func (g *target) create(t *testing.T, e *types.Entry) (*types.Entry, *types.Status) {
	t.Helper()
	resp, err := entryv1.NewEntryClient(g.conn).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetResults()[0].GetEntry(), resp.GetResults()[0].GetStatus()
}

// minted returns a connection to the server's TCP port with a minted SVID, or without one for "".
func (g *target) minted(t *testing.T, id *types.SPIFFEID) *grpc.ClientConn {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(g.domain)
	b, err := bundlev1.NewBundleClient(g.conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	bundle := x509bundle.New(td)
	for _, a := range b.GetX509Authorities() {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			t.Fatal(err)
		}
		bundle.AddX509Authority(cert)
	}
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, "/spire/server")))
	if id != nil {
		key, der := csr(t, g.text(id))
		resp, err := svidv1.NewSVIDClient(g.conn).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: der})
		if err != nil {
			t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{{Certificate: resp.GetSvid().GetCertChain(), PrivateKey: key}}
	}
	conn, err := grpc.NewClient(g.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func csr(t *testing.T, ids ...string) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{}
	for _, text := range ids {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

func code(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestSPIRE(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	t.Run("entries", g.entries)
	t.Run("fetch-x509-svids", g.fetchX509)
	t.Run("fetch-jwt-svids", g.fetchJWT)
	t.Run("admin-endpoints", g.adminEndpoints)
	t.Run("downstream-endpoints", g.downstreamEndpoints)
	t.Run("debug-endpoints", g.debugEndpoints)
	t.Run("join-token", g.joinToken)
	t.Run("force-rotation-jwt-authority", g.forceRotationJWT)
	t.Run("force-rotation-self-signed", g.forceRotationX509)
	t.Run("evict-agent", g.evictAgent)
}

// entries: what is similar is found, what is wrong is refused item by item, and revisions go up.
func (g *target) entries(t *testing.T) {
	client := entryv1.NewEntryClient(g.conn)
	made := g.entry(t, "/entries/a", func(e *types.Entry) { e.Hint = "outer" })
	again, s := g.create(t, &types.Entry{SpiffeId: made.GetSpiffeId(), ParentId: made.GetParentId(), Selectors: made.GetSelectors()})
	if codes.Code(s.GetCode()) != codes.AlreadyExists || again.GetId() != made.GetId() {
		t.Errorf("a similar entry: %v, %v", s, again)
	}
	for name, change := range map[string]func(e *types.Entry){
		"of another trust domain": func(e *types.Entry) { e.SpiffeId = &types.SPIFFEID{TrustDomain: "elsewhere.test", Path: "/a"} },
		"without selectors":       func(e *types.Entry) { e.Selectors = nil },
		"without a path":          func(e *types.Entry) { e.SpiffeId = &types.SPIFFEID{TrustDomain: g.domain} },
		"with a negative TTL":     func(e *types.Entry) { e.X509SvidTtl = -1 },
	} {
		e := &types.Entry{SpiffeId: g.id("/entries/bad"), ParentId: g.agentID, Selectors: made.GetSelectors()}
		change(e)
		if _, s := g.create(t, e); codes.Code(s.GetCode()) != codes.InvalidArgument {
			t.Errorf("an entry %s: %v", name, s)
		}
	}
	made.DnsNames = []string{"a.test"}
	resp, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{made}, InputMask: &types.EntryMask{DnsNames: true}})
	if err != nil || resp.GetResults()[0].GetEntry().GetRevisionNumber() != made.GetRevisionNumber()+1 || resp.GetResults()[0].GetEntry().GetHint() != "outer" {
		t.Errorf("an update of the DNS names: %v, %v", resp, err)
	}
	for hint, want := range map[string]int32{"outer": 1, "inner": 0} {
		out, err := g.cli(t, "entry", "count", "-hint", hint, "-spiffeID", g.text(made.GetSpiffeId()), "-output", "json")
		var count struct {
			Count int32 `json:"count"`
		}
		if err != nil || json.Unmarshal([]byte(out), &count) != nil || count.Count != want {
			t.Errorf("entries with hint %q: %s, %v", hint, out, err)
		}
	}
	gone, err := client.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{made.GetId(), "nobody-knows"}})
	if err != nil || gone.GetResults()[0].GetStatus().GetCode() != 0 || codes.Code(gone.GetResults()[1].GetStatus().GetCode()) != codes.NotFound {
		t.Errorf("deletion: %v, %v", gone, err)
	}
}

// fetch-x509-svids: as many SVIDs as entries match, and a workload that matches none is refused.
func (g *target) fetchX509(t *testing.T) {
	var ids []string
	for i := range 3 {
		ids = append(ids, g.text(g.entry(t, fmt.Sprintf("/fetch/%d", i), nil).GetSpiffeId()))
	}
	eventually(t, "all SVIDs", func() error {
		out := g.api(t, "fetch", "x509")
		for _, id := range ids {
			if !strings.Contains(out, "SPIFFE ID:\t\t"+id+"\n") {
				return fmt.Errorf("%s is not in %s", id, out)
			}
		}
		return nil
	})
}

// fetch-jwt-svids: what is fetched validates for its audience, and for no other.
func (g *target) fetchJWT(t *testing.T) {
	id := g.text(g.entry(t, "/jwt", nil).GetSpiffeId())
	out := g.api(t, "fetch", "jwt", "-audience", "here", "-spiffeID", id)
	_, rest, _ := strings.Cut(out, "token("+id+"):\n\t")
	token, _, found := strings.Cut(rest, "\n")
	if !found {
		t.Fatalf("there is no token in %s", out)
	}
	if out := g.api(t, "validate", "jwt", "-audience", "here", "-svid", token); !strings.Contains(out, "SVID is valid.") || !strings.Contains(out, id) {
		t.Errorf("validation says %s", out)
	}
	if out, err := site.Run(t.Context(), nil, g.agent, "api", "validate", "jwt", "-audience", "there", "-svid", token, "-socketPath", g.agentSocket); err == nil {
		t.Errorf("it validates for another audience: %s", out)
	}
}

// admin-endpoints: an entry with admin makes an administrator of its SVID, over TCP; any other does not.
func (g *target) adminEndpoints(t *testing.T) {
	admin := g.entry(t, "/admin", func(e *types.Entry) { e.Admin = true })
	g.entry(t, "/plain", nil)
	for _, c := range []struct {
		name string
		id   *types.SPIFFEID
		want codes.Code
	}{{"an administrator", admin.GetSpiffeId(), codes.OK}, {"a workload", g.id("/plain"), codes.PermissionDenied}, {"nobody", nil, codes.PermissionDenied}} {
		t.Run(c.name, func(t *testing.T) {
			conn := g.minted(t, c.id)
			_, err := agentv1.NewAgentClient(conn).CountAgents(t.Context(), &agentv1.CountAgentsRequest{})
			code(t, err, c.want)
			_, err = entryv1.NewEntryClient(conn).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
			code(t, err, c.want)
			_, err = bundlev1.NewBundleClient(conn).ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{})
			code(t, err, c.want)
			_, err = bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			code(t, err, codes.OK)
			_, err = entryv1.NewEntryClient(conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
			code(t, err, codes.PermissionDenied)
		})
	}
}

// downstream-endpoints: an entry with downstream gets a CA and publishes keys; no administrator does.
func (g *target) downstreamEndpoints(t *testing.T) {
	down := g.entry(t, "/downstream", func(e *types.Entry) { e.Downstream = true })
	admin := g.entry(t, "/admin", func(e *types.Entry) { e.Admin = true })
	_, request := csr(t, "spiffe://"+g.domain)
	resp, err := svidv1.NewSVIDClient(g.minted(t, down.GetSpiffeId())).NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: request})
	if err != nil || len(resp.GetCaCertChain()) == 0 || len(resp.GetX509Authorities()) == 0 {
		t.Fatalf("got %v, %v", resp, err)
	}
	if ca, err := x509.ParseCertificate(resp.GetCaCertChain()[0]); err != nil || !ca.IsCA || !slices.ContainsFunc(ca.URIs, func(u *url.URL) bool { return u.String() == "spiffe://"+g.domain }) {
		t.Errorf("the CA is %v, %v", ca, err)
	}
	_, err = svidv1.NewSVIDClient(g.minted(t, admin.GetSpiffeId())).NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: request})
	code(t, err, codes.PermissionDenied)
}

// debug-endpoints: for callers of the private socket only.
func (g *target) debugEndpoints(t *testing.T) {
	info, err := debugv1.NewDebugClient(g.conn).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	if err != nil || info.GetAgentsCount() < 1 || len(info.GetSvidChain()) == 0 {
		t.Errorf("got %v, %v", info, err)
	}
	_, err = debugv1.NewDebugClient(g.minted(t, nil)).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	if c := status.Code(err); c != codes.Unimplemented && c != codes.PermissionDenied {
		t.Errorf("over TCP: %v", err)
	}
}

// join-token: good once, and with its alias.
func (g *target) joinToken(t *testing.T) {
	out, err := g.cli(t, "token", "generate", "-spiffeID", g.text(g.id("/node")))
	if err != nil {
		t.Fatal(err)
	}
	token := strings.Fields(out)[1]
	attest := func() error {
		_, der := csr(t)
		stream, err := agentv1.NewAgentClient(g.minted(t, nil)).AttestAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
			Data: &types.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentv1.AgentX509SVIDParams{Csr: der},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		return err
	}
	code(t, attest(), codes.OK)
	err = attest()
	code(t, err, codes.InvalidArgument)
	if !strings.Contains(status.Convert(err).Message(), "join token does not exist or has already been used") {
		t.Errorf("the second time: %v", err)
	}
	agent := "spiffe://" + g.domain + "/spire/agent/join_token/" + token
	if out, err := g.cli(t, "agent", "show", "-spiffeID", agent); err != nil || !strings.Contains(out, agent) {
		t.Errorf("agent show: %s, %v", out, err)
	}
	if out, err := g.cli(t, "entry", "show", "-parentID", agent); err != nil || !strings.Contains(out, g.text(g.id("/node"))) {
		t.Errorf("the alias: %s, %v", out, err)
	}
	if out, err := g.cli(t, "agent", "evict", "-spiffeID", agent); err != nil {
		t.Errorf("agent evict: %s, %v", out, err)
	}
}

// authority returns the ID of an authority that a command's JSON tells of.
func (g *target) authority(t *testing.T, state string, args ...string) string {
	t.Helper()
	out, err := g.cli(t, append(append([]string{"localauthority"}, args...), "-output", "json")...)
	if err != nil {
		t.Fatal(err)
	}
	var answer map[string]json.RawMessage
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	var a struct {
		ID string `json:"authority_id"`
	}
	if err := json.Unmarshal(answer[state], &a); err != nil || a.ID == "" {
		t.Fatalf("there is no %s in %s: %v", state, out, err)
	}
	return a.ID
}

// rotate replaces an authority by force: prepare, activate, taint the old, revoke it.
func (g *target) rotate(t *testing.T, kind string) (old string) {
	t.Helper()
	first := g.authority(t, "active", kind, "show")
	next := g.authority(t, "prepared_authority", kind, "prepare")
	if out, err := g.cli(t, "localauthority", kind, "taint", "-authorityID", first); err == nil {
		t.Errorf("the active authority was tainted: %s", out)
	}
	if got := g.authority(t, "activated_authority", kind, "activate", "-authorityID", next); got != next {
		t.Errorf("activated %s, want %s", got, next)
	}
	if got := g.authority(t, "active", kind, "show"); got != next {
		t.Errorf("active is %s, want %s", got, next)
	}
	if got := g.authority(t, "tainted_authority", kind, "taint", "-authorityID", first); got != first {
		t.Errorf("tainted %s, want %s", got, first)
	}
	return first
}

// force-rotation-jwt-authority: tokens are of the new key, and the old one leaves the bundle.
func (g *target) forceRotationJWT(t *testing.T) {
	id := g.text(g.entry(t, "/rotated", nil).GetSpiffeId())
	g.api(t, "fetch", "jwt", "-audience", "a", "-spiffeID", id)
	old := g.rotate(t, "jwt")
	g.authority(t, "revoked_authority", "jwt", "revoke", "-authorityID", old)
	eventually(t, "the old key to leave the bundle of workloads", func() error {
		out := g.api(t, "fetch", "jwt", "-audience", "a", "-spiffeID", id)
		if strings.Contains(out, old) {
			return fmt.Errorf("it is in %s", out)
		}
		return nil
	})
}

// force-rotation-self-signed: workloads are given SVIDs of the new authority, and the old one goes.
func (g *target) forceRotationX509(t *testing.T) {
	g.entry(t, "/rotated", nil)
	g.api(t, "fetch", "x509")
	old := g.rotate(t, "x509")
	g.authority(t, "revoked_authority", "x509", "revoke", "-authorityID", old)
	eventually(t, "one authority at the workload", func() error {
		if out := g.api(t, "fetch", "x509"); strings.Contains(out, "CA #2") {
			return fmt.Errorf("there is more than one in %s", out)
		}
		return nil
	})
}

// evict-agent: one that is evicted and cannot attest again serves no new SVIDs. It is the last case.
func (g *target) evictAgent(t *testing.T) {
	if os.Getenv("BLACKBOX_SERVER_SOCKET") != "" {
		t.Log("an agent that is not ours is left alone")
		return
	}
	if out, err := g.cli(t, "agent", "evict", "-spiffeID", g.text(g.agentID)); err != nil || !strings.Contains(out, "Agent evicted successfully") {
		t.Errorf("agent evict: %s, %v", out, err)
	}
	_, err := agentv1.NewAgentClient(g.conn).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: g.agentID})
	code(t, err, codes.NotFound)
}
