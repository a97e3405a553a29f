// Package site runs the built binaries as an operator would: a server and agents as processes, each
// with a folder, a configuration file and a log of its own. The demo, test/compat and test/robust
// stand on it.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package site

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/assay-id/assay/test/lab/port"
)

// TrustDomain is the trust domain of every site that has no other.
const TrustDomain = "example.org"

// Site is one server with its folder, and what agents need to know to join it.
type Site struct {
	// Dir holds everything that the site writes.
	Dir string
	// Bin is the folder with the built binaries.
	Bin string
	// Port is the server's TCP port, chosen once, so that a server can be restarted where its agents
	// look for it.
	Port int
	// Address is the server's address. Empty: 127.0.0.1.
	Address string
	// Netns is the path of the network namespace that the server runs in. Empty: this process's.
	Netns string
	// Domain is the trust domain. Empty: TrustDomain.
	Domain string
	// LogLevel of the server and its agents. Empty: debug.
	LogLevel string
	// ServerExtra is put inside the server block, ServerBlocks after it.
	ServerExtra, ServerBlocks string
	// DataDir is the server's data folder. Empty: one in Dir.
	DataDir string
	// ServerAs is the user to run the server as. Nil: this process's.
	ServerAs *syscall.Credential
	// SPIRE's programs take the place of ours where they are given.
	SPIRE SPIRE

	server *Process
}

// New makes a site in dir, which must exist, with binaries from bin.
func New(dir, bin string) (*Site, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"assay-server", "assay-agent"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return nil, fmt.Errorf("find the binaries: %w (run make first)", err)
		}
	}
	free, err := port.Free()
	if err != nil {
		return nil, err
	}
	// The demo's workloads run as other users and in containers, and must reach the agent's socket.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	return &Site{Dir: dir, Bin: bin, Port: free}, nil
}

// ServerSocket is the path of the server's private socket.
func (s *Site) ServerSocket() string { return filepath.Join(s.Dir, "server", "private", "api.sock") }

// ServerLog is the path of the server's log.
func (s *Site) ServerLog() string { return filepath.Join(s.Dir, "server.log") }

// ServerData is the server's data folder.
func (s *Site) ServerData() string {
	if s.DataDir != "" {
		return s.DataDir
	}
	return filepath.Join(s.Dir, "server", "data")
}

// ServerConfig is the path of the server's configuration file.
func (s *Site) ServerConfig() string { return filepath.Join(s.Dir, "server.hcl") }

// StartServer writes the configuration, starts the server and waits until it is healthy.
func (s *Site) StartServer(ctx context.Context) error {
	if err := s.LaunchServer(); err != nil {
		return err
	}
	return s.server.WaitFor(ctx, "the server to be healthy", func() error {
		_, err := s.ServerCLI(ctx, "healthcheck")
		return err
	})
}

// LaunchServer writes the configuration, starts the server and does not wait.
func (s *Site) LaunchServer() error {
	path, err := s.WriteServerConfig()
	if err != nil {
		return err
	}
	name, args := within(s.Netns, s.serverProgram(), "run", "-config", path)
	s.server, err = Start(s.ServerLog(), s.ServerAs, name, args...)
	return err
}

// within has a program run in a network namespace, if there is one. The program takes the place of what
// brings it there, so its PID is the one that was started.
func within(netns, name string, args ...string) (string, []string) {
	if netns == "" {
		return name, args
	}
	return "nsenter", append([]string{"--net=" + netns, "--", name}, args...)
}

// FailServer starts a server that is expected to end by itself, and returns what it wrote to standard
// error; the error says that it did not end, or not with an error.
func (s *Site) FailServer(ctx context.Context) (string, error) {
	path, err := s.WriteServerConfig()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(s.Bin, "assay-server"), "run", "-config", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.ServerAs, Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		return stderr.String(), fmt.Errorf("want exit status 1, have %w: %s", err, stderr.String())
	}
	return stderr.String(), nil
}

// WriteServerConfig writes the server's configuration and returns its path.
func (s *Site) WriteServerConfig() (string, error) {
	config := fmt.Sprintf(`server {
  trust_domain = %q
  bind_address = %q
  bind_port    = %d
  socket_path  = %q
  data_dir     = %q
  log_level    = %q
  %s
}
%s
`, s.trustDomain(), s.address(), s.Port, s.ServerSocket(), s.ServerData(), s.logLevel(), s.ServerExtra, s.serverBlocks())
	if s.SPIRE.Server != "" {
		config = s.spireServerConfig()
	}
	path := s.ServerConfig()
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return "", err
	}
	if s.ServerAs != nil {
		return path, os.Chown(path, int(s.ServerAs.Uid), int(s.ServerAs.Gid))
	}
	return path, nil
}

