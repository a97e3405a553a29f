package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/agent/admin"
	"github.com/assay-id/assay/agent/admin/wire"
)

func explain() *cobra.Command {
	var pid int32
	var container string
	r := newAdmin("explain", "Says why a process gets the identities it gets, and what is missing for more",
		func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
			req := &wire.ExplainRequest{Target: &wire.ExplainRequest_Pid{Pid: pid}}
			if container != "" {
				req.Target = &wire.ExplainRequest_Container{Container: container}
			}
			resp, err := wire.NewAdminClient(conn).Explain(ctx, req)
			if err != nil {
				// What the agent has to say about the process is a sentence by itself.
				return errors.New(status.Convert(err).Message())
			}
			return r.output.Print(r.Command, func(w io.Writer) error { return admin.Render(w, resp) }, resp)
		}).checked(func() error {
		switch {
		case (pid == 0) == (container == ""):
			return errors.New("one of -pid and -container is required")
		case pid < 0:
			return errors.New("-pid must be positive")
		}
		return nil
	})
	r.Flags().Int32Var(&pid, "pid", 0, "The process, by its ID in the agent's PID namespace")
	r.Flags().StringVar(&container, "container", "", "The container, by its ID or the first 12 digits of it")
	r.Long = `Attests a process as if it had just called the Workload API and shows what each attestor proved about
it, the entries it matches, the nearest ones that it does not match and what is missing, how far
behind the server the agent is, and what to do. It hands out no identity and changes nothing.`
	r.Example = "  assay-agent explain -pid $(pidof shop)\n  assay-agent explain -container 3f2a9c1b7d10"
	return r.Command
}
