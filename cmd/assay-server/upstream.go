package main

import (
	"fmt"

	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/ca/upstream"
	"github.com/assay-id/assay/server/ca/upstream/disk"
	"github.com/assay-id/assay/server/ca/upstream/nested"
)

// upstreamAuthority returns how the authority above is opened that the file names; nil if it names none.
func upstreamAuthority(from conf.Chosen) func(server.Needs) (upstream.Authority, error) {
	switch c := from.Config.(type) {
	case nil:
		return nil
	case *conf.UpstreamDisk:
		return func(server.Needs) (upstream.Authority, error) {
			return disk.Open(disk.Config{CertPath: c.CertPath, KeyPath: c.KeyPath, BundlePath: c.BundlePath})
		}
	case *conf.UpstreamSPIRE:
		return func(n server.Needs) (upstream.Authority, error) {
			return nested.New(nested.Config{
				TrustDomain: n.TrustDomain, ServerAddress: c.Address, ServerPort: c.Port, Socket: c.Socket, Log: n.Log,
			})
		}
	}
	return func(server.Needs) (upstream.Authority, error) {
		return nil, fmt.Errorf("upstream authority %q is not in this program", from.Kind)
	}
}
