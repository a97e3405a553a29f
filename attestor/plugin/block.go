package plugin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/external"
)

// OpenBlock starts the plugin that a block of the configuration names. kind is SPIRE's name of what it is, service
// what it must offer, services what it may ask of us besides what each may ask.
func OpenBlock(c *external.Config, kind, service string, services []Service, needs attestor.Needs) (*Plugin, error) {
	sum, err := external.ParseChecksum(c.Checksum)
	if err != nil {
		return nil, fmt.Errorf("plugin_checksum: %w", err)
	}
	if c.Identity && needs.Identity == nil && !needs.Trial {
		return nil, errors.New("plugin_identity: agents have no identity to give to plugins; only plugins of the server may ask for one")
	}
	if needs.Now == nil {
		needs.Now = time.Now
	}
	return Open(context.Background(), Config{
		Name: c.Name, Type: kind, Service: service, Path: c.Path(), Args: c.Args, Checksum: sum, Env: c.Env, Data: c.Data,
		Services: append(hosted(c, needs), services...), TrustDomain: needs.TrustDomain, Trial: needs.Trial, Log: needs.Log, Now: needs.Now,
		Audit: func(event string, err error) {
			if needs.Audit != nil && !needs.Trial {
				needs.Audit(event, "plugin/"+c.Name, err)
			}
		},
	})
}
