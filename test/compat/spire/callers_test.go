package spire

import (
	"fmt"
	"os"
	"strings"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab/site"
)

const callersFile = "testdata/callers.txt"

// TestCallers asks every method as everybody there is, and compares who is let in with what a spire-server of
// v1.15.3 said.
func TestCallers(t *testing.T) {
	if os.Getenv("BLACKBOX_SERVER_SOCKET") != "" {
		t.Skip("a server that others use is left alone")
	}
	t.Parallel()
	w := newWords(t, serverAlone(t))
	resp, err := entryv1.NewEntryClient(w.local).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
		callerEntry("/admin", &types.Entry{Admin: true}), callerEntry("/downstream", &types.Entry{Downstream: true}), callerEntry("/workload", &types.Entry{}),
	}})
	if err != nil || len(resp.GetResults()) != 3 {
		t.Fatalf("make the entries: %v, %v", resp, err)
	}
	ask := func(who, method, request string) { w.ask(t, &question{who: who, method: method, request: request}) }
	ask("local", "agent.CreateJoinToken", `{"ttl":600,"token":"one"}`)
	ask("anyone", "agent.AttestAgent", `[{"params":{"data":{"type":"join_token","payload":"${b64 one}"},"params":{"csr":"${csr }"}}}]`)
	if isReal() {
		w.changed = true
		w.settle(&question{who: "agent/one"})
	}
	var lines []string
	for _, m := range methods() {
		line := fullMethod(m)[1:] + ":"
		for _, who := range []string{"local", "/admin", "agent/one", "/downstream", "/workload", "anyone"} {
			stream, err := w.conn(t, who).NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, fullMethod(m))
			if err == nil {
				if !m.IsStreamingClient() {
					_ = stream.SendMsg(message(t, m.Input())) // if it cannot be sent, there is an answer that says why
				}
				_ = stream.CloseSend()
				err = stream.RecvMsg(message(t, m.Output()))
			}
			text := status.Convert(err).Message()
			switch {
			case status.Code(err) == codes.PermissionDenied && strings.HasPrefix(text, "authorization denied for method"):
			case status.Code(err) == codes.Unimplemented && strings.HasPrefix(text, "unknown service"):
			default:
				line += " " + who
			}
		}
		lines = append(lines, line)
	}
	got := strings.Join(lines, "\n") + "\n"
	if isReal() && os.Getenv("BLACKBOX_RECORD") != "" {
		if err := os.WriteFile(callersFile, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(callersFile)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		wants := strings.Split(string(want), "\n")
		for i, line := range lines {
			if i >= len(wants) || line != wants[i] {
				t.Errorf("%s\nis not among those who are let in:\n%s", line, want)
			}
		}
	}
}

// callerEntry is an entry that makes somebody of a caller.
func callerEntry(path string, e *types.Entry) *types.Entry {
	id := func(path string) *types.SPIFFEID { return &types.SPIFFEID{TrustDomain: site.TrustDomain, Path: path} }
	e.SpiffeId, e.ParentId = id(path), id("/host")
	e.Selectors = []*types.Selector{{Type: "a", Value: fmt.Sprint(path)}}
	return e
}
