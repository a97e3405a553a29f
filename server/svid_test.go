package server

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
)

func TestBatchNewX509SVID(t *testing.T) {
	w := start(t)
	ctx := w.context()
	path, _, conn := w.agent("signer")
	otherPath, _, other := w.agent("other")
	mine := w.create(shop(func(e *types.Entry) { e.ParentId, e.X509SvidTtl = id(path), 60 }))
	theirs := w.create(shop(func(e *types.Entry) { e.ParentId = id(otherPath) }))
	client := svidv1.NewSVIDClient(conn)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	broken := csr(t, newKey(t))
	broken[len(broken)-1] ^= 1

	t.Run("answers are in the order of the questions, each with its status", func(t *testing.T) {
		cases := []struct {
			name string
			p    *svidv1.NewX509SVIDParams
			code codes.Code
			part string
		}{
			{"no entry ID", &svidv1.NewX509SVIDParams{Csr: csr(t, newKey(t))}, codes.InvalidArgument, "missing entry ID"},
			{"no CSR", &svidv1.NewX509SVIDParams{EntryId: mine.GetId()}, codes.InvalidArgument, "missing CSR"},
			{"a truncated CSR", &svidv1.NewX509SVIDParams{EntryId: mine.GetId(), Csr: broken[:30]}, codes.InvalidArgument, "malformed CSR"},
			{"a bad signature", &svidv1.NewX509SVIDParams{EntryId: mine.GetId(), Csr: broken}, codes.InvalidArgument, "malformed CSR"},
			{"RSA-1024", &svidv1.NewX509SVIDParams{EntryId: mine.GetId(), Csr: csr(t, weak)}, codes.InvalidArgument, "1024 bits"},
			{"an unknown entry", &svidv1.NewX509SVIDParams{EntryId: "nobody", Csr: csr(t, newKey(t))}, codes.NotFound, "entry not found or not authorized"},
			{"another agent's entry", &svidv1.NewX509SVIDParams{EntryId: theirs.GetId(), Csr: csr(t, newKey(t))}, codes.NotFound, "entry not found or not authorized"},
			{"nothing at all", nil, codes.InvalidArgument, "missing entry ID"},
			{"someone else's ID in the CSR", &svidv1.NewX509SVIDParams{EntryId: mine.GetId(), Csr: csr(t, newKey(t), "spiffe://example.org/admin")}, codes.OK, "OK"},
		}
		req := &svidv1.BatchNewX509SVIDRequest{}
		for _, c := range cases {
			req.Params = append(req.Params, c.p)
		}
		before := len(w.audit())
		resp, err := client.BatchNewX509SVID(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		lines := w.audit()[before:]
		for i, c := range cases {
			r := resp.GetResults()[i]
			if r.GetStatus().GetCode() != int32(c.code) || !strings.Contains(r.GetStatus().GetMessage(), c.part) || (c.code != codes.OK) != (r.GetSvid() == nil) {
				t.Errorf("%s: got %v", c.name, r)
			}
			if want := map[bool]string{true: "allow", false: "deny"}[c.code == codes.OK]; lines[i]["outcome"] != want || lines[i]["event"] != "svid.x509.new" {
				t.Errorf("%s: audit line %v", c.name, lines[i])
			}
		}
		leaf, err := x509.ParseCertificate(resp.GetResults()[8].GetSvid().GetCertChain()[0])
		if err != nil {
			t.Fatal(err)
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/shop" {
			t.Errorf("what was signed is not the entry's: %v", leaf.URIs)
		}
		if life := leaf.NotAfter.Sub(leaf.NotBefore); life != 70*time.Second {
			t.Errorf("it lives %s, want 60s and 10s before", life)
		}
	})
	t.Run("a batch has 1 to 500 questions", func(t *testing.T) {
		_, err := client.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{})
		refused(t, err, codes.InvalidArgument, "missing parameters")
		_, err = client.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: make([]*svidv1.NewX509SVIDParams, 501)})
		refused(t, err, codes.ResourceExhausted, "the limit is 500")
	})
	t.Run("an entry whose selectors or parent change is another agent's at once", func(t *testing.T) {
		moved := w.create(shop(func(e *types.Entry) { e.SpiffeId, e.ParentId = id("/moved"), id(path) }))
		sign := func(c svidv1.SVIDClient) int32 {
			resp, err := c.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: moved.GetId(), Csr: csr(t, newKey(t))}}})
			if err != nil {
				t.Fatal(err)
			}
			return resp.GetResults()[0].GetStatus().GetCode()
		}
		if code := sign(client); code != 0 {
			t.Errorf("before: code %d", code)
		}
		_, err := w.entries().BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{
			Entries: []*types.Entry{{Id: moved.GetId(), ParentId: id(otherPath)}}, InputMask: &types.EntryMask{ParentId: true},
		})
		if err != nil {
			t.Fatal(err)
		}
		if code := sign(client); code != int32(codes.NotFound) {
			t.Errorf("after: code %d", code)
		}
		if code := sign(svidv1.NewSVIDClient(other)); code != 0 {
			t.Errorf("the other, after: code %d", code)
		}
	})
	w.unharmed()
}

