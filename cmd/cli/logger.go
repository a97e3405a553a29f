package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
)

// LoggerCalls are the calls of a daemon's logger service. The agent's and the server's are two services with the
// same messages under different names.
type LoggerCalls struct {
	Get   func(ctx context.Context, conn *grpc.ClientConn) (*types.Logger, error)
	Set   func(ctx context.Context, conn *grpc.ClientConn, level types.LogLevel) (*types.Logger, error)
	Reset func(ctx context.Context, conn *grpc.ClientConn) (*types.Logger, error)
}

// LoggerCommands are "logger get", "logger set" and "logger reset" of a daemon ("agent" or "server"), each asked at
// a socket of its own that socket makes.
func LoggerCommands(daemon string, socket func() *Socket, calls LoggerCalls) *cobra.Command {
	get := loggerCommand("get", "Shows the level of the log", socket(), "error fetching logger", calls.Get)
	var level string
	set := loggerCommand("set", "Sets the level of the log until the "+daemon+" ends", socket(), "failed to set log level",
		func(ctx context.Context, conn *grpc.ClientConn) (*types.Logger, error) {
			wanted, err := parseLogLevel(level)
			if err != nil {
				return nil, err
			}
			return calls.Set(ctx, conn, wanted)
		})
	set.Flags().StringVar(&level, "level", "", "The level: trace, debug, info, warn, error, fatal or panic")
	set.PreRunE = func(*cobra.Command, []string) error { _, err := parseLogLevel(level); return err } // before anybody is asked
	reset := loggerCommand("reset", "Sets the level of the log to what it was at the start", socket(), "failed to reset logger", calls.Reset)
	return Group("logger", "Reads and sets the level of the "+daemon+"'s log", get, set, reset)
}

// loggerCommand makes a command that asks for the logger and prints it. failure is how SPIRE's command begins when
// the call goes wrong.
func loggerCommand(use, short string, socket *Socket, failure string, call func(context.Context, *grpc.ClientConn) (*types.Logger, error)) *cobra.Command {
	var output Output
	c := &cobra.Command{
		Use: use, Short: short, Args: NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return socket.With(c, func(ctx context.Context, conn *grpc.ClientConn) error {
				l, err := call(ctx, conn)
				if err != nil {
					return fmt.Errorf("%s: %w", failure, err)
				}
				return output.Print(c, func(w io.Writer) error { return printLogger(w, l) }, l)
			})
		},
	}
	socket.AddTo(c)
	output.AddTo(c)
	return c
}

var logLevels = map[logrus.Level]types.LogLevel{
	logrus.PanicLevel: types.LogLevel_PANIC, logrus.FatalLevel: types.LogLevel_FATAL, logrus.ErrorLevel: types.LogLevel_ERROR,
	logrus.WarnLevel: types.LogLevel_WARN, logrus.InfoLevel: types.LogLevel_INFO, logrus.DebugLevel: types.LogLevel_DEBUG,
	logrus.TraceLevel: types.LogLevel_TRACE,
}

// parseLogLevel reads the level that "logger set -level" names.
func parseLogLevel(text string) (types.LogLevel, error) {
	if text == "" {
		return 0, errors.New("a value (-level) must be set")
	}
	level, err := logrus.ParseLevel(text)
	if err != nil {
		return 0, fmt.Errorf("the value %q is not a valid setting; there are trace, debug, info, warn, error, fatal and panic", text)
	}
	return logLevels[level], nil
}

func printLogger(w io.Writer, l *types.Logger) error {
	_, err := fmt.Fprintf(w, "Logger Level : %s\nLaunch Level : %s\n\n", levelName(l.GetCurrentLevel()), levelName(l.GetLaunchLevel()))
	return err
}

func levelName(wanted types.LogLevel) string {
	for level, wire := range logLevels {
		if wire == wanted {
			return level.String()
		}
	}
	return "unknown"
}
