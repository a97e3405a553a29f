package server

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/wire/evidencev1"
)

// grants are roles as a test gives them.
type grants struct {
	svid, token, unix []*caller.Role
}

func (g *grants) SVID(id spiffeid.ID) []*caller.Role {
	if strings.HasPrefix(id.Path(), "/team/") {
		return g.svid
	}
	return nil
}

func (g *grants) Token(_ context.Context, token string) (string, []*caller.Role, error) {
	if token != "good" {
		return "", nil, errors.New("no good")
	}
	return "https://login.test ann", g.token, nil
}

func (g *grants) Unix(uint32, uint32) ([]*caller.Role, bool) { return g.unix, g.unix != nil }

var shopRole = &caller.Role{
	Name: "shop", Verbs: []string{"entry:read", "entry:write", "svid:mint", "token:create", "bundle:write"}, Paths: []string{"/shop"}, Parents: []string{"/node"}, DNSNames: []string{"*.shop.test"},
	Selectors: []attestor.Selector{{Type: "k8s", Value: "ns:shop"}},
}

// minted returns a connection with a minted SVID.
func (w *world) minted(path string) *grpc.ClientConn {
	w.t.Helper()
	key := newKey(w.t)
	resp, err := w.svids().MintX509SVID(w.context(), &svidv1.MintX509SVIDRequest{Csr: csr(w.t, key, "spiffe://example.org"+path)})
	if err != nil {
		w.t.Fatal(err)
	}
	return w.dial(&tls.Certificate{Certificate: resp.GetSvid().GetCertChain(), PrivateKey: key})
}

func shopEntry(name string, change func(e *types.Entry)) *types.Entry {
	e := &types.Entry{SpiffeId: id("/shop/" + name), ParentId: id("/node"), Selectors: selectors("k8s:ns:shop", "k8s:sa:"+name)}
	if change != nil {
		change(e)
	}
	return e
}

