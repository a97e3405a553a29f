package main

import (
	"github.com/spf13/cobra"

	"github.com/assay-id/assay/cmd/cli/migrate"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/api/roles"
	"github.com/assay-id/assay/server/verdict/rules"
)

func migrateCommand() *cobra.Command {
	shape := migrate.Shape{File: conf.ServerShape(), Plugins: map[string]map[string]func() any{
		"node_attestor": {}, "key_manager": conf.KeyManagerKinds(), "upstream_authority": conf.UpstreamKinds(),
	}}
	for _, j := range judges() {
		shape.Plugins["node_attestor"][j.Type] = j.Config
	}
	return migrate.Command("assay-server", shape, migrate.Server, func(path string, expandEnv bool) error {
		_, err := conf.LoadServer(path, judges(), conf.Options{ExpandEnv: expandEnv, Named: append(rules.Kinds(), clusterKind(), roles.Kind()), CheckNamed: checkNamed})
		return err
	})
}
