package main

import (
	"testing"

	"github.com/assay-id/assay/cmd/cli/samplestest"
)

func TestSample(t *testing.T) {
	kinds := map[string]func() any{}
	for _, k := range nodes() {
		kinds[k.Type] = k.Config
	}
	samplestest.Run(t, "../../conf/agent.hcl", "node_attestor", kinds)
	kinds = map[string]func() any{}
	for _, k := range workloads() {
		kinds[k.Type] = k.Config
	}
	samplestest.Run(t, "../../conf/agent.hcl", "workload_attestor", kinds)
}
