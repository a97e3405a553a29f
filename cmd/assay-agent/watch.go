package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
)

// watchPause is the longest pause between two tries of a watch whose stream ended.
const watchPause = 30 * time.Second

func apiWatch() *cobra.Command {
	socket := cli.AgentSocket(conf.DefaultAgentSocket)
	var output cli.Output
	c := &cobra.Command{
		Use: "watch", Short: "Shows X509-SVIDs each time they change, until Ctrl-C", Args: cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			conn, err := socket.Dial()
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close() }()
			return watch(c, conn, &output)
		},
	}
	socket.AddTo(c)
	output.AddTo(c)
	return c
}

// watch prints every answer of the stream. A stream that ends is opened again, as workloads do, with
// the reason on standard error; only a request that can never do ends the watch.
func watch(c *cobra.Command, conn *grpc.ClientConn, output *cli.Output) error {
	ctx := metadata.AppendToOutgoingContext(c.Context(), "workload.spiffe.io", "true")
	client := workload.NewSpiffeWorkloadAPIClient(conn)
	last := time.Now()
	pause := time.Duration(0)
	for {
		err := follow(ctx, client, func(resp *workload.X509SVIDResponse) error {
			pause = 0
			took := time.Since(last)
			last = time.Now()
			return output.Print(c, func(w io.Writer) error {
				svids, err := parseX509(resp)
				if err != nil {
					return err
				}
				printX509(w, svids, took)
				return nil
			}, resp)
		})
		switch status.Code(err) {
		case codes.InvalidArgument, codes.Unimplemented:
			return err
		}
		pause = min(pause+time.Second, watchPause)
		fmt.Fprintf(c.ErrOrStderr(), "%s; trying again in %s\n", denied(err), pause)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

func follow(ctx context.Context, client workload.SpiffeWorkloadAPIClient, show func(*workload.X509SVIDResponse) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := show(resp); err != nil {
			return err
		}
	}
}
