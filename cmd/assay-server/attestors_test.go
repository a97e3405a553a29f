package main

import (
	"testing"

	"github.com/assay-id/assay/cmd/cli/samplestest"
	"github.com/assay-id/assay/conf"
)

func TestSample(t *testing.T) {
	kinds := map[string]func() any{}
	for _, k := range judges() {
		kinds[k.Type] = k.Config
	}
	samplestest.Run(t, "../../conf/server.hcl", "node_attestor", kinds)
	samplestest.Run(t, "../../conf/server.hcl", "upstream_authority", conf.UpstreamKinds())
	samplestest.Run(t, "../../conf/server.hcl", "key_manager", conf.KeyManagerKinds())
}
