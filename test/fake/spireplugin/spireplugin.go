// Package spireplugin is a plugin of SPIRE of every kind, made with SPIRE's plugin SDK as its templates are. A
// test runs itself as the plugin: its TestMain calls RunIfAsked first. What is wrong with a plugin is asked
// for in its plugin_data, as mode = "…". One that is built by itself is in test/compat/peers/plugin.
package spireplugin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl"
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	identityproviderv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/identityprovider/v1"
	agentkeymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/keymanager/v1"
	agentnodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/keymanager/v1"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	upstreamauthorityv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/upstreamauthority/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// asked is the first argument of a test that is to be the plugin.
const asked = "spire-plugin"

// The kinds, each the argument behind the first.
const (
	NodeAgent  = "node-agent"
	NodeServer = "node-server"
	Workload   = "workload"
	Keys       = "keys"
	AgentKeys  = "agent-keys"
	Upstream   = "upstream"
)

// RunIfAsked does not return if the test was started as a plugin.
func RunIfAsked() {
	if len(os.Args) > 2 && os.Args[1] == asked {
		Run(os.Args[2])
		os.Exit(0)
	}
}

// Env is the plugin_env of every kind: a program that is checked for races takes a second to exit otherwise.
func Env() []string { return []string{"GORACE=atexit_sleep_ms=0"} }

// Args are the plugin_args of a kind.
func Args(kind string) []string { return []string{asked, kind} }

// Self returns the path of the running test and its SHA-256.
func Self(t testing.TB) (path string, sum [sha256.Size]byte) {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path, Sum(t, path)
}

// Sum returns the SHA-256 of a file.
func Sum(t testing.TB, path string) (sum [sha256.Size]byte) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		t.Fatal(err)
	}
	hash.Sum(sum[:0])
	return sum
}

// Run is the program: a plugin of the kind. Some modes are chosen by an argument already, as they show before
// there is a configuration.
func Run(kind string) {
	kind, early, _ := strings.Cut(kind, "+")
	switch early {
	case "mute":
		select {}
	case "crash":
		os.Exit(3)
	case "exit":
		os.Exit(0)
	case "next": // of a version of SPIRE's plugins that is not there yet
		fmt.Println("1|2|unix|/nowhere|grpc|")
		select {}
	case "chatter":
		fmt.Println("hello, I am no plugin")
		select {}
	case "flood":
		for {
			fmt.Print(strings.Repeat("x", 1<<16))
		}
	case "tcp":
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		fmt.Printf("1|1|tcp|%s|grpc|\n", l.Addr())
		select {}
	case "elsewhere": // somebody else listens there
		fmt.Printf("1|1|unix|%s|grpc|\n", os.Getenv("ELSEWHERE"))
		select {}
	case "netrpc":
		fmt.Println("1|1|unix|/nowhere|netrpc|")
		select {}
	case "future":
		fmt.Println("2|1|unix|/nowhere|grpc|")
		select {}
	case "":
	default:
		panic("unknown mode " + early)
	}
	p := &Plugin{}
	config := configv1.ConfigServiceServer(p)
	switch kind {
	case NodeAgent:
		pluginmain.Serve(agentnodeattestorv1.NodeAttestorPluginServer(&nodeAgent{Plugin: p}), config)
	case NodeServer:
		pluginmain.Serve(nodeattestorv1.NodeAttestorPluginServer(&nodeServer{Plugin: p}), config)
	case Workload:
		pluginmain.Serve(workloadattestorv1.WorkloadAttestorPluginServer(&workload{Plugin: p}), config)
	case Keys:
		pluginmain.Serve(keymanagerv1.KeyManagerPluginServer(&keys{Plugin: p, held: map[string]*heldKey{}}), config)
	case Upstream:
		pluginmain.Serve(upstreamauthorityv1.UpstreamAuthorityPluginServer(&authority{Plugin: p}), config)
	case "unconfigurable":
		pluginmain.Serve(workloadattestorv1.WorkloadAttestorPluginServer(&workload{Plugin: p}))
	case AgentKeys: // also a plugin of another kind than it is taken for
		pluginmain.Serve(agentkeymanagerv1.KeyManagerPluginServer(&agentKeys{of: &keys{Plugin: p, held: map[string]*heldKey{}}}), config)
	default:
		panic("unknown kind " + kind)
	}
}

// Config is the plugin_data.
type Config struct {
	// Mode is what is wrong; empty: nothing. What is in the file "mode" of the directory goes before it.
	Mode string `hcl:"mode"`
	// Directory is where what must survive a restart is kept, and where Seen is written to.
	Directory string `hcl:"directory"`
	// Secret proves a node.
	Secret string `hcl:"secret"`
}

