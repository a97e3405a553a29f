// Command assay-server runs the server, and administers one over its private Unix socket or over TCP.
//
// Flags have one dash or two. Texts, flags and JSON are those of SPIRE's command where the command is
// the same, so that scripts made for it go on working.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

func main() { os.Exit(cli.Main(root())) }

func root() *cobra.Command {
	c := cli.Group("assay-server", "Gives attested workloads their identity",
		run(), validate(), migrateCommand(), importCommand(), applyCommand(),
		cli.Group("entry", "Says who gets which identity", entryCreate(), entryUpdate(), entryShow(), entryCount(), entryDelete()),
		cli.Group("agent", "Looks after admitted agents", agentList(), agentCount(), agentShow(), agentBan(), agentEvict(), agentPurge()),
		cli.Group("token", "Makes tokens that let agents join", tokenGenerate()),
		cli.Group("bundle", "Shows and keeps trust bundles", bundleShow(), bundleCount(), bundleList(), bundleSet(), bundleDelete()),
		cli.Group("federation", "Keeps the bundles of other trust domains", federationCreate(), federationUpdate(), federationDelete(), federationList(), federationShow(), federationRefresh()),
		cli.Group("x509", "Signs X509-SVIDs without an entry", x509Mint()),
		cli.Group("wit", "Signs WIT-SVIDs without an entry", witMint()),
		cli.Group("jwt", "Signs JWT-SVIDs without an entry", jwtMint()),
		localAuthorityCommands(), upstreamAuthorityCommands(),
		evidenceCommands(), auditCommands(),
		healthcheck(),
		loggerCommands(),
		cli.Group("debug", "Looks into the running server", debugGetInfo()),
		check(), backupCommand(), restore(),
		cli.Group("snapshot", "Shows and makes snapshots of the store", snapshotList(), snapshotTake()),
		cli.VersionCommand(),
	)
	return c
}

// remote is a command that talks to the server: at its private socket, or over TCP.
type remote struct {
	*cobra.Command
	socket *cli.Socket
	output cli.Output
}

// newRemote makes a command with the flags that all of them have. do runs with a connection.
func newRemote(use, short string, do func(ctx context.Context, r *remote, conn *grpc.ClientConn) error) *remote {
	r := newLocal(use, short, do)
	which := cli.AddFar(r.Command, r.socket)
	nearby := r.RunE
	r.RunE = func(c *cobra.Command, args []string) error {
		far, err := which()
		switch {
		case err != nil:
			return err
		case far == nil:
			return nearby(c, args)
		}
		return far.With(c, func(ctx context.Context, conn *grpc.ClientConn) error { return do(ctx, r, conn) })
	}
	return r
}

// newLocal is newRemote for what a server does for callers of its socket only.
func newLocal(use, short string, do func(ctx context.Context, r *remote, conn *grpc.ClientConn) error) *remote {
	r := &remote{socket: cli.ServerSocket(conf.DefaultServerSocket)}
	r.Command = &cobra.Command{
		Use: use, Short: short, Args: cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return r.socket.With(c, func(ctx context.Context, conn *grpc.ClientConn) error { return do(ctx, r, conn) })
		},
	}
	r.socket.AddTo(r.Command)
	r.output.AddTo(r.Command)
	return r
}

// unused tells of flags that were given and have no effect beside another.
func (r *remote) unused(beside string, names ...string) {
	for _, name := range names {
		if f := r.Flags().Lookup(name); f != nil && f.Changed {
			fmt.Fprintf(r.ErrOrStderr(), "Note: with %s, -%s has no effect.\n", beside, name)
		}
	}
}

// checked adds a look at the flags before anybody is asked.
func (r *remote) checked(check func() error) *remote {
	r.PreRunE = func(*cobra.Command, []string) error { return check() }
	return r
}
