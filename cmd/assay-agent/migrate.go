package main

import (
	"github.com/spf13/cobra"

	"github.com/assay-id/assay/cmd/cli/migrate"
	"github.com/assay-id/assay/conf"
)

func migrateCommand() *cobra.Command {
	shape := migrate.Shape{File: conf.AgentShape(), Plugins: map[string]map[string]func() any{
		"node_attestor": {}, "workload_attestor": {}, "key_manager": conf.AgentKeyManagers(),
	}}
	for _, n := range nodes() {
		shape.Plugins["node_attestor"][n.Type] = n.Config
	}
	for _, w := range workloads() {
		shape.Plugins["workload_attestor"][w.Type] = w.Config
	}
	return migrate.Command("assay-agent", shape, migrate.Agent, func(path string, expandEnv bool) error {
		_, err := conf.LoadAgent(path, nodes(), workloads(), conf.Options{ExpandEnv: expandEnv})
		return err
	})
}
