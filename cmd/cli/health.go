package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// healthTime is how long one health check may take, and healthPause is between two of "-wait".
const (
	healthTime  = 30 * time.Second
	healthPause = 100 * time.Millisecond
)

// HealthCommand asks a daemon over its socket whether it serves. name is "server" or "agent".
func HealthCommand(name string, socket *Socket) *cobra.Command {
	var shallow, verbose bool
	var wait time.Duration
	var output Output
	c := &cobra.Command{
		Use: "healthcheck", Short: "Asks the " + name + " whether it serves", Args: NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if wait < 0 {
				return errors.New("-wait must not be negative")
			}
			if verbose && !output.JSON() {
				fmt.Fprintf(c.OutOrStdout(), "Checking %s health...\n", name)
			}
			err := healthy(c.Context(), name, socket, c.ErrOrStderr(), wait)
			if err == nil {
				return output.PrintValue(c, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "%s is healthy.\n", strings.ToUpper(name[:1])+name[1:])
					return err
				}, healthReport{Healthy: true})
			}
			if output.JSON() {
				if printed := output.PrintValue(c, nil, healthReport{Reason: err.Error()}); printed != nil {
					return printed
				}
				return &Exit{Status: 1}
			}
			if name == "agent" { // as SPIRE's agent says it, unlike its server
				fmt.Fprintf(c.ErrOrStderr(), "Agent is unhealthy: %v\n", err)
				return &Exit{Status: 1}
			}
			return fmt.Errorf("%s is unhealthy: %w", name, err)
		},
	}
	socket.AddTo(c)
	output.AddTo(c)
	c.Flags().BoolVar(&shallow, "shallow", false, "Ask for less; there is no difference today")
	c.Flags().BoolVar(&verbose, "verbose", false, "Say what is done")
	c.Flags().DurationVar(&wait, "wait", 0, "How long to go on asking one that does not serve yet, as after its start")
	return c
}

// healthReport is what "healthcheck -output json" prints.
type healthReport struct {
	Healthy bool   `json:"healthy"`
	Reason  string `json:"reason,omitempty"`
}

// healthy asks until the daemon serves or the wait is over, once at least.
func healthy(ctx context.Context, name string, socket *Socket, stderr io.Writer, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, wait+healthTime)
	defer cancel()
	path, err := socket.Path()
	if err != nil {
		return err
	}
	done := Patience(stderr, fmt.Sprintf("waiting for %s at %s", socket.Program, path))
	defer done()
	over := time.Now().Add(wait)
	for {
		err := serving(ctx, name, socket)
		if err == nil || !time.Now().Before(over) {
			return err
		}
		timer := time.NewTimer(healthPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
}

func serving(ctx context.Context, name string, socket *Socket) error {
	conn, err := socket.Dial()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return check(ctx, name, conn)
}

func check(ctx context.Context, name string, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, healthTime)
	defer cancel()
	resp, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	switch {
	case status.Code(err) == codes.PermissionDenied:
		return fmt.Errorf("it does not say so to this user, who needs a role with the verb \"server:read\": %w", err)
	case err != nil:
		return err
	case resp.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING && name == "agent":
		return fmt.Errorf("%s returned status %q: it was not admitted by its server yet, or is about to end; its log says why", name, resp.GetStatus())
	case resp.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING:
		return fmt.Errorf("%s returned status %q", name, resp.GetStatus())
	}
	return nil
}