func TestNewJWTSVID(t *testing.T) {
	w := start(t)
	path, _, conn := w.agent("signer")
	mine := w.create(shop(func(e *types.Entry) { e.ParentId = id(path) }))
	client := svidv1.NewSVIDClient(conn)
	for _, c := range []struct {
		name string
		req  *svidv1.NewJWTSVIDRequest
		code codes.Code
		part string
	}{
		{"without an entry", &svidv1.NewJWTSVIDRequest{Audience: []string{"a"}}, codes.InvalidArgument, "missing entry ID"},
		{"without an audience", &svidv1.NewJWTSVIDRequest{EntryId: mine.GetId()}, codes.InvalidArgument, "at least one audience is required"},
		{"with an empty audience only", &svidv1.NewJWTSVIDRequest{EntryId: mine.GetId(), Audience: []string{""}}, codes.InvalidArgument, "at least one audience is required"},
		{"with too many audiences", &svidv1.NewJWTSVIDRequest{EntryId: mine.GetId(), Audience: make([]string, 101)}, codes.InvalidArgument, "the limit is 100"},
		{"for an unknown entry", &svidv1.NewJWTSVIDRequest{EntryId: "nobody", Audience: []string{"a"}}, codes.NotFound, "entry not found or not authorized"},
	} {
		t.Run("a token "+c.name+" is refused", func(t *testing.T) {
			_, err := client.NewJWTSVID(w.context(), c.req)
			refused(t, err, c.code, c.part)
			if line := w.lastAudit("svid.jwt.new"); line["outcome"] != "deny" {
				t.Errorf("audit line %v", line)
			}
		})
	}
	t.Run("none is signed where they are off", func(t *testing.T) {
		w := start(t, func(c *Config) { c.CA.DisableJWT = true })
		_, err := w.svids().MintJWTSVID(w.context(), &svidv1.MintJWTSVIDRequest{Id: id("/x"), Audience: []string{"a"}})
		refused(t, err, codes.Unimplemented, "JWT functionality is disabled")
	})
}

