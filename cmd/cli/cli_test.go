package cli

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func tree() *cobra.Command {
	create := &cobra.Command{Use: "create", RunE: func(*cobra.Command, []string) error { return nil }}
	create.Flags().String("spiffeID", "", "")
	create.Flags().StringArray("selector", nil, "")
	create.Flags().Bool("node", false, "")
	create.Flags().Int("ttl", 0, "")
	return Group("tool", "", Group("entry", "", create))
}

func TestDoubleDashes(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"single dashes", "entry create -spiffeID x -node", "entry create --spiffeID x --node"},
		{"double dashes", "entry create --spiffeID x --node", "entry create --spiffeID x --node"},
		{"values with an equals sign", "entry create -spiffeID=x -ttl=-5", "entry create --spiffeID=x --ttl=-5"},
		{"a value that looks like a flag", "entry create -spiffeID -node -node", "entry create --spiffeID -node --node"},
		{"a negative number", "entry create -ttl -5 -node", "entry create --ttl -5 --node"},
		{"a lone dash", "entry create -selector - -node", "entry create --selector - --node"},
		{"a short flag", "entry create -h", "entry create -h"},
		{"an unknown flag", "entry create -nosuch x", "entry create --nosuch x"},
		{"everything after two dashes", "entry create -- -node", "entry create -- -node"},
		{"a value that names a command", "entry create -selector create -node", "entry create --selector create --node"},
		{"a flag without its value", "entry create -spiffeID", "entry create --spiffeID"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := DoubleDashes(tree(), strings.Fields(c.in))
			if diff := cmp.Diff(strings.Fields(c.want), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func execute(t *testing.T, root *cobra.Command, args ...string) (status int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	root.SetOut(&o)
	root.SetErr(&e)
	before := os.Args
	defer func() { os.Args = before }()
	os.Args = append([]string{root.Name()}, args...)
	status = Main(root)
	return status, o.String(), e.String()
}

func TestComplaints(t *testing.T) {
	for _, c := range []struct{ name, args, want string }{
		{"an unknown flag", "entry create -spifeID x", "Error: unknown flag -spifeID; run 'tool entry create --help' for the flags\n"},
		{"a flag in the wrong case", "entry create -spiffeid x", "Error: unknown flag -spiffeid, did you mean -spiffeID?; run 'tool entry create --help' for the flags\n"},
		{"an unknown command", "entry creat", "Error: unknown command \"creat\" for \"tool entry\", did you mean \"create\"?; run 'tool entry --help' for what there is\n"},
		{"a number that is none", "entry create -ttl x", "Error: -ttl cannot be \"x\": it takes a whole number; run 'tool entry create --help' for the flags\n"},
	} {
		t.Run(c.name+" is one line and status 1", func(t *testing.T) {
			status, out, errOut := execute(t, tree(), strings.Fields(c.args)...)
			if status != 1 || out != "" {
				t.Errorf("status %d, output %q", status, out)
			}
			if diff := cmp.Diff(c.want, errOut); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("a group without a command shows its help", func(t *testing.T) {
		status, out, _ := execute(t, tree(), "entry")
		if status != 0 || !strings.Contains(out, "create") {
			t.Errorf("status %d, output %q", status, out)
		}
	})
}

func TestPrintProto(t *testing.T) {
	for _, c := range []struct {
		name     string
		messages []proto.Message
		want     string
	}{
		{"an empty field is there", []proto.Message{&agentv1.CountAgentsResponse{}}, `{"count":0}`},
		{"two messages are an array", []proto.Message{&agentv1.CountAgentsResponse{Count: 42}, &agentv1.CountAgentsResponse{Count: 1}}, `[{"count":42},{"count":1}]`},
		{"an absent message is not there", []proto.Message{&trustdomainv1.ListFederationRelationshipsResponse{
			FederationRelationships: []*types.FederationRelationship{{TrustDomain: "a", BundleEndpointUrl: "b"}}}},
			`{"federation_relationships":[{"bundle_endpoint_url":"b","trust_domain":"a"}],"next_page_token":""}`},
		{"large numbers are text and bytes are base64", []proto.Message{&types.Bundle{SequenceNumber: 1 << 63, X509Authorities: []*types.X509Certificate{{Asn1: []byte{1}}}}},
			`{"jwt_authorities":[],"refresh_hint":"0","sequence_number":"9223372036854775808","trust_domain":"","wit_authorities":[],"x509_authorities":[{"asn1":"AQ==","tainted":false}]}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			if err := PrintProto(&b, c.messages...); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want+"\n", b.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSocketPath(t *testing.T) {
	for _, c := range []struct {
		name      string
		env       map[string]string
		args      []string
		want, err string
	}{
		{"the default", nil, nil, "/default", ""},
		{"a flag", nil, []string{"--socketPath", "/a"}, "/a", ""},
		{"a flag wins over all", map[string]string{"ASSAY_AGENT_PUBLIC_SOCKET": "/b"}, []string{"--socketPath", "/a", "--instance", "i"}, "/a", ""},
		{"the environment", map[string]string{"ASSAY_AGENT_PUBLIC_SOCKET": "/b", "SPIRE_AGENT_PUBLIC_SOCKET": "/c", "SPIFFE_ENDPOINT_SOCKET": "unix:///d"}, nil, "/b", ""},
		{"SPIRE's environment", map[string]string{"SPIRE_AGENT_PUBLIC_SOCKET": "/c", "SPIFFE_ENDPOINT_SOCKET": "unix:///d"}, nil, "/c", ""},
		{"the endpoint of workloads", map[string]string{"SPIFFE_ENDPOINT_SOCKET": "unix:///d"}, nil, "/d", ""},
		{"an endpoint that is no socket", map[string]string{"SPIFFE_ENDPOINT_SOCKET": "tcp://127.0.0.1:1"}, nil, "", "only unix:// addresses"},
		{"an instance", map[string]string{"ASSAY_AGENT_PUBLIC_SOCKET_TEMPLATE": "/run/%i/api.sock"}, []string{"--instance", "x"}, "/run/x/api.sock", ""},
		{"an instance in SPIRE's template", map[string]string{"SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE": "/run/%i/api.sock"}, []string{"--instance", "x"}, "/run/x/api.sock", ""},
		{"an instance without a template", nil, []string{"--instance", "x"}, "", "needs the environment variable ASSAY_AGENT_PUBLIC_SOCKET_TEMPLATE"},
		{"an instance in a template without a place", map[string]string{"ASSAY_AGENT_PUBLIC_SOCKET_TEMPLATE": "/run/api.sock"}, []string{"--instance", "x"}, "", "has no %i"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, name := range []string{"ASSAY_AGENT_PUBLIC_SOCKET", "SPIRE_AGENT_PUBLIC_SOCKET", "SPIFFE_ENDPOINT_SOCKET"} {
				t.Setenv(name, "")
				t.Setenv(name+"_TEMPLATE", "")
			}
			for name, value := range c.env {
				t.Setenv(name, value)
			}
			s := AgentSocket("/default")
			command := new(cobra.Command)
			s.AddTo(command)
			if err := command.ParseFlags(c.args); err != nil {
				t.Fatal(err)
			}
			got, err := s.Path()
			if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	for name, c := range map[string]struct{ path, want string }{
		"no socket":                   {filepath.Join(dir, "none.sock"), "is assay-server running? If it is, name its socket with -socketPath"},
		"a socket of a dead server":   {dead, "nobody listens at " + dead + ": is assay-server running?"},
		"a folder that is not there":  {filepath.Join(dir, "no", "such.sock"), "no socket at"},
		"a path too long to be right": {"/" + strings.Repeat("x", 200), "connect to /xxx"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := (&Socket{Default: c.path, Program: "assay-server"}).Dial()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestHealthCommand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server, status := grpc.NewServer(), health.NewServer()
	grpc_health_v1.RegisterHealthServer(server, status)
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-served })
	t.Run("a server that serves is healthy", func(t *testing.T) {
		code, out, _ := execute(t, HealthCommand("server", ServerSocket("/")), "-socketPath", path, "-verbose")
		if code != 0 || out != "Checking server health...\nServer is healthy.\n" {
			t.Errorf("status %d, output %q", code, out)
		}
	})
	t.Run("one that does not serve is not", func(t *testing.T) {
		status.SetServingStatus("", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
		code, out, errOut := execute(t, HealthCommand("agent", AgentSocket("/")), "-socketPath", path)
		if code != 1 || out != "" || !strings.HasPrefix(errOut, "Agent is unhealthy: agent returned status \"NOT_SERVING\": it was not admitted by its server yet") {
			t.Errorf("status %d, output %q, %q", code, out, errOut)
		}
	})
}

func TestHealthOfAServerThatDoesNotAnswerThisUser(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
		return nil, status.Error(codes.PermissionDenied, "authorization denied")
	}))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-served })
	code, _, errOut := execute(t, HealthCommand("server", ServerSocket("/")), "-socketPath", path)
	if code != 1 || !strings.Contains(errOut, `does not say so to this user, who needs a role with the verb "server:read": `) {
		t.Errorf("status %d, output %q", code, errOut)
	}
}

func TestPatience(t *testing.T) {
	t.Run("a short wait is silent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var b bytes.Buffer
			done := Patience(&b, "waiting for something")
			time.Sleep(900 * time.Millisecond)
			done()
			time.Sleep(time.Minute)
			synctest.Wait()
			if b.Len() > 0 {
				t.Errorf("got %q", &b)
			}
		})
	})
	t.Run("a long one says what it waits for, once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var b bytes.Buffer
			done := Patience(&b, "waiting for something")
			time.Sleep(10 * time.Second)
			synctest.Wait()
			done()
			if b.String() != "waiting for something …\n" {
				t.Errorf("got %q", &b)
			}
		})
	})
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Run("a secret is for its owner only, even where a public file was", func(t *testing.T) {
		if err := WriteFile(path, []byte("new"), true); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("got %v, %v", info.Mode(), err)
		}
		if text, _ := os.ReadFile(path); string(text) != "new" {
			t.Errorf("got %q", text)
		}
	})
	t.Run("nothing is left behind in a folder that is not there", func(t *testing.T) {
		err := WriteFile("/nowhere/file", nil, true)
		if err == nil || err.Error() != "write /nowhere/file: no such file or directory" {
			t.Errorf("got %v", err)
		}
	})
}
