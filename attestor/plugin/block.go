package plugin

import (
	"context"
	"fmt"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
)

// OpenBlock starts the plugin that a block of the configuration names. kind is SPIRE's name of what it is, service
// what it must offer, services what it may ask of us.
func OpenBlock(c *external.Config, kind, service string, services []Service, needs attestor.Needs) (*Plugin, error) {
	sum, err := external.ParseChecksum(c.Checksum)
	if err != nil {
		return nil, fmt.Errorf("plugin_checksum: %w", err)
	}
	return Open(context.Background(), Config{
		Name: c.Name, Type: kind, Service: service, Path: c.Path(), Args: c.Args, Checksum: sum, Env: c.Env, Data: c.Data,
		Services: services, TrustDomain: needs.TrustDomain, Trial: needs.Trial, Log: needs.Log, Now: needs.Now,
		Audit: func(event string, err error) {
			if needs.Audit != nil && !needs.Trial {
				needs.Audit(event, "plugin/"+c.Name, err)
			}
		},
	})
}
