package compat

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

// stockAgent speaks to the server as SPIRE's agent does, and says what it is told to say.
type stockAgent struct {
	site *site.Site
	td   spiffeid.TrustDomain
	id   spiffeid.ID
	conn *grpc.ClientConn // with the agent's SVID
}

// anonymous returns a connection to the server's TCP port without a client certificate.
func (a *stockAgent) anonymous(t *testing.T) *grpc.ClientConn {
	t.Helper()
	return dial(t, a.site, tlsconfig.TLSClientConfig(bundleOf(t, a.site), tlsconfig.AuthorizeID(serverID(a.td))))
}

func serverID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromPath(td, "/spire/server")
}

func dial(t *testing.T, s *site.Site, config *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", s.Port), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func bundleOf(t *testing.T, s *site.Site) *x509bundle.Bundle {
	t.Helper()
	path, err := s.WriteBundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := x509bundle.Load(spiffeid.RequireTrustDomainFromString(site.TrustDomain), path)
	if err != nil {
		t.Fatal(err)
	}
	return bundle
}

func newCSR(t *testing.T, key *ecdsa.PrivateKey, uri string) []byte {
	t.Helper()
	template := &x509.CertificateRequest{Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}}
	if uri != "" {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// attest joins by token and returns the result.
func attest(ctx context.Context, conn *grpc.ClientConn, kind string, payload, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: kind, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the answer says why
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	return resp.GetResult(), stream.CloseSend()
}

func newStockAgent(t *testing.T, s *site.Site) *stockAgent {
	t.Helper()
	a := &stockAgent{site: s, td: spiffeid.RequireTrustDomainFromString(site.TrustDomain)}
	token, err := s.Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	result, err := attest(t.Context(), a.anonymous(t), "join_token", []byte(token), newCSR(t, key, ""))
	if err != nil {
		t.Fatal(err)
	}
	if result.GetReattestable() {
		t.Error("an agent that joined by token is said to be able to re-attest")
	}
	var chain []*x509.Certificate
	for _, der := range result.GetSvid().GetCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	a.id = spiffeid.RequireFromPath(a.td, result.GetSvid().GetId().GetPath())
	svid := &x509svid.SVID{ID: a.id, Certificates: chain, PrivateKey: key}
	a.conn = dial(t, s, tlsconfig.MTLSClientConfig(svid, bundleOf(t, s), tlsconfig.AuthorizeID(serverID(a.td))))
	return a
}

// agentMask is what SPIRE's agent asks for.
var agentMask = &types.EntryMask{
	SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true, RevisionNumber: true,
	StoreSvid: true, Hint: true, AdditionalAttributes: true, CreatedAt: true,
}

// syncAll does what SPIRE's agent does with SyncAuthorizedEntries, holding nothing before. It
// returns the entries and whether the first answer was of revisions.
func (a *stockAgent) syncAll(t *testing.T) (map[string]*types.Entry, bool) {
	t.Helper()
	stream, err := entryv1.NewEntryClient(a.conn).SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	recv := func() *entryv1.SyncAuthorizedEntriesResponse {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: agentMask}); err != nil {
		t.Fatal(err)
	}
	resp := recv()
	all := map[string]*types.Entry{}
	if len(resp.GetEntryRevisions()) == 0 {
		for _, e := range resp.GetEntries() {
			all[e.GetId()] = e
		}
		return all, false
	}
	page := len(resp.GetEntryRevisions())
	var ids []string
	for {
		for _, r := range resp.GetEntryRevisions() {
			ids = append(ids, r.GetId())
		}
		if !resp.GetMore() {
			break
		}
		resp = recv()
	}
	for chunk := range slices.Chunk(slices.Sorted(slices.Values(ids)), page) {
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: chunk}); err != nil {
			t.Fatal(err)
		}
		for more := true; more; {
			resp := recv()
			for _, e := range resp.GetEntries() {
				all[e.GetId()] = e
			}
			more = resp.GetMore()
		}
	}
	return all, true
}

func TestStockAgentSync(t *testing.T) {
	s := newSite(t, nil)
	agent := newStockAgent(t, s)
	client := entries(t, s)
	want := map[string]bool{}
	add := func(count int) {
		var batch []*types.Entry
		for range count {
			batch = append(batch, newEntry(agent.id.Path(), fmt.Sprintf("/w/%d", len(want)+len(batch))))
		}
		resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range resp.GetResults() {
			want[r.GetEntry().GetId()] = true
		}
	}
	createEntry(t, client, newEntry("/spire/agent/join_token/another", "/not-mine"))
	for _, c := range []struct {
		add       int
		revisions bool
	}{{add: 0}, {add: 1}, {add: 499}, {add: 1, revisions: true}, {add: 700, revisions: true}} {
		add(c.add)
		t.Run(fmt.Sprintf("%d entries", len(want)), func(t *testing.T) {
			got, revisions := agent.syncAll(t)
			if revisions != c.revisions {
				t.Errorf("the first answer was of revisions: %v", revisions)
			}
			if !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want))) {
				t.Errorf("got %d entries", len(got))
			}
			all, err := entryv1.NewEntryClient(agent.conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
			if err != nil || len(all.GetEntries()) != len(want) {
				t.Errorf("GetAuthorizedEntries: %d entries, %v", len(all.GetEntries()), err)
			}
		})
	}
}

