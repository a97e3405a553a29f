package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/cmd/cli"
)

// upstreamAuthorityCommands is "upstreamauthority": what an operator does about the roots above.
func upstreamAuthorityCommands() *cobra.Command {
	return cli.Group("upstreamauthority", "Replaces the root that the server's own authorities hang on",
		upstreamStep("taint", "Tainted", "Has everything replaced at once that hangs on an upstream root",
			func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, string, error) {
				r, err := c.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: id})
				return r, r.GetUpstreamAuthoritySubjectKeyId(), err
			}),
		upstreamStep("revoke", "Revoked", "Takes a tainted upstream root out of the bundle",
			func(ctx context.Context, c localauthorityv1.LocalAuthorityClient, id string) (proto.Message, string, error) {
				r, err := c.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: id})
				return r, r.GetUpstreamAuthoritySubjectKeyId(), err
			}),
	)
}

func upstreamStep(verb, done, short string, do func(context.Context, localauthorityv1.LocalAuthorityClient, string) (proto.Message, string, error)) *cobra.Command {
	var id string
	r := newRemote(verb, short, func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, id, err := do(ctx, localauthorityv1.NewLocalAuthorityClient(conn), id)
		if err != nil {
			return fmt.Errorf("could not %s X.509 upstream authority: %w", verb, err)
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s X.509 upstream authority:\n  Subject Key ID: %s\n", done, id)
			return err
		}, resp)
	})
	r.Long = short + ". The root is one that the old authority of this server hangs on, and not the\n" +
		"active one: prepare and activate another first, when the authority above signs with another root."
	r.checked(func() error {
		if id == "" {
			return errors.New("the Subject Key ID of the X.509 upstream authority is required")
		}
		return nil
	})
	r.Flags().StringVar(&id, "subjectKeyID", "", "Subject key ID of the root, as \"localauthority x509 show\" prints it")
	return r.Command
}
