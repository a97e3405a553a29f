package spire

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3" // what is linked is called by name
	_ "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	_ "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	_ "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	_ "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	_ "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	_ "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/assay-id/assay/test/lab/site"
)

const agentMessages = "testdata/agent-messages.txt"

// asked are the services that agent-messages.txt asks, by the words that it has for them.
var asked = map[string]protoreflect.FullName{
	"workload":   "SpiffeWorkloadAPI",
	"secrets":    "envoy.service.secret.v3.SecretDiscoveryService",
	"health":     "grpc.health.v1.Health",
	"reflection": "grpc.reflection.v1.ServerReflection",
	"delegated":  "spire.api.agent.delegatedidentity.v1.DelegatedIdentity",
	"debug":      "spire.agent.debug.v1.Debug",
	"logger":     "spire.api.agent.logger.v1.Logger",
}

// agentWire is who asks in agent-messages.txt: $ is a question, and the other marks are agentShell's.
type agentWire struct {
	*agentShell
	conns map[string]*grpc.ClientConn
}

// TestAgentMessages asks a spire-agent's sockets message by message, and a server's for what is no API of SPIRE.
func TestAgentMessages(t *testing.T) {
	alone(t)
	t.Parallel()
	s := serverAlone(t)
	admin := filepath.Join(s.Dir, "agent", "private", "admin.sock")
	o := site.AgentOptions{Extra: "authorized_delegates = [\"spiffe://example.org/two\"]\n"}
	if realAgent() {
		o.Extra += fmt.Sprintf("admin_socket_path = %q", admin)
	} else {
		o.Extra += `workload_hold = "10ms"`
	}
	g, a := field(t, s, "agent", o)
	w := newWords(t, s)
	w.values["agent"], w.values["uid"], w.values["token"] = g.text(g.agentID), strconv.Itoa(os.Getuid()), "none"
	files, err := filepath.Abs("testdata/files")
	if err != nil {
		t.Fatal(err)
	}
	w.values["files"] = files
	wire := &agentWire{
		agentShell: &agentShell{words: w, program: g.agent, server: g.cli, public: a.Socket, admin: admin},
		conns:      map[string]*grpc.ClientConn{"server": w.local, "tcp": w.conn(t, "anyone")},
	}
	for who, socket := range map[string]string{"public": a.Socket, "bare": a.Socket, "private": admin} {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		wire.conns[who] = conn
	}
	play(t, agentMessages, func(c *command) string {
		if c.mark != "$" {
			return wire.typed(t, c)
		}
		return "> " + wire.ask(t, c) + "\n"
	})
}

// ask makes a call and returns the first answer to each message: streams of the agent do not end.
func (w *agentWire) ask(t *testing.T, c *command) string {
	t.Helper()
	parts := strings.SplitN(c.typedLine, " ", 3)
	if len(parts) < 3 || w.conns[parts[0]] == nil {
		t.Fatalf("%s:%d: want WHO SERVICE.METHOD REQUEST", agentMessages, c.line)
	}
	m := agentMethod(t, parts[1])
	request := w.fill(t, parts[2])
	if !m.IsStreamingClient() {
		request = "[" + request + "]"
	}
	var requests []json.RawMessage
	if err := json.Unmarshal([]byte(request), &requests); err != nil {
		t.Fatalf("%s:%d: %v", agentMessages, c.line, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if parts[0] == "public" {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	}
	stream, err := w.conns[parts[0]].NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, fullMethod(m))
	if err != nil {
		return w.refusal(err)
	}
	var answers []string
	for _, request := range requests {
		in, out := message(t, m.Input()), message(t, m.Output())
		if err := protojson.Unmarshal(request, in); err != nil {
			t.Fatalf("%s:%d: %v", agentMessages, c.line, err)
		}
		_ = stream.SendMsg(in) // if it cannot be sent, there is an answer that says why
		if !m.IsStreamingClient() {
			_ = stream.CloseSend()
		}
		err := stream.RecvMsg(out)
		switch {
		case errors.Is(err, io.EOF):
			answers = append(answers, "nothing")
		case err != nil:
			return strings.Join(append(answers, w.refusal(err)), " ; ")
		default:
			answers = append(answers, w.text(t, out))
		}
	}
	return strings.Join(answers, " ; ")
}

func agentMethod(t *testing.T, name string) protoreflect.MethodDescriptor {
	t.Helper()
	service, method, _ := strings.Cut(name, ".")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(asked[service])
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	m := d.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(method))
	if m == nil {
		t.Fatalf("there is no method %q", name)
	}
	return m
}

// TestEveryMethodOfTheAgentIsAsked says which are in no transcript.
func TestEveryMethodOfTheAgentIsAsked(t *testing.T) {
	all, _ := commands(t, agentMessages)
	for _, word := range slices.Sorted(maps.Keys(asked)) {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(asked[word])
		if err != nil {
			t.Fatal(err)
		}
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			name := word + "." + string(methods.Get(i).Name())
			if !slices.ContainsFunc(all, func(c *command) bool { return len(c.args) > 1 && c.args[1] == name }) {
				t.Errorf("%s: nobody asks %s", agentMessages, name)
			}
		}
	}
}

// inPEM says what is in base64 of PEM.
func inPEM(v string) string {
	raw, err := base64.StdEncoding.DecodeString(v)
	if err != nil {
		return v
	}
	return strings.Join(strings.Fields(pemBlock.ReplaceAllString(string(raw), "${1};")), " ")
}
