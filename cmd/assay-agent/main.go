// Command assay-agent runs the agent, fetches from its Workload API, and asks a running one why a
// workload gets what it gets.
//
// Flags have one dash or two. Texts, flags and JSON are those of SPIRE's command where the command is
// the same, so that scripts made for it go on working.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

func main() { os.Exit(cli.Main(root())) }

func root() *cobra.Command {
	return cli.Group("assay-agent", "Proves what runs on this node and hands out the identities",
		run(), validate(), setup(), migrateCommand(),
		cli.Group("api", "Talks to the Workload API as a workload does",
			apiFetch(), cli.Group("validate", "Validates what workloads present", validateJWT()), apiWatch()),
		explain(), filesCommand(),
		cli.Group("tpm", "Looks into the machine's TPM", tpmEK()),
		cli.HealthCommand("agent", cli.AgentSocket(conf.DefaultAgentSocket)),
		loggerCommands(),
		cli.Group("debug", "Looks into the running agent", debugGetInfo()),
		cli.VersionCommand(),
	)
}

// remote is a command that talks to one of the agent's sockets.
type remote struct {
	*cobra.Command
	socket  *cli.Socket
	output  cli.Output
	timeout time.Duration // 0: none
}

// newRemote makes a command with the flags that all of them have. do runs with a connection.
func newRemote(socket *cli.Socket, use, short string, do func(ctx context.Context, r *remote, conn *grpc.ClientConn) error) *remote {
	r := &remote{socket: socket}
	r.Command = &cobra.Command{
		Use: use, Short: short, Args: cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if r.timeout < 0 {
				return errors.New("-timeout must not be negative; 0 waits without end")
			}
			return r.socket.With(c, func(ctx context.Context, conn *grpc.ClientConn) error {
				if r.timeout > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, r.timeout)
					defer cancel()
				}
				err := do(ctx, r, conn)
				if status.Code(err) == codes.DeadlineExceeded && r.timeout > 0 { // by this clock or by the agent's, whichever was first
					return fmt.Errorf("%w: there was no answer within %s (-timeout); an agent holds a process for some time that has no identity yet: \"assay-agent explain -pid PID\" says what it lacks", err, r.timeout)
				}
				return err
			})
		},
	}
	r.socket.AddTo(r.Command)
	r.output.AddTo(r.Command)
	return r
}

// newWorkload makes a command that calls the Workload API, with the header that the API demands.
func newWorkload(use, short string, do func(ctx context.Context, r *remote, conn *grpc.ClientConn) error) *remote {
	r := newRemote(cli.AgentSocket(conf.DefaultAgentSocket), use, short, func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		return do(metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"), r, conn)
	})
	r.Flags().DurationVar(&r.timeout, "timeout", 5*time.Second, "How long to wait for an answer; 0 waits without end")
	return r
}

// newAdmin makes a command that calls the agent's admin socket.
func newAdmin(use, short string, do func(ctx context.Context, r *remote, conn *grpc.ClientConn) error) *remote {
	return newRemote(cli.AdminSocket(conf.DefaultAdminSocket), use, short, do)
}

// checked adds a look at the flags before anybody is asked.
func (r *remote) checked(check func() error) *remote {
	r.PreRunE = func(*cobra.Command, []string) error { return check() }
	return r
}
