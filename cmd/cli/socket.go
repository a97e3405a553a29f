package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// Socket is the -socketPath and -instance flags, and the environment that stands in for them. The
// order is: -socketPath, -instance in the template, the environment's path, the default.
type Socket struct {
	// Default is the path if nothing else names one.
	Default string
	// Templates are the environment variables that hold a path with %i for the instance; each without
	// its suffix _TEMPLATE is the variable that holds a plain path. The first that is set counts.
	Templates []string
	// Endpoints are further environment variables that hold a path or a unix:// address.
	Endpoints []string
	// Program is what listens there, as in "assay-server", for complaints.
	Program string

	// Flag names another one; "": socketPath.
	Flag string
	// Quiet: the command says by itself what it waits for.
	Quiet bool

	path, instance string
}

// ServerSocket is the server's private socket, defaulting to the given path.
func ServerSocket(path string) *Socket {
	return &Socket{
		Default:   path,
		Templates: []string{"ASSAY_SERVER_PRIVATE_SOCKET_TEMPLATE", "SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE"},
		Program:   "assay-server",
	}
}

// AgentSocket is the Workload API's socket, defaulting to the given path.
func AgentSocket(path string) *Socket {
	return &Socket{
		Default:   path,
		Templates: []string{"ASSAY_AGENT_PUBLIC_SOCKET_TEMPLATE", "SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE"},
		Endpoints: []string{"SPIFFE_ENDPOINT_SOCKET"},
		Program:   "assay-agent",
	}
}

// AdminSocket is the agent's admin socket, defaulting to the given path.
func AdminSocket(path string) *Socket {
	return &Socket{
		Default:   path,
		Templates: []string{"ASSAY_AGENT_ADMIN_SOCKET_TEMPLATE", "SPIRE_AGENT_ADMIN_SOCKET_TEMPLATE"},
		Program:   "assay-agent",
	}
}

// AddTo adds the flags to a command.
func (s *Socket) AddTo(c *cobra.Command) {
	c.Flags().StringVar(&s.path, "socketPath", "", fmt.Sprintf("Path of the socket of %s (default %q)", s.Program, s.Default))
	c.Flags().StringVar(&s.instance, "instance", "", "Instance name to put in place of %i in the environment's "+s.Templates[0])
}

// Path returns the absolute path of the socket.
func (s *Socket) Path() (string, error) {
	path, err := s.choose()
	if err != nil {
		return "", err
	}
	path = strings.TrimPrefix(strings.TrimPrefix(path, "unix:"), "//")
	full, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("find socket %s: %w", path, err)
	}
	return full, nil
}

func (s *Socket) choose() (string, error) {
	switch {
	case s.path != "":
		return s.path, nil
	case s.instance != "":
		for _, name := range s.Templates {
			if template := os.Getenv(name); template != "" {
				if !strings.Contains(template, "%i") {
					return "", fmt.Errorf("environment variable %s has no %%i for -instance to take the place of", name)
				}
				return strings.ReplaceAll(template, "%i", s.instance), nil
			}
		}
		return "", fmt.Errorf("-instance needs the environment variable %s, a path with %%i in it", s.Templates[0])
	}
	for _, name := range s.Templates {
		if path := os.Getenv(strings.TrimSuffix(name, "_TEMPLATE")); path != "" {
			return path, nil
		}
	}
	for _, name := range s.Endpoints {
		if path := os.Getenv(name); path != "" {
			if scheme, _, ok := strings.Cut(path, ":"); ok && scheme != "unix" {
				return "", fmt.Errorf("environment variable %s is %q, but only unix:// addresses are known here", name, path)
			}
			return path, nil
		}
	}
	return s.Default, nil
}

// Dial connects to the socket. It says in one sentence what is the matter if nobody listens there.
func (s *Socket) Dial() (*grpc.ClientConn, error) {
	path, err := s.Path()
	if err != nil {
		return nil, err
	}
	probe, err := net.DialTimeout("unix", path, 5*time.Second)
	if err != nil {
		return nil, s.unreachable(path, err)
	}
	first := make(chan net.Conn, 1)
	first <- probe
	conn, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case c := <-first:
				return c, nil
			default:
				return new(net.Dialer).DialContext(ctx, "unix", path)
			}
		}))
	if err != nil {
		_ = probe.Close()
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return conn, nil
}

func (s *Socket) unreachable(path string, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no socket at %s: is %s running? If it is, name its socket with -%s", path, s.Program, cmp.Or(s.Flag, "socketPath"))
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nobody listens at %s: is %s running?", path, s.Program)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("no permission to open %s: run this as the user of %s, or as root", path, s.Program)
	}
	return fmt.Errorf("connect to %s: %w", path, errors.Unwrap(err))
}

// With dials, calls do and hangs up. A wait of more than a second is explained on standard error.
func (s *Socket) With(c *cobra.Command, do func(ctx context.Context, conn *grpc.ClientConn) error) error {
	conn, err := s.Dial()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	path, _ := s.Path()
	if !s.Quiet {
		done := Patience(c.ErrOrStderr(), fmt.Sprintf("waiting for %s at %s", s.Program, path))
		defer done()
	}
	err = do(c.Context(), conn)
	if unknownService(err) {
		what := "is not what this command is for"
		if strings.Contains(err.Error(), "unknown service assay.") {
			what = "is SPIRE's, which has no such call, or not what this command is for"
		}
		return fmt.Errorf("%w; what listens at %s %s, whose socket is %s by default: name it with -socketPath", err, path, what, s.Default)
	}
	return err
}

// unknownService says that whoever answered has never heard of what it was asked for.
func unknownService(err error) bool {
	return status.Code(err) == codes.Unimplemented && strings.Contains(err.Error(), "unknown service")
}

// Patience writes what is waited for once a second has passed, unless the returned function was called
// before. That function may be called more than once.
func Patience(w io.Writer, what string) (done func()) {
	var mu sync.Mutex
	stopped := false
	timer := time.AfterFunc(time.Second, func() {
		mu.Lock()
		defer mu.Unlock()
		if !stopped {
			fmt.Fprintln(w, what+" …")
		}
	})
	return func() {
		timer.Stop()
		mu.Lock()
		stopped = true
		mu.Unlock()
	}
}

// StatusText returns the name that the status code of one item in a batch has in the texts scripts
// look for, as in "AlreadyExists".
func StatusText(code int32) string { return codes.Code(uint32(code)).String() } //nolint:gosec // codes are small
