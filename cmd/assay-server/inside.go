package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

func healthcheck() *cobra.Command {
	return cli.HealthCommand("server", cli.ServerSocket(conf.DefaultServerSocket))
}

func loggerCommands() *cobra.Command {
	return cli.LoggerCommands("server", func() *cli.Socket { return cli.ServerSocket(conf.DefaultServerSocket) }, cli.LoggerCalls{
		Get: func(ctx context.Context, conn *grpc.ClientConn) (*types.Logger, error) {
			return loggerv1.NewLoggerClient(conn).GetLogger(ctx, &loggerv1.GetLoggerRequest{})
		},
		Set: func(ctx context.Context, conn *grpc.ClientConn, level types.LogLevel) (*types.Logger, error) {
			return loggerv1.NewLoggerClient(conn).SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: level})
		},
		Reset: func(ctx context.Context, conn *grpc.ClientConn) (*types.Logger, error) {
			return loggerv1.NewLoggerClient(conn).ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{})
		},
	})
}

func debugGetInfo() *cobra.Command {
	return newLocal("getinfo", "Shows what the running server knows of itself", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		d, err := debugv1.NewDebugClient(conn).GetInfo(ctx, &debugv1.GetInfoRequest{})
		if err != nil {
			return fmt.Errorf("error getting debug info: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintln(w, "Server Debug Info:")
			line := func(name string, value any) { fmt.Fprintf(w, "  %-25s%v\n", name+":", value) }
			line("Uptime", time.Duration(d.GetUptime())*time.Second)
			line("Registered Agents", d.GetAgentsCount())
			line("Registration Entries", d.GetEntriesCount())
			line("Federated Bundles", d.GetFederatedBundlesCount())
			for i, cert := range d.GetSvidChain() {
				if i == 0 {
					fmt.Fprintln(w, "  SVID Chain:")
				}
				cli.PrintDebugCertificate(w, i, idText(cert.GetId()), cert.GetSubject(), cert.GetExpiresAt())
			}
			return nil
		}, d)
	}).Command
}