func (s *Site) serverBlocks() string {
	if s.ServerBlocks != "" {
		return s.ServerBlocks
	}
	return `node_attestor "join_token" {}`
}

func (s *Site) trustDomain() string {
	if s.Domain != "" {
		return s.Domain
	}
	return TrustDomain
}

func (s *Site) address() string {
	if s.Address != "" {
		return s.Address
	}
	return "127.0.0.1"
}

func (s *Site) logLevel() string {
	if s.LogLevel != "" {
		return s.LogLevel
	}
	return "debug"
}

// Server is the running server, nil before StartServer.
func (s *Site) Server() *Process { return s.server }

// ServerCLI runs an assay-server command against the server's socket and returns its output.
func (s *Site) ServerCLI(ctx context.Context, args ...string) (string, error) {
	args = append(args, "-socketPath", s.ServerSocket())
	return Run(ctx, nil, s.serverProgram(), args...)
}

// DialServer returns a connection to the server's private socket; the caller closes it.
func (s *Site) DialServer() (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+s.ServerSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// Token makes a join token.
func (s *Site) Token(ctx context.Context, args ...string) (string, error) {
	out, err := s.ServerCLI(ctx, append([]string{"token", "generate"}, args...)...)
	if err != nil {
		return "", err
	}
	fields := strings.Fields(out)
	if len(fields) < 2 || fields[0] != "Token:" {
		return "", fmt.Errorf("read the token: unexpected output %q", out)
	}
	return fields[1], nil
}

// WriteBundle writes the server's bundle as PEM, for agents to start from, and returns its path.
func (s *Site) WriteBundle(ctx context.Context) (string, error) {
	out, err := s.ServerCLI(ctx, "bundle", "show")
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.Dir, "bootstrap.pem")
	return path, os.WriteFile(path, []byte(out), 0o600)
}

// Stop stops what the site started, gently.
func (s *Site) Stop() error {
	if s.server == nil {
		return nil
	}
	return s.server.Stop(15 * time.Second)
}

// Agent is one agent of a site.
type Agent struct {
	*Process
	// Dir is the agent's folder, Socket and Admin are its sockets, Log is its log.
	Dir, Socket, Admin, Log string

	site   *Site
	config string
	env    []string
	netns  string
}

// AgentOptions say how an agent differs from the plain one, which joins with a token and attests
// with unix.
type AgentOptions struct {
	// Blocks replace the attestor blocks. Empty: join_token, and unix with discover_workload_path.
	Blocks string
	// SPIRENode takes the place of a spire-agent's join token, as Blocks do with ours.
	SPIRENode string
	// Docker is the socket of an engine whose containers are attested; Blocks must be empty.
	Docker string
	// Extra is put inside the agent block.
	Extra string
	// Token is the join token.
	Token string
	// Trust replaces the line that says how the server is known at first. Empty: trust_bundle_path
	// with the server's bundle of now.
	Trust string
	// Env is put into the agent's environment.
	Env []string
	// Netns is the path of the network namespace that the agent runs in. Empty: this process's.
	Netns string
	// Socket is the path of the agent's socket. Empty: one in its folder.
	Socket string
}