func TestHostileAgent(t *testing.T) {
	s := newSite(t, nil)
	agent := newStockAgent(t, s)
	client := entries(t, s)
	mine := createEntry(t, client, newEntry(agent.id.Path(), "/mine"))
	other := createEntry(t, client, newEntry("/spire/agent/join_token/another", "/other"))
	signer := svidv1.NewSVIDClient(agent.conn)
	one := func(t *testing.T, entryID string, csr []byte) (*svidv1.BatchNewX509SVIDResponse_Result, error) {
		t.Helper()
		resp, err := signer.BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{
			Params: []*svidv1.NewX509SVIDParams{{EntryId: entryID, Csr: csr}}})
		if err != nil {
			return nil, err
		}
		return resp.GetResults()[0], nil
	}
	csr := newCSR(t, newKey(t), "")

	t.Run("an honest request is served", func(t *testing.T) {
		got, err := one(t, mine.GetId(), csr)
		if err != nil || got.GetStatus().GetCode() != 0 {
			t.Fatal(got, err)
		}
	})
	t.Run("a CSR that names somebody else gets the entry's ID and nothing more", func(t *testing.T) {
		got, err := one(t, mine.GetId(), newCSR(t, newKey(t), "spiffe://example.org/other"))
		if err != nil || got.GetStatus().GetCode() != 0 {
			t.Fatal(got, err)
		}
		leaf, err := x509.ParseCertificate(got.GetSvid().GetCertChain()[0])
		if err != nil {
			t.Fatal(err)
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/mine" {
			t.Fatalf("got a certificate for %v", leaf.URIs)
		}
	})
	t.Run("another agent's entry is not found", func(t *testing.T) {
		got, err := one(t, other.GetId(), csr)
		if err != nil {
			t.Fatal(err)
		}
		if c := codes.Code(got.GetStatus().GetCode()); c != codes.NotFound || got.GetSvid() != nil {
			t.Fatal(got)
		}
		_, err = signer.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: other.GetId(), Audience: []string{"a"}})
		if status.Code(err) != codes.NotFound {
			t.Fatal(err)
		}
	})
	t.Run("a CSR with a broken signature is refused", func(t *testing.T) {
		broken := bytes.Clone(csr)
		broken[len(broken)-1] ^= 1
		got, err := one(t, mine.GetId(), broken)
		if err != nil || codes.Code(got.GetStatus().GetCode()) != codes.InvalidArgument {
			t.Fatal(got, err)
		}
	})
	for name, call := range map[string]func(context.Context) error{
		"create entries": func(ctx context.Context) error {
			_, err := entryv1.NewEntryClient(agent.conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{})
			return err
		},
		"list entries": func(ctx context.Context) error {
			_, err := entryv1.NewEntryClient(agent.conn).ListEntries(ctx, &entryv1.ListEntriesRequest{})
			return err
		},
		"ban an agent": func(ctx context.Context) error {
			_, err := agentv1.NewAgentClient(agent.conn).BanAgent(ctx, &agentv1.BanAgentRequest{Id: &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: "/spire/agent/x"}})
			return err
		},
		"make a token": func(ctx context.Context) error {
			_, err := agentv1.NewAgentClient(agent.conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 60})
			return err
		},
		"mint": func(ctx context.Context) error {
			_, err := signer.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: newCSR(t, newKey(t), "spiffe://example.org/admin")})
			return err
		},
		"append to the bundle": func(ctx context.Context) error {
			_, err := bundlev1.NewBundleClient(agent.conn).AppendBundle(ctx, &bundlev1.AppendBundleRequest{})
			return err
		},
	} {
		t.Run("an agent may not "+name, func(t *testing.T) {
			if err := call(t.Context()); status.Code(err) != codes.PermissionDenied {
				t.Fatal(err)
			}
		})
	}
	t.Run("a used token is refused, also to many at once", func(t *testing.T) {
		token, err := s.Token(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conn := agent.anonymous(t)
		if _, err := attest(t.Context(), conn, "join_token", []byte(token), csr); err != nil {
			t.Fatal(err)
		}
		_, err = attest(t.Context(), conn, "join_token", []byte(token), csr)
		if status.Code(err) != codes.InvalidArgument || status.Convert(err).Message() != "failed to attest: join token does not exist or has already been used" {
			t.Fatal(err)
		}
	})
	t.Run("an unknown attestation type is refused by name", func(t *testing.T) {
		_, err := attest(t.Context(), agent.anonymous(t), "nope", []byte("x"), csr)
		if status.Code(err) != codes.FailedPrecondition {
			t.Fatal(err)
		}
	})
	t.Run("anybody may have the bundle, nobody without a certificate the entries", func(t *testing.T) {
		conn := agent.anonymous(t)
		if _, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
			t.Fatal(err)
		}
		_, err := entryv1.NewEntryClient(conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		if status.Code(err) != codes.PermissionDenied {
			t.Fatal(err)
		}
	})
}
