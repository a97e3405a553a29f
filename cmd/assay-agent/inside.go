package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

func loggerCommands() *cobra.Command {
	return cli.LoggerCommands("agent", func() *cli.Socket { return cli.AdminSocket(conf.DefaultAdminSocket) }, cli.LoggerCalls{
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
	return newAdmin("getinfo", "Shows what the running agent knows of itself", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		d, err := debugv1.NewDebugClient(conn).GetInfo(ctx, &debugv1.GetInfoRequest{})
		if err != nil {
			return fmt.Errorf("error getting debug info: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintln(w, "Agent Debug Info:")
			line := func(name string, value any) { fmt.Fprintf(w, "  %-33s%v\n", name+":", value) }
			line("Uptime", time.Duration(d.GetUptime())*time.Second)
			synced := "(never)"
			if at := d.GetLastSyncSuccess(); at != 0 {
				synced = time.Unix(at, 0).UTC().Format(time.RFC3339)
			}
			line("Last Sync Success", synced)
			line("Cached X.509 SVIDs", d.GetCachedX509SvidsCount())
			line("Cached JWT SVIDs", d.GetCachedJwtSvidsCount())
			line("Cached SVID Store X.509 SVIDs", d.GetCachedSvidstoreX509SvidsCount())
			for i, cert := range d.GetSvidChain() {
				if i == 0 {
					fmt.Fprintln(w, "  SVID Chain:")
				}
				id := "(none)"
				if cert.GetId() != nil {
					id = "spiffe://" + cert.GetId().GetTrustDomain() + cert.GetId().GetPath()
				}
				cli.PrintDebugCertificate(w, i, id, cert.GetSubject(), cert.GetExpiresAt())
			}
			return nil
		}, d)
	}).Command
}
