// Command plugin is a workload attestor of SPIRE, or with the argument "keys" a key manager of its agent, as others build
// theirs: a program of its own, made of the templates in SPIRE's plugin SDK, with the versions of go-plugin and gRPC
// that the SDK asks for.
package main

import (
	"context"
	"crypto/ecdsa"
	"fmt"
	"os"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl"
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/keymanager/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var (
	_ pluginsdk.NeedsLogger       = (*attestor)(nil)
	_ pluginsdk.NeedsHostServices = (*attestor)(nil)
)

type config struct {
	Selector string `hcl:"selector"`
}

type attestor struct {
	workloadattestorv1.UnimplementedWorkloadAttestorServer
	configv1.UnimplementedConfigServer

	mu      sync.RWMutex
	config  *config
	logger  hclog.Logger
	metrics metricsv1.MetricsServiceClient
}

func (a *attestor) SetLogger(logger hclog.Logger) { a.logger = logger }

func (a *attestor) BrokerHostServices(broker pluginsdk.ServiceBroker) error {
	if !broker.BrokerClient(&a.metrics) {
		a.logger.Warn("no metrics are served here")
	}
	return nil
}

func (a *attestor) Configure(_ context.Context, req *configv1.ConfigureRequest) (*configv1.ConfigureResponse, error) {
	c := new(config)
	if err := hcl.Decode(c, req.HclConfiguration); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "failed to decode configuration: %v", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.config = c
	return &configv1.ConfigureResponse{}, nil
}

func (a *attestor) Attest(_ context.Context, req *workloadattestorv1.AttestRequest) (*workloadattestorv1.AttestResponse, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.config == nil {
		return nil, status.Error(codes.FailedPrecondition, "not configured")
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", req.Pid))
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "process: %v", err)
	}
	a.logger.Info("attested", "pid", req.Pid)
	if a.metrics.IsInitialized() {
		if _, err := a.metrics.IncrCounter(context.Background(), &metricsv1.IncrCounterRequest{Key: []string{"attested"}, Val: 1}); err != nil {
			return nil, err
		}
	}
	return &workloadattestorv1.AttestResponse{SelectorValues: []string{a.config.Selector, "exe:" + exe}}, nil
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "keys" {
		pluginmain.Serve(keymanagerv1.KeyManagerPluginServer(&keys{keys: map[string]*ecdsa.PrivateKey{}}))
		return
	}
	plugin := new(attestor)
	pluginmain.Serve(workloadattestorv1.WorkloadAttestorPluginServer(plugin), configv1.ConfigServiceServer(plugin))
}
