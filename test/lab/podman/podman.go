// Package podman runs a private Podman, root's or a user's own: the real one with a storage, and a service that speaks Docker's API,
// of its own. Images are built FROM scratch around static Go programs, so that nothing is pulled.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package podman

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
)

// patience is how long one thing may take; on a busy small machine it is slow.
const patience = 2 * time.Minute

// Engine is a private Podman. Only one goroutine may start and stop its service.
type Engine struct {
	dir     string
	netns   string
	service *exec.Cmd
	user    *rootless // nil: root's
}

// Config says what is special about a Podman; the zero value is fine.
type Config struct {
	// Netns is the path of a network namespace that all of it runs in; empty is this process's.
	Netns string
	// UID is whose it is; 0 is root's. Any other user gets a name, subordinate users and a cgroup for it.
	UID int
}

// Available says why there can be no private Podman here, or nil.
func Available() error {
	if os.Geteuid() != 0 {
		return errors.New("a private Podman needs root")
	}
	for _, tool := range []string{"podman", "runc"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is not installed (Debian: apt-get install podman runc)", tool)
		}
	}
	return nil
}

// Start starts the service with everything it writes below a new folder in the system's temporary folder
// (sockets must have short paths). Close ends it and removes that folder.
func Start(ctx context.Context, c Config) (*Engine, error) {
	dir, err := os.MkdirTemp("", "podman")
	if err != nil {
		return nil, err
	}
	e := &Engine{dir: dir, netns: c.Netns}
	if c.UID != 0 {
		if e.user, err = newRootless(dir, c.UID); err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
	}
	if err := e.Up(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// Socket is the path of the service's socket.
func (e *Engine) Socket() string { return filepath.Join(e.dir, "podman.sock") }

// Command is podman on the private storage. runc, because crun refuses hosts with both kinds of cgroups.
func (e *Engine) Command(ctx context.Context, args ...string) *exec.Cmd {
	args = append([]string{
		"--root", filepath.Join(e.dir, "root"), "--runroot", filepath.Join(e.dir, "run"), "--tmpdir", filepath.Join(e.dir, "tmp"),
		"--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc",
	}, args...)
	if e.user != nil {
		return e.user.command(ctx, e.dir, e.netns, "podman", args...)
	}
	if e.netns != "" {
		return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + e.netns, "--", "podman"}, args...)...)
	}
	return exec.CommandContext(ctx, "podman", args...)
}

// Do runs a command and returns what it prints.
func (e *Engine) Do(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := e.Command(ctx, args...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("podman %s: %w: %s", strings.Join(args, " "), err, said.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// Up starts the service after Down and waits until it answers. Containers that ran still do.
func (e *Engine) Up(ctx context.Context) error {
	service := e.Command(context.Background(), "system", "service", "--time", "0", "unix://"+e.Socket())
	service.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := service.Start(); err != nil {
		return err
	}
	e.service = service
	c, err := client.New(client.WithHost("unix://" + e.Socket()))
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		_, err := c.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true})
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the service does not answer: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Down ends the service; containers run on.
func (e *Engine) Down() {
	if e.service == nil {
		return
	}
	_ = e.service.Process.Kill()
	_ = e.service.Wait()
	e.service = nil
}

// Close removes every container, ends the service and removes what it wrote.
func (e *Engine) Close() error {
	_, err := e.Do("rm", "--force", "--time", "0", "--all")
	e.Down()
	if e.user != nil {
		err = errors.Join(err, e.user.close())
	}
	// What Podman started to tidy up after its containers may still be at it.
	removed := os.RemoveAll(e.dir)
	for end := time.Now().Add(patience); removed != nil && time.Now().Before(end); removed = os.RemoveAll(e.dir) {
		<-time.After(50 * time.Millisecond)
	}
	return errors.Join(err, removed)
}

// Build makes an image FROM scratch around a program, with a label "app", and returns its ID.
func (e *Engine) Build(program, app string) (string, error) {
	folder, err := os.MkdirTemp(e.dir, "build")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(folder)
	if err := os.Chmod(folder, 0o755); err != nil { // whoever's Podman it is, reads it
		return "", err
	}
	text, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	recipe := fmt.Sprintf("FROM scratch\nCOPY app /app\nLABEL app=%s\nENTRYPOINT [\"/app\"]\n", app)
	for name, content := range map[string][]byte{"Dockerfile": []byte(recipe), "app": text} {
		if err := os.WriteFile(filepath.Join(folder, name), content, 0o755); err != nil {
			return "", err
		}
	}
	id, err := e.Do("build", "--quiet", "--isolation", "chroot", folder)
	return "sha256:" + strings.TrimPrefix(id, "sha256:"), err
}

// Run starts a container and returns its first process. The arguments end with the image and what it is
// given; it has no network unless they say otherwise.
func (e *Engine) Run(args ...string) (int, error) {
	if !slices.Contains(args, "--network") {
		args = append([]string{"--network", "none"}, args...)
	}
	if e.user != nil {
		args = append([]string{"--cgroup-parent", "/" + e.user.cgroup}, args...)
	}
	// Podman raises limits that not every machine lets it raise.
	id, err := e.Do(append([]string{"run", "--detach", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"}, args...)...)
	if err != nil {
		return 0, err
	}
	text, err := e.Do("inspect", id)
	if err != nil {
		return 0, err
	}
	var inspected []struct{ State struct{ Pid int } }
	if err := json.Unmarshal([]byte(text), &inspected); err != nil || len(inspected) != 1 || inspected[0].State.Pid == 0 {
		return 0, fmt.Errorf("inspect %s: %w: %s", id, errors.Join(err, os.ErrProcessDone), text)
	}
	return inspected[0].State.Pid, nil
}
