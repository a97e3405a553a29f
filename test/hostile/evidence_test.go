package hostile

import (
	"encoding/json"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/rules"
	"github.com/assay-id/assay/server/wire/evidencev1"
)

// anImage is a config digest.
const anImage = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// withEvidence makes a server judge images.
func withEvidence(t *testing.T) func(*server.Config) {
	t.Helper()
	policies, err := rules.ScanPolicies("test", []byte("scan_policy \"prod\" {\n  sources = [\"local\"]\n}\n"))
	if err != nil {
		t.Fatal(err)
	}
	return func(c *server.Config) { c.Evidence = &server.Evidence{Rules: verdict.Rules{Policies: policies}} }
}

// aReport is a clean one, as Trivy writes it.
func aReport() []byte {
	text, err := json.Marshal(map[string]any{
		"SchemaVersion": 2, "CreatedAt": time.Now().Format(time.RFC3339Nano), "ArtifactType": "container_image", "ArtifactName": "shop",
		"Metadata": map[string]any{"ImageID": anImage, "OS": map[string]any{"Family": "debian", "Name": "12"}},
		"Results":  []any{map[string]any{"Target": "x", "Class": "os-pkgs", "Packages": []any{map[string]any{"Name": "lib"}}}},
	})
	if err != nil {
		panic(err)
	}
	return text
}

// anException is one that can be made.
func anException(id string) *evidencev1.Exception {
	return &evidencev1.Exception{
		Id: id, Policy: "prod", Digest: anImage, Package: "lib", Vulnerability: "CVE-2026-1", Reason: "not reachable", Approver: "somebody",
		ExpiresAt: time.Now().Add(time.Hour).Unix(),
	}
}

// pushed makes an image known.
func (g *ground) pushed() {
	g.t.Helper()
	stream, err := evidencev1.NewEvidenceClient(g.as["local"]).Push(g.context())
	if err != nil {
		g.t.Fatal(err)
	}
	for _, m := range []*evidencev1.PushRequest{
		{Step: &evidencev1.PushRequest_Header{Header: &evidencev1.PushHeader{Image: "reg/shop@" + anImage}}},
		{Step: &evidencev1.PushRequest_Chunk{Chunk: aReport()}},
	} {
		if err := stream.Send(m); err != nil {
			break // CloseAndRecv says why
		}
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		g.t.Fatal(err)
	}
}

// about is a sample of a question about an image that is known.
func about(m proto.Message) sample {
	return call("admin", func(g *ground, _ []byte) proto.Message { g.pushed(); return m })
}

func init() {
	for method, s := range map[string]sample{
		"Push": {as: "admin", messages: []message{
			fixed(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Header{Header: &evidencev1.PushHeader{Image: "reg/shop@" + anImage}}}),
			func(*ground, []byte) proto.Message {
				return &evidencev1.PushRequest{Step: &evidencev1.PushRequest_Chunk{Chunk: aReport()}}
			},
		}},
		// No registry may be asked here; test/lab has one.
		"Collect":  {as: "admin", code: codes.InvalidArgument, messages: []message{fixed(&evidencev1.CollectRequest{Image: "reg/shop@" + anImage})}},
		"List":     call("admin", fixed(&evidencev1.ListRequest{PageSize: 3})),
		"Show":     about(&evidencev1.ShowRequest{Image: anImage}),
		"Explain":  about(&evidencev1.ExplainRequest{Image: anImage, Policy: "prod"}),
		"Simulate": call("admin", fixed(&evidencev1.SimulateRequest{Config: "scan_policy \"x\" {\n  sources = [\"local\"]\n}\n", File: "x.hcl"})),
		"PutException": call("admin", func(g *ground, _ []byte) proto.Message {
			return &evidencev1.PutExceptionRequest{Exception: anException(g.name())}
		}),
		"ListExceptions": call("admin", fixed(&evidencev1.ListExceptionsRequest{})),
		"DeleteException": call("admin", func(g *ground, _ []byte) proto.Message {
			made, err := evidencev1.NewEvidenceClient(g.as["local"]).PutException(g.context(), &evidencev1.PutExceptionRequest{Exception: anException(g.name())})
			if err != nil {
				g.t.Fatal(err)
			}
			return &evidencev1.DeleteExceptionRequest{Id: made.GetId()}
		}),
		"Release": call("admin", fixed(&evidencev1.ReleaseRequest{Policy: "prod"})),
		// No report is held here; server/verdict has tests with one.
		"Accept": {as: "admin", code: codes.NotFound, messages: []message{fixed(&evidencev1.AcceptRequest{Report: anImage, Reason: "x"})}},
	} {
		samples["/assay.evidence.v1.Evidence/"+method] = s
	}
}
