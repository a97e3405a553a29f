package spire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	_ "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1" // what is linked is called by name
	_ "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	_ "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// The transcripts in testdata/messages are what a spire-server of v1.15.3 was asked, and what it answered,
// message by message:
//
//	== what this is about
//	admin agent.CountAgents {"filter":{"by_banned":true}}
//	= {"count":1}
//	! why Assay answers something else, if it does
//	~ {"count":2}
//
// The first word of a question is who asks: local (the private socket), anyone (TCP, without a certificate),
// agent/TOKEN (an agent that an earlier question attested) or a path, whose SVID is minted. Answers are written
// with names in the place of what is another at each run (words_test.go).
//
// realAgent says whether agents are SPIRE's; servers may be ours then, or the other way round.
func realAgent() bool { return os.Getenv("BLACKBOX_AGENT") != "" }

// TestMessages plays them to Assay; with BLACKBOX_SERVER alone it plays them to the spire-server of that path,
// and with BLACKBOX_RECORD too it writes down what that answers.

// question is one call of a transcript.
type question struct {
	title, who, method, request string
	line                        int
	want                        string // SPIRE's answer
	why, ours                   string // Assay's, if it is another, and the reason
}

// transcript reads a file of testdata/messages.
func transcript(t *testing.T, path string) []*question {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []*question
	title := ""
	for n, line := range strings.Split(string(text), "\n") {
		mark, rest, _ := strings.Cut(line, " ")
		var last *question
		if len(all) > 0 {
			last = all[len(all)-1]
		}
		switch mark {
		case "", "#":
		case "==":
			title = rest
		case "=":
			last.want = rest
		case "!":
			last.why = rest
		case "~":
			last.ours = rest
		default:
			method, request, ok := strings.Cut(rest, " ")
			if !ok {
				t.Fatalf("%s:%d: want WHO SERVICE.METHOD REQUEST", path, n+1)
			}
			all = append(all, &question{title: title, who: mark, method: method, request: request, line: n + 1})
		}
	}
	for _, q := range all {
		if (q.why == "") != (q.ours == "") {
			t.Errorf("%s:%d: a difference wants a reason, and a reason a difference", path, q.line)
		}
	}
	return all
}

// record writes the answers of a spire-server into a transcript.
func record(t *testing.T, path string, answers map[int]string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for n, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(line, "= ") {
			continue
		}
		out = append(out, line)
		if answer, ok := answers[n+1]; ok {
			out = append(out, "= "+answer)
		}
	}
	if err := os.WriteFile(path, []byte(strings.Join(out, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
}

func transcripts(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/messages/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("find the transcripts: %v, %v", files, err)
	}
	return files
}

// descriptor finds a method by its service's and its own name.
func descriptor(t *testing.T, name string) protoreflect.MethodDescriptor {
	t.Helper()
	service, method, _ := strings.Cut(name, ".")
	for _, m := range methods() {
		if string(m.Name()) == method && strings.HasPrefix(string(m.FullName()), "spire.api.server."+service+".") {
			return m
		}
	}
	t.Fatalf("there is no method %q", name)
	return nil
}

// methods are all of SPIRE's server.
func methods() []protoreflect.MethodDescriptor {
	var all []protoreflect.MethodDescriptor
	protoregistry.GlobalFiles.RangeFilesByPackage("spire.api.server", func(protoreflect.FileDescriptor) bool { return true })
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if strings.HasPrefix(string(f.Package()), "spire.api.server.") {
			for i := range f.Services().Len() {
				for j := range f.Services().Get(i).Methods().Len() {
					all = append(all, f.Services().Get(i).Methods().Get(j))
				}
			}
		}
		return true
	})
	slices.SortFunc(all, func(a, b protoreflect.MethodDescriptor) int {
		return strings.Compare(string(a.FullName()), string(b.FullName()))
	})
	return all
}

func fullMethod(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
}

func message(t *testing.T, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return kind.New().Interface()
}

