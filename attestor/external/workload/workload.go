// Package workload is workload attestation by a plugin of SPIRE.
package workload

import (
	"context"
	"fmt"
	"math"
	"time"

	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/attestor/plugin"
)

// patience is how long one attestation may take. The agent's own is the same.
const patience = 5 * time.Second

// Kind returns the workload's side of external plugins.
func Kind() attestor.WorkloadKind {
	return attestor.WorkloadKind{Type: external.Type, Config: func() any { return new(external.Config) }, Open: open}
}

type attests struct {
	*plugin.Plugin
	name string
}

func open(config any, needs attestor.Needs) (attestor.Workload, error) {
	c, ok := config.(*external.Config)
	if !ok {
		return nil, fmt.Errorf("external configuration is a %T", config)
	}
	p, err := plugin.OpenBlock(c, "WorkloadAttestor", workloadattestorv1.WorkloadAttestor_ServiceDesc.ServiceName, nil, needs)
	if err != nil {
		return nil, err
	}
	return &attests{p, c.Name}, nil
}

// Attest implements attestor.Workload.
func (a *attests) Attest(ctx context.Context, p attestor.Process) ([]attestor.Selector, error) {
	if p.PID <= 0 || p.PID > math.MaxInt32 {
		return nil, fmt.Errorf("process ID %d is none", p.PID)
	}
	var values []string
	err := a.Do(ctx, patience, func(ctx context.Context, conn grpc.ClientConnInterface) error {
		answer, err := workloadattestorv1.NewWorkloadAttestorClient(conn).Attest(ctx, &workloadattestorv1.AttestRequest{Pid: int32(p.PID)}) //nolint:gosec // it was looked at
		if err != nil {
			return plugin.Explain(err)
		}
		values = answer.GetSelectorValues()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return external.Selectors(a.name, values)
}