func TestRolesLimitWhatAnAdministratorMayDo(t *testing.T) {
	w := start(t, func(c *Config) {
		c.Roles = &grants{svid: []*caller.Role{shopRole}, token: []*caller.Role{shopRole}}
		c.CA.WIT = true
	})
	bank := w.create(&types.Entry{SpiffeId: id("/bank"), ParentId: id("/node"), Selectors: selectors("k8s:ns:bank")})
	conn := w.minted("/team/shop")
	entries := entryv1.NewEntryClient(conn)
	status := func(t *testing.T, s *types.Status, code codes.Code) {
		t.Helper()
		if codes.Code(s.GetCode()) != code {
			t.Errorf("got %v, want %s", s, code)
		}
	}
	create := func(t *testing.T, e *types.Entry, code codes.Code) *types.Entry {
		t.Helper()
		resp, err := entries.BatchCreateEntry(w.context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
		if err != nil {
			t.Fatal(err)
		}
		status(t, resp.GetResults()[0].GetStatus(), code)
		return resp.GetResults()[0].GetEntry()
	}
	mine := create(t, shopEntry("till", nil), codes.OK)
	t.Run("the audit line names the role", func(t *testing.T) {
		if line := w.lastAudit("entry.create"); line["caller"] != "spiffe://example.org/team/shop as shop" {
			t.Errorf("audit line %v", line)
		}
	})
	for name, c := range map[string]struct {
		beyond string
		change func(e *types.Entry)
	}{
		"another path":         {"path /bank/x", func(e *types.Entry) { e.SpiffeId = id("/bank/x") }},
		"another parent":       {"parent /spire/agent/x", func(e *types.Entry) { e.ParentId = id("/spire/agent/x") }},
		"a foreign DNS name":   {"DNS names bank.test", func(e *types.Entry) { e.DnsNames = []string{"a.shop.test", "bank.test"} }},
		"without the selector": {"selectors k8s:sa:x", func(e *types.Entry) { e.Selectors = selectors("k8s:sa:x") }},
		"an administrator":     {"admin", func(e *types.Entry) { e.Admin = true }},
		"a downstream server":  {"downstream", func(e *types.Entry) { e.Downstream = true }},
	} {
		t.Run("an entry for "+name+" is refused, and the audit line alone says why", func(t *testing.T) {
			resp, err := entries.BatchCreateEntry(w.context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{shopEntry("x", c.change)}})
			if err != nil {
				t.Fatal(err)
			}
			got := resp.GetResults()[0].GetStatus()
			if status(t, got, codes.PermissionDenied); got.GetMessage() != "it is outside of the caller's roles" {
				t.Errorf("the caller is told %q", got.GetMessage())
			}
			want := "it is outside of the caller's roles (not in role shop: its " + c.beyond + ")"
			if line := w.denied(t, "entry.create"); line["reason"] != want {
				t.Errorf("audit line %v, want %q", line, want)
			}
		})
	}
	t.Run("an entry that is in the way is not shown if it is another's", func(t *testing.T) {
		if e := create(t, shopEntry("x", func(e *types.Entry) { e.Id = bank.GetId() }), codes.AlreadyExists); e != nil {
			t.Errorf("it is: %v", e)
		}
	})
	t.Run("nor is one that is alike, and more than the role may give", func(t *testing.T) {
		w.create(shopEntry("boss", func(e *types.Entry) { e.Admin = true }))
		if e := create(t, shopEntry("boss", nil), codes.AlreadyExists); e != nil {
			t.Errorf("it is: %v", e)
		}
	})
	t.Run("lists and counts show what is within, page by page", func(t *testing.T) {
		list, err := entries.ListEntries(w.context(), &entryv1.ListEntriesRequest{PageSize: 1})
		if err != nil || len(list.GetEntries()) != 1 || list.GetEntries()[0].GetId() != mine.GetId() {
			t.Errorf("got %v, %v", list, err)
		}
		count, err := entries.CountEntries(w.context(), &entryv1.CountEntriesRequest{})
		if err != nil || count.GetCount() != 1 {
			t.Errorf("got %v, %v", count, err)
		}
		_, err = entries.GetEntry(w.context(), &entryv1.GetEntryRequest{Id: bank.GetId()})
		refused(t, err, codes.NotFound, "entry not found")
	})
	t.Run("another's entry can be neither changed nor deleted, nor one's own be moved out", func(t *testing.T) {
		stolen := shopEntry("x", func(e *types.Entry) { e.Id = bank.GetId() })
		moved := shopEntry("till", func(e *types.Entry) { e.Id, e.SpiffeId = mine.GetId(), id("/bank") })
		resp, err := entries.BatchUpdateEntry(w.context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{stolen, moved}})
		if err != nil {
			t.Fatal(err)
		}
		status(t, resp.GetResults()[0].GetStatus(), codes.NotFound)
		status(t, resp.GetResults()[1].GetStatus(), codes.PermissionDenied)
		if got := resp.GetResults()[0].GetStatus().GetMessage(); got != "failed to update entry" {
			t.Errorf("the caller is told %q", got)
		}
		if line := w.denied(t, "entry.update"); line["reason"] != "it is outside of the caller's roles (not in role shop: its path /bank)" {
			t.Errorf("audit line %v", line)
		}
		gone, err := entries.BatchDeleteEntry(w.context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{bank.GetId(), mine.GetId(), "none"}})
		if err != nil {
			t.Fatal(err)
		}
		for i, code := range []codes.Code{codes.NotFound, codes.OK, codes.NotFound} {
			status(t, gone.GetResults()[i].GetStatus(), code)
		}
		if _, err := w.entries().GetEntry(w.context(), &entryv1.GetEntryRequest{Id: bank.GetId()}); err != nil {
			t.Error(err)
		}
	})
	t.Run("tokens are made for aliases within", func(t *testing.T) {
		agents := agentv1.NewAgentClient(conn)
		if _, err := agents.CreateJoinToken(w.context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: id("/shop/node")}); err != nil {
			t.Error(err)
		}
		_, err := agents.CreateJoinToken(w.context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: id("/bank/node")})
		refused(t, err, codes.PermissionDenied, "outside of the caller's roles")
	})
	t.Run("what is no verb of the role is refused", func(t *testing.T) {
		_, err := agentv1.NewAgentClient(conn).ListAgents(w.context(), &agentv1.ListAgentsRequest{})
		refused(t, err, codes.PermissionDenied, "authorization denied for method")
	})
	t.Run("a bundle is not deleted together with others' entries", func(t *testing.T) {
		_, err := bundlev1.NewBundleClient(conn).BatchDeleteFederatedBundle(w.context(), &bundlev1.BatchDeleteFederatedBundleRequest{
			TrustDomains: []string{"other.test"}, Mode: bundlev1.BatchDeleteFederatedBundleRequest_DELETE,
		})
		refused(t, err, codes.PermissionDenied, "mode restrict only")
	})
	t.Run("an SVID without a role may do nothing", func(t *testing.T) {
		_, err := entryv1.NewEntryClient(w.minted("/other")).ListEntries(w.context(), &entryv1.ListEntriesRequest{})
		refused(t, err, codes.PermissionDenied, "authorization denied for method")
	})
	t.Run("a token gives the role, and a bad one nothing", func(t *testing.T) {
		plain := entryv1.NewEntryClient(w.dial(nil))
		with := func(text string) context.Context {
			return metadata.AppendToOutgoingContext(w.context(), "authorization", text)
		}
		if _, err := plain.ListEntries(with("Bearer good"), &entryv1.ListEntriesRequest{}); err != nil {
			t.Error(err)
		}
		if line := w.lastAudit("entry.list"); line["caller"] != "https://login.test ann as shop" {
			t.Errorf("audit line %v", line)
		}
		for _, text := range []string{"Bearer bad", "Basic good", "good", ""} {
			_, err := plain.ListEntries(with(text), &entryv1.ListEntriesRequest{})
			refused(t, err, codes.PermissionDenied, "authorization denied for method")
		}
	})
	t.Run("the audit line of a refusal says whose the token is, or what is wrong with it", func(t *testing.T) {
		plain := agentv1.NewAgentClient(w.dial(nil))
		for token, want := range map[string][2]string{
			"good": {"https://login.test ann as shop", "authorization denied for method /spire.api.server.agent.v1.Agent/ListAgents"},
			"bad":  {"anyone", "authorization denied for method /spire.api.server.agent.v1.Agent/ListAgents; its token is refused: "},
		} {
			_, err := plain.ListAgents(metadata.AppendToOutgoingContext(w.context(), "authorization", "Bearer "+token), &agentv1.ListAgentsRequest{})
			refused(t, err, codes.PermissionDenied, "authorization denied for method")
			if strings.Contains(err.Error(), "token") {
				t.Errorf("the caller is told %v", err)
			}
			line := w.lastAudit("call.refuse")
			if reason, _ := line["reason"].(string); line["caller"] != want[0] || !strings.HasPrefix(reason, want[1]) || (token == "good") != (reason == want[1]) {
				t.Errorf("%s: audit line %v", token, line)
			}
		}
	})
	t.Run("administrators stay what they are", func(t *testing.T) {
		if _, err := w.agents().ListAgents(w.context(), &agentv1.ListAgentsRequest{}); err != nil {
			t.Error(err)
		}
	})
}

