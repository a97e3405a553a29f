// Command assay is the developer's tool: "assay dev" is a server, an agent and one registered workload
// in one process, for a laptop, without root and without Docker.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/assay-id/assay/cmd/cli"
)

func main() { os.Exit(cli.Main(root())) }

func root() *cobra.Command {
	return cli.Group("assay", "Attested identities on a developer's machine and in a pipeline", dev(), evidenceCommands(), cli.VersionCommand())
}