// NewAgent writes an agent's folder and configuration; Start starts it.
func (s *Site) NewAgent(ctx context.Context, name string, o AgentOptions) (*Agent, error) {
	if o.Trust == "" {
		bundle, err := s.WriteBundle(ctx)
		if err != nil {
			return nil, err
		}
		o.Trust = fmt.Sprintf("trust_bundle_path = %q", bundle)
	}
	dir := filepath.Join(s.Dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	a := &Agent{
		Dir: dir, Socket: filepath.Join(dir, "public", "api.sock"), Admin: filepath.Join(dir, "private", "admin.sock"),
		Log: filepath.Join(s.Dir, name+".log"), site: s, config: filepath.Join(s.Dir, name+".hcl"), env: o.Env, netns: o.Netns,
	}
	if o.Socket != "" {
		a.Socket = o.Socket
	}
	if o.Docker != "" {
		o.Blocks = fmt.Sprintf("node_attestor \"join_token\" {}\nworkload_attestor \"docker\" {\n  docker_socket_path = %q\n}", o.Docker)
	}
	if o.Blocks == "" {
		o.Blocks = "node_attestor \"join_token\" {}\nworkload_attestor \"unix\" {\n  discover_workload_path = true\n}"
	}
	if o.Token != "" {
		o.Extra += fmt.Sprintf("\n  join_token = %q", o.Token)
	}
	config := fmt.Sprintf(`agent {
  trust_domain      = %q
  server_address    = %q
  server_port       = %d
  socket_path       = %q
  admin_socket_path = %q
  data_dir          = %q
  %s
  log_level         = %q
  %s
}
%s
`, s.trustDomain(), s.address(), s.Port, a.Socket, a.Admin, filepath.Join(dir, "data"), o.Trust, s.logLevel(), o.Extra, o.Blocks)
	if s.SPIRE.Agent != "" {
		config = s.spireAgentConfig(a, o)
	}
	return a, os.WriteFile(a.config, []byte(config), 0o600)
}

// Start starts the agent and waits until it is healthy.
func (a *Agent) Start(ctx context.Context) error {
	if err := a.Launch(); err != nil {
		return err
	}
	return a.Healthy(ctx)
}

// Healthy waits until the agent has something to serve.
func (a *Agent) Healthy(ctx context.Context) error {
	return a.WaitFor(ctx, "the agent to be healthy", func() error {
		_, err := a.CLI(ctx, "healthcheck", "-socketPath", a.Socket)
		return err
	})
}

// Launch starts the agent and does not wait.
func (a *Agent) Launch() error {
	var err error
	name, args := within(a.netns, a.site.agentProgram(), "run", "-config", a.config)
	a.Process, err = start(a.Log, nil, a.env, name, args...)
	return err
}

// Data is the agent's data folder.
func (a *Agent) Data() string { return filepath.Join(a.Dir, "data") }

// CLI runs an assay-agent command and returns its output.
func (a *Agent) CLI(ctx context.Context, args ...string) (string, error) {
	return Run(ctx, nil, a.site.agentProgram(), args...)
}

// Run runs a command to its end and returns its standard output; the error carries what it wrote to
// standard error. as, if not nil, is the user to run as.
func Run(ctx context.Context, as *syscall.Credential, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(stderr.String() + "\n" + stdout.String())
		return stdout.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, text)
	}
	return stdout.String(), nil
}

// Process is a started program.
type Process struct {
	cmd  *exec.Cmd
	name string
	log  string
	done chan struct{}
	err  error // of Wait; valid after done is closed
	once sync.Once
}

// Start starts a program whose output is appended to the log file. as, if not nil, is the user to
// run as. A program started so dies with its parent.
func Start(log string, as *syscall.Credential, name string, args ...string) (*Process, error) {
	return start(log, as, nil, name, args...)
}

func start(log string, as *syscall.Credential, env []string, name string, args ...string) (*Process, error) {
	file, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return StartTo(file, log, as, env, name, args...)
}

// StartTo is Start with the standard output going to out, extra environment variables, and log
// named in errors; standard error goes where out goes if that is a file.
func StartTo(out io.Writer, log string, as *syscall.Credential, env []string, name string, args ...string) (*Process, error) {
	cmd := exec.Command(name, args...)
	cmd.Stdout = out
	if file, ok := out.(*os.File); ok {
		cmd.Stderr = file
	} else {
		cmd.Stderr = os.Stderr
	}
	if len(env) > 0 {
		cmd.Env = append(os.Environ(), env...)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: as}
	p := &Process{cmd: cmd, name: filepath.Base(name), log: log, done: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID is the process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill ends the process as kill -9 does and waits for its end.
func (p *Process) Kill() {
	p.once.Do(func() { _ = p.cmd.Process.Kill() })
	<-p.done
}

// Stop sends SIGTERM and waits; after the given time it kills and says so.
func (p *Process) Stop(patience time.Duration) error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		if p.err != nil {
			return fmt.Errorf("stop %s: %w, its log is %s", p.name, p.err, p.log)
		}
		return nil
	case <-time.After(patience):
		p.Kill()
		return fmt.Errorf("stop %s: still there %v after SIGTERM", p.name, patience)
	}
}

// WaitFor asks until ready returns nil, the process ends, or ctx does.
func (p *Process) WaitFor(ctx context.Context, what string, ready func() error) error {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("wait for %s: %w: %s", what, p.end(), Tail(p.log, 10))
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: last %w: %s", what, context.Cause(ctx), err, Tail(p.log, 10))
		case <-ticker.C:
		}
	}
}

// end says how the process ended; valid after done is closed.
func (p *Process) end() error {
	if p.err != nil {
		return fmt.Errorf("%s ended: %w", p.name, p.err)
	}
	return fmt.Errorf("%s ended", p.name)
}

// Tail returns the last lines of a file, for an error message.
func Tail(path string, lines int) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// ErrNoTool says that a program the caller wanted is not installed.
var ErrNoTool = errors.New("not installed")

// Tool finds a program on PATH or in the sbin folders.
func Tool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("find %s: %w", name, ErrNoTool)
}