func TestARoleSeesOfAnImageWhatIsWithin(t *testing.T) {
	reader := &caller.Role{Name: "reader", Verbs: []string{"evidence:read"}, Paths: []string{"/shop"}}
	w := start(t, withEvidence(t, `scan_policy "prod" {
  sources = ["local"]
}`), func(c *Config) { c.Roles = &grants{svid: []*caller.Role{reader}} })
	for _, path := range []string{"/shop/till", "/bank"} {
		w.create(&types.Entry{SpiffeId: id(path), ParentId: id("/node"), Selectors: selectors("unix:uid:1", "scan:policy:prod")})
	}
	if _, err := w.push(scanned(t, time.Now())); err != nil {
		t.Fatal(err)
	}
	see := func(t *testing.T, conn grpc.ClientConnInterface) (shown, told string) {
		t.Helper()
		evidence := evidencev1.NewEvidenceClient(conn)
		whole, err := evidence.Show(w.context(), &evidencev1.ShowRequest{Image: image})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range whole.GetEntries() {
			shown += e.GetSpiffeId() + " "
		}
		story, err := evidence.Explain(w.context(), &evidencev1.ExplainRequest{Image: image})
		if err != nil {
			t.Fatal(err)
		}
		return shown, strings.Join(story.GetLines(), "\n")
	}
	t.Run("an administrator sees every entry that demands evidence", func(t *testing.T) {
		shown, told := see(t, w.local)
		for _, text := range []string{shown, told} {
			if !strings.Contains(text, "example.org/bank") || !strings.Contains(text, "example.org/shop/till") {
				t.Error(text)
			}
		}
	})
	t.Run("a role sees those within its paths", func(t *testing.T) {
		shown, told := see(t, w.minted("/team/shop"))
		for _, text := range []string{shown, told} {
			if strings.Contains(text, "bank") || !strings.Contains(text, "example.org/shop/till") {
				t.Error(text)
			}
		}
	})
}

