package plugin

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/attestor/external"
)

// process is a running program, with a directory of its own for its sockets.
type process struct {
	pid  int
	dir  *folder
	out  *bufio.Reader // what it prints; the first line is its greeting
	pipe io.Closer

	ended chan struct{} // closed when it has ended and nothing of it is left
	exit  error         // why; to be read after ended
}

// launch runs the image. log takes what it writes to its standard error, line by line, until it has ended.
func launch(cfg *Config, program *image, log func(io.Reader)) (*process, error) {
	dir, err := newFolder(os.TempDir())
	if err != nil {
		return nil, fmt.Errorf("make a directory for its socket: %w", err)
	}
	p := &process{dir: dir, ended: make(chan struct{})}
	cmd := &exec.Cmd{
		Path: program.path(), Args: append([]string{cfg.Path}, cfg.Args...), Env: environment(cfg, dir.path),
		// A group of its own, so that its children end with it; and it ends with us however we end.
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	}
	out, err1 := cmd.StdoutPipe()
	said, err2 := cmd.StderrPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, errors.Join(err, dir.remove())
	}
	started := make(chan error, 1)
	go p.run(cmd, started, func() { log(said) })
	if err := <-started; err != nil {
		return nil, errors.Join(err, dir.remove())
	}
	p.pid, p.out, p.pipe = cmd.Process.Pid, bufio.NewReaderSize(out, maxGreeting), out
	return p, nil
}

// run starts the process on a thread of its own and waits for its end there. The kernel kills the process
// when the thread that started it ends, so nobody else may have the thread; and what is set on the thread,
// that nothing below it can gain rights by running setuid programs, the process inherits. The thread is
// thrown away with the goroutine.
func (p *process) run(cmd *exec.Cmd, started chan<- error, log func()) {
	runtime.LockOSThread()
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		started <- err
		return
	}
	pid := cmd.Process.Pid
	// Keys must not end up in core dumps. It is no reason to fail.
	_ = unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
	started <- nil
	var reading sync.WaitGroup
	reading.Go(log)
	// Its group is killed while its number is still its own: before it is waited for.
	for {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	_ = unix.Kill(-pid, unix.SIGKILL)
	// Whoever left the group may hold the pipe open: its reader gets a moment for the last words, no more.
	last := make(chan struct{})
	go func() { reading.Wait(); close(last) }()
	select {
	case <-last:
	case <-time.After(time.Second):
	}
	p.exit = cmd.Wait() // closes our ends of the pipes
	<-last
	_ = p.dir.remove()
	if p.exit == nil {
		p.exit = errors.New("exit status 0")
	}
	close(p.ended)
}

// kill ends it and all of its group.
func (p *process) kill() {
	select {
	case <-p.ended: // the number may be somebody else's
	default:
		_ = unix.Kill(-p.pid, unix.SIGKILL)
	}
}

// environment is all that a program gets of it: what the protocol needs, and what the operator names.
func environment(cfg *Config, dir string) []string {
	env := []string{
		cfg.Type + "=" + cfg.Type, // the "magic cookie" of SPIRE's plugins
		"PLUGIN_PROTOCOL_VERSIONS=1",
		"PLUGIN_UNIX_SOCKET_DIR=" + dir,
		"TMPDIR=" + dir, // where older ones make their socket
	}
	for _, one := range cfg.Env {
		if strings.Contains(one, "=") {
			env = append(env, one)
		} else if value, ok := os.LookupEnv(one); ok {
			env = append(env, one+"="+value)
		}
	}
	return env
}

// maxGreeting is how long the first line may be, in bytes.
const maxGreeting = 4096

// greeting reads the line in which a program says where it listens, as go-plugin prints it:
// the protocol's version, the version of what is spoken, network, address, and how it is spoken.
func (p *process) greeting(patience time.Duration) (socket string, err error) {
	type read struct {
		line string
		err  error
	}
	got := make(chan read, 1)
	go func() { // ends with the process at the latest
		line, err := p.out.ReadSlice('\n')
		got <- read{string(line), err}
		_, _ = io.Copy(io.Discard, p.out) // the pipe must not fill
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case r := <-got:
		switch {
		case errors.Is(r.err, bufio.ErrBufferFull):
			return "", fmt.Errorf("its first line is longer than %d bytes", maxGreeting)
		case r.err != nil:
			select {
			case <-p.ended:
				return "", fmt.Errorf("it ended before it said where it listens: %w", p.exit)
			case <-timer.C:
				return "", errors.New("it closed its standard output before it said where it listens")
			}
		}
		return parseGreeting(r.line)
	case <-timer.C:
		return "", fmt.Errorf("it has not said within %s where it listens", patience)
	}
}

func parseGreeting(line string) (socket string, err error) {
	parts := strings.Split(strings.TrimSpace(line), "|")
	if len(parts) < 5 {
		return "", fmt.Errorf("it said %q where a plugin says where it listens; is it one?", external.Clip(strings.TrimSpace(line)))
	}
	switch {
	case parts[0] != "1":
		return "", fmt.Errorf("it speaks version %q of the plugin protocol, not 1", external.Clip(parts[0]))
	case parts[1] != "1":
		return "", fmt.Errorf("it is a plugin of version %q, not 1", external.Clip(parts[1]))
	case parts[4] != "grpc":
		return "", fmt.Errorf("it speaks %q, not gRPC", external.Clip(parts[4]))
	case parts[2] != "unix":
		return "", fmt.Errorf("it listens at %s %q; only Unix sockets are spoken to, since anybody may connect to others", external.Clip(parts[2]), external.Clip(parts[3]))
	case len(parts) > 5 && len(parts[5]) > 50:
		return "", errors.New("it demands TLS, which nobody asked for")
	}
	return parts[3], nil
}
