package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
)

func tokenGenerate() *cobra.Command {
	var spiffeID string
	var ttl int
	r := newRemote("generate", "Makes a join token, good for one agent, once", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		req := &agentv1.CreateJoinTokenRequest{Ttl: int32(ttl)} //nolint:gosec // checked below
		if spiffeID != "" {
			var err error
			if req.AgentId, err = parseID(spiffeID); err != nil {
				return fmt.Errorf("SPIFFE ID %q: %w", spiffeID, err)
			}
		}
		token, err := agentv1.NewAgentClient(conn).CreateJoinToken(ctx, req)
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintf(w, "Token: %s\n", token.GetValue())
			if spiffeID == "" {
				fmt.Fprintln(w, "Warning: Missing SPIFFE ID.")
			}
			return nil
		}, token)
	}).checked(func() error {
		if ttl < 1 || ttl > math.MaxInt32 {
			return errors.New("-ttl must be at least one second, and fit 32 bits")
		}
		return nil
	})
	r.Flags().IntVar(&ttl, "ttl", 600, "How long the token can be used, in seconds")
	r.Flags().StringVar(&spiffeID, "spiffeID", "", "A further SPIFFE ID for the agent's node, as parent of entries (optional)")
	r.Example = "  assay-server token generate -spiffeID spiffe://example.org/node1"
	return r.Command
}