func TestMint(t *testing.T) {
	w := start(t)
	ctx := w.context()
	key := newKey(t)
	for _, c := range []struct {
		name string
		uris []string
		ttl  int32
		part string
	}{
		{"without an ID", nil, 0, "CSR URI SAN is required"},
		{"with two IDs", []string{"spiffe://example.org/a", "spiffe://example.org/b"}, 0, "only one URI SAN is expected"},
		{"with something that is no SPIFFE ID", []string{"https://example.org/a"}, 0, "CSR URI SAN is invalid"},
		{"with a foreign ID", []string{"spiffe://elsewhere.test/a"}, 0, "not a member"},
		{"with the server's ID", []string{"spiffe://example.org/spire/server"}, 0, "reserved"},
		{"with an agent's ID", []string{"spiffe://example.org/spire/agent/x"}, 0, "reserved"},
		{"with the trust domain's ID", []string{"spiffe://example.org"}, 0, "path is empty"},
		{"with a negative TTL", []string{"spiffe://example.org/a"}, -1, "invalid TTL"},
	} {
		t.Run("an X509-SVID "+c.name+" is refused", func(t *testing.T) {
			_, err := w.svids().MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(t, key, c.uris...), Ttl: c.ttl})
			refused(t, err, codes.InvalidArgument, c.part)
			if line := w.lastAudit("svid.x509.mint"); line["outcome"] != "deny" || line["caller"] != "local" {
				t.Errorf("audit line %v", line)
			}
		})
	}
	t.Run("an X509-SVID is signed as asked", func(t *testing.T) {
		resp, err := w.svids().MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(t, key, "spiffe://example.org/minted"), Ttl: 120})
		if err != nil || resp.GetSvid().GetId().GetPath() != "/minted" {
			t.Fatalf("got %v, %v", resp, err)
		}
		leaf, err := x509.ParseCertificate(resp.GetSvid().GetCertChain()[0])
		if err != nil || leaf.NotAfter.Unix() != resp.GetSvid().GetExpiresAt() || time.Until(leaf.NotAfter) > 121*time.Second {
			t.Errorf("got %v, %v", leaf, err)
		}
		if line := w.lastAudit("svid.x509.mint"); line["serial"] != leaf.SerialNumber.String() || line["outcome"] != "allow" {
			t.Errorf("audit line %v", line)
		}
	})
	t.Run("a JWT-SVID is signed as asked", func(t *testing.T) {
		resp, err := w.svids().MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: id("/minted"), Audience: []string{"a"}, Ttl: 60})
		if err != nil || strings.Count(resp.GetSvid().GetToken(), ".") != 2 || resp.GetSvid().GetExpiresAt()-resp.GetSvid().GetIssuedAt() != 60 {
			t.Errorf("got %v, %v", resp, err)
		}
		for _, line := range w.audit() {
			if strings.Contains(fmt.Sprint(line), resp.GetSvid().GetToken()) {
				t.Error("the token is in the audit log")
			}
		}
	})
	t.Run("a JWT-SVID of a reserved ID is refused", func(t *testing.T) {
		_, err := w.svids().MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: id("/spire/server"), Audience: []string{"a"}})
		refused(t, err, codes.InvalidArgument, "reserved")
	})
}

func TestNoLineNoCertificate(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("there is no /dev/full to stand for a full disk")
	}
	dir := t.TempDir()
	link := filepath.Join(dir, "audit.log")
	if err := os.Symlink("/dev/full", link); err != nil {
		t.Fatal(err)
	}
	w := start(t, func(c *Config) { c.AuditPath = link })
	ctx := w.context()
	resp, err := w.svids().MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr(t, newKey(t), "spiffe://example.org/a")})
	refused(t, err, codes.Unavailable, "audit log cannot be written")
	if resp != nil {
		t.Error("a certificate was given out")
	}
	if w.running.Ready() == nil || w.running.Live() != nil {
		t.Errorf("ready %v, live %v", w.running.Ready(), w.running.Live())
	}
	if _, _, err := w.attest("honest", []byte("unseen"), ""); err == nil {
		t.Error("an agent was admitted")
	}
	// What would change something is refused before it does.
	_, err = w.entries().BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{shop()}})
	refused(t, err, codes.Unavailable, "audit log cannot be written")
	_, err = w.agents().CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 1})
	refused(t, err, codes.Unavailable, "audit log cannot be written")
	if got := w.running.Ready(); got == nil {
		t.Error("it is ready again without a line")
	}
}
