package server

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/rules"
	"github.com/assay-id/assay/server/wire/evidencev1"
)

// withEvidence configures a scan policy.
func withEvidence(t *testing.T, text string) func(*Config) {
	t.Helper()
	policies, err := rules.ScanPolicies("test", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return func(c *Config) {
		c.Evidence = &Evidence{Rules: verdict.Rules{Policies: policies}, CRLAddress: "127.0.0.1:0", CRLPath: filepath.Join(t.TempDir(), "crl.pem")}
	}
}

// scanned is a report on the image as Trivy writes it.
func scanned(t *testing.T, at time.Time, critical ...string) []byte {
	t.Helper()
	var list []any
	for _, id := range critical {
		list = append(list, map[string]any{"VulnerabilityID": id, "PkgName": "lib", "InstalledVersion": "1", "Severity": "CRITICAL"})
	}
	text, err := json.Marshal(map[string]any{
		"SchemaVersion": 2, "CreatedAt": at.Format(time.RFC3339Nano), "ArtifactType": "container_image", "ArtifactName": "shop",
		"Metadata": map[string]any{"ImageID": image, "OS": map[string]any{"Family": "debian", "Name": "12"}},
		"Results":  []any{map[string]any{"Target": "x", "Class": "os-pkgs", "Packages": []any{map[string]any{"Name": "lib"}}, "Vulnerabilities": list}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// push pushes a document over the local socket, in two pieces.
func (w *world) push(content []byte) (*evidencev1.PushResponse, error) {
	w.t.Helper()
	stream, err := evidencev1.NewEvidenceClient(w.local).Push(w.context())
	if err != nil {
		return nil, err
	}
	for _, m := range []*evidencev1.PushRequest{
		{Step: &evidencev1.PushRequest_Header{Header: &evidencev1.PushHeader{Image: "reg/shop@" + image}}},
		{Step: &evidencev1.PushRequest_Chunk{Chunk: content[:len(content)/2]}},
		{Step: &evidencev1.PushRequest_Chunk{Chunk: content[len(content)/2:]}},
	} {
		if err := stream.Send(m); err != nil {
			break
		}
	}
	return stream.CloseAndRecv()
}

func TestWhatIsPushedDecidesAndRevokes(t *testing.T) {
	w := start(t, withEvidence(t, `scan_policy "prod" {
  sources = ["local"]
  on_fail = "withdraw+revoke"
}`))
	path, _, conn := w.agent("node")
	e := w.create(shop(func(e *types.Entry) {
		e.ParentId, e.Selectors = id(path), selectors("unix:uid:1000", "scan:policy:prod")
	}))
	sign := func() *svidv1.BatchNewX509SVIDResponse_Result {
		t.Helper()
		resp, err := svidv1.NewSVIDClient(conn).BatchNewX509SVID(w.context(), &svidv1.BatchNewX509SVIDRequest{
			Params: []*svidv1.NewX509SVIDParams{{EntryId: e.GetId(), Csr: csr(t, newKey(t))}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetResults()[0]
	}
	pushed, err := w.push(scanned(t, time.Now()))
	if err != nil {
		t.Fatal(err)
	}
	if v := pushed.GetImages()[0].GetVerdicts(); len(v) != 1 || v[0].GetStatus() != "pass" || !v[0].GetAllowed() {
		t.Fatalf("got %v", pushed)
	}
	agent := w.report(conn, image)
	r := sign()
	if r.GetStatus().GetCode() != 0 {
		t.Fatal(r.GetStatus())
	}
	cert, err := x509.ParseCertificate(r.GetSvid().GetCertChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if time.Until(cert.NotAfter) > 11*time.Minute {
		t.Errorf("it lives until %s, longer than svid_ttl_max", cert.NotAfter)
	}
	t.Run("before anything is revoked there are lists already, and they are empty", func(t *testing.T) {
		b, err := w.running.Records.Bundle(w.context(), td)
		if err != nil || len(b.CRLs) != 1 {
			t.Fatalf("%d lists, %v", len(b.CRLs), err)
		}
		if list, err := x509.ParseRevocationList(b.CRLs[0]); err != nil || len(list.RevokedCertificateEntries) != 0 {
			t.Errorf("%v, %v", list, err)
		}
	})
	if _, err := w.push(scanned(t, time.Now(), "CVE-2026-1")); err != nil {
		t.Fatal(err)
	}
	t.Run("the agent is told at once", func(t *testing.T) {
		for {
			if v := agent.next(); v != nil && len(v.GetPolicies()) == 1 && v.GetPolicies()[0].GetStatus() == "fail" {
				return
			}
		}
	})
	t.Run("renewal is refused", func(t *testing.T) {
		if r := sign(); r.GetStatus().GetCode() != int32(codes.FailedPrecondition) {
			t.Errorf("got %v", r.GetStatus())
		}
	})
	t.Run("what it holds is on the list of revoked certificates", func(t *testing.T) {
		resp, err := http.Get("http://" + w.running.CRL.String() + "/crl")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		der, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			t.Fatalf("%s: %v", resp.Status, err)
		}
		found := false
		for _, one := range list.RevokedCertificateEntries {
			found = found || one.SerialNumber.Cmp(cert.SerialNumber) == 0
		}
		if !found || list.Number.Cmp(big.NewInt(1)) < 0 {
			t.Errorf("number %s lists %d certificates, and not this one", list.Number, len(list.RevokedCertificateEntries))
		}
		b, err := w.running.Records.Bundle(w.context(), td)
		if err != nil {
			t.Fatal(err)
		}
		if len(b.CRLs) == 0 || string(b.CRLs[0]) != string(der) {
			t.Error("the bundle carries another list")
		}
		if err := list.CheckSignatureFrom(b.X509[len(b.X509)-1].Certificate); err != nil {
			t.Error(err)
		}
	})
	t.Run("the audit log says why", func(*testing.T) {
		if line := w.lastAudit("verdict.change"); line["finding"] != "CVE-2026-1" || line["policy"] != "prod" || line["outcome"] != "deny" {
			t.Errorf("%v", line)
		}
		if line := w.lastAudit("svid.x509.revoke"); line["serial"] != cert.SerialNumber.String() {
			t.Errorf("%v", line)
		}
	})
	w.unharmed()
}

func TestStrangersPushNothing(t *testing.T) {
	w := start(t, withEvidence(t, `scan_policy "prod" {
  sources = ["local"]
}`))
	_, _, agent := w.agent("node")
	for name, c := range map[string]struct {
		conn  evidencev1.EvidenceClient
		token string
		want  codes.Code
	}{
		"without a certificate":      {evidencev1.NewEvidenceClient(w.dial(nil)), "", codes.Unauthenticated},
		"with an agent's SVID":       {evidencev1.NewEvidenceClient(agent), "", codes.PermissionDenied},
		"with a token of no issuer":  {evidencev1.NewEvidenceClient(w.dial(nil)), "Bearer a.b.c", codes.PermissionDenied},
		"with another kind of token": {evidencev1.NewEvidenceClient(w.dial(nil)), "Basic eDp5", codes.Unauthenticated},
		"with a token of alg none": {evidencev1.NewEvidenceClient(w.dial(nil)),
			"Bearer eyJhbGciOiJub25lIn0.eyJpc3MiOiJodHRwczovL2NpLmV4YW1wbGUub3JnIn0.", codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := w.context()
			if c.token != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, "authorization", c.token)
			}
			stream, err := c.conn.Push(ctx)
			if err != nil {
				t.Fatal(err)
			}
			header := &evidencev1.PushHeader{Image: image}
			_ = stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Header{Header: header}})
			_, err = stream.CloseAndRecv()
			refused(t, err, c.want, "")
			_, err = c.conn.List(ctx, &evidencev1.ListRequest{})
			refused(t, err, codes.PermissionDenied, "")
		})
	}
	w.unharmed()
}

func TestADocumentThatIsTooLargeIsRefusedAsItComes(t *testing.T) {
	w := start(t, withEvidence(t, `scan_policy "prod" {
  sources = ["local"]
}`))
	stream, err := evidencev1.NewEvidenceClient(w.local).Push(w.context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Header{Header: &evidencev1.PushHeader{Image: image}}}); err != nil {
		t.Fatal(err)
	}
	chunk := make([]byte, 1<<20)
	for range 40 {
		if stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Chunk{Chunk: chunk}}) != nil {
			break
		}
	}
	_, err = stream.CloseAndRecv()
	refused(t, err, codes.InvalidArgument, fmt.Sprintf("larger than %d MiB", 32))
	if n, err := w.counts("assay_server_evidence_rejected_total", "reason"); err != nil || n["too-large"] != 1 {
		t.Errorf("counted as refused: %v, %v", n, err)
	}
	if line := w.lastAudit("evidence.push"); line["outcome"] != "deny" {
		t.Errorf("the audit log says %v", line)
	}
	w.unharmed()
}