// One way to mint that forgot the paths would be a way around all the others.
func TestEveryWayToMintIsBoundByTheRolesPaths(t *testing.T) {
	w := start(t, func(c *Config) { c.Roles = &grants{svid: []*caller.Role{shopRole}}; c.CA.WIT = true })
	conn := w.minted("/team/shop")
	key := newKey(t)
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	ways := map[string]func(path string) proto.Message{
		"MintX509SVID": func(path string) proto.Message {
			return &svidv1.MintX509SVIDRequest{Csr: csr(t, key, "spiffe://example.org"+path)}
		},
		"MintJWTSVID": func(path string) proto.Message {
			return &svidv1.MintJWTSVIDRequest{Id: id(path), Audience: []string{"a"}}
		},
		"MintWITSVID": func(path string) proto.Message {
			return &svidv1.MintWITSVIDRequest{Id: id(path), PublicKey: public, SigningAlgorithm: "ES256"}
		},
	}
	for _, method := range svidv1.SVID_ServiceDesc.Methods {
		name := "/" + svidv1.SVID_ServiceDesc.ServiceName + "/" + method.MethodName
		if caller.Verb(name) != "svid:mint" {
			continue
		}
		t.Run(method.MethodName, func(t *testing.T) {
			way := ways[method.MethodName]
			if way == nil {
				t.Fatal("it is not tried here")
			}
			if err := conn.Invoke(w.context(), name, way("/shop/a"), &emptypb.Empty{}); err != nil {
				t.Errorf("within the paths: %v", err)
			}
			err := conn.Invoke(w.context(), name, way("/bank"), &emptypb.Empty{})
			refused(t, err, codes.PermissionDenied, "outside of the caller's roles")
			line := w.lastAudit(map[string]string{"MintX509SVID": "svid.x509.mint", "MintJWTSVID": "svid.jwt.mint", "MintWITSVID": "svid.wit.mint"}[method.MethodName])
			if reason, _ := line["reason"].(string); !strings.Contains(reason, "not in role shop: its path /bank") || strings.Contains(err.Error(), "/bank") {
				t.Errorf("the caller is told %v, the audit line is %v", err, line)
			}
		})
	}
}

func TestNamesInMintedCertificatesAreTheRolesToGive(t *testing.T) {
	bankRole := &caller.Role{Name: "bank", Verbs: []string{"svid:mint", "entry:write"}, Paths: []string{"/bank"}, DNSNames: []string{"*.bank.test"}}
	w := start(t, func(c *Config) { c.Roles = &grants{svid: []*caller.Role{shopRole, bankRole}} })
	conn := w.minted("/team/both")
	key := newKey(t)
	for name, c := range map[string]struct {
		path, common string
		names        []string
		within       bool
	}{
		"no name":                                   {path: "/shop/a", within: true},
		"a name of the role's":                      {path: "/shop/a", names: []string{"a.shop.test"}, within: true},
		"a name that is nobody's":                   {path: "/shop/a", names: []string{"a.shop.test", "evil.test"}},
		"a common name of the role's":               {path: "/shop/a", common: "a.shop.test", within: true},
		"a common name that is nobody's":            {path: "/shop/a", common: "evil.test"},
		"a path of one role, a name of the other":   {path: "/shop/a", names: []string{"a.bank.test"}},
		"a path of one, a common name of the other": {path: "/bank/a", common: "a.shop.test"},
	} {
		t.Run("a certificate with "+name, func(t *testing.T) {
			der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
				Subject: pkix.Name{CommonName: c.common}, DNSNames: c.names, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: c.path}},
			}, key)
			if err != nil {
				t.Fatal(err)
			}
			_, err = svidv1.NewSVIDClient(conn).MintX509SVID(w.context(), &svidv1.MintX509SVIDRequest{Csr: der})
			if c.within && err != nil {
				t.Error(err)
			}
			if !c.within {
				refused(t, err, codes.PermissionDenied, "outside of the caller's roles")
			}
		})
	}
}
