package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

func healthcheck() *cobra.Command {
	return cli.HealthCommand("server", cli.ServerSocket(conf.DefaultServerSocket))
}

func loggerGet() *cobra.Command {
	return newLocal("get", "Shows the level of the log", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		l, err := loggerv1.NewLoggerClient(conn).GetLogger(ctx, &loggerv1.GetLoggerRequest{})
		if err != nil {
			return fmt.Errorf("error fetching logger: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error { return cli.PrintLogger(w, l) }, l)
	}).Command
}

func loggerSet() *cobra.Command {
	var level string
	r := newLocal("set", "Sets the level of the log until the server ends", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		wanted, err := cli.ParseLogLevel(level)
		if err != nil {
			return err
		}
		l, err := loggerv1.NewLoggerClient(conn).SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: wanted})
		if err != nil {
			return fmt.Errorf("failed to set log level: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error { return cli.PrintLogger(w, l) }, l)
	}).checked(func() error { _, err := cli.ParseLogLevel(level); return err })
	r.Flags().StringVar(&level, "level", "", "The level: trace, debug, info, warn, error, fatal or panic")
	return r.Command
}

func loggerReset() *cobra.Command {
	return newLocal("reset", "Sets the level of the log to what it was at the start", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		l, err := loggerv1.NewLoggerClient(conn).ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{})
		if err != nil {
			return fmt.Errorf("failed to reset logger: %w", err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error { return cli.PrintLogger(w, l) }, l)
	}).Command
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