// ask makes the call of a question and returns its answer in words.
func (w *words) ask(t *testing.T, q *question) string {
	t.Helper()
	m := descriptor(t, q.method)
	conn := w.conn(t, q.who)
	text := w.fill(t, q.request)
	if !m.IsStreamingClient() {
		in, out := message(t, m.Input()), message(t, m.Output())
		if err := protojson.Unmarshal([]byte(text), in); err != nil {
			t.Fatalf("line %d: %v", q.line, err)
		}
		err := conn.Invoke(t.Context(), fullMethod(m), in, out)
		if err != nil {
			return w.refusal(err)
		}
		w.note(t, q, out)
		return w.text(t, out)
	}
	var requests []json.RawMessage
	if err := json.Unmarshal([]byte(text), &requests); err != nil {
		t.Fatalf("line %d: %v", q.line, err)
	}
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, fullMethod(m))
	if err != nil {
		return w.refusal(err)
	}
	var answers []string
	receive := func() error {
		out := message(t, m.Output())
		err := stream.RecvMsg(out)
		switch {
		case errors.Is(err, io.EOF):
			return err
		case err != nil:
			answers = append(answers, w.refusal(err))
			return err
		}
		w.note(t, q, out)
		answers = append(answers, w.text(t, out))
		return nil
	}
	for _, request := range requests {
		in := message(t, m.Input())
		if err := protojson.Unmarshal(request, in); err != nil {
			t.Fatalf("line %d: %v", q.line, err)
		}
		_ = stream.SendMsg(in) // if it cannot be sent, there is an answer that says why
		if receive() != nil {
			return strings.Join(answers, " ; ")
		}
	}
	_ = stream.CloseSend()
	for receive() == nil {
	}
	if len(answers) == 0 {
		return "nothing"
	}
	return strings.Join(answers, " ; ")
}

func (w *words) refusal(err error) string {
	st := status.Convert(err)
	text := fmt.Sprintf("%s: %s", st.Code(), w.plain(st.Message()))
	for _, d := range st.Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			text += " [" + d.GetReason().String() + "]"
		}
	}
	return text
}

// isReal says whether it is SPIRE that is asked.
func isReal() bool { return os.Getenv("BLACKBOX_SERVER") != "" }

// TestMessages plays every transcript to a server of its own.
func TestMessages(t *testing.T) {
	if isReal() && os.Getenv("BLACKBOX_SERVER_SOCKET") != "" {
		t.Skip("a server that others use is left alone")
	}
	for _, path := range transcripts(t) {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			t.Parallel()
			w := newWords(t, serverAlone(t))
			answers := map[int]string{}
			for _, q := range transcript(t, path) {
				if isReal() {
					w.settle(q)
				}
				got := w.ask(t, q)
				answers[q.line] = got
				want := q.want
				if !isReal() && q.ours != "" {
					want = q.ours
				}
				if got != want && os.Getenv("BLACKBOX_RECORD") == "" {
					t.Errorf("%s:%d: %s: %s as %s\nwant %s\ngot  %s", path, q.line, q.title, q.method, q.who, want, got)
				}
			}
			if isReal() && os.Getenv("BLACKBOX_RECORD") != "" {
				record(t, path, answers)
			}
		})
	}
}

// settle waits for SPIRE's caches, which answer what was true seconds ago.
func (w *words) settle(q *question) {
	_, method, _ := strings.Cut(q.method, ".")
	switch {
	case q.who != "local" && q.who != "anyone" && w.changed:
		w.changed = false
		time.Sleep(6 * time.Second)
	case strings.HasPrefix(q.method, "bundle.Get"), strings.HasPrefix(q.method, "svid.NewDownstream"):
		time.Sleep(1100 * time.Millisecond)
	case strings.HasPrefix(method, "Batch"), method == "AttestAgent", method == "CreateJoinToken":
		w.changed = true
	}
}

// TestTranscriptsCoverTheAPI says what of SPIRE's API no transcript asks for or has answered.
func TestTranscriptsCoverTheAPI(t *testing.T) {
	asked, seen := map[string]bool{}, map[string]bool{}
	for _, path := range transcripts(t) {
		for _, q := range transcript(t, path) {
			m := descriptor(t, q.method)
			asked[string(m.FullName())] = true
			for _, text := range []string{q.request} {
				fieldsOf(text, m.Input(), asked)
			}
			for _, text := range []string{q.want, q.ours} {
				for answer := range strings.SplitSeq(text, " ; ") {
					fieldsOf(answer, m.Output(), seen)
				}
			}
		}
	}
	for _, m := range methods() {
		if !asked[string(m.FullName())] {
			t.Errorf("no transcript asks %s", m.FullName())
		}
		missing := map[string]bool{}
		missed(m.Input(), asked, missing, map[protoreflect.FullName]bool{})
		for _, name := range slices.Sorted(maps.Keys(missing)) {
			if unasked[name] == "" {
				t.Errorf("%s: no transcript gives %s", m.FullName(), name)
			}
		}
		missing = map[string]bool{}
		missed(m.Output(), seen, missing, map[protoreflect.FullName]bool{})
		for _, name := range slices.Sorted(maps.Keys(missing)) {
			if unseen[name] == "" {
				t.Errorf("%s: no transcript is answered with %s", m.FullName(), name)
			}
		}
	}
}