// Plugin is what all kinds have in common.
type Plugin struct {
	configv1.UnimplementedConfigServer

	mu     sync.Mutex // guards the rest
	config *Config
	td     string
	logger hclog.Logger
	agents agentstorev1.AgentStoreServiceClient
	known  bool

	metrics    metricsv1.MetricsServiceClient
	identities identityproviderv1.IdentityProviderServiceClient
	measures   bool // there is a Metrics service
	identified bool // there is an IdentityProvider service
}

// SetLogger implements pluginsdk.NeedsLogger.
func (p *Plugin) SetLogger(logger hclog.Logger) { p.logger = logger }

// BrokerHostServices implements pluginsdk.NeedsHostServices.
func (p *Plugin) BrokerHostServices(broker pluginsdk.ServiceBroker) error {
	p.known = broker.BrokerClient(&p.agents)
	p.measures = broker.BrokerClient(&p.metrics)
	p.identified = broker.BrokerClient(&p.identities)
	return nil
}

// Configure implements the Config service.
func (p *Plugin) Configure(_ context.Context, in *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	config, err := read(in.GetHclConfiguration())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "failed to decode configuration: %v", err)
	}
	switch config.Mode {
	case "slow-configure":
		select {}
	case "child": // one that would outlive it
		child := exec.Command("sleep", "1000")
		if err := child.Start(); err != nil {
			return nil, err
		}
		if err := os.WriteFile(config.Directory+"/child", fmt.Append(nil, child.Process.Pid), 0o600); err != nil {
			return nil, err
		}
	case "crash-configure":
		os.Exit(4)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.config, p.td = config, in.GetCoreConfiguration().GetTrustDomain()
	p.logger.Info("configured", "trust_domain", p.td)
	fmt.Println("printed by the plugin")
	if config.Directory != "" {
		if err := p.seen(config.Directory); err != nil {
			return nil, err
		}
	}
	return &configv1.ConfigureResponse{}, nil
}

// Validate implements the Config service.
func (p *Plugin) Validate(_ context.Context, in *configv1.ValidateRequest) (*configv1.ValidateResponse, error) {
	if _, err := read(in.GetHclConfiguration()); err != nil {
		return &configv1.ValidateResponse{Notes: []string{err.Error()}}, nil //nolint:nilerr // it is the answer
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

func read(text string) (*Config, error) {
	config := new(Config)
	if err := hcl.Decode(config, text); err != nil {
		return nil, err
	}
	if config.Mode == "bad-config" {
		return nil, errors.New("mode is not to my taste")
	}
	return config, nil
}

// seen writes down what the plugin sees of the world: its environment and open files.
func (p *Plugin) seen(dir string) error {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	var text strings.Builder
	fmt.Fprintln(&text, "pid", os.Getpid())
	for _, env := range os.Environ() {
		fmt.Fprintln(&text, "env", env)
	}
	for _, file := range files {
		to, err := os.Readlink("/proc/self/fd/" + file.Name())
		if err == nil {
			fmt.Fprintln(&text, "fd", to)
		}
	}
	limits, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(limits)) {
		if strings.HasPrefix(line, "NoNewPrivs:") {
			fmt.Fprint(&text, line)
		}
	}
	return os.WriteFile(dir+"/seen", []byte(text.String()), 0o600)
}

// mode returns what is to go wrong, having let go wrong what goes wrong for every kind.
func (p *Plugin) mode(ctx context.Context) (*Config, error) {
	p.mu.Lock()
	config := p.config
	p.mu.Unlock()
	if config == nil {
		return nil, status.Error(codes.FailedPrecondition, "not configured")
	}
	if config.Directory != "" {
		if text, err := os.ReadFile(config.Directory + "/mode"); err == nil {
			changed := *config
			changed.Mode = string(text)
			config = &changed
		}
	}
	switch config.Mode {
	case "hang":
		<-ctx.Done()
		time.Sleep(time.Hour) // whoever hangs does not look at contexts
	case "crash":
		os.Exit(5)
	case "crash-once":
		if _, err := os.Stat(config.Directory + "/crashed"); err != nil {
			_ = os.WriteFile(config.Directory+"/crashed", nil, 0o600)
			os.Exit(6)
		}
	case "flood":
		flood()
	case "measure":
		return config, p.measure(ctx)
	case "identity":
		return config, p.identity(ctx, config.Directory)
	case "error":
		return nil, status.Error(codes.Internal, "it went wrong\nin \x1b[31mtwo lines"+strings.Repeat("!", 10_000))
	}
	return config, nil
}

// flood writes megabytes to everything that the host may read: the descriptors themselves, and what go-plugin sends on.
func flood() {
	line := []byte(strings.Repeat("x", 99) + "\n")
	block := bytes.Repeat(line, 1000)
	for _, to := range []*os.File{os.NewFile(1, "stdout"), os.NewFile(2, "stderr"), os.Stdout, os.Stderr} {
		for range 40 { // 4 MB
			_, _ = to.Write(block)
		}
	}
}
