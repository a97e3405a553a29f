package main

import (
	"testing"

	"github.com/assay-id/assay/cmd/cli/samplestest"
	"github.com/assay-id/assay/conf"
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
	kinds = conf.AgentKeyManagers()
	delete(kinds, "memory") // has no keys to document
	samplestest.Run(t, "../../conf/agent.hcl", "key_manager", kinds)
}