// fieldsOf notes which fields a message in JSON has, however deep.
func fieldsOf(text string, d protoreflect.MessageDescriptor, into map[string]bool) {
	var raw any
	if json.NewDecoder(bytes.NewReader([]byte(text))).Decode(&raw) != nil {
		return
	}
	var walk func(v any, d protoreflect.MessageDescriptor)
	walk = func(v any, d protoreflect.MessageDescriptor) {
		switch v := v.(type) {
		case []any:
			for _, one := range v {
				walk(one, d)
			}
		case map[string]any:
			for key, value := range v {
				f := d.Fields().ByName(protoreflect.Name(key))
				if f == nil {
					continue
				}
				into[string(f.FullName())] = true
				if f.Message() != nil {
					walk(value, f.Message())
				}
			}
		}
	}
	walk(raw, d)
}

// missed collects the fields below a message that are not among those that were had.
func missed(d protoreflect.MessageDescriptor, had, missing map[string]bool, been map[protoreflect.FullName]bool) {
	if been[d.FullName()] || d.ParentFile().Package() == "google.protobuf" {
		return
	}
	been[d.FullName()] = true
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		if !had[string(f.FullName())] {
			missing[string(f.FullName())] = true
		}
		if f.Message() != nil {
			missed(f.Message(), had, missing, been)
		}
	}
}

const unbuilt = "SPIRE has not built it; ours is in test/compat's TestWIT and the tests of server"

// unasked and unseen are what no transcript has, and why.
var (
	unasked = map[string]string{}
	unseen  = map[string]string{
		"spire.api.server.debug.v1.GetInfoResponse.uptime": "another at each call",

		"spire.api.server.agent.v1.AttestAgentResponse.challenge":           "join tokens ask none: TestNodeReattestation",
		"spire.api.server.agent.v1.AttestAgentResponse.Result.reattestable": "a join token is used once: TestNodeReattestation",
		"spire.api.types.Agent.can_reattest":                                "TestNodeReattestation",
		"spire.api.types.Agent.selectors":                                   "TestNodeReattestation",

		"spire.api.server.entry.v1.EntryRevision.created_at":                      "TestPagesOfEntries",
		"spire.api.server.entry.v1.EntryRevision.id":                              "TestPagesOfEntries",
		"spire.api.server.entry.v1.EntryRevision.revision_number":                 "TestPagesOfEntries",
		"spire.api.server.entry.v1.SyncAuthorizedEntriesResponse.entry_revisions": "TestPagesOfEntries",
		"spire.api.server.entry.v1.SyncAuthorizedEntriesResponse.more":            "TestPagesOfEntries",

		"spire.api.server.localauthority.v1.AuthorityState.upstream_authority_subject_key_id":                      "TestForcedUpstreamRotation",
		"spire.api.server.localauthority.v1.RevokeX509UpstreamAuthorityResponse.upstream_authority_subject_key_id": "TestForcedUpstreamRotation",
		"spire.api.server.localauthority.v1.TaintX509UpstreamAuthorityResponse.upstream_authority_subject_key_id":  "TestForcedUpstreamRotation",

		"spire.api.server.bundle.v1.PublishWITAuthorityResponse.wit_authorities":              unbuilt,
		"spire.api.server.localauthority.v1.ActivateWITAuthorityResponse.activated_authority": unbuilt,
		"spire.api.server.localauthority.v1.GetWITAuthorityStateResponse.active":              unbuilt,
		"spire.api.server.localauthority.v1.GetWITAuthorityStateResponse.old":                 unbuilt,
		"spire.api.server.localauthority.v1.GetWITAuthorityStateResponse.prepared":            unbuilt,
		"spire.api.server.localauthority.v1.PrepareWITAuthorityResponse.prepared_authority":   unbuilt,
		"spire.api.server.localauthority.v1.RevokeWITAuthorityResponse.revoked_authority":     unbuilt,
		"spire.api.server.localauthority.v1.TaintWITAuthorityResponse.tainted_authority":      unbuilt,
		"spire.api.server.svid.v1.BatchNewWITSVIDResponse.Result.svid":                        unbuilt,
		"spire.api.server.svid.v1.MintWITSVIDResponse.svid":                                   unbuilt,
		"spire.api.types.WITKey.tainted":                                                      unbuilt,
		"spire.api.types.WITSVID.expires_at":                                                  unbuilt,
		"spire.api.types.WITSVID.hint":                                                        unbuilt,
		"spire.api.types.WITSVID.id":                                                          unbuilt,
		"spire.api.types.WITSVID.issued_at":                                                   unbuilt,
		"spire.api.types.WITSVID.token":                                                       unbuilt,
	}
)

// codeName is how a transcript writes the status of an item.
func codeName(code any) string {
	n, ok := code.(float64)
	if !ok {
		return fmt.Sprint(code)
	}
	return codes.Code(uint32(n)).String()
}
